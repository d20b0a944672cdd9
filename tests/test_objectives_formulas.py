"""Objectives against their formulas, written again in plain Python from the papers: over every order, by swapping, by counting.

`FORMULAS` has one for every entry of the table; a new entry without one fails here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayward.objectives import (
    OBJECTIVES,
    Loss,
    bradley_terry,
    focal,
    hinge,
    lambdarank,
    listnet,
    margin,
    pick_best,
    plackett_luce,
    q_ranking,
)
from rayward.objectives.places import correlation, rank
from rayward.objectives.regularisers import REGULARISERS, log_barrier
from test_objectives import ALONG, GROUP, SCORE, SHORT, Places, loss_of, losses, tensors, with_gradient

PROPERTY = settings(deadline=None, max_examples=40)
RANKING = st.lists(SCORE, min_size=2, max_size=5)  # scores of places in the order of their targets, the best first


def lost(p: float) -> float:
    return -math.log(p)


def wins(a: float, b: float) -> float:
    """P(a is preferred to b): Bradley & Terry 1952."""
    return 1 / (1 + math.exp(b - a))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def likelihood(ranking: tuple[float, ...]) -> float:
    """P(this order) when places are drawn one after the other by exp(score): Plackett 1975."""
    return math.prod(math.exp(s) / sum(math.exp(r) for r in ranking[n:]) for n, s in enumerate(ranking))


def ordered(places: Places) -> list[tuple[float, float, float]]:
    """(score of the better, score of the worse, gap of their targets) of every pair that is ordered."""
    return [(a, b, t - u) for a, t in places for b, u in places if t > u]


def neighbours(places: Places) -> list[float]:
    levels = sorted({t for _, t in places}, reverse=True)
    return [lost(wins(a, b)) for high, low in itertools.pairwise(levels) for a, t in places for b, u in places if (t, u) == (high, low)]


def luce(places: Places) -> float:
    total = 0.0
    for s, t in places:
        below = [other for other, target in places if target < t]
        if below:
            total += math.log(math.exp(s) + sum(map(math.exp, below))) - s
    return total


def best(places: Places) -> float:
    top = max(t for _, t in places)
    rest = [math.exp(s) for s, t in places if t < top]
    return mean([lost(math.exp(s) / (math.exp(s) + sum(rest))) for s, t in places if t == top]) if rest else 0.0


def votes(places: Places) -> float:
    pairs = []
    for (a, t), (b, u) in itertools.combinations(places, 2):
        p = t / (t + u) if t + u else 0.5
        pairs.append(p * lost(wins(a, b)) + (1 - p) * lost(wins(b, a)))
    return mean(pairs)


def ranknet(places: Places) -> float:
    pairs = []
    for (a, t), (b, u) in itertools.combinations(places, 2):
        p = (1 + (t > u) - (t < u)) / 2
        pairs.append(p * lost(wins(a, b)) + (1 - p) * lost(wins(b, a)))
    return mean(pairs)


def top_one(places: Places) -> float:
    """P(comes first), by summing the likelihood of every order that it leads."""
    shares = []
    for values in zip(*places, strict=True):
        orders = list(itertools.permutations(range(len(values))))
        shares.append([sum(likelihood(tuple(values[k] for k in order)) for order in orders if order[0] == n) for n in range(len(values))])
    return -sum(p * math.log(q) for q, p in zip(*shares, strict=True))


def ndcg(gains: list[float]) -> float:
    """Of gains in the order they are shown."""
    ideal = sorted(gains, reverse=True)
    dcg = [sum(g / math.log2(place + 2) for place, g in enumerate(shown)) for shown in (gains, ideal)]
    return dcg[0] / dcg[1] if dcg[1] else 0.0


def swapped(places: Places) -> list[tuple[float, float, float]]:
    """(score of the better, of the worse, what NDCG moves by if the two change places) of every ordered pair."""
    levels = sorted({t for _, t in places})
    shown = sorted(range(len(places)), key=lambda k: (-places[k][0], places[k][1]))  # an order: the place at every rank
    gains = [2.0 ** levels.index(places[k][1]) - 1 for k in shown]
    moved = []
    for a, b in itertools.permutations(range(len(places)), 2):
        if places[shown[a]][1] > places[shown[b]][1]:
            other = list(gains)
            other[a], other[b] = gains[b], gains[a]
            moved.append((places[shown[a]][0], places[shown[b]][0], abs(ndcg(other) - ndcg(gains))))
    return moved


def pqm(places: Places, zeta: float = 2.0) -> float:
    wrong = sum(math.exp(s + zeta) for s, t in places if t <= 0.5)
    chain = [0.0, *(s for s, t in places if t > 0.5)]
    terms = [lost(math.exp(s) / (sum(map(math.exp, chain[: n + 1])) + wrong)) for n, s in enumerate(chain)]
    return mean(terms if wrong else terms[1:])


def odin(places: Places) -> float:
    """q = s, l = s / 2, tokens as test_objectives gives them."""
    pairs = ordered(places)
    if not pairs:
        return 0.0
    tokens = [5 + 10 * (t - 0.3) ** 2 for _, t in places]
    scores = [s for s, _ in places]
    rho = float(np.corrcoef(scores, tokens)[0, 1]) if np.std(scores) > 1e-3 and np.std(tokens) > 1e-3 else math.nan
    return mean([lost(wins(1.5 * a, 1.5 * b)) for a, b, _ in pairs]) + abs(rho) + 1 - rho


def entropy(places: Places) -> float:
    return mean([t * lost(wins(s, 0)) + (1 - t) * lost(wins(0, s)) for s, t in places])


def classes(places: Places) -> float:
    """Logits -s, 0, s of wrong, neutral, right, as test_objectives gives them."""
    total = []
    for s, t in places:
        weights = [math.exp(-s), 1.0, math.exp(s)]
        share = [max(0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0, 2 * t - 1)]
        total.append(-sum(p * math.log(w / sum(weights)) for p, w in zip(share, weights, strict=True)))
    return mean(total)


def verdict(places: Places) -> float:
    """Logits -s/2, s/2 and s/5 of wrong, right and the rest, as test_objectives gives them."""
    total = []
    for s, t in places:
        wrong, right, rest = (math.exp(x * s) for x in (-0.5, 0.5, 0.2))
        total.append(-t * math.log(right / (wrong + right + rest)) - (1 - t) * math.log(wrong / (wrong + right + rest)))
    return mean(total)


def along(score: float, target: float) -> list[float]:
    """The scores at the tokens of an answer, as test_objectives gives them."""
    return [score + more for more in (ALONG[:2] if target > SHORT else ALONG)]


def deepspeed(places: Places) -> float:
    """Every pair token by token, from the second, where they part, to the end of the longer answer; one that has ended keeps its score."""
    made = []
    for (s, t), (r, u) in itertools.permutations(places, 2):
        if t > u:
            better, worse = along(s, t), along(r, u)
            tokens = range(1, max(len(better), len(worse)))
            made.append(mean([lost(wins(better[min(n, len(better) - 1)], worse[min(n, len(worse) - 1)])) for n in tokens]))
    return mean(made)


def token_entropy(places: Places) -> float:
    return mean([mean([t * lost(wins(s, 0)) + (1 - t) * lost(wins(0, s)) for s in along(score, t)]) for score, t in places])


FORMULAS: dict[str, Callable[[Places], float]] = {
    "bradley_terry": lambda places: mean([lost(wins(a, b)) for a, b, _ in ordered(places)]),
    "vote_share": votes,
    "margin": lambda places: mean([lost(wins(a - m, b)) for a, b, m in ordered(places)]),
    "scaled": lambda places: mean([m * lost(wins(a, b)) for a, b, m in ordered(places)]),
    "hinge": lambda places: mean([max(0.0, 1 - (a - b)) for a, b, _ in ordered(places)]),
    "focal": lambda places: mean([(1 - 2 * max(0.0, wins(a, b) - 0.5)) ** 2 * lost(wins(a, b)) for a, b, _ in ordered(places)]),
    "adjacent": lambda places: mean(neighbours(places)),
    "ranknet": ranknet,
    "debiased": odin,
    "plackett_luce": luce,
    "pick_best": best,
    "listnet": top_one,
    "lambdarank": lambda places: sum(moved * lost(wins(a, b)) for a, b, moved in swapped(places)),
    "q_ranking": pqm,
    "binary_cross_entropy": entropy,
    "three_class": classes,
    "next_token": verdict,
    "token_wise": deepspeed,
    "token_cross_entropy": token_entropy,
    "squared_error": lambda places: mean([(s - t) ** 2 for s, t in places]),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
@PROPERTY
@given(places=GROUP)
def test_every_entry_is_its_formula(name: str, places: Places) -> None:
    expected = FORMULAS[name](places)
    if not math.isnan(expected):  # a correlation of what does not vary
        assert loss_of(name, places) == pytest.approx(expected, rel=1e-6, abs=1e-8)


# ------------------------------------------------------------------------------------------------------------ settings


def one(loss: Loss, places: Places, **chosen: float) -> float:
    return float(loss(*tensors([places]), **chosen)[0])


@PROPERTY
@given(places=GROUP, e=st.floats(0, 0.5), T=st.floats(0.1, 5))
def test_smoothing_and_temperature(places: Places, e: float, T: float) -> None:
    pairs = [(wins(a / T, b / T), wins(b / T, a / T)) for a, b, _ in ordered(places)]
    assert one(bradley_terry, places, smoothing=e, temperature=T) == pytest.approx(
        mean([(1 - e) * lost(p) + e * lost(q) for p, q in pairs]), rel=1e-6, abs=1e-8
    )
    cooled = [(s / T, t) for s, t in places]
    assert one(pick_best, places, temperature=T) == pytest.approx(best(cooled), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("e", [0.05, 0.2])
def test_smoothed_scores_settle_at_the_log_odds_of_a_right_judgement(e: float) -> None:
    at = math.log((1 - e) / e)
    _, pulls = zero_pull(bradley_terry, [(at, 1.0), (0.0, 0.0)], smoothing=e)
    assert pulls == pytest.approx([0.0, 0.0], abs=1e-12)


def zero_pull(loss: Loss, places: Places, **chosen: float) -> tuple[float, list[float]]:
    score, target, mask = tensors([places])
    score.requires_grad_()
    value = loss(score, target, mask, **chosen)
    value.sum().backward()
    assert score.grad is not None
    return value.item(), score.grad[0].tolist()


@PROPERTY
@given(places=GROUP, scale=st.floats(0, 4), m=st.floats(0, 4), gamma=st.floats(0, 4), T=st.floats(0.2, 4))
def test_the_other_settings(places: Places, scale: float, m: float, gamma: float, T: float) -> None:
    pairs = ordered(places)
    expected = {
        (margin, "scale", scale): [lost(wins(a - scale * gap, b)) for a, b, gap in pairs],
        (hinge, "margin", m): [max(0.0, m - (a - b)) for a, b, _ in pairs],
        (focal, "gamma", gamma): [(1 - 2 * max(0.0, wins(a, b) - 0.5)) ** gamma * lost(wins(a, b)) for a, b, _ in pairs],
        (q_ranking, "margin", m): [pqm(places, m)],
        (listnet, "temperature", T): [listnet_of(places, T)],
    }
    for (loss, name, value), terms in expected.items():
        assert one(loss, places, **{name: value}) == pytest.approx(mean(terms), rel=1e-6, abs=1e-8), name


def listnet_of(places: Places, T: float) -> float:
    total, said = sum(math.exp(t / T) for _, t in places), sum(math.exp(s) for s, _ in places)
    return -sum(math.exp(t / T) / total * math.log(math.exp(s) / said) for s, t in places)


# ------------------------------------------------------------------------------------- orders, ranks, and what is equal to what


@PROPERTY
@given(scores=RANKING)
def test_plackett_luce_is_the_likelihood_of_a_ranking_and_sums_to_one(scores: list[float]) -> None:
    total = 0.0
    for order in itertools.permutations(scores):
        p = math.exp(-loss_of("plackett_luce", [(s, float(-n)) for n, s in enumerate(order)]))
        assert p == pytest.approx(likelihood(order), rel=1e-9)
        total += p
    assert total == pytest.approx(1.0, rel=1e-9)


@PROPERTY
@given(scores=RANKING, data=st.data())
def test_an_unranked_tail_is_every_order_of_the_tail(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores) - 1))
    top, tail = scores[:k], scores[k:]
    every_order = sum(likelihood((*top, *order)) for order in itertools.permutations(tail))
    ranked = [(s, float(len(scores) - n)) for n, s in enumerate(top)] + [(s, 0.0) for s in tail]
    assert math.exp(-loss_of("plackett_luce", ranked)) == pytest.approx(every_order, rel=1e-9)


@PROPERTY
@given(scores=RANKING)
def test_pick_best_is_every_order_that_the_best_leads(scores: list[float]) -> None:
    every_order = sum(likelihood((scores[0], *order)) for order in itertools.permutations(scores[1:]))
    ranked = [(s, float(-n)) for n, s in enumerate(scores)]
    assert math.exp(-loss_of("pick_best", ranked)) == pytest.approx(every_order, rel=1e-9)


@pytest.mark.parametrize("order", [p for p in itertools.permutations(range(4)) if p.index(0) != p[0]])
@pytest.mark.parametrize("loss", [plackett_luce, bradley_terry, pick_best, lambdarank], ids=lambda loss: loss.__name__)
def test_ranks_go_in_as_their_negative_and_an_order_is_something_else(loss: Loss, order: tuple[int, ...]) -> None:
    scores = torch.tensor([[0.7, -1.1, 0.2, 1.9]], dtype=torch.float64)
    ranks = torch.tensor([[order.index(place) for place in range(4)]])  # the rank of every place; order is the place at every rank
    mask = torch.ones(1, 4, dtype=torch.bool)
    along = scores[:, list(order)]  # scores from the best place to the worst
    right = loss(along, torch.tensor([[3.0, 2.0, 1.0, 0.0]]), mask)
    assert loss(scores, -ranks, mask).item() == pytest.approx(right.item())
    assert loss(scores, -torch.tensor([order]), mask).item() != pytest.approx(right.item(), rel=1e-3)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_rank_is_where_a_place_stands(order: tuple[int, ...]) -> None:
    score = torch.zeros(1, 5)
    for stands, place in enumerate(order):
        score[0, place] = 10.0 - stands
    mask = torch.tensor([[True, True, True, True, False]])
    ranks = rank(score, torch.zeros(1, 5), mask)[0, :4].tolist()
    assert ranks == [1 + order.index(place) for place in range(4)]


def test_equal_scores_rank_the_worse_first_so_that_a_new_model_learns() -> None:
    _, pulls = with_gradient("lambdarank", *tensors([[(0.0, 1.0), (0.0, 0.0), (0.0, 0.5)]]))
    assert pulls[0, 0] < 0 < pulls[0, 1]


@PROPERTY
@given(places=GROUP)
def test_lambdarank_pulls_by_the_lambdas(places: Places) -> None:
    if len({s for s, _ in places}) < len(places):
        return
    _, pulls = with_gradient("lambdarank", *tensors([places]))
    expected = dict.fromkeys((s for s, _ in places), 0.0)
    for a, b, moved in swapped(places):
        pull = moved / (1 + math.exp(a - b))
        expected[a] -= pull
        expected[b] += pull
    assert pulls[0].tolist() == pytest.approx([expected[s] for s, _ in places], rel=1e-6, abs=1e-9)


SAME_AT_TWO = ["plackett_luce", "pick_best", "adjacent", "ranknet"]


@pytest.mark.parametrize("name", SAME_AT_TWO)
@PROPERTY
@given(better=SCORE, worse=SCORE, gap=st.floats(0.001, 5))
def test_two_places_are_the_pairwise_loss(name: str, better: float, worse: float, gap: float) -> None:
    expected = -float(torch.nn.functional.logsigmoid(torch.tensor(better - worse, dtype=torch.float64)))
    assert loss_of(name, [(worse, 0.0), (better, gap)]) == pytest.approx(expected, rel=1e-9)


@PROPERTY
@given(better=SCORE, worse=SCORE)
def test_targets_of_one_and_zero_are_the_pairwise_loss(better: float, worse: float) -> None:
    pair = [(better, 1.0), (worse, 0.0)]
    for name in ("vote_share", "scaled", "lambdarank"):
        times = 1 - 1 / math.log2(3) if name == "lambdarank" else 1.0  # what NDCG moves by
        assert loss_of(name, pair) == pytest.approx(times * loss_of("bradley_terry", pair), rel=1e-9)


@PROPERTY
@given(places=GROUP)
def test_settings_of_zero_are_bradley_terry(places: Places) -> None:
    plain = one(bradley_terry, places)
    assert one(margin, places, scale=0.0) == pytest.approx(plain, rel=1e-9, abs=1e-12)
    assert one(focal, places, gamma=0.0) == pytest.approx(plain, rel=1e-9, abs=1e-12)


@PROPERTY
@given(scores=RANKING)
def test_without_ties_a_pair_weighs_one_over_the_number_of_pairs(scores: list[float]) -> None:
    pairs = [lost(wins(a, b)) for a, b in itertools.combinations(scores, 2)]
    ranked = [(s, float(-n)) for n, s in enumerate(scores)]
    assert loss_of("bradley_terry", ranked) == pytest.approx(sum(pairs) / math.comb(len(scores), 2), rel=1e-9)


def triplet(anchor: float, positive: float, negative: float, m: float) -> float:
    """FaceNet's, with squared distances on a line."""
    return max(0.0, (anchor - positive) ** 2 - (anchor - negative) ** 2 + m)


