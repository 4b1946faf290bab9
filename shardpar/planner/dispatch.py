"""Which of a step's sequences each of several unequal pipelines gets, so that all end together.

The slowest pipeline's time is made least: counts of each length are the variables of a small
integer programme, which is solved to a stated gap only where a rounded relaxation is not within
it already. (Hydraulis, arXiv 2412.07894; longest first: Graham, 1969.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from shardpar.errors import DataError, PlanError
from shardpar.planner.bins import first_fit_decreasing

Numbers = tuple[int, ...]
Method = Literal["greedy", "rounded", "milp"]

_MOST_CLASSES = 256
_MOST_NODES = 2_000


@dataclass(frozen=True)
class PipelineSpeed:
    """What a pipeline can take, and how fast.

    Attributes:
      token_cap: the most tokens of a micro-batch, and so of a sequence.
      token_s: seconds its slowest stage needs for each token.
      pair_s: and for each pair of tokens of one sequence, as attention does.
      fixed_s: seconds of a step whatever it gets: filling and draining, gradients, the update.
    """

    token_cap: int
    token_s: float
    pair_s: float = 0.0
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        if self.token_cap < 1 or self.token_s <= 0 or min(self.pair_s, self.fixed_s) < 0:
            raise PlanError(
                f"a pipeline has token_cap={self.token_cap}, token_s={self.token_s}, "
                f"pair_s={self.pair_s}, fixed_s={self.fixed_s}; the first two must be more than "
                "0, the others 0 or more"
            )

    def seconds(self, number: int, length: int) -> float:
        """Seconds for so many sequences of a length.

        >>> PipelineSpeed(token_cap=64, token_s=1.0, pair_s=0.5).seconds(number=2, length=4)
        24.0
        """
        return number * (self.token_s * length + self.pair_s * length * length)


@dataclass(frozen=True)
class Dispatch:
    """Who gets what in one step.

    Attributes:
      sequences: of each pipeline, the numbers of its sequences, ascending.
      microbatches: of each pipeline, its sequences packed under its token cap.
      pipeline_s: seconds of each.
      lower_bound_s: no assignment has a faster slowest pipeline.
      method: what found it.
    """

    sequences: tuple[Numbers, ...]
    microbatches: tuple[tuple[Numbers, ...], ...]
    pipeline_s: tuple[float, ...]
    lower_bound_s: float
    method: Method

    @property
    def step_s(self) -> float:
        """Seconds of the slowest pipeline."""
        return max(self.pipeline_s)

    @property
    def gap(self) -> float:
        """The share by which the step may be above the best there is."""
        return self.step_s / self.lower_bound_s - 1 if self.lower_bound_s else 0.0


def dispatch(
    lengths: Sequence[int], pipelines: Sequence[PipelineSpeed], gap: float = 0.01
) -> Dispatch:
    """Assigns every sequence to a pipeline so that the slowest one takes least.

    Args:
      lengths: tokens of each sequence, 1 or more.
      pipelines: what they can take.
      gap: the share by which the result may be above the best; it is kept unless the integer
        programme grows beyond what is solved in a step's time. The result says what was reached.

    Raises:
      DataError: a length is less than 1.
      PlanError: there is no pipeline, or a sequence is too long for each.

    >>> fast, slow = PipelineSpeed(token_cap=8, token_s=1.0), PipelineSpeed(4, token_s=2.0)
    >>> found = dispatch([8, 4, 4, 2, 2], [fast, slow])
    >>> found.pipeline_s, found.sequences, round(found.gap, 6)
    ((14.0, 12.0), ((0, 2, 4), (1, 3)), 0.0)
    """
    given = np.asarray(lengths, np.int64)
    _require_dispatchable(given, pipelines)
    fixed = np.array([p.fixed_s for p in pipelines])
    costs = np.array([p.token_s * given + p.pair_s * (given * given) for p in pipelines])
    costs[np.array([[p.token_cap] for p in pipelines]) < given] = np.inf
    # Whole seconds or nanoseconds alike: the solver's tolerances are for numbers around 1.
    home = _greedy(costs, fixed)
    unit = _seconds(home, costs, fixed).max() or 1.0
    costs, fixed = costs / unit, fixed / unit
    home, method = _improved(home, costs, fixed), "greedy"
    bound = float(max(fixed.max(), (costs + fixed[:, None]).min(axis=0, initial=np.inf).max()
                      if given.size else 0.0))  # fmt: skip
    best: tuple[float, np.ndarray, Method] = (_slowest(home, costs, fixed), home, "greedy")
    if best[0] > bound * (1 + gap):
        # Means of unlike lengths would not bound what those lengths take.
        exact = _Classes.of(given, costs, most=given.size)
        relaxed, relaxed_bound = exact.solve(fixed, integral=False, gap=gap)
        # Rounding errors of the solver must not make the certificate too strong.
        bound = max(bound, relaxed_bound * (1 - 1e-9))
        best = _better(best, exact.rounded(relaxed, costs, fixed), costs, fixed, "rounded")
        if best[0] > bound * (1 + gap):
            classes = _Classes.of(given, costs, most=_MOST_CLASSES)
            whole, whole_bound = classes.solve(fixed, integral=True, gap=gap)
            if classes.exact:
                bound = max(bound, whole_bound * (1 - 1e-9))
            if whole is not None:
                best = _better(best, classes.rounded(whole, costs, fixed), costs, fixed, "milp")
    step, home, method = best
    sequences = tuple(tuple(np.flatnonzero(home == p).tolist()) for p in range(len(pipelines)))
    return Dispatch(
        sequences,
        tuple(
            _packed(numbers, given, pipeline.token_cap)
            for numbers, pipeline in zip(sequences, pipelines, strict=True)
        ),
        tuple((_seconds(home, costs, fixed) * unit).tolist()),
        float(min(bound, step) * unit),
        method,
    )


def _require_dispatchable(lengths: np.ndarray, pipelines: Sequence[PipelineSpeed]) -> None:
    if not pipelines:
        raise PlanError("sequences were to be dispatched to no pipeline; give one or more")
    most = max(p.token_cap for p in pipelines)
    if lengths.size and lengths.min() < 1:
        at = int(lengths.argmin())
        raise DataError(f"sequence {at} has {lengths[at]} tokens; leave out what has none")
    if lengths.size and lengths.max() > most:
        at = int(lengths.argmax())
        raise PlanError(
            f"sequence {at} has {lengths[at]} tokens and no pipeline takes more than {most}; cut "
            f"it, or plan a pipeline whose token_cap is {lengths[at]}"
        )


def _packed(numbers: Numbers, lengths: np.ndarray, cap: int) -> tuple[Numbers, ...]:
    bins = first_fit_decreasing(lengths[list(numbers)].tolist(), cap)
    return tuple(tuple(numbers[i] for i in items) for items in bins)


def _seconds(home: np.ndarray, costs: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Seconds of each pipeline; `home` is the pipeline of each sequence."""
    chosen = costs[home, np.arange(home.size)]
    return fixed + np.bincount(home, chosen, minlength=fixed.size)


