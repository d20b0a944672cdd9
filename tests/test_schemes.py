"""Schemes: against brute force, closed forms and simulation; and that every completion is accounted for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from rayward.policies import Request, ToyPolicy
from rayward.records import Message
from rayward.schemes import (
    SCHEMES,
    Ask,
    AutoSettings,
    BisectSettings,
    Budget,
    CertifiedSettings,
    Decision,
    ExhaustiveSettings,
    FreeRules,
    PosteriorSettings,
    Rounds,
    ScanSettings,
    SkewSettings,
    Solution,
    State,
    fit,
    fresh,
    make_scheme,
    measure,
    pilot,
    rounds,
)
from rayward.schemes import posterior as posterior_scheme
from rayward.schemes.posterior import LEVELS, chain, covariance, evidence, first_drop, information, messages, variance_fall
from rayward.schemes.posterior import values as value_posterior
from rayward.schemes.search import failures_needed, splits
from rayward.toy_world import ToyWorld, seed_of

NAMES = sorted(SCHEMES)
PAIRS = [(name, want) for name in NAMES for want in SCHEMES[name].wants]
SMALL = {  # settings under which a test is quick, and the caps are met
    "exhaustive": ExhaustiveSettings(n=3),
    "scan": ScanSettings(n=3, batch=2),
    "bisect": BisectSettings(k=3),
    "skew": SkewSettings(k=3, batch=2),
    "certified": CertifiedSettings(batch=3, cap=20),
    "posterior": PosteriorSettings(batch=3, cap=24),
}


def solution(T=5, outcome=False, root=(4, 8), problem="p", tokens=None):
    return Solution(T, outcome, tokens or tuple(40.0 * (T - t) for t in range(T)), *root, problem)


def state(of, right=(), wrong=(), unknown=()):
    pad = [tuple(c) + (0,) * (of.steps - len(c)) for c in (right, wrong, unknown)]
    return State(of, *pad)


class Truth:
    """Verdicts as a function of (solution, kept, k): right with the prefix's value; unknown now and then."""

    def __init__(self, values, unknown=0.0, seed=0):
        self.values, self.unknown, self.seed, self.asked = values, unknown, seed, []

    def verdict(self, i, kept, k):
        rng = random.Random(seed_of(self.seed, i, kept, k))
        return None if rng.random() < self.unknown else rng.random() < self.values[i][kept]

    def __call__(self, draws):
        self.asked += [(d.solution, d.kept, k) for d in draws for k in d.numbers]
        return [[self.verdict(d.solution, d.kept, k) for k in d.numbers] for d in draws]


def worlds(count=12, seed=0):
    """Solutions of many shapes: values fall at the first error and stay low; some end right, some problems are shared."""
    rng = random.Random(seed)
    solutions, values = [], []
    for i in range(count):
        T = rng.randint(1, 7)
        error, v = rng.randint(1, T), rng.uniform(0.3, 0.9)
        values.append([v if t < error else 0.02 for t in range(T)])
        solutions.append(solution(T, outcome=i % 4 == 0, root=(rng.randint(0, 8), 8), problem=f"p{i % 3}"))
    return solutions, values


# ----------------------------------------------------------------------------------------------------------------------- the interface


def test_the_table_names_its_settings_and_every_field_says_what_it_is():
    for name, entry in SCHEMES.items():
        assert dataclasses.is_dataclass(entry.settings), name
        assert entry.settings.__doc__
        assert make_scheme(name)([fresh(solution())]), name


@pytest.mark.parametrize("name", NAMES)
def test_a_scheme_that_cannot_give_soft_labels_says_which_can(name):
    if "soft" in SCHEMES[name].wants:
        make_scheme(name, None, FreeRules(want="soft"))
    else:
        with pytest.raises(ValueError, match="exhaustive, posterior"):
            make_scheme(name, None, FreeRules(want="soft"))


def test_unknown_names_and_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="did you mean bisect"):
        make_scheme("bisekt")
    with pytest.raises(ValueError, match="BisectSettings"):
        make_scheme("bisect", ScanSettings())


BAD = [
    lambda: ExhaustiveSettings(n=0),
    lambda: ScanSettings(batch=0),
    lambda: BisectSettings(k=0),
    lambda: SkewSettings(error=1.5),
    lambda: SkewSettings(least_gain=0),
    lambda: SkewSettings(error=0.1, least_gain=0.1),
    lambda: CertifiedSettings(alpha=0),
    lambda: CertifiedSettings(p0=0.5, p1=0.4),
    lambda: CertifiedSettings(p1=1.0),
    lambda: PosteriorSettings(q0=1.0),
    lambda: PosteriorSettings(alpha=1.0),
    lambda: PosteriorSettings(cap=0),
    lambda: PosteriorSettings(least_gain=-0.1),
    lambda: FreeRules(min_pass_rate=0.9, max_pass_rate=0.1),
    lambda: FreeRules(max_unknown=0),
    lambda: Budget(job=-1),
    lambda: AutoSettings(pilot=0),
    lambda: Solution(0, False, ()),
    lambda: Solution(2, False, (1.0,)),
    lambda: Solution(1, False, (1.0,), 3, 2),
]


@pytest.mark.parametrize("make", BAD)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match=r"\d"):
        make()