@pytest.mark.parametrize(("positive", "negative"), [(0.5, 2.0), (1.5, 1.0), (-1.0, 1.1)])
def test_hinge_is_the_triplet_loss_of_minus_the_distance(positive: float, negative: float) -> None:
    assert loss_of("hinge", [(-(positive**2), 1.0), (-(negative**2), 0.0)]) == pytest.approx(triplet(0.0, positive, negative, 1.0))


# --------------------------------------------------------------------------------------------------------- forms that go wrong


@pytest.mark.parametrize(("better", "worse"), [(0.5, -0.25), (-1.0, 1.0), (0.0, 0.7)])
def test_the_misprint_of_log_exp_is_another_loss(better: float, worse: float) -> None:
    right = loss_of("bradley_terry", [(better, 1.0), (worse, 0.0)])
    assert right == pytest.approx(math.log(1 + math.exp(worse - better)))
    inside = 1 + math.exp(worse) - math.exp(better)  # as some texts print it
    assert inside <= 0 or math.log(inside) != pytest.approx(right, rel=0.01)
    assert 1 + math.exp(0.0) - math.exp(1.0) < 0  # and for a pair that is right by 1 it is no number


def test_the_plain_log_of_a_sigmoid_overflows_where_ours_does_not() -> None:
    score, target, mask = torch.tensor([[-200.0, 200.0]]), torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert math.isinf(-torch.log(torch.sigmoid(score[0, 0] - score[0, 1])).item())
    loss, pulls = with_gradient("bradley_terry", score, target, mask)
    assert loss.item() == 400.0
    assert pulls.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.99])
