"""What tests of models share: random bodies of a few thousand weights, tokenizers built on the spot, examples of the toy world.

Everything is made from a seed, in memory, without a network.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rayward import dataflow, labels
from rayward.batching import BatchSettings
from rayward.dataflow import Recipe
from rayward.fitting import FitSettings
from rayward.labels import LABELERS
from rayward.policies import ToyPolicy
from rayward.records import Example, Message, Rejected, Rollout, examples_table
from rayward.rendering import Group, Groups, Renderer, RenderSettings, write_groups
from rayward.reward_model import ModelSettings
from rayward.sampling import SampleSettings, sample, sample_problems, toy_problem
from rayward.storage import Dataset, Manifest, open_dataset, part_of, schema_of, whole_digest, write_part
from rayward.toy_world import ToyWorld
from rayward.training import TrainSettings

# ------------------------------------------------------------------------------------------------------------------ bodies

VOCABULARY = 96  # tokens that random bodies know
WORDS = 420  # tokens of byte_tokenizer

_MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_USUAL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_MARKS,
}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
BODIES: dict[str, dict[str, Any]] = {
    "qwen3": {**_GROUPED, "head_dim": 8},
    "qwen2": _GROUPED,
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": None},
    "gemma2": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt_neox": _USUAL,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 128,
        **_MARKS,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_MARKS},
    "bert": _USUAL,
    "roberta": {**_USUAL, "max_position_embeddings": 160},
    "deberta-v2": {**_USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "modernbert": {**_USUAL, "local_attention": 16, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
}
DECODERS = ["qwen3", "qwen2", "llama", "mistral", "gemma2", "gpt_neox", "gpt2"]
ENCODERS = ["bert", "roberta", "deberta-v2", "modernbert"]


def classifier(kind: str, seed: int = 0, vocabulary: int = VOCABULARY, **changes: Any) -> nn.Module:
    """A random sequence classifier with one output and no dropout, with weights large enough that every token tells."""
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **{**BODIES[kind], **changes})
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                nn.init.normal_(weight, std=0.25)
            elif name.endswith("bias"):
                nn.init.normal_(weight, std=0.1)
    return model.eval()


def random_group(rng: np.random.Generator, prompt: int, answers: Sequence[int], places: Sequence[int] = ()) -> Group:
    """Random tokens; answers of the given lengths, with as many places each as `places` says (default: one, at the end)."""
    lengths = np.array([prompt, *answers], np.int32)
    ends = np.cumsum(lengths)
    at: list[int] = []
    for n, length in enumerate(answers):
        inner = rng.choice(length - 1, (places[n] if places else 1) - 1, replace=False) if length > 1 else []
        at += [*sorted(int(ends[n] + i) for i in inner), int(ends[n + 1]) - 1]
    tokens = rng.integers(3, VOCABULARY, int(lengths.sum())).astype(np.int32)
    return Group(tokens, lengths, np.array(at, np.int32), rng.random(len(at)).astype(np.float32), float(rng.uniform(0.5, 2)))


def sequences(group: Group) -> list[torch.Tensor]:
    """The prompt with every answer, as transformers takes one sequence."""
    prompt, *answers = np.split(group.token_T, np.cumsum(group.length_A)[:-1])
    return [torch.tensor(np.concatenate([prompt, a]), dtype=torch.int64).unsqueeze(0) for a in answers]


@torch.no_grad()
def plain_scores(model: nn.Module, group: Group, pooling: str = "last") -> list[float]:
    """The scores of a group's places, every answer a sequence of its own without padding, in plain transformers and torch."""
    head = getattr(model, "score", None) or model.classifier
    ends = np.cumsum(group.length_A)
    scores = []
    for place in group.place_K:
        answer = int(np.searchsorted(ends, place, side="right")) - 1
        ids = sequences(group)[answer]
        if pooling == "own":
            scores.append(model(input_ids=ids).logits.item())
            continue
        hidden_TD = model.base_model(input_ids=ids).last_hidden_state[0]
        at = int(place - ends[answer] + group.length_A[0])
        pooled_D = {"last": hidden_TD[at], "first": hidden_TD[0], "mean": hidden_TD.mean(0)}[pooling]
        scores.append(head(pooled_D).item())
    return scores


# -------------------------------------------------------------------------------------------------------------- tokenizers

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "What is 12 plus 30? First we add the tens: 10 + 30 = 40.\n\nThen the ones: 2.\n\nSo the answer is 42.\n\n",
    "The quick brown fox jumps over the lazy dog!\nIs it so? Yes, it is so.\n\n  Indented lines, too.\n",
    "user assistant system Human: Assistant: System:\n\n",
]


_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _marks(tokenizer: Tokenizer, single: str) -> Any:
    """What a tokenizer puts around a text by itself."""
    named = [(word, tokenizer.token_to_id(word)) for word in single.split() if word != "$A"]
    return processors.TemplateProcessing(single=single, special_tokens=named)


