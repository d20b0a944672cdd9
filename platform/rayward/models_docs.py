"""docs/models.md, made from the code: `python -m rayward.models_docs` writes it again.

What heads, poolings and the layouts of other projects are is drawn in the stories of their modules; the tables here are those.

>>> drawn(pooling)[0]
['last', 'D', 'the token at the place: one score per step or answer; for bodies whose tokens see nothing that comes after them']
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from rayward import foreign, heads, pooling
from rayward.reward_model import overall

# Bodies that tests try at a few thousand random weights: AutoConfig's name -> what becomes of a prompt with several answers
BODIES: dict[str, str] = {
    "qwen3": "shared",
    "qwen2": "shared",
    "llama": "shared",
    "mistral": "shared",
    "gemma2": "shared",
    "gemma3_text": "shared",
    "phi3": "shared",
    "gpt_neox": "shared",
    "gpt2": "shared",
    "opt": "shared",
    "mixtral": "shared",
    "qwen3_moe": "shared",
    "gpt_oss": "shared",
    "bloom": "separate",
    "jamba": "separate",
    "qwen3_next": "separate",
    "bert": "looks ahead",
    "roberta": "looks ahead",
    "deberta-v2": "looks ahead",
    "modernbert": "looks ahead",
}

_SAYS = {
    "shared": "causal; the prompt is encoded once for all of its answers",
    "separate": "causal; every answer is a sequence of its own with the prompt in front (recurrent mixers, distances counted in the row)",
    "looks ahead": "an encoder; every answer is a sequence of its own, and has one score",
}

_HEAD = """# Models

Made from the code by `python -m rayward.models_docs`; do not edit.

A reward model is a body, a pooling that says which of its hidden states are read, and a head that turns them into a score. Any class
that transformers' `AutoModelForSequenceClassification` knows is a body; settings are those of `--set net.NAME=VALUE`. What is saved is a
plain Hugging Face folder; where the head has one layer and the pooling is the class's own, plain transformers gives the same scores.
"""

_WEIGHTS = """Of `attributes`, `net.attribute_weights='{"helpful": 2, "verbose": -0.5}'` says what each weighs in the score; they are
divided by their sum, which must be above 0. A negative weight takes off what goes with an attribute, e.g. length.
"""

_MEMBERS = """## Several heads

`net.members=5` with `net.new_head=true` puts five heads of one kind on one body: an ensemble for the price of one pass. Each begins with
weights of its own (with `net.head_layers=2` a hidden layer of its own too) and is trained by its own loss; the model's loss is the mean
of theirs, its score the mean of their scores, and that is what is validated, calibrated, evaluated and registered. `train.bootstrap=true`
gives each head its own draw of the examples, as often as a draw with replacement would have them. Any objective that reads scores trains
them, attributes and steps too.

They differ far less than models of several seeds, since the body is one, and less still without the bootstrap
([results.md](results.md)). What they differ by is in `select_uncertain` (one such model is enough), as `member_scores` in what
`score_rollouts` and the registered model give, and with `score_rollouts --caution c` c standard deviations are taken off the score.
Comparisons leave every head free to add a number of its own to all answers of a prompt: differences of scores within a prompt are what
they mean, and where deviations of single scores are used, `--regularise '{"centre": 0.01}'` holds those numbers near 0.

All heads lie in the class's own, one after the other: plain transformers gives one logit per head (`score 1`, `score 2`, ...), and the
score is their mean; heads of two layers it does not read, as any such. A class whose own head has several layers (RoBERTa) has all but
the last in common. Several heads are not for `head=verdict`, `net.head_tokens`, `net.overall`, `net.verbosity` and `net.take_off`, which
is said.
"""

_OVERALL = """`net.overall` says how attributes become one score:

| `net.overall` | score | |
|---|---|---|
{rows}

r_a is the output of an attribute. `linear` and `gate` learn from targets without a name, comparisons or an overall rating, and so
in a stage of their own, after the attributes:

    rayward run train_reward_model --examples store/ratings --output store/rated --set net.head=attributes --set net.new_head=true ...
    rayward run train_reward_model --examples store/pairs --output store/gated --model store/rated/model \\
      --set net.overall=gate --set train.freeze_layers=-1 --objective-settings '{{"temperature": 0.1}}'

`train.freeze_layers=-1` trains these weights alone: body and attributes stay as they are, and an attribute's own scores with them.
Without it the comparisons train everything, and what an attribute says drifts from what it was rated as. Ratings on a small scale give
small gaps, and weights that add up to 1 cannot widen them: the objective's `temperature` divides gaps instead (ArmoRM has a scale for
it). A gate is for decoders; plain transformers reads the attributes of such a model, and not its one score.

`net.verbosity=tokens`, or the name of an attribute, takes off every attribute as much of it as leaves no rank correlation (Spearman's is 0;
ArmoRM, section 3.2), measured at the end of that stage on the answers held out (without any: trained on) and printed. It stays with the
model for later stages, as part of the one score; an attribute's own output is still its rating. What follows verbosity
in no way, or against it, loses nothing. A score without verbosity is no better one where longer answers are better.
`--set net.take_off='{{"tokens": 0.01}}'` says by hand how much is taken off every attribute for a token (or for a point of the attribute
that is named, itself too), and `'{{"tokens": {{"helpful": 0.01}}}}'` off which. It is in the score from the first step on, so fresh weights
of `linear` and `gate` learn with it.
"""

_VERIFIERS = """## Generative verifiers

    --set 'render.judge=Is it correct? Reply Yes or No.' --set 'net.head_tokens=Yes No' --set net.head=verdict --set net.new_head=true