def test_binary_cross_entropy_is_least_where_the_model_says_the_target(target: float) -> None:
    at = math.log(target / (1 - target))
    loss, pulls = with_gradient("binary_cross_entropy", *tensors([[(at, target)]]))
    assert loss.item() == pytest.approx(-target * math.log(target) - (1 - target) * math.log(1 - target))
    assert pulls.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
def test_vote_share_is_least_where_the_gap_is_the_log_odds_of_the_votes(share: float) -> None:
    _, pulls = with_gradient("vote_share", *tensors([[(math.log(share / (1 - share)), share), (0.0, 1 - share)]]))
    assert pulls[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


# ------------------------------------------------------------------------------------------------ over a batch, over an answer


def test_correlation_is_numpys_over_all_places_that_are_there() -> None:
    rng = np.random.default_rng(0)
    value, other, mask = rng.normal(size=(5, 4)), rng.integers(3, 400, (5, 4)), rng.random((5, 4)) < 0.7
    value[~mask] = np.nan
    found = correlation(*map(torch.from_numpy, (value, other.astype(float), mask)))
    assert found.item() == pytest.approx(np.corrcoef(value[mask], other[mask])[0, 1], abs=1e-6)
    assert correlation(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)).item() == 0.0


def test_debiased_correlates_over_the_batch_and_leaves_out_what_is_not_compared() -> None:
    groups: list[Places] = [[(0.5, 1.0), (-1.0, 0.0)], [(2.0, 0.5), (1.0, 0.25), (0.3, 0.75)], [(9.0, 0.5), (-9.0, 0.5)]]
    seen = losses("debiased", *tensors(groups)).tolist()
    places = [p for places in groups[:2] for p in places]
    shared = odin(places) - mean([lost(wins(1.5 * a, 1.5 * b)) for a, b, _ in ordered(places)])  # the correlations of all of them
    own = [mean([lost(wins(1.5 * a, 1.5 * b)) for a, b, _ in ordered(places)]) for places in groups[:2]]
    assert seen == pytest.approx([own[0] + shared, own[1] + shared, 0.0], rel=1e-6)


