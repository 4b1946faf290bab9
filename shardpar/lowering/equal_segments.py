"""Which values of one stage stand in the places of another's, where stages compute alike.

A pipeline in one program runs the first stage's equations on every stage, each time with that
stage's parameters. That is right if every stage's equations are the same but for the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from shardpar.capture._compat import is_literal
from shardpar.capture.cut import CutProgram, LayerCall
from shardpar.capture.segments import Segment, Segments, segments
from shardpar.errors import PlanError
from shardpar.lowering.runs import alike
from shardpar.spec.lockstep import EqualStages


@dataclass(frozen=True, eq=False)
class EqualSegments:
    """A program cut into its lead, equal stages and its tail.

    Attributes:
      cut: segment 0 is the lead, 1 to S are the stages, S + 1 is the tail.
      params: of each parameter of the first stage, those of all stages.
      rest: the same of the model's other variables that layers read.
      enters: of what the lead sends, by position, what the first stage receives, in order.
      passes: of what the first stage sends, by position, what the next one receives, in order.
      leaves: of what passes, by position, what the tail receives of the last stage.
      arrives: where in what the tail receives that stands.
      around: (position in what the lead sends, position in what the tail receives) pairs.
    """

    cut: Segments
    params: Mapping[str, tuple[str, ...]]
    rest: Mapping[str, tuple[str, ...]]
    enters: tuple[int, ...]
    passes: tuple[int, ...]
    leaves: tuple[int, ...]
    arrives: tuple[int, ...]
    around: tuple[tuple[int, int], ...]


def equal_segments(program: CutProgram, ends: EqualStages) -> EqualSegments:
    """Cuts a program into equal stages.

    Args:
      program: the cut loss.
      ends: which layers are in the lead, in each stage and in the tail.

    Raises:
      PlanError: the stages do not compute alike, or hand on more than the next stage reads.
    """
    runs = (ends.lead, *ends.runs, ends.tail)
    cut = segments(program, {name: s for s, names in enumerate(runs) for name in names})
    _require_ends(cut)
    calls = [_calls(program, cut.stages[s], names) for s, names in enumerate(ends.runs, 1)]
    matches = [_Match(program, cut, calls, s) for s in range(len(calls))]
    for match in matches:
        match.require_alike()
    params = {name: tuple(m.params[name] for m in matches) for name in matches[0].params}
    rest = {name: tuple(m.rest[name] for m in matches) for name in matches[0].rest}
    _require_own(cut, params)
    lead, first, tail = cut.stages[0], cut.stages[1], cut.stages[-1]
    ring = _ring(program, cut, calls)
    last = {_made(program, calls[-1], v): n for n, (_, v) in _from(tail, len(calls))}
    stray = [place for place in last if place not in ring]
    if stray:
        raise PlanError(
            f"the loss reads a result of {calls[-1][stray[0][0]].name} that no stage hands on to "
            f"the next{_ELSE}"
        )
    eqns = program.closed.jaxpr.eqns
    sent = {v: n for n, v in enumerate(first.sent)}
    return EqualSegments(
        cut,
        params,
        rest,
        tuple(lead.sent.index(v) for _, v in first.received),
        tuple(sent[eqns[calls[0][k].position].outvars[o]] for k, o in ring),
        tuple(ring.index(place) for place in last),
        tuple(last.values()),
        tuple((lead.sent.index(v), n) for n, (_, v) in _from(tail, 0)),
    )


_ELSE = "; write schedule: 1f1b"


def _from(segment: Segment, stage: int) -> list[tuple[int, tuple[int, Any]]]:
    """What a segment receives of a stage, with its positions."""
    return [(n, pair) for n, pair in enumerate(segment.received) if pair[0] == stage]


def _require_ends(cut: Segments) -> None:
    """That nothing but the stages' own runs stands between the lead and the tail."""
    last = len(cut.stages) - 1
    for number, segment in enumerate(cut.stages):
        if segment.local:
            raise PlanError(
                f"the model's variable {segment.local[0]} changes with the data, as batch "
                f"statistics do, which schedule single_jit does not follow{_ELSE}"
            )
        whole = segment.gives_total, segment.gives_weight
        if any(whole) if number != last else not all(whole):
            raise PlanError(
                "schedule single_jit needs the loss and its weight to be computed after the last "
                f"stage's layers{_ELSE}"
            )


def _calls(program: CutProgram, segment: Segment, names: tuple[str, ...]) -> list[LayerCall]:
    calls = [call for call in program.calls if call.position in segment.positions]
    between = segment.positions - {call.position for call in calls}
    if between:
        eqn = program.closed.jaxpr.eqns[min(between)]
        raise PlanError(
            f"schedule single_jit runs layers {names[0]} to {names[-1]} one after another, but "
            f"the model computes something between them ({eqn.primitive.name}); put it inside a "
            "layer, or write schedule: 1f1b"
        )
    return calls