@pytest.mark.parametrize(("name", "want"), PAIRS)
@examples(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_state_gives_positive_asks_of_inner_prefixes_or_a_decision(name, want, data):
    T = data.draw(st.integers(1, 9))
    counts = st.lists(st.integers(0, 40), min_size=T, max_size=T).map(tuple)
    root = data.draw(st.integers(0, 8))
    of = solution(T, data.draw(st.sampled_from([True, False, None])), (data.draw(st.integers(0, root)), root))
    one = State(of, data.draw(counts), data.draw(counts), data.draw(counts))
    rules = FreeRules(want=want, right_is_free=data.draw(st.booleans()))
    [answer] = make_scheme(name, SMALL[name], rules)([one])
    if isinstance(answer, Decision):
        assert len(answer.hard) == len(answer.soft) == len(answer.sd) == T
        assert answer.first_error is None or -1 <= answer.first_error < T
        assert all(v is None or 0 <= v <= 1 for v in (*answer.hard, *answer.soft))
        if answer.first_error is not None:
            e = answer.first_error
            assert answer.hard == tuple(float(e < 0 or i < e) for i in range(T))
        if answer.abstained:
            assert ":" in answer.abstained
            assert answer.first_error is None
            assert not any(v is not None for v in answer.hard)
    else:
        assert answer
        assert all(1 <= kept < T and times > 0 for kept, times in answer)
        assert len({kept for kept, _ in answer}) == len(answer)


@pytest.mark.parametrize(("name", "want"), PAIRS)
def test_a_decision_depends_on_its_own_counts_alone(name, want):
    solutions, values = worlds(24)
    scheme = make_scheme(name, SMALL[name], FreeRules(want=want))
    run = Rounds(solutions, scheme)
    truth = Truth(values)
    for _ in range(2):
        for d in run.asks():
            run.tell(d.solution, d.kept, d.first, truth([d])[0])
    states = [run.state(i) for i in range(len(solutions))]
    together = scheme(states)
    order = random.Random(1).sample(range(len(states)), len(states))
    assert _same(scheme([states[i] for i in order]), [together[i] for i in order])
    assert _same([scheme([s])[0] for s in states], together)


def _same(a, b):
    """Equal up to the last bits: a matrix product of another shape may round otherwise."""

    def near(x, y):
        if isinstance(x, float) and isinstance(y, float):
            return abs(x - y) < 1e-9
        return x == y

    def flat(answer):
        if isinstance(answer, Decision):
            return [*answer.hard, *answer.soft, *answer.sd, answer.first_error, answer.confidence, answer.abstained]
        return list(itertools.chain.from_iterable(answer))

    return len(a) == len(b) and all(
        type(x) is type(y) and len(flat(x)) == len(flat(y)) and all(map(near, flat(x), flat(y))) for x, y in zip(a, b, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------- the free rules


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_need_no_completions_for_hard_labels(name):
    done = rounds([solution(outcome=True)], make_scheme(name), Truth([[0.5] * 5]))
    assert done.decisions[0].hard == (1.0,) * 5
    assert done.decisions[0].first_error == -1
    assert done.counters.completions == 0


@pytest.mark.parametrize("name", [name for name in NAMES if "soft" in SCHEMES[name].wants])
def test_soft_labels_of_right_answers_are_drawn_for(name):
    done = rounds([solution(outcome=True)], make_scheme(name, None, FreeRules(want="soft")), Truth([[0.5] * 5]))
    assert done.counters.completions > 0
    assert all(v is not None for v in done.decisions[0].soft)
    assert done.decisions[0].soft[-1] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_that_is_not_free_is_drawn_for(name):
    settings = (
        PosteriorSettings(alpha=1e-6, least_gain=0) if name == "posterior" else None
    )  # by default it is sure of a right answer from the start
    good = rounds([solution(outcome=True)], make_scheme(name, settings, FreeRules(right_is_free=False)), Truth([[0.9] * 5]))
    assert good.counters.completions > 0
    assert good.decisions[0].first_error == -1


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_could_not_be_graded_abstains(name):
    done = rounds([solution(outcome=None)], make_scheme(name), Truth([[0.5] * 5]))
    assert done.decisions[0].abstained.startswith("outcome:")
    assert done.counters.abstained == {"outcome": 1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("root", [(0, 8), (8, 8)])
def test_hopeless_and_certain_problems_are_skipped_by_setting_with_the_reason(name, root):
    rules = FreeRules(min_pass_rate=0.05, max_pass_rate=0.95)
    done = rounds([solution(root=root)], make_scheme(name, None, rules), Truth([[0.5] * 5]))
    assert done.counters.completions == 0
    assert done.decisions[0].abstained == f"pass rate: {root[0]} of 8 other answers to its problem end right"
    assert not make_scheme(name, None, rules).rules.known(fresh(solution(root=(0, 0))))  # nothing is known of it: not hopeless


@pytest.mark.parametrize("name", NAMES)
def test_a_single_step_needs_nothing(name):
    done = rounds([solution(1)], make_scheme(name), Truth([[0.5]]))
    assert done.decisions[0].first_error == 0
    assert done.counters.completions == 0


@pytest.mark.parametrize("name", ["scan", "bisect", "skew"])
def test_nothing_is_sampled_after_a_decided_negative_and_nothing_after_a_success(name):
    truth = Truth([[1, 1, 0, 0, 0, 0, 0, 0]])
    settings = dataclasses.replace(SMALL[name], batch=1)
    done = rounds([solution(8)], make_scheme(name, settings), truth)
    assert done.decisions[0].first_error == 1
    seen = {}
    for _, kept, k in truth.asked:
        assert not any(t < kept and bad for t, bad in seen.items()), "sampled after a decided negative"
        assert kept >= 2 or k == 0, "sampled after a success"
        if kept >= 2 and k == 2:
            seen[kept] = True
    assert done.counters.completions == sum(3 if t >= 2 else 1 for t in {kept for _, kept, _ in truth.asked})


@pytest.mark.parametrize("name", NAMES)
def test_unknown_is_never_wrong(name):
    """All verdicts unknown: nobody calls a step wrong, everybody ends and says why."""
    done = rounds([solution()], make_scheme(name), lambda draws: [[None] * d.times for d in draws])
    assert done.decisions[0].abstained.startswith("unknown:")
    assert done.decisions[0].first_error is None
    assert done.counters.unknown == done.counters.completions > 0
    assert done.counters.wrong == 0


@pytest.mark.parametrize("name", ["exhaustive", "scan", "bisect", "skew"])
def test_unknown_verdicts_are_drawn_again_and_change_no_label(name):
    values = [[1, 1, 1, 0, 0, 0]] * 30
    scheme = make_scheme(name, SMALL[name], FreeRules(max_unknown=1000))
    done = rounds([solution(6)] * 30, scheme, Truth(values, unknown=0.6))
    assert {d.first_error for d in done.decisions} == {2}
    assert done.counters.unknown > done.counters.right


def test_counts_of_unknown_do_not_move_the_posterior():
    of = solution()
    a, b = state(of, (0, 2), (0, 1, 3)), state(of, (0, 2), (0, 1, 3), (0, 5, 5, 5, 5))
    one, two = posterior_scheme([a, b], PosteriorSettings(alpha=0.9), "hard")
    assert one == two


def test_the_labelled_solution_is_no_draw_of_its_own():
    """Chosen for its wrong ending, its suffix says nothing new: no prefix counts it, the root holds other answers only."""
    seen = evidence([fresh(solution(3, root=(0, 0)))])
    assert np.allclose(seen.like_TBG, 1)


# ------------------------------------------------------------------------------------------------------------------- exhaustive, scan


def test_exhaustive_decodes_by_the_first_failure_or_the_last_success():
    of = solution(6)
    one = state(of, (0, 2, 0, 1, 0, 0), (0, 1, 3, 2, 3, 3))
    assert make_scheme("exhaustive", ExhaustiveSettings(3))([one])[0].first_error == 1
    assert make_scheme("exhaustive", ExhaustiveSettings(3, "last"))([one])[0].first_error == 3
    none = state(of, (), (0, 3, 3, 3, 3, 3))
    assert make_scheme("exhaustive", ExhaustiveSettings(3, "last"))([none])[0].first_error == 0


def test_scan_gives_the_labels_of_exhaustive_from_the_same_draws():
    solutions, values = worlds(60, seed=5)
    full = rounds(solutions, make_scheme("exhaustive", ExhaustiveSettings(4)), Truth(values))
    part = rounds(solutions, make_scheme("scan", ScanSettings(4)), Truth(values))
    assert [d.first_error for d in full.decisions] == [d.first_error for d in part.decisions]
    assert part.counters.completions < full.counters.completions / 2


def test_soft_labels_are_unbiased_in_the_toy_world():
    """Shares of exhaustive from the real solver against the closed form; unknown verdicts do not bias them."""
    world = ToyWorld(slip=0.2, repair=0.1)
    policy, numbers = ToyPolicy(world), world.problem(3)
    steps = world.continue_steps(numbers, (), seed=2)
    prompt = (Message("user", world.question(numbers)),)
    gold, n = str(max(numbers)), 600

    def draw(draws):
        verdicts = []
        for d in draws:
            requests = [Request(prompt, steps[: d.kept], seed_of("soft", d.kept, k)) for k in d.numbers]
            right = [c.steps[-1] == f"A: {gold}" for c in policy(requests)]
            verdicts.append([None if k % 7 == 0 else r for k, r in zip(d.numbers, right, strict=True)])
        return verdicts

    of = solution(len(steps), outcome=f"A: {gold}" == steps[-1])
    scheme = make_scheme("exhaustive", ExhaustiveSettings(n), FreeRules(want="soft", max_unknown=10_000))
    [decision] = rounds([of], scheme, draw).decisions
    for t in range(1, len(steps)):
        truth = world.value(numbers, steps[:t])
        assert abs(decision.soft[t - 1] - truth) < 4 * math.sqrt(max(truth * (1 - truth), 0.01) / n)
        assert 0 < decision.sd[t - 1] < 0.03


# --------------------------------------------------------------------------------------------------------------------------- the split


def _trees(lo, hi):
    if hi - lo < 2:
        yield None
        return
    for m in range(lo + 1, hi):
        for left, right in itertools.product(_trees(lo, m), _trees(m, hi)):
            yield (m, left, right)


def _walk(tree, tau, cost_good, cost_bad, tokens):
    total = 0.0
    while tree is not None:
        m, left, right = tree
        total += tokens[m] * (cost_good if m < tau else cost_bad)
        tree = right if m < tau else left
    return total


def _tree_of(table, lo, hi):
    if hi - lo < 2:
        return None
    m = int(table[lo, hi])
    return (m, _tree_of(table, lo, m), _tree_of(table, m, hi))


def _chance_of_failures(right, count, k):
    """E[(1 - v)^k] under Beta(right + 1/2, count - right + 1/2), from gamma functions."""
    a, b = right + 0.5, count - right + 0.5
    return math.exp(math.lgamma(b + k) - math.lgamma(b) + math.lgamma(a + b) - math.lgamma(a + b + k))


@pytest.mark.parametrize("T", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(("k", "root"), [(4, (1, 8)), (8, (0, 0)), (16, (8, 8)), (60, (3, 8))])
def test_the_split_is_the_best_of_all_search_trees(T, k, root):
    rng = random.Random(T)
    tokens = tuple(itertools.accumulate((rng.uniform(5, 80) for _ in range(T)), initial=0.0))[:0:-1]
    good = sum(_chance_of_failures(*root, j) for j in range(k))

    def cost(tree):
        return sum(_walk(tree, tau, good, k, tokens) for tau in range(1, T + 1)) / T

    ours = cost(_tree_of(splits(tokens, k, *root), 0, T))
    assert ours == pytest.approx(min(map(cost, _trees(0, T))), rel=1e-12)


def test_failures_needed_follow_the_error_level_of_the_problem():
    easy, hard = solution(16, root=(7, 8)), solution(16, root=(1, 8))
    at = SkewSettings(error=0.1)
    assert failures_needed(easy, at) == math.ceil(math.log(0.1 / 4) / math.log1p(-7.5 / 9)) == 3
    assert failures_needed(hard, at) == math.ceil(math.log(0.1 / 4) / math.log1p(-1.5 / 9))
    assert failures_needed(solution(16, root=(0, 8)), SkewSettings(error=0.001)) == 48
    assert failures_needed(hard, SkewSettings(k=5)) == 5
    price = SkewSettings(least_gain=0.02)
    for root in ((7, 8), (1, 8), (4, 8), (0, 0)):
        k = failures_needed(solution(16, root=root), price)
        gains = [_chance_of_failures(*root, n) - _chance_of_failures(*root, n + 1) for n in range(k + 1)]
        assert gains[k] <= 0.02 < gains[k - 1]
    assert failures_needed(solution(16, root=(0, 99)), price) == 2  # a problem that nobody solves is not worth more
    assert failures_needed(solution(16, root=(0, 0)), SkewSettings(least_gain=1e-6)) == 48


@pytest.mark.parametrize(("cost", "place"), [("call", 1), ("token", 7)])
def test_a_search_saves_completions_or_tokens(cost, place):
    """Where the last prefix costs next to nothing it is looked at first, if tokens are what counts."""
    of = solution(8, root=(8, 8), tokens=(100.0,) * 7 + (1.0,))
    [[ask]] = make_scheme("skew", SkewSettings(cost=cost))([fresh(of)])
    assert ask.kept == place


def test_the_error_of_halving_stays_within_its_bound():
    """P(wrong) <= ceil(log2 T) (1 - v)^k where the good prefixes have value v and the bad ones 0."""
    T, k, v, count = 8, 4, 0.5, 1500
    rng = random.Random(0)
    errors = [rng.randint(1, T) for _ in range(count)]
    values = [[v if t < e else 0.0 for t in range(T)] for e in errors]
    for name, settings in (("bisect", BisectSettings(k)), ("skew", SkewSettings(k))):
        done = rounds([solution(T)] * count, make_scheme(name, settings), Truth(values))
        wrong = np.mean([d.first_error != e - 1 for d, e in zip(done.decisions, errors, strict=True)])
        assert 0 < wrong <= 3 * (1 - v) ** k + 0.02, name


# --------------------------------------------------------------------------------------------------------------------------- certified


@pytest.mark.parametrize("batch", [1, 5])
def test_certified_names_a_true_crossing_at_its_level(batch):
    """Values that are not even monotone: the crossing V > p0 before, V < p1 after is true with chance 1 - alpha, for any batch."""
    rng = random.Random(0)
    alpha, p0, p1, T, count = 0.2, 0.1, 0.3, 8, 800
    values = [[rng.choice([0.02, 0.09, 0.31, 0.5, 0.9]) for _ in range(T)] for _ in range(count)]
    for row in values:
        row[0] = 0.9
    done = rounds([solution(T)] * count, make_scheme("certified", CertifiedSettings(alpha, p1, p0, batch, cap=400)), Truth(values))
    wrong = kept = 0
    for decision, row in zip(done.decisions, values, strict=True):
        if decision.abstained:
            continue
        kept += 1
        tau = decision.first_error + 1
        wrong += not (row[tau - 1] > p0 and (0.0 if tau == T else row[tau]) < p1)
        assert decision.confidence == 0.8
    assert kept > count / 2
    assert wrong / count <= alpha


def test_one_test_errs_no_more_often_than_its_level_however_often_one_looks():
    """At the border V = p0 the e-process reaches 1/a with chance at most a, with looks after every completion for ever."""
    a, p0, p1, count = 0.1, 0.1, 0.4, 4000
    rng = np.random.default_rng(0)
    factor = np.where(rng.random((count, 300)) < p0, math.log(p1 / p0), math.log((1 - p1) / (1 - p0)))
    assert (np.cumsum(factor, 1).max(1) >= -math.log(a)).mean() <= a + 0.01


def test_certified_with_nothing_left_below_is_one_success_decides():
    scheme = make_scheme("certified", CertifiedSettings(alpha=0.1, p1=0.3, p0=0.0))
    k = math.ceil(math.log(0.1 / 1) / math.log(0.7))
    done = rounds([solution(2)], scheme, Truth([[1, 0]]))
    assert (done.counters.completions, done.decisions[0].first_error) == (k, 0)
    done = rounds([solution(2)], scheme, Truth([[1, 1]]))
    assert (done.counters.completions, done.decisions[0].first_error) == (1, 1)


def test_certified_abstains_at_its_cap():
    done = rounds([solution(4)], make_scheme("certified", CertifiedSettings(alpha=1e-9, cap=10, batch=4)), Truth([[0.1] * 4]))
    assert done.decisions[0].abstained.startswith("unsure:")
    assert done.counters.completions == 10


# --------------------------------------------------------------------------------------------------------------------------- posterior


def _paths(T, kernel, seen, b):
    """Every path of levels and its probability with all verdicts, by enumeration."""
    G = len(LEVELS)
    prior = np.where((LEVELS > 0) & (LEVELS < 1), 1 / (G - 2), 0.0)
    paths = np.stack(np.meshgrid(*[np.arange(G)] * T, indexing="ij"), -1).reshape(-1, T)
    p = prior[paths[:, 0]] * seen.like_TBG[0, b, paths[:, 0]] * seen.end_BG[b, paths[:, -1]]
    for t in range(1, T):
        p = p * kernel.all_GG[paths[:, t - 1], paths[:, t]] * seen.like_TBG[t, b, paths[:, t]]
    return LEVELS[paths], p


BRUTE = [
    (3, False, (0, 1, 0), (0, 1, 4)),
    (3, True, (0, 1, 2), (0, 3, 1)),
    (4, False, (1, 5, 0, 1), (0, 1, 3, 2)),
    (4, True, (0, 0, 0, 0), (0, 0, 0, 0)),
    (4, None, (0, 20, 0, 3), (0, 3, 30, 0)),
    (4, False, (0, 3, 0, 2), (0, 0, 40, 0)),
]


@pytest.mark.parametrize(("T", "outcome", "right", "wrong"), BRUTE)
@pytest.mark.parametrize(("q0", "z0"), [(0.75, 0.995), (0.85, 0.1)])
def test_the_posterior_is_exact(T, outcome, right, wrong, q0, z0):
    """Against all 19^T paths: first error, its joint with every value, means, covariances, evidence, information, fall of variance."""
    kernel = chain(q0, z0, 0.5)
    one = state(solution(T, outcome, root=(5, 8)), right, wrong)
    seen = evidence([one, fresh(one.solution)])
    m = messages(seen, kernel.all_GG)
    v, p = _paths(T, kernel, seen, 0)
    assert m.log_evidence_B[0] == pytest.approx(math.log(p.sum()), abs=1e-12)
    p = p / p.sum()
    drops = v[:, 1:] < 0.5 * v[:, :-1]
    tau = np.where(drops.any(1), drops.argmax(1) + 1, T)
    drop = first_drop(m, kernel)
    place = np.array([p[tau == s].sum() for s in range(1, T + 1)])
    joint = np.array([[(p * v[:, t])[tau == s].sum() for s in range(1, T + 1)] for t in range(1, T)])
    assert np.abs(drop.place_BS[0] - place).max() < 1e-12
    assert np.abs(drop.with_value_BtS[0] - joint).max() < 1e-12
    mean = np.array([(p * v[:, t]).sum() for t in range(1, T)])
    cov = np.array([[(p * v[:, s] * v[:, t]).sum() for t in range(1, T)] for s in range(1, T)]) - np.outer(mean, mean)
    known = value_posterior(m)
    assert np.abs(known.mean_Bt[0] - mean).max() < 1e-12
    assert np.abs(known.sd_Bt[0] - np.sqrt(np.diag(cov))).max() < 1e-6
    assert np.abs(covariance(m, kernel)[0] - cov).max() < 1e-12
    for t in range(1, T):  # one more verdict at prefix t, taken in full
        success, failure = p * v[:, t], p * (1 - v[:, t])
        after_h = after_var = 0.0
        for q in (success, failure):
            if q.sum() < 1e-12:
                continue
            w = q / q.sum()
            h = [w[tau == s].sum() for s in range(1, T + 1)]
            after_h -= q.sum() * sum(x * math.log2(x) for x in h if x > 0)
            after_var += q.sum() * sum((w * v[:, s] ** 2).sum() - (w * v[:, s]).sum() ** 2 for s in range(1, T))
        before_h = -sum(x * math.log2(x) for x in place if x > 0)
        assert information(drop)[0, t - 1] == pytest.approx(before_h - after_h, abs=1e-6)
        if 1e-3 < mean[t - 1] < 1 - 1e-3:
            assert variance_fall(known.mean_Bt, covariance(m, kernel))[0, t - 1] == pytest.approx(np.trace(cov) - after_var, abs=1e-9)


@pytest.mark.parametrize("z0", [0.0, 0.1, 0.995, 1.0])
def test_the_chain_is_a_martingale_and_splits_into_kept_and_dropped(z0):
    kernel = chain(0.6, z0, 0.5)
    assert np.allclose(kernel.all_GG.sum(1), 1)
    assert np.allclose(kernel.all_GG @ LEVELS, LEVELS)
    assert (kernel.all_GG >= 0).all()
    assert np.array_equal(kernel.keep_GG + kernel.drop_GG, kernel.all_GG)
    assert kernel.all_GG[0, 0] == kernel.all_GG[-1, -1] == 1
    assert (kernel.drop_GG[2:-1, 0] > 0).all() == (z0 > 0)


def test_contradicting_counts_in_the_thousands_stay_finite():
    one = state(solution(6), (0, 0, 5000, 0, 5000, 0), (0, 5000, 0, 5000, 5000, 9))
    [decision] = posterior_scheme([one], PosteriorSettings(if_unsure="guess"), "hard")
    assert decision.first_error is not None
    assert all(math.isfinite(v) for v in decision.soft)


def test_the_posterior_finds_errors_that_the_policy_repairs():
    """Any success calls every step good where errors are repaired; the relative drop does not, and more draws do not harm it."""
    values = [[0.9, 0.9, 0.9, 0.25, 0.25, 0.2, 0.2, 0.1]] * 60
    of = [solution(8, root=(7, 8))] * 60
    repaired = PosteriorSettings(q0=0.85, z0=0.1, if_unsure="guess")
    found = rounds(of, make_scheme("posterior", repaired), Truth(values)).decisions
    any_success = rounds(of, make_scheme("exhaustive", ExhaustiveSettings(32)), Truth(values)).decisions
    assert np.mean([d.first_error == 2 for d in found]) > 0.7
    assert np.mean([d.first_error == 2 for d in any_success]) < 0.1


def test_soft_and_hard_come_from_the_same_draws():
    values = [[0.8, 0.8, 0.8, 0.8, 0.05, 0.02]] * 40
    scheme = make_scheme("posterior", PosteriorSettings(sd=0.08, cap=400), FreeRules(want="soft"))
    done = rounds([solution(6, root=(6, 8))] * 40, scheme, Truth(values))
    error = np.mean([np.abs(np.array(d.soft[:-1]) - values[0][1:]).mean() for d in done.decisions])
    assert error < 0.1
    assert all(np.mean(d.sd[:-1]) <= 0.08 for d in done.decisions)
    assert np.mean([d.hard[0] == 1.0 for d in done.decisions]) > 0.9
    assert np.mean([d.hard[4] == 0.0 for d in done.decisions]) > 0.9


@pytest.mark.parametrize("want", ["hard", "soft"])
def test_the_posterior_abstains_at_its_cap_or_guesses(want):
    settings = PosteriorSettings(alpha=1e-9, sd=1e-9, least_gain=0, cap=10, batch=4)
    rules = FreeRules(want=want)
    done = rounds([solution()], make_scheme("posterior", settings, rules), Truth([[0.5] * 5]))
    assert done.decisions[0].abstained.startswith("unsure:")
    assert done.counters.completions == 10
    guess = dataclasses.replace(settings, if_unsure="guess")
    done = rounds([solution()], make_scheme("posterior", guess, rules), Truth([[0.5] * 5]))
    assert not done.decisions[0].abstained
    assert None not in done.decisions[0].soft
    assert (done.decisions[0].first_error is None) == (want == "soft")


def test_the_posterior_gives_up_where_completions_buy_little():
    """A hopeless problem costs little, an easy one is labelled; a price of 0 spends the whole cap on the hopeless one."""
    values, of = [[0.02] * 8, [0.9, 0.9, 0.9, 0.9, 0, 0, 0, 0]], [solution(8, root=(0, 8)), solution(8, root=(8, 8))]
    priced = rounds(of, make_scheme("posterior", PosteriorSettings(least_gain=0.01)), Truth(values))
    assert priced.decisions[0].abstained.endswith("least_gain=0.01")
    assert priced.decisions[1].first_error == 3
    assert priced.states[0].drawn < 64
    free = rounds(of, make_scheme("posterior", PosteriorSettings(least_gain=0, alpha=1e-6)), Truth(values))
    assert free.states[0].drawn == 64


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9])
def test_a_batch_is_spread_over_the_best_prefixes(batch):
    [asks] = posterior_scheme([fresh(solution(6))], PosteriorSettings(batch=batch), "hard")
    assert sum(times for _, times in asks) == batch
    assert len(asks) == min(5, (batch + 1) // 2)
    [asks] = posterior_scheme([fresh(solution(2))], PosteriorSettings(batch=batch), "hard")
    assert asks == [Ask(1, batch)]


def test_tokens_make_late_prefixes_more_welcome():
    of = solution(12)
    [by_call] = posterior_scheme([fresh(of)], PosteriorSettings(cost="call"), "hard")
    [by_token] = posterior_scheme([fresh(of)], PosteriorSettings(cost="token"), "hard")
    assert by_token[0].kept > by_call[0].kept


# ----------------------------------------------------------------------------------------------------------------- the driver, resume


@pytest.mark.parametrize(("name", "want"), PAIRS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_verdicts_does_not_matter(name, want, seed):
    """Verdicts one by one in any order, asks by the handful, against whole rounds."""
    solutions, values = worlds()
    scheme = make_scheme(name, SMALL[name], FreeRules(want=want))
    truth = Truth(values, unknown=0.1)
    whole = rounds(solutions, scheme, truth)
    rng = random.Random(seed)
    run, waiting, asked = Rounds(solutions, scheme), [], []
    while not run.done:
        new = [(d.solution, d.kept, k) for d in run.asks(room=rng.randint(1, 9)) for k in d.numbers]
        waiting, asked = waiting + new, asked + new
        assert run.outstanding == len(waiting)
        rng.shuffle(waiting)
        for i, kept, k in [waiting.pop() for _ in range(rng.randint(0, len(waiting)))]:
            assert run.tell(i, kept, k, [truth.verdict(i, kept, k)]) == 1
    assert _same(run.decisions, whole.decisions)
    assert sorted(asked) == sorted(truth.asked)
    assert run.counters == whole.counters


@pytest.mark.parametrize(("name", "want"), PAIRS)
def test_resume_draws_nothing_twice_and_gives_the_same_labels(name, want):
    """Killed after every possible number of verdicts: a log answers for what it holds, the rest is drawn."""
    solutions, values = worlds()
    scheme = make_scheme(name, SMALL[name], FreeRules(want=want))
    truth = Truth(values, unknown=0.1)
    whole = rounds(solutions, scheme, truth)
    order = list(truth.asked)
    assert len(set(order)) == len(order) == whole.counters.completions, "a draw was asked for twice"
    for kept_of_log in range(0, len(order) + 1, max(1, len(order) // 6)):
        log = {key: truth.verdict(*key) for key in order[:kept_of_log]}
        drawn = []

        def draw(draws, log=log, drawn=drawn):
            new = [(d.solution, d.kept, k) for d in draws for k in d.numbers if (d.solution, d.kept, k) not in log]
            drawn += new
            log.update((key, truth.verdict(*key)) for key in new)
            return [[log[d.solution, d.kept, k] for k in d.numbers] for d in draws]

        again = rounds(solutions, scheme, draw)
        assert again.decisions == whole.decisions
        assert sorted(drawn) == sorted(order[kept_of_log:])


@pytest.mark.parametrize(("name", "want"), PAIRS)
def test_counters_are_exact(name, want):
    solutions, values = worlds()
    truth, reports = Truth(values, unknown=0.1), []
    scheme = make_scheme(name, SMALL[name], FreeRules(want=want))
    done = rounds(solutions, scheme, truth, report=lambda c: reports.append((c.rounds, c.completions, c.decided)))
    c = done.counters
    assert c.completions == len(truth.asked) == sum(c.by_kept.values()) == c.right + c.wrong + c.unknown
    verdicts = [truth.verdict(*key) for key in truth.asked]
    assert [c.right, c.wrong, c.unknown] == [verdicts.count(v) for v in (True, False, None)]
    assert {t: sum(kept == t for _, kept, _ in truth.asked) for t in c.by_kept} == dict(c.by_kept)
    assert c.tokens == pytest.approx(sum(solutions[i].tokens[kept] for i, kept, _ in truth.asked))
    assert c.solutions == c.decided == len(done.decisions)
    assert c.abstained.total() == sum(bool(d.abstained) for d in done.decisions)
    assert c.rounds == len(reports) == reports[-1][0]
    for i, s in enumerate(done.states):
        assert s.drawn == sum(j == i for j, _, _ in truth.asked)
    draws = {(i, kept): [k for j, t, k in truth.asked if (j, t) == (i, kept)] for i, kept, _ in truth.asked}
    assert all(sorted(ks) == list(range(len(ks))) for ks in draws.values()), "draws of a prefix are numbered from 0"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [Budget(solution=7), Budget(problem=15), Budget(job=40), Budget(solution=20, problem=30, job=50)])
def test_every_run_ends_under_its_caps(name, budget):
    solutions, values = worlds()
    truth = Truth(values)
    done = rounds(solutions, make_scheme(name, SMALL[name]), truth, budget)
    spent = [s.drawn for s in done.states]
    assert not budget.solution or max(spent) <= budget.solution
    assert not budget.job or sum(spent) <= budget.job
    for p in {s.problem for s in solutions}:
        assert not budget.problem or sum(n for n, s in zip(spent, solutions, strict=True) if s.problem == p) <= budget.problem
    unbound = rounds(solutions, make_scheme(name, SMALL[name]), Truth(values))
    for a, b in zip(done.decisions, unbound.decisions, strict=True):
        assert a.abstained.startswith("budget:") or _same([a], [b])
    assert done.counters.abstained["budget"] == sum(d.abstained.startswith("budget:") for d in done.decisions)


def test_a_told_draw_does_not_count_again_and_one_never_asked_for_is_refused():
    run = Rounds([solution(3)], make_scheme("bisect"))
    [draw] = run.asks()
    assert run.asks() == []
    assert not run.done
    assert run.tell(*draw[:3], [True]) == 1
    assert run.tell(*draw[:3], [False]) == 0
    assert run.state(0).right[draw.kept] == 1
    assert run.state(0).wrong[draw.kept] == 0
    with pytest.raises(ValueError, match="never asked for"):
        run.tell(0, draw.kept, 1, [True])
    with pytest.raises(ValueError, match="never asked for"):
        run.tell(0, 7, 0, [True])


def test_a_scheme_of_ones_own_is_held_to_the_interface():
    for kept, times in ((5, 1), (-1, 1), (2, 0)):
        asks = [Ask(kept, times)]
        with pytest.raises(ValueError, match="the scheme asked for"):
            Rounds([solution()], lambda states, asks=asks: [asks for _ in states]).asks()
    with pytest.raises(ValueError, match="asked for nothing"):
        Rounds([solution()], lambda states: [[] for _ in states]).asks()
    with pytest.raises(ValueError, match="1 verdicts for 3 draws"):
        rounds([solution()], make_scheme("scan", ScanSettings(batch=3)), lambda draws: [[True] for _ in draws])


def test_room_is_kept_and_solutions_that_are_begun_come_first():
    run = Rounds([solution(3) for _ in range(10)], make_scheme("exhaustive", ExhaustiveSettings(4)))
    first = run.asks(room=6)
    assert [(d.solution, d.kept, d.first, d.times) for d in first] == [(0, 1, 0, 4), (0, 2, 0, 2)]
    assert [tuple(d) for d in run.asks(room=3)] == [(0, 2, 2, 2), (1, 1, 0, 1)]
    assert run.counters.completions == 9


def test_what_was_drawn_under_looser_settings_is_used_again():
    """Going on from the states of alpha=0.3 is the same as asking for alpha=0.02 at once."""
    solutions, values = worlds()
    truth = Truth(values)
    settings = PosteriorSettings(alpha=0.02, cap=100, least_gain=0)
    at_once = rounds(solutions, make_scheme("posterior", settings), truth)
    loose = rounds(solutions, make_scheme("posterior", dataclasses.replace(settings, alpha=0.3)), truth)
    tight = rounds(solutions, make_scheme("posterior", settings), truth, states=loose.states)
    assert _same(tight.decisions, at_once.decisions)
    assert loose.counters.completions + tight.counters.completions == at_once.counters.completions
    with pytest.raises(ValueError, match="states are not of these"):
        Rounds(solutions, make_scheme("posterior"), states=loose.states[1:])


# --------------------------------------------------------------------------------------------------------------------------- the pilot


def _chain_world(rng, T, repair, count):
    """Wrong solutions of a two-state policy: it errs, notices with chance `repair` per step, and what is wrong at the end is wrong."""
    solutions, values = [], []
    while len(solutions) < count:
        err = rng.dirichlet(np.full(T, 0.5)) * rng.uniform(0.2, 1.5)
        err = 1 - np.exp(-err)
        clean, wrong = np.ones(T + 1), np.zeros(T + 1)
        for t in range(T - 1, -1, -1):
            clean[t] = (1 - err[t]) * clean[t + 1] + err[t] * wrong[t + 1]
            wrong[t] = repair * clean[t + 1] + (1 - repair) * wrong[t + 1]
        bad = [False]
        for t in range(T):
            bad.append(rng.random() >= repair if bad[-1] else rng.random() < err[t])
        if bad[-1]:
            values.append([float(wrong[t] if bad[t] else clean[t]) for t in range(T)])
            solutions.append(solution(T, root=(int(rng.binomial(8, clean[0])), 8)))
    return solutions, values


@pytest.mark.parametrize(("repair", "name"), [(0.0, "skew"), (0.1, "posterior")])
def test_a_pilot_tells_whether_errors_are_repaired(repair, name):
    solutions, values = _chain_world(np.random.default_rng(1), 8, repair, 60)
    done = rounds(solutions, make_scheme("exhaustive"), Truth(values))
    found = measure(done.states, "hard")
    assert found.scheme == name
    assert found.solutions == 60
    assert ("repaired" in found.says) == (repair > 0)
    assert str(found.recovered) in found.says
    settings = SCHEMES[found.scheme].settings(**found.settings)
    assert make_scheme(found.scheme, settings)([fresh(solution())])
    assert measure(done.states, "soft").scheme == "posterior"
    fitted = fit(done.states)
    assert (fitted.z0 >= 0.9) == (repair == 0)
    assert fitted.log_evidence >= fitted.log_evidence_final


def test_chance_failures_of_hard_problems_are_not_taken_for_repair():
    """A good prefix of value 0.1 fails 8 times by chance more often than not: recovery is seen, and is none."""
    values = [[0.1, 0.1, 0.1, 0.1, 0.1, 0.0]] * 60
    done = rounds([solution(6, root=(1, 8))] * 60, make_scheme("exhaustive"), Truth(values))
    found = measure(done.states, "hard")
    assert found.recovered > 20
    assert found.scheme == "skew"


def test_the_pilot_is_spread_over_wrong_answers_with_inner_steps():
    solutions = [solution(T, outcome) for T, outcome in [(2, False), (5, True), (5, None)] + [(5, False)] * 9]
    assert pilot(solutions, AutoSettings(pilot=3)) == [3, 6, 9]
    assert pilot(solutions, AutoSettings(pilot=100)) == list(range(3, 12))
    assert pilot(solutions[:3]) == []
    assert [measure([], want).scheme for want in ("hard", "soft")] == ["skew", "posterior"]  # nothing is known of repair
    with pytest.raises(ValueError, match="no pilot"):
        fit([])