def byte_tokenizer(chat_template: str | None = CHATML, **tokens: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here, cut as Qwen's, that puts BOS before a text by itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.post_processor = _marks(tokenizer, "<s> $A")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|pad|>", **tokens},
    )


def language_model(folder: Path, kind: str = "qwen3", tied: bool = False, **changes: Any) -> Any:
    """A random causal language model with byte_tokenizer, as it comes from the hub."""
    usual = BODIES["llama" if kind == "phi" else kind]
    longer = {"n_positions" if kind == "gpt2" else "max_position_embeddings": 512}
    config = AutoConfig.for_model(kind, vocab_size=WORDS, **{**usual, **longer, "tie_word_embeddings": tied, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.25)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer trained here, with CLS and SEP around a text, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = _marks(tokenizer, "[CLS] $A [SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# ---------------------------------------------------------------------------------------------------------- toy examples


def question(text: str = "What is 12 plus 30?") -> tuple[Message, ...]:
    return (Message("user", text),)


def example(*answers: str | tuple[str, ...], prompt: tuple[Message, ...] | None = None, **changes: Any) -> Example:
    """An example of these answers; the first is the best."""
    cut = tuple((a,) if isinstance(a, str) else a for a in answers)
    places = sum(map(len, cut))
    usual = {"id": "e", "targets": tuple(float(places - n) for n in range(places)), "counts": (1,) * places}
    return Example(prompt=prompt or question(), answers=cut, **{**usual, **changes})


def toy_rollouts(problems: int, seed: int = 0, answers: int = 8, **more: int) -> list[list[Rollout]]:
    """Rollouts of toy problems, prompt by prompt."""
    world = ToyWorld()
    asked = [toy_problem(n, world, seed) for n in range(problems)]
    return sample_problems(asked, ToyPolicy(world), SampleSettings(answers=answers, seed=seed, **more)).rollouts


def toy_examples(kind: str, problems: int, seed: int = 0, answers: int = 8) -> list[Example]:
    """Examples of one kind of label."""
    more = {"answers": 1, "continued": 1, "continuations": 8} if kind == "steps" else {"answers": answers}
    chosen = labels.PairSettings("adjacent") if kind == "pairs" else LABELERS[kind].settings()
    made = [e for rollouts in toy_rollouts(problems, seed, **more) for e in LABELERS[kind].label(rollouts, chosen)]
    return [e for e in made if isinstance(e, Example)]


FIT = FitSettings(  # what tests fit: a decoder of width 32 on examples of the toy world, a fifth of the prompts held out
    examples="",
    model="tiny",
    objective="auto",
    net=ModelSettings(width=32),
    render=RenderSettings(max_length=128),
    batch=BatchSettings(size=8),
    train=TrainSettings(),
    validation_share=0.2,
)


def toy_dataset(kind: str, folder: Path, problems: int, seed: int = 0) -> Dataset:
    """The same on disk, as the pipelines leave it."""
    whole = SampleSettings(answers=1, continued=1, seed=seed) if kind == "steps" else SampleSettings(seed=seed)
    labeler = LABELERS[kind]
    chosen = labels.PairSettings("adjacent") if kind == "pairs" else labeler.settings()
    with contextlib.redirect_stderr(io.StringIO()):
        rollouts = sample(Recipe("sample_rollouts", str(folder / "rollouts"), whole, [], "local"), f"toy:{problems}:{seed}", whole)
        recipe = Recipe(f"label_{kind}", str(folder / kind), chosen, [rollouts.lineage()], "local")
        return dataflow.label(recipe, rollouts, labeler, chosen)


def dataset_of(examples: Sequence[Example], folder: Path, made_by: str = "by hand") -> Dataset:
    """Examples on disk, in one part."""
    return on_disk("examples", examples_table(examples), folder, made_by=made_by)


def on_disk(kind: str, table: pa.Table, folder: Path, parts: int = 1, made_by: str = "by hand") -> Dataset:
    """Examples or rollouts on disk."""
    which = part_of(table["prompt_id"], parts)
    leaves: dict[str, str] = {}
    for part in range(parts):
        leaves |= write_part(folder, part, parts, table.filter(pa.array(which == part)), schema_of(kind))
    n = table.num_rows
    manifest = Manifest(kind, made_by, n, n, {}, n, whole_digest(leaves), {}, "0")
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return open_dataset(folder, kind)


def rendered(tokenizer: Any, examples: Iterable[Example], settings: RenderSettings | None = None) -> list[Group]:
    """Examples as groups, none of them rejected."""
    made = list(Renderer(tokenizer, settings or RenderSettings()).render(examples))
    assert not [m for m in made if isinstance(m, Rejected)]
    return [m for m in made if isinstance(m, Group)]


def groups_on_disk(tokenizer: Any, examples: Iterable[Example], folder: Path) -> Groups:
    """Examples as memory-mapped groups, none of them rejected."""
    assert write_groups(folder, [examples_table(examples)], Renderer(tokenizer, RenderSettings())) == []
    return Groups(folder)
