"""Several attributes as one score: weights equal their formulas, are the same packed and reloaded, and learn alone.

The references are plain transformers on one unpadded sequence, loops, and ranks counted by hand.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rayward.batching import BatchSettings, collate
from rayward.errors import ModelError, SettingsError
from rayward.fitting import FitSettings, fit, prepare
from rayward.objectives import make_objective
from rayward.records import Example
from rayward.rendering import Group, RenderSettings
from rayward.reward_model import (
    OVERALL,
    ModelSettings,
    RewardModel,
    forget_verbosity,
    load_model,
    read_notes,
    save_model,
    score_groups,
)
from rayward.reward_model.overall import without
from rayward.scoring import Scorer
from rayward.training import TrainSettings
from tiny import byte_tokenizer, classifier, dataset_of, example, question, random_group, sequences

torch.set_num_threads(1)
NAMES = ("helpful", "short", "true")
WAYS = ["mean", "linear", "gate"]
LESS = {"nothing": (), "tokens": (0.1, -0.2, 0.05), "short": (0.5, 1.0, 0.25)}  # verbosity -> how much is taken off


def rated(folder: Path, body: str = "qwen3", **changes: Any) -> Path:
    """A model that gives three ratings, saved."""
    model = classifier(body, vocabulary=420)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(3)
    loaded = load_model(str(folder / "base"), ModelSettings(head="attributes", new_head=True, **changes), attributes=NAMES)
    save_model(loaded.model, loaded.tokenizer, folder / "rated", {})
    return folder / "rated"


def combined(folder: Path, way: str, less: str, body: str = "qwen3") -> RewardModel:
    """The same with one score of them, by weights that are not as they began."""
    loaded = load_model(str(rated(folder, body)), ModelSettings(overall=way))  # type: ignore[arg-type]
    reading = loaded.model.reading
    if less != "nothing":
        loaded.model.reading = replace(reading, verbosity=less, taken_off=LESS[less])
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in getattr(loaded.model.classifier, OVERALL).parameters() if way != "mean" else ():
            weight.copy_(torch.randn_like(weight))
    save_model(loaded.model, loaded.tokenizer, folder / "saved", {})
    return loaded.model.eval()


@torch.no_grad()
def by_hand(model: RewardModel, group: Group) -> list[float]:
    """The scores of a group, answer by answer, from the formula."""
    reading, body = model.reading, model.classifier.base_model
    prompt_D = body(input_ids=torch.tensor(group.token_T[: group.length_A[0]])[None].long()).last_hidden_state[0, -1]
    scores = []
    for ids in sequences(group):
        rating_A = [float(r) for r in model.head(body(input_ids=ids).last_hidden_state[0, -1])]
        if reading.taken_off:
            verbosity = ids.shape[1] - int(group.length_A[0]) if reading.verbosity == "tokens" else rating_A[NAMES.index(reading.verbosity)]
            rating_A = [r - much * verbosity for r, much in zip(rating_A, reading.taken_off, strict=True)]
        weight_A, add = [1 / 3] * 3, 0.0
        if reading.overall == "linear":
            layer = model.classifier.overall
            weight_A, add = layer.weight[0].tolist(), float(layer.bias)
        if reading.overall == "gate":
            first, _, last = model.classifier.overall
            hidden_D = (first.weight @ prompt_D + first.bias).clamp(min=0)
            weight_A = (last.weight @ hidden_D + last.bias).softmax(0).tolist()
            assert sum(weight_A) == pytest.approx(1)
            assert min(weight_A) >= 0
        scores.append(sum(w * r for w, r in zip(weight_A, rating_A, strict=True)) + add)
    return scores


GROUPS = [
    random_group(np.random.default_rng(n), prompt, answers) for n, (prompt, answers) in enumerate([(5, [6, 9]), (12, [4]), (3, [20, 2])])
]


@pytest.mark.parametrize("less", list(LESS))
@pytest.mark.parametrize("way", WAYS)
def test_the_score_is_its_formula_packed_separate_and_reloaded(way: str, less: str, tmp_path: Path) -> None:
    model = combined(tmp_path, way, less)
    scores = score_groups(model, GROUPS, BatchSettings())
    for group, score in zip(GROUPS, scores, strict=True):
        np.testing.assert_allclose(score, by_hand(model, group), rtol=2e-4, atol=2e-5)
    again = load_model(str(tmp_path / "saved"), ModelSettings()).model.eval()
    assert again.reading == model.reading
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.shares_prefix = False
    separate = score_groups(model, GROUPS, BatchSettings())
    np.testing.assert_allclose(np.concatenate(separate), np.concatenate(scores), rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(np.concatenate(score_groups(again, GROUPS, BatchSettings())), np.concatenate(scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_ratings_stay_what_they_were(way: str, tmp_path: Path) -> None:
    model, plain = combined(tmp_path, way, "short"), load_model(str(tmp_path / "rated"), ModelSettings()).model
    batch = collate([GROUPS], shared=True)
    with torch.no_grad():
        output_GKC, before_GKC = model.outputs(batch), plain.outputs(batch)
    torch.testing.assert_close(output_GKC[..., :3], before_GKC, rtol=1e-6, atol=1e-6)
    column_GK = torch.full_like(batch.column_GK, 2)
    assert torch.equal(model.reading.pick(output_GKC, column_GK), output_GKC[..., 2])


@pytest.mark.parametrize("way", ["linear", "gate"])
def test_fresh_weights_begin_as_the_plain_mean(way: str, tmp_path: Path) -> None:
    path = str(rated(tmp_path))
    fresh, plain = (load_model(path, ModelSettings(overall=o)).model for o in (way, "mean"))  # type: ignore[arg-type]
    one, two = (np.concatenate(score_groups(m, GROUPS, BatchSettings())) for m in (fresh, plain))
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_an_encoder_has_learned_weights_and_no_gate(tmp_path: Path) -> None:
    model = combined(tmp_path, "linear", "tokens", "bert")
    again = load_model(str(tmp_path / "saved"), ModelSettings()).model
    one, two = (np.concatenate(score_groups(m, GROUPS, BatchSettings())) for m in (model, again))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="overall=gate weighs attributes by the prompt alone"):
        load_model(str(tmp_path / "rated"), ModelSettings(overall="gate"))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"overall": "gate", "attribute_weights": '{"true": 1}'}, "learns the weights that attribute_weights fixes"),
        ({"verbosity": "wordy"}, r"verbosity=wordy is no attribute \(helpful, short, true\)(.|\n)*or tokens"),
        ({"overall": "linear", "verbosity": "tokens"}, "say net.verbosity in the stage that learns the attributes"),
        ({"overall": "gate", "head": "scalar", "new_head": True}, "is about attributes, and the head is of kind scalar"),
        ({"verbosity": "tokens", "head": "two_class", "new_head": True}, "is about attributes, and the head is of kind two_class"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=word):
        load_model(str(rated(tmp_path)), ModelSettings(**changes))


def test_a_model_that_lost_its_weights_is_an_error(tmp_path: Path) -> None:
    combined(tmp_path, "gate", "nothing")
    config = json.loads((tmp_path / "rated" / "config.json").read_text(encoding="utf-8"))
    config["rayward"]["head"]["overall"] = "gate"
    (tmp_path / "rated" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="lacks the weights of its overall=gate"):
        load_model(str(tmp_path / "rated"), ModelSettings())
    assert load_model(str(tmp_path / "saved"), ModelSettings(overall="mean")).model.reading.overall == "mean"


# --------------------------------------------------------------------------------------------------------------- verbosity


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ranks counted by hand."""
    ranks = [np.array([(np.sum(x < v) + np.sum(x <= v) + 1) / 2 for v in x]) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(r) for r in ranks) else 0.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), slope=st.floats(-2, 5), scale=st.sampled_from([1e-3, 1.0, 300.0]), whole=st.booleans())