def test_debiased_moves_what_length_explains_out_of_the_quality() -> None:
    """Judges prefer the longer of two answers that are equally good, and the better of two of a length."""
    rng = np.random.default_rng(1)
    good, tokens = rng.normal(size=(200, 2)), rng.normal(size=(200, 2))
    target = torch.from_numpy(good + tokens)
    feature_GKD = torch.from_numpy(np.stack([good, tokens], -1))
    mask = torch.ones(200, 2, dtype=torch.bool)
    head = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head[0], head[1] = torch.tensor([0.1, 0.1]), torch.tensor([0.1, -0.1])
    optimizer = torch.optim.Adam([head], lr=0.05)
    for _ in range(120):
        output = feature_GKD @ head.T
        loss = OBJECTIVES["debiased"].loss(output[..., 0], target, mask, output_GKC=output, length_GK=torch.from_numpy(tokens))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    quality, length = (feature_GKD @ head.T).detach().flatten(0, 1).T.numpy()
    assert abs(np.corrcoef(quality, tokens.ravel())[0, 1]) < 0.1
    assert np.corrcoef(quality, good.ravel())[0, 1] > 0.9
    assert np.corrcoef(length, tokens.ravel())[0, 1] > 0.7


def test_q_ranking_lets_right_steps_rise_and_wrong_ones_fall() -> None:
    score, target, mask = tensors([[(0.0, 1.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.0)]])
    for _ in range(200):
        _, pulls = with_gradient("q_ranking", score, target, mask)
        score = score - 0.5 * pulls
    first, second, wrong, also = score[0].tolist()
    assert second > first > 0 > wrong == pytest.approx(also)