@dataclass(eq=False)
class _Match:
    """What of one stage stands for what of the first stage.

    Attributes:
      program, cut, calls: the model, and each stage's layers.
      stage: the stage's number.
      params, rest: names found so far, by those of the first stage.
    """

    program: CutProgram
    cut: Segments
    calls: list[list[LayerCall]]
    stage: int
    params: dict[str, str] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        jaxpr, segment = self.program.closed.jaxpr, self.cut.stages[self.stage + 1]
        self._source = dict(zip(jaxpr.invars, self.program.inputs, strict=True))
        self._ports = [
            {v: n for n, (_, v) in enumerate(part.received)}
            for part in (self.cut.stages[1], segment)
        ]
        layers = {call.position for call in self.program.calls}
        self._producer = {
            v: (eqn, n)
            for i, eqn in enumerate(jaxpr.eqns)
            if i not in layers
            for n, v in enumerate(eqn.outvars)
        }
        self._known: set[tuple[Any, Any]] = set()

    def require_alike(self) -> None:
        """Refuses a stage that does not compute what the first one does."""
        first, calls = self.calls[0], self.calls[self.stage]
        segment = self.cut.stages[self.stage + 1]
        sources = {at for at, _ in segment.received} - {self.stage}
        if sources or not segment.received:
            raise PlanError(
                f"{calls[0].name} and the layers after it must read what the layer before them "
                f"makes and nothing else that layers make{_ELSE}"
            )
        if len(first) != len(calls):
            raise PlanError(
                f"stages 0 and {self.stage} call {len(first)} and {len(calls)} layers{_ELSE}"
            )
        for one, other in zip(first, calls, strict=True):
            if not alike(one, other):
                raise PlanError(f"{one.name} and {other.name} do not compute the same{_ELSE}")
            eqns = self.program.closed.jaxpr.eqns
            inputs = zip(eqns[one.position].invars, eqns[other.position].invars, strict=True)
            for number, (v, w) in enumerate(inputs):
                if not self._given_alike(v, w):
                    raise PlanError(
                        f"{one.name} and {other.name} are given different things besides their "
                        f"parameters (input {number}){_ELSE}"
                    )
        if set(self.params.values()) != set(segment.params):
            raise PlanError(
                f"stage {self.stage} computes something of parameters outside its layers{_ELSE}"
            )

    def _given_alike(self, v: Any, w: Any) -> bool:
        """Whether a layer's input is to this stage what another is to the first."""
        if is_literal(v) or is_literal(w):
            return self._equal(v, w)
        if v.aval.shape != w.aval.shape or v.aval.dtype != w.aval.dtype:
            return False
        if v in self._ports[0] or w in self._ports[1]:
            floats = jnp.issubdtype(v.aval.dtype, jnp.floating)
            return bool(floats) and self._ports[0].get(v) == self._ports[1].get(w)
        made = _made(self.program, self.calls[0], v)
        if made is not None:
            return made == _made(self.program, self.calls[self.stage], w)
        if self._source.get(v, ("",))[0] == "params" == self._source.get(w, ("",))[0]:
            name = self._source[w][1]
            return self.params.setdefault(self._source[v][1], name) == name
        return self._equal(v, w)

    def _equal(self, v: Any, w: Any) -> bool:
        """Whether two values of the batch and the model's other variables are computed alike.

        Masks and positions are the same for every stage; keys are those of a stage's own layers.
        """
        if is_literal(v) or is_literal(w):
            return is_literal(v) and is_literal(w) and bool(v.val == w.val)
        if (v, w) in self._known:
            return True
        kinds = self._source.get(v, ("",))[0], self._source.get(w, ("",))[0]
        if kinds == ("rest", "rest"):
            name = self._source[w][1]
            equal = self.rest.setdefault(self._source[v][1], name) == name
        elif v in self._producer and w in self._producer:
            (one, n), (other, m) = self._producer[v], self._producer[w]
            equal = (
                (n, one.primitive, str(one.params)) == (m, other.primitive, str(other.params))
                and len(one.invars) == len(other.invars)
                and all(map(self._equal, one.invars, other.invars))
            )
        else:
            equal = v is w and kinds[0] in ("batch", "")
        if equal:
            self._known.add((v, w))
        return equal


def _made(program: CutProgram, calls: list[LayerCall], v: Any) -> tuple[int, int] | None:
    """(call, output) of some calls that makes a variable."""
    for k, call in enumerate(calls):
        for o, out in enumerate(program.closed.jaxpr.eqns[call.position].outvars):
            if out is v:
                return k, o
    return None


def _ring(
    program: CutProgram, cut: Segments, calls: list[list[LayerCall]]
) -> list[tuple[int, int]]:
    """What each stage hands on, as (call, output), in the order in which the next receives it."""
    rings = [
        [_made(program, calls[s], v) for _, v in cut.stages[s + 2].received]
        for s in range(len(calls) - 1)
    ]
    shapes = [
        [(v.aval.shape, v.aval.dtype) for _, v in cut.stages[s + 1].received]
        for s in range(len(calls))
    ]
    for s, (ring, shape) in enumerate(zip(rings, shapes[1:], strict=True)):
        known = {v for _, v in cut.stages[s + 2].received}
        if ring != rings[0] or None in ring or shape != shapes[0]:
            raise PlanError(f"stage {s} does not hand on what stage 0 does{_ELSE}")
        if set(cut.stages[s + 1].sent) - known:
            raise PlanError(
                f"layers after stage {s + 1} read what stage {s} computes, and single_jit hands "
                f"values to the next stage only{_ELSE}"
            )
    return [place for place in rings[0] if place is not None]


def _require_own(cut: Segments, params: Mapping[str, tuple[str, ...]]) -> None:
    """That no parameter of the stages is read anywhere else."""
    seen: set[str] = set(cut.stages[0].params) | set(cut.stages[-1].params)
    for s in range(len(cut.stages) - 2):
        for names in params.values():
            if names[s] in seen:
                raise PlanError(
                    f"parameter {names[s]} is read in several stages, of which each has its own "
                    f"with schedule single_jit{_ELSE}"
                )
        seen |= {names[s] for names in params.values()}