def test_as_little_is_taken_off_as_leaves_no_rank_correlation(seed: int, slope: float, scale: float, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    verbosity = scale * (rng.integers(1, 30, 60) if whole else rng.normal(size=60))
    rating = slope * verbosity / scale + rng.normal(size=60) * (10 if whole else 1)
    share = without(rating, verbosity)
    if spearman(rating, verbosity) <= 0:
        assert share == 0
        return
    assert share > 0
    assert spearman(rating - share * verbosity, verbosity) <= 1e-9
    assert spearman(rating - share * (1 - 1e-9) * verbosity, verbosity) > -1e-9  # the one before was above
    assert spearman(rating - share * verbosity, verbosity) > -0.05  # one exchange of neighbours


def test_what_does_not_vary_loses_nothing() -> None:
    assert without([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == without([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0
    assert without([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx(1.0)


@pytest.mark.parametrize("verbosity", ["tokens", "short"])
def test_no_attribute_of_a_score_follows_verbosity(verbosity: str, tmp_path: Path) -> None:
    model = load_model(str(rated(tmp_path)), ModelSettings()).model
    groups = [random_group(np.random.default_rng(n), 4, [2 + n % 17, 2 + n % 11]) for n in range(60)]
    batch = collate([groups], shared=True)
    with torch.no_grad():
        model.head.weight[1] += model.head.weight[0]  # so that one follows the other
    much = forget_verbosity(model, groups, verbosity, BatchSettings())
    with torch.no_grad():
        rating_NA = model.outputs(batch)[batch.mask_GK][:, :3].double().numpy()
    length_N = batch.length_GK[batch.mask_GK].numpy() if verbosity == "tokens" else rating_NA[:, 1]
    assert tuple(much) == NAMES
    for a, share in enumerate(much.values()):
        assert share >= 0
        assert spearman(rating_NA[:, a] - share * length_N, length_N) <= 1e-9
    assert much["helpful"] > 0 or verbosity == "tokens"
    assert verbosity == "tokens" or much["short"] == 1.0


@pytest.mark.parametrize(
    ("take_off", "verbosity", "much"),
    [
        ('{"tokens": 0.5}', "tokens", (0.5, 0.5, 0.5)),
        ('{"tokens": {"true": 2, "helpful": 0}}', "tokens", (0.0, 0.0, 2.0)),
        ('{"short": 1}', "short", (1.0, 1.0, 1.0)),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_taken_off_by_hand_is_in_the_score_and_stays(
    way: str, take_off: str, verbosity: str, much: tuple[float, ...], tmp_path: Path
) -> None:
    path = str(rated(tmp_path))
    loaded = load_model(path, ModelSettings(overall=way, take_off=take_off))  # type: ignore[arg-type]
    assert (loaded.model.reading.verbosity, loaded.model.reading.taken_off) == (verbosity, much)
    scores = score_groups(loaded.model, GROUPS, BatchSettings())
    for group, score in zip(GROUPS, scores, strict=True):
        np.testing.assert_allclose(score, by_hand(loaded.model.eval(), group), rtol=2e-4, atol=2e-5)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved", {})
    again = load_model(str(tmp_path / "saved"), ModelSettings()).model
    assert again.reading == loaded.model.reading
    same = load_model(str(tmp_path / "saved"), ModelSettings(take_off=take_off)).model
    assert same.reading == loaded.model.reading
    other = ModelSettings(take_off='{"tokens": 0.25}')
    if way == "mean":
        assert load_model(str(tmp_path / "saved"), other).model.reading.taken_off == (0.25, 0.25, 0.25)
    else:
        with pytest.raises(ModelError, match="have learned from"):
            load_model(str(tmp_path / "saved"), other)


@pytest.mark.parametrize(
    ("take_off", "word"),
    [
        ('{"wordy": 1}', r"wordy is no attribute \(helpful, short, true\)(.|\n)*or tokens"),
        ('{"tokens": {"helpfull": 1}}', "helpfull is no attribute to take off from"),
        ('{"tokens": -0.5}', "-0.5 of tokens cannot be taken off helpful(.|\n)*at least 0, in points of the attribute per token"),
        ('{"short": "much"}', '"much" of short cannot be taken off(.|\n)*per point of short'),
        ('{"tokens": true}', "true of tokens cannot"),
        ('{"tokens": null}', "null of tokens cannot"),
        ('{"tokens": NaN}', "NaN of tokens cannot"),
        ('{"tokens": {"true": Infinity}}', "Infinity of tokens cannot be taken off true"),
    ],
)
def test_nonsense_is_not_taken_off(take_off: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=word):
        load_model(str(rated(tmp_path)), ModelSettings(take_off=take_off))
    with pytest.raises(ModelError, match="is about attributes, and the head is of kind scalar"):
        load_model(str(tmp_path / "rated"), ModelSettings(take_off='{"tokens": 1}', head="scalar", new_head=True))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"take_off": "[1]"}, "is not a JSON object"),
        ({"take_off": '{"tokens": 1, "short": 1}'}, "names more than one verbosity"),
        ({"take_off": '{"tokens": 1}', "verbosity": "tokens"}, "leave one of them out"),
    ],
)
def test_settings_that_say_two_things_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises((SettingsError, ValueError), match=word):
        ModelSettings(**changes)


# --------------------------------------------------------------------------------------------------- from ratings to a gate

WORDS = ["cat", "dog", "sun", "moon", "tree", "red"]


def said(n: int) -> tuple[str, tuple[str, str]]:
    """A prompt of somebody who likes one of two words, and two answers."""
    rng = random.Random(n)
    answers = [" ".join(rng.choice(WORDS[: 2 + 2 * (k % 2)] + WORDS) for _ in range(rng.randint(3, 12))) for k in range(2)]
    return f"I like {('cat', 'dog')[n % 2]} , say {n % 7}", (answers[0], answers[1])


def words_in(answer: str) -> tuple[float, float]:
    return float(answer.split().count("cat")), float(answer.split().count("dog"))


def ratings(count: int) -> list[Example]:
    """How many of either word an answer has."""
    made = []
    for n in range(count):
        prompt, answers = said(n)
        targets = tuple(t for a in answers for t in words_in(a))
        made.append(example(*answers, prompt=question(prompt), id=f"r{n}", targets=targets, counts=(1,) * 4, attributes=("cat", "dog")))
    return made


def likings(count: int, start: int = 1000) -> list[Example]:
    """The better of two answers has more of the word that the prompt likes, and less of the other."""
    made = []
    for n in range(start, start + count):
        prompt, answers = said(n)
        liked, other = ([words_in(a)[k] for a in answers] for k in (n % 2, 1 - n % 2))
        if (liked[0] - liked[1]) * (other[0] - other[1]) < 0:
            targets = tuple(float(v == max(liked)) for v in liked)
            made.append(example(*answers, prompt=question(prompt), id=f"l{n}", targets=targets, counts=(1, 1)))
    return made


def stage(folder: Path, examples: Path, model: str, objective: str, net: ModelSettings, **train: Any) -> FitSettings:
    return FitSettings(str(examples), model, objective, net, RenderSettings(max_length=96), BatchSettings(16), TrainSettings(**train), 0.1)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to count two words."""
    folder = tmp_path_factory.mktemp("counted")
    dataset_of(ratings(300), folder / "ratings", "label_attributes")
    net = ModelSettings(width=32, layers=1, head="attributes")
    fit(stage(folder, folder / "ratings", "tiny", "squared_error", net, lr=5e-3, epochs=8), str(folder / "fit"))
    return folder / "fit" / "model"


def right(scorer: Scorer, examples: list[Example]) -> float:
    return float(np.mean([(s[0] > s[1]) == (e.targets[0] > e.targets[1]) for s, e in zip(scorer(examples), examples, strict=True)]))


def test_a_gate_learns_what_matters_where_and_nothing_else_moves(counted: Path, tmp_path: Path) -> None:
    before = Scorer.load(counted)
    dataset_of(likings(600), tmp_path / "pairs", "label_pairs")
    net = ModelSettings(overall="gate")
    settings = stage(tmp_path, tmp_path / "pairs", str(counted), "bradley_terry", net, lr=1e-2, epochs=10, freeze_layers=-1)
    fit(settings, str(tmp_path / "fit"))
    after = Scorer.load(tmp_path / "fit" / "model")
    assert after.model.reading == replace(before.model.reading, overall="gate")
    own = before.model.state_dict()
    new = {name: tensor for name, tensor in after.model.state_dict().items() if f".{OVERALL}." not in name}
    assert own.keys() == new.keys()
    assert all(torch.equal(own[name], new[name]) for name in own)
    tests = likings(600, start=5000)
    assert right(before, tests) < 0.6
    assert right(after, tests) > 0.8
    train_side = prepare(settings, str(tmp_path / "fit"))  # the same command again, as the training left it
    assert train_side.folder == tmp_path / "fit"
    from rayward.registry.pyfunc import RewardModelPyfunc

    served = RewardModelPyfunc()
    served.load_context(SimpleNamespace(artifacts={"model": str(tmp_path / "fit" / "model")}))
    rows = [{"prompt": e.prompt[0].content, "answer": a[0]} for e in tests[:8] for a in e.answers]
    np.testing.assert_allclose(served.predict(None, pd.DataFrame(rows))["score"], np.concatenate(after(tests[:8])), rtol=1e-4, atol=1e-5)


def test_verbosity_is_taken_off_where_the_attributes_are_learned_and_stays(counted: Path, tmp_path: Path) -> None:
    dataset_of(ratings(80), tmp_path / "ratings", "label_attributes")
    net = ModelSettings(verbosity="tokens")
    fit(stage(tmp_path, tmp_path / "ratings", str(counted), "squared_error", net, lr=1e-9), str(tmp_path / "fit"))
    less = Scorer.load(tmp_path / "fit" / "model").model.reading
    assert less.verbosity == "tokens"
    assert min(less.taken_off) > 0  # a longer answer has more of either word
    dataset_of(likings(40), tmp_path / "pairs", "label_pairs")
    again = stage(tmp_path, tmp_path / "pairs", str(tmp_path / "fit" / "model"), "bradley_terry", ModelSettings(overall="gate"), lr=1e-2)
    fit(again, str(tmp_path / "gated"))
    assert Scorer.load(tmp_path / "gated" / "model").model.reading == replace(less, overall="gate")


def test_a_fit_keeps_what_is_taken_off_by_hand(counted: Path, tmp_path: Path) -> None:
    dataset_of(likings(40), tmp_path / "pairs", "label_pairs")
    net = ModelSettings(take_off='{"tokens": {"dog": 0.125}}', overall="gate")
    fit(stage(tmp_path, tmp_path / "pairs", str(counted), "bradley_terry", net, lr=1e-2), str(tmp_path / "fit"))
    reading = Scorer.load(tmp_path / "fit" / "model").model.reading
    assert (reading.verbosity, reading.taken_off, reading.overall) == ("tokens", (0.0, 0.125), "gate")


def test_an_overall_rating_is_learned_from_its_aspects(counted: Path, tmp_path: Path) -> None:
    made = []
    for e in ratings(200):
        overall = tuple(2 * cat - 0.5 * dog + 1 for cat, dog in (words_in(a[0]) for a in e.answers))
        made.append(replace(e, targets=overall, counts=(1, 1), attributes=("liked",)))
    dataset_of(made, tmp_path / "overall", "label_attributes")
    net = ModelSettings(overall="linear")
    fit(
        stage(tmp_path, tmp_path / "overall", str(counted), "squared_error", net, lr=3e-2, epochs=12, freeze_layers=-1),
        str(tmp_path / "fit"),
    )
    layer: Any = getattr(Scorer.load(tmp_path / "fit" / "model").model.classifier, OVERALL)
    cat, dog = layer.weight[0].tolist()
    assert cat > 1
    assert dog < 0.3
    assert read_notes(tmp_path / "fit" / "model")["head"]["overall"] == "linear"


def test_ratings_alone_teach_no_gate(counted: Path, tmp_path: Path) -> None:
    dataset_of(ratings(30), tmp_path / "ratings", "label_attributes")
    asked = stage(tmp_path, tmp_path / "ratings", str(counted), "squared_error", ModelSettings(overall="gate"))
    with pytest.raises(SettingsError, match="all of these targets are about attributes themselves"):
        prepare(asked, str(tmp_path / "fit"))


def test_gradients_reach_the_gate_and_no_masked_place(tmp_path: Path) -> None:
    model = combined(tmp_path, "gate", "tokens")
    batch = collate([GROUPS], shared=True)
    output_GKC = model.outputs(batch)
    output_GKC.retain_grad()
    score_GK = model.reading.pick(output_GKC, batch.column_GK)
    make_objective("squared_error").of(batch, score_GK, output_GKC, len(NAMES)).sum().backward()
    assert output_GKC.grad is not None
    assert not batch.mask_GK.all()
    assert output_GKC.grad[batch.mask_GK].any()
    assert not output_GKC.grad[~batch.mask_GK].any()
    weights: list[Tensor] = list(getattr(model.classifier, OVERALL).parameters())
    assert all(w.grad is not None and w.grad.isfinite().all() and w.grad.any() for w in weights)