# ---------------------------------------------------------------------------------------------------------- regularisers


def barrier(score: float) -> float:
    """-log(1 - (score / 5)^2), and from 4.95 on the tangent there."""
    slope = 2 * 4.95 / (25 - 4.95**2)
    return -math.log(1 - (min(abs(score), 4.95) / 5) ** 2) + slope * max(0.0, abs(score) - 4.95)


TERMS_OF_SCORES: dict[str, Callable[[list[float]], float]] = {
    "centre": lambda scores: sum(scores) ** 2,
    "square": lambda scores: mean([s * s for s in scores]),
    "log_barrier": lambda scores: mean([barrier(s) for s in scores]),
}


def test_every_regulariser_has_its_formula() -> None:
    assert TERMS_OF_SCORES.keys() == REGULARISERS.keys()


@pytest.mark.parametrize("name", list(TERMS_OF_SCORES))
@PROPERTY
@given(groups=st.lists(GROUP, min_size=1, max_size=3), junk=st.sampled_from([0.0, 3.0, 1e30, math.nan]))
def test_every_regulariser_is_its_formula(name: str, groups: list[Places], junk: float) -> None:
    score, _, mask = tensors(groups, junk)
    expected = [TERMS_OF_SCORES[name]([s for s, _ in places]) for places in groups]
    assert REGULARISERS[name](score, mask).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "scores", "worth"),
    [
        ("centre", [1.0, 2.0, -0.5], 6.25),
        ("square", [1.0, 2.0, -0.5], 1.75),
        ("log_barrier", [3.0, -4.0, 0.0], math.log(1.5625 / 0.36) / 3),
    ],
)
def test_regularisers_by_hand(name: str, scores: list[float], worth: float) -> None:
    score, _, mask = tensors([[(s, 0.0) for s in scores]])
    assert REGULARISERS[name](score, mask).tolist() == pytest.approx([worth])


def test_the_log_barrier_is_its_formula_inside_and_goes_on_straight() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)

    def at(score: float) -> float:
        return log_barrier(torch.tensor([[score]], dtype=torch.float64), mask).item()

    for score in (-4.9, -1.0, 0.0, 2.5, 4.9):
        assert at(score) == pytest.approx(-math.log(5 + score) - math.log(5 - score) + 2 * math.log(5))
    assert at(4.95 + 1e-7) == pytest.approx(at(4.95 - 1e-7), rel=1e-5)
    slope = (at(4.95) - at(4.95 - 1e-6)) / 1e-6
    assert (at(7.0) - at(6.0)) == pytest.approx(slope, rel=1e-3)
    assert at(-7.0) == at(7.0)
