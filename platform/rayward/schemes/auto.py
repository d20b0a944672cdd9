"""Which scheme for this policy: a pilot tells whether it repairs its own errors.

    pilot      some solutions with wrong answers, every prefix drawn n times (`exhaustive`); ten with n = 8 tell repair of 3 % a step
               (docs/montecarlo.md), and more of them fit the posterior's chain better
    measure    in how many of them a later prefix succeeds after one from which nothing did, and how much likelier the verdicts are if a
               loss need not be total than if it is. The first alone misleads: at hard problems a good prefix fails n times by chance

>>> from rayward.schemes.states import State
>>> solution = Solution(4, outcome=False, tokens=(40.0, 30.0, 20.0, 10.0), root_right=6, root_count=8)
>>> dead = State(solution, (0, 7, 0, 0), (0, 1, 8, 8), (0, 0, 0, 0))
>>> found = measure([dead] * 10, "hard")
>>> found.scheme, found.recovered, found.says
('skew', 0, 'errors are final: in 0 of 10 pilot solutions a prefix succeeds after one from which nothing did, ...')
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayward.schemes.posterior import fit
from rayward.schemes.states import Solution, State


@dataclass(frozen=True)
class AutoSettings:
    """The pilot, and what is taken from it."""

    pilot: int = 100  # most solutions with wrong answers whose every prefix is drawn
    share: float = 0.05  # most of all wrong answers that are taken for it: of a small job the pilot costs no more than a part
    n: int = 8  # continuations of every prefix of theirs
    least: float = 5.0  # log evidence for errors that are repaired, over final ones, from which on they are believed in
    least_gain: float = 0.015  # of skew, where it is chosen: about as accurate as exhaustive with n = 16

    def __post_init__(self) -> None:
        if self.pilot < 1 or self.n < 1:
            raise ValueError(f"pilot={self.pilot} and n={self.n} must be at least 1")
        if not (0 < self.share <= 1 and 0 < self.least_gain < 1):
            raise ValueError(f"share={self.share} and least_gain={self.least_gain} must be above 0, and share at most 1")

    def size(self, wrong: float) -> int:
        """Solutions in the pilot where there are about so many wrong answers.

        >>> [AutoSettings().size(wrong) for wrong in (0, 8, 600, 10**7)]
        [0, 1, 30, 100]
        """
        return min(self.pilot, math.ceil(round(self.share * wrong, 9)))


@dataclass(frozen=True)
class Finding:
    """What a pilot says of a policy."""

    scheme: str  # name in SCHEMES
    settings: Mapping[str, Any]  # of that scheme
    solutions: int  # in the pilot, with a wrong answer
    recovered: int  # of them: a success from a prefix after one from which nothing succeeded
    log_evidence: float  # for losses that need not be total, over total ones; natural logarithm
    says: str  # in words

    @property
    def short(self) -> str:
        """What it rests on, in short."""
        return f"{self.recovered} of {self.solutions} wrong answers recover, log evidence of repair {self.log_evidence:+.1f}"


def pilot(solutions: Sequence[Solution], settings: AutoSettings = AutoSettings()) -> list[int]:
    """Indices of the solutions to draw from exhaustively: wrong answers with at least two inner steps, spread over the whole list."""
    fit_for_it = [i for i, s in enumerate(solutions) if s.outcome is False and s.steps > 2]
    count = min(settings.pilot, len(fit_for_it))
    return [fit_for_it[n * len(fit_for_it) // count] for n in range(count)]


def measure(states: Sequence[State], want: Literal["hard", "soft"], settings: AutoSettings = AutoSettings()) -> Finding:
    """Choose a scheme from a pilot's counts. Where there was nothing to draw from: `skew`, or the posterior as it is for soft labels."""
    wrong = [s for s in states if s.solution.outcome is False]
    if not wrong:
        name = "posterior" if want == "soft" else "skew"
        says = "no wrong answer of three steps or more to draw from in the pilot, so nothing is known of repair"
        return Finding(name, {}, 0, 0, 0.0, f"{says}. Scheme: {name} with its usual settings")
    recovered = sum(_recovers(s) for s in wrong)
    found = fit(wrong)
    gain = found.log_evidence - found.log_evidence_final
    repairs = gain >= settings.least
    name = "posterior" if repairs or want == "soft" else "skew"
    chosen: dict[str, Any] = {"q0": found.q0, "z0": found.z0} if name == "posterior" else {"least_gain": settings.least_gain}
    why = {
        (True, "hard"): "any-success labels would get worse with more completions",
        (False, "hard"): "halving with early stop needs no model",
        (True, "soft"): "soft labels from the fitted chain",
        (False, "soft"): "soft labels from the fitted chain",
    }[repairs, want]
    says = (
        f"errors are {'repaired' if repairs else 'final'}: in {recovered} of {len(wrong)} pilot solutions a prefix succeeds after one "
        f"from which nothing did, and the verdicts speak {'for' if repairs else 'against'} repair (log evidence {gain:+.1f}, "
        f"q0={found.q0}, z0={found.z0}). Scheme: {name}; {why}"
    )
    return Finding(name, chosen, len(wrong), recovered, gain, says)


def _recovers(state: State) -> bool:
    """A prefix without a success, and a later one with one."""
    counted = [r for r, w in zip(state.right[1:], state.wrong[1:], strict=True) if r + w]
    return any(not r and any(counted[t:]) for t, r in enumerate(counted))