def _slowest(home: np.ndarray, costs: np.ndarray, fixed: np.ndarray) -> float:
    return float(_seconds(home, costs, fixed).max())


def _better(
    best: tuple[float, np.ndarray, Method],
    home: np.ndarray,
    costs: np.ndarray,
    fixed: np.ndarray,
    method: Method,
) -> tuple[float, np.ndarray, Method]:
    home = _improved(home, costs, fixed)
    step = _slowest(home, costs, fixed)
    return (step, home, method) if step < best[0] else best


def _greedy(costs: np.ndarray, fixed: np.ndarray, home: np.ndarray | None = None) -> np.ndarray:
    """Longest first, each to where it ends first; those that have a `home` already stay."""
    home = np.full(costs.shape[1], -1) if home is None else home.copy()
    placed = np.flatnonzero(home >= 0)
    busy = fixed + np.bincount(home[placed], costs[home[placed], placed], minlength=fixed.size)
    rest = np.flatnonzero(home < 0)
    for i in rest[np.argsort(-costs[:, rest].min(axis=0), kind="stable")].tolist():
        home[i] = int(np.argmin(busy + costs[:, i]))
        busy[home[i]] += costs[home[i], i]
    return home


def _improved(home: np.ndarray, costs: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Moves single sequences off the slowest pipeline for as long as that makes a faster step."""
    home = home.copy()
    for _ in range(home.size):
        busy = _seconds(home, costs, fixed)
        slowest = int(busy.argmax())
        on_it = np.flatnonzero(home == slowest)
        if not on_it.size:
            break
        after = np.maximum(busy[:, None] + costs[:, on_it], busy[slowest] - costs[slowest, on_it])
        after[slowest] = np.inf
        to, which = np.unravel_index(int(after.argmin()), after.shape)
        if after[to, which] >= busy[slowest] * (1 - 1e-12):
            break
        home[on_it[which]] = to
    return home


@dataclass(frozen=True, eq=False)
class _Classes:
    """Sequences of like length, as the integer programme counts them.

    Attributes:
      members: the sequences of each class, longest first.
      costs: seconds of a member of each class on each pipeline, [pipelines, classes].
      exact: whether members are equally long; otherwise `costs` are means.
    """

    members: tuple[np.ndarray, ...]
    costs: np.ndarray
    exact: bool

    @classmethod
    def of(cls, lengths: np.ndarray, costs: np.ndarray, most: int) -> _Classes:
        """About `most` classes at most; a class for each length if there are no more."""
        order = np.argsort(-lengths, kind="stable")
        # A class holds one length, or lengths that fit into the same pipelines.
        allowed = np.isfinite(costs)[:, order]
        new = np.ones(order.size, bool)
        new[1:] = lengths[order][1:] != lengths[order][:-1]
        exact = int(new.sum()) <= most
        if not exact:
            every = -(-order.size // most)
            new = np.arange(order.size) % every == 0
            new[1:] |= (allowed[:, 1:] != allowed[:, :-1]).any(axis=0)
        members = np.split(order, np.flatnonzero(new)[1:])
        means = np.stack([costs[:, m].mean(axis=1) for m in members], axis=1)
        return cls(tuple(members), means, exact)

    def solve(
        self, fixed: np.ndarray, *, integral: bool, gap: float
    ) -> tuple[np.ndarray | None, float]:
        """How many of each class each pipeline gets, [pipelines, classes], and a lower bound."""
        pipelines, classes = self.costs.shape
        counts = np.array([m.size for m in self.members], float)
        allowed = np.isfinite(self.costs)
        used = np.where(allowed, self.costs, 0.0)
        all_go = sparse.hstack(
            [*([sparse.eye_array(classes)] * pipelines),
             sparse.csr_array((classes, 1))]
        )  # fmt: skip
        in_time = sparse.hstack(
            [
                sparse.block_diag([sparse.csr_array(row[None, :]) for row in used]),
                sparse.csr_array(-np.ones((pipelines, 1))),
            ]
        )
        places = pipelines * classes
        result = milp(
            np.append(np.zeros(places), 1.0),
            integrality=np.append(np.full(places, int(integral)), 0),
            bounds=Bounds(0, np.append(np.where(allowed, counts, 0.0).ravel(), np.inf)),
            constraints=[
                LinearConstraint(all_go, counts, counts),
                LinearConstraint(in_time, -np.inf, -fixed),
            ],
            # Nodes and not seconds: the same step is dispatched the same way everywhere.
            options={"mip_rel_gap": gap / 2, "node_limit": _MOST_NODES},
        )
        bound = result.mip_dual_bound if integral else result.fun
        found = None if result.x is None else result.x[:places].reshape(pipelines, classes)
        return found, 0.0 if bound is None or not np.isfinite(bound) else float(bound)

    def rounded(
        self, counts: np.ndarray | None, costs: np.ndarray, fixed: np.ndarray
    ) -> np.ndarray:
        """The pipeline of each sequence: whole parts as counted, what is left over greedily."""
        home = np.full(costs.shape[1], -1)
        if counts is not None:
            whole = np.floor(counts + 1e-6).astype(int)
            for c, members in enumerate(self.members):
                # Dealt in turns, so that each pipeline has the class's mean length.
                turns = np.concatenate(
                    [(np.arange(n) + 0.5) / n for n in whole[:, c]] or [np.zeros(0)]
                )
                owners = np.repeat(np.arange(len(whole)), whole[:, c])
                owners = owners[np.argsort(turns, kind="stable")][: members.size]
                home[members[: owners.size]] = owners
        return _greedy(costs, fixed, home)