A question follows every answer, and what is read is the token that a reply would begin with. `render.judge` is a turn of the user's after
the answer; with `{answer}` in it, and `{prompt}`, it is all that the model is shown. Use that where a chat template drops the thoughts
of earlier turns (such examples are rejected, with that word), or where a judge's prompt is given. `render.judge_reply` is how
the reply begins before its verdict. Nothing of the question is ever cut off. It comes into the config, so that scoring, pyfunc and
HTTP ask the same.

The score is the logit of the first token minus that of the second: what `AutoModelForCausalLM` says there, trained further. Three ways:

| | trained | what is left |
|---|---|---|
| `head=two_class`, `binary_cross_entropy` | two rows, begun as those of the tokens | a classifier |
| `head=verdict`, `binary_cross_entropy` | the output layer itself, softmax over the two tokens | both that and a language model |
| `head=verdict`, `next_token` | the same, softmax over all tokens | the same, and it replies with a verdict when it is sampled |

What `verdict` leaves loads with `AutoModelForCausalLM` as it stands; where a server goes by the name of the class, say which, e.g. vLLM's
`--hf-overrides '{"architectures": ["Qwen3ForCausalLM"]}'`. As every objective works on scores, so does `bradley_terry` on a
verifier's. Where input and output share one embedding, `verdict` reads that, and `train.shard` and `freeze_layers=-1` are not for it.
`net.language=true` keeps the output layer beside any other head, for `--regularise '{"language": 0.5}'`.
"""

_BODIES = """## Bodies

What a body can do is found out by asking it: a prompt with two answers, in one row and in two. It shares prompts if

* a token does not change with what comes after it,
* it takes a mask of four dimensions and positions, and then says in one row what it says in two,
* no text can outgrow its attention window, if it has one (`render.max_length` at most the window),
* the pooling is `last`.

Otherwise the fit says so in one line, and every answer is a sequence of its own. The scores are the same; only the time is not. Attention
over segments, without masks, is used where a body with it says what it says with a mask, by the kernel that is right on the device at
hand (`net.attention`, [training.md](training.md)); soft caps, sinks and bodies with an attention of their own keep masks. Of a last layer
only what other tokens need is computed for tokens that are not read. Experts are chosen token by token, so that rows change nothing for
them; `--regularise '{"balance": 0.01}'` keeps them in balance ([objectives.md](objectives.md)).

A body without a sequence classifier in transformers (Mamba) is refused with a word.
"""

_FOREIGN = """## Checkpoints of other projects

`--model FOLDER` or a name on the hub. The head is found by the names of its weights and comes as it is; where it has two outputs, say
`--set net.head=two_class`. It is saved under the name that its class has for it, so that it is found again here; a bias or a second layer
is still nothing that plain transformers would read.

The mean and deviation that OpenRLHF writes into a config are not applied: they would divide the log-odds that a difference of scores was
trained to be. What is saved again does not have them, as they would be those of an earlier head.
"""


def page() -> str:
    """The whole document."""
    lines = [_HEAD, "## Heads", "", "`--set net.head=KIND`. A new head starts at Normal(0, 1/sqrt(d+1)) and works in float32.", ""]
    lines += ["| `net.head` | outputs | names | score | tokens to start from |", "|---|---|---|---|---|"]
    for name, outputs, *said in drawn(heads)[2:]:
        starts = " or ".join(map(str, heads.KINDS[name].tokens))
        lines.append(f"| `{name}` | {outputs} | {' | '.join(said)} | {starts} |")
    lines += ["", '`net.head_layers=2` puts a hidden layer with a ReLU before the outputs. `net.head_tokens="+ -"` starts a new head from']
    lines += [
        "the language model's rows of these tokens, right first; a scalar head of one token starts as that token's logit (Cobbe et al.,"
    ]
    lines += ["arXiv 2110.14168: their gain is the length of the row, and their bias is the same for every answer).", ""]
    ways = "\n".join(f"| `{name}` | {score} | {said} |" for name, score, said in drawn(overall))
    lines += [_WEIGHTS, _OVERALL.format(rows=ways), _MEMBERS, "## Poolings", ""]
    lines += ["| `net.pooling` | numbers | reads |", "|---|---|---|", *(f"| `{n}` | {d} | {said} |" for n, d, said in drawn(pooling)), ""]
    lines += ["D is the hidden size. `auto` is `last` for a causal body and `own` for an encoder. All but `last` read the whole sequence,"]
    lines += ["prompt and answer, give one score per answer, and share no prompts; `mean_max` needs a head of twice the width:"]
    lines += ["`net.new_head=true`.", "", _VERIFIERS, _BODIES, "| body | |", "|---|---|"]
    lines += [f"| {', '.join(f'`{b}`' for b, does in BODIES.items() if does == kind)} | {said} |" for kind, said in _SAYS.items()]
    lines += ["", _FOREIGN, "| weights of the head | written by |", "|---|---|"]
    lines += [f"| {', '.join(f'`{w}`' for w in names.split(', '))} | {by} |" for names, by in drawn(foreign)]
    lines += ["", "| refused | because | way out |", "|---|---|---|"]
    lines += [f"| `{file}` | {why} | {way_out} |" for file, (why, way_out) in foreign.REFUSED.items()]
    return "\n".join(lines) + "\n"


def drawn(module: ModuleType) -> list[list[str]]:
    """The cells of the table that is drawn in a module's story: indented lines, cells two spaces apart."""
    rows = [line for line in (module.__doc__ or "").splitlines() if re.match(r"    \S", line)]
    return [re.split(r"\s{2,}", row.strip()) for row in rows]


if __name__ == "__main__":
    (Path(__file__).parents[2] / "docs" / "models.md").write_text(page(), encoding="utf-8")
