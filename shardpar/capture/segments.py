"""Which equations of a cut program run on which stage, and what the stages send one another.

A stage runs the equations of its layers and, of what lies between layers, what depends on
them. What depends on neither parameters nor layers (masks, positions, counters of random
keys) is not sent but computed again by each stage that needs it: micro-batches would wait
for one another otherwise. Ties and skips are variables that more than one stage reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardpar.capture._compat import as_function, is_dropped, is_literal, levels, only, subjaxpr
from shardpar.capture.cut import CutProgram
from shardpar.errors import PlanError

_RANDOM, _BATCH, _DATA = 0, 1, 2
"""What a variable depends on at most: counters, the batch, parameters or layers' own state."""


@dataclass(frozen=True, eq=False)
class Again:
    """An equation of another stage of which some outputs are computed again.

    Attributes:
      position: of the equation.
      outputs: which of its outputs.
      function: from `inputs` to those outputs.
      inputs: variables of the program.
    """

    position: int
    outputs: tuple[Any, ...]
    function: Callable[..., list[Any]]
    inputs: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A stage's part of a program.

    Attributes:
      positions: its equations.
      again: what it computes though other stages do too.
      params, batch: names of the parameters and batch arrays it reads.
      counters: names of the model's variables that are the same on all stages, which it reads.
      local: names of those that only this stage reads and changes, such as batch statistics.
      received: variables that earlier stages send, by the number of the stage.
      sent: variables that later stages read.
      gives_total, gives_weight: whether the loss or its weight is computed here.
    """

    positions: frozenset[int]
    again: tuple[Again, ...]
    params: tuple[str, ...]
    batch: tuple[str, ...]
    counters: tuple[str, ...]
    local: tuple[str, ...]
    received: tuple[tuple[int, Any], ...]
    sent: tuple[Any, ...]
    gives_total: bool
    gives_weight: bool


@dataclass(frozen=True, eq=False)
class Segments:
    """A program cut into stages.

    Attributes:
      program: the whole.
      stages: in order.
      counters: names of the model's variables that every stage can advance by itself.
    """

    program: CutProgram
    stages: tuple[Segment, ...]
    counters: tuple[str, ...]

    @cached_property
    def advance(self) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """The counters after a micro-batch, from those before it."""
        names = self.counters
        places = [self.program.outputs.index(name) + 2 for name in names]
        closed, used = only(self.program.closed, places)
        function = as_function(closed)
        reads = [self.program.inputs[i][1] for i in used]

        def advance(rest: Mapping[str, Any]) -> dict[str, Any]:
            return dict(zip(names, function(*(rest[name] for name in reads)), strict=True))

        return advance


def segments(program: CutProgram, stage_of: Mapping[str, int]) -> Segments:
    """Cuts a program into stages.

    Args:
      program: the cut loss.
      stage_of: the stage of each layer, by name; stages count from 0.

    Raises:
      PlanError: a layer reads what a later stage computes, or layers of several stages
        change one of the model's variables.
    """
    level, local = _levels(program)
    owner = _owners(program, stage_of, level)
    count = max(stage_of.values()) + 1
    return Segments(
        program,
        tuple(_segment(program, level, owner, local, stage, count) for stage in range(count)),
        tuple(sorted(set(program.outputs) - local)),
    )


def _levels(program: CutProgram) -> tuple[dict[Any, int], set[str]]:
    """The level of every variable, and the names of the model's variables that data changes."""
    jaxpr = program.closed.jaxpr
    local: set[str] = set()
    while True:
        given = [
            {"params": _DATA, "batch": _BATCH, "rest": _DATA if name in local else _RANDOM}[kind]
            for kind, name in program.inputs
        ]
        level = levels(program.closed, given)
        changed = {
            name
            for name, v in zip(program.outputs, jaxpr.outvars[2:], strict=True)
            if not is_literal(v) and level[v] > _RANDOM
        }
        if changed <= local:
            return level, local
        local |= changed


def _owners(
    program: CutProgram, stage_of: Mapping[str, int], level: Mapping[Any, int]
) -> dict[int, int]:
    """The stage of every equation that depends on data, by position."""
    eqns = program.closed.jaxpr.eqns
    layer = {call.position: call for call in program.calls}
    made: dict[Any, int] = {}
    owner: dict[int, int | None] = {}
    for position, eqn in enumerate(eqns):
        outs = [v for v in eqn.outvars if not is_dropped(v)]
        if position not in layer and all(level[v] < _DATA for v in outs):
            continue
        before = [
            made[v] for v in eqn.invars if not is_literal(v) and v in made and level[v] == _DATA
        ]
        at = max(before, default=None)
        if position in layer:
            name = layer[position].name
            if at is not None and at > stage_of[name]:
                raise PlanError(
                    f"layer {name} is in stage {stage_of[name]} but reads what stage {at} "
                    "computes; put it there, or later"
                )
            at = stage_of[name]
        owner[position] = at
        made.update((v, at) for v in outs if at is not None)
    _place_early(program, owner, max(stage_of.values()))
    return {position: at for position, at in owner.items() if at is not None}


def _place_early(program: CutProgram, owner: dict[int, int | None], last: int) -> None:
    """Equations that depend on parameters alone run on the first stage that needs them."""
    eqns = program.closed.jaxpr.eqns
    needed: dict[Any, int] = {}
    for position in sorted(owner, reverse=True):
        eqn = eqns[position]
        at = owner[position]
        if at is None:
            at = min((needed[v] for v in eqn.outvars if v in needed), default=last)
            owner[position] = at
        for v in eqn.invars:
            if not is_literal(v):
                needed[v] = min(at, needed.get(v, last))


def _segment(
    program: CutProgram,
    level: Mapping[Any, int],
    owner: Mapping[int, int],
    local: set[str],
    stage: int,
    count: int,
) -> Segment:
    jaxpr = program.closed.jaxpr
    source = dict(zip(jaxpr.invars, program.inputs, strict=True))
    producer = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    positions = frozenset(i for i, at in owner.items() if at == stage)
    total_at, weight_at, mine = _outputs(program, level, owner, producer, local, count)
    ends = [v for v, at in zip(jaxpr.outvars, (total_at, weight_at), strict=False) if at == stage]
    ends += [
        v
        for name, v in zip(program.outputs, jaxpr.outvars[2:], strict=True)
        if mine.get(name) == stage
    ]
    wanted = {v for i in positions for v in jaxpr.eqns[i].invars if not is_literal(v)}
    wanted |= {v for v in ends if not is_literal(v)}
    again = _again(program, wanted, level, positions)
    for one in again:
        wanted |= set(one.inputs)
    computed = {v for one in again for v in one.outputs}
    received = sorted(
        {
            (owner[producer[v]], v)
            for v in wanted
            if v in producer and v not in computed and owner.get(producer[v], stage) != stage
        },
        key=lambda pair: producer[pair[1]],
    )
    later = {
        v
        for i, at in owner.items()
        if at > stage
        for v in jaxpr.eqns[i].invars
        if not is_literal(v) and level[v] == _DATA and producer.get(v) in positions
    } | {
        v
        for v, at in zip(jaxpr.outvars[:2], (total_at, weight_at), strict=True)
        if not is_literal(v) and at != stage and producer.get(v) in positions
    }
    reads = {kind: sorted(source[v][1] for v in wanted if v in source and source[v][0] == kind)
             for kind in ("params", "batch", "rest")}  # fmt: skip
    here = {name for name, at in mine.items() if at == stage}
    return Segment(
        positions,
        again,
        tuple(reads["params"]),
        tuple(reads["batch"]),
        tuple(name for name in reads["rest"] if name not in local),
        tuple(sorted(here)),
        tuple(received),
        tuple(sorted(later, key=lambda v: (producer[v], str(v)))),
        total_at == stage,
        weight_at == stage,
    )


def _outputs(
    program: CutProgram,
    level: Mapping[Any, int],
    owner: Mapping[int, int],
    producer: Mapping[Any, int],
    local: set[str],
    count: int,
) -> tuple[int, int, dict[str, int]]:
    """The stages of the loss, of its weight, and of each local variable of the model."""
    jaxpr = program.closed.jaxpr
    source = {v: name for v, (_, name) in zip(jaxpr.invars, program.inputs, strict=True)}

    def stage_of(v: Any, otherwise: int) -> int:
        if is_literal(v) or level[v] < _DATA or v not in producer:
            return otherwise
        return owner[producer[v]]

    total_at = stage_of(jaxpr.outvars[0], count - 1)
    weight_at = stage_of(jaxpr.outvars[1], total_at)
    readers: dict[str, set[int]] = {name: set() for name in local}
    for position, at in owner.items():
        for v in jaxpr.eqns[position].invars:
            if not is_literal(v) and source.get(v) in readers:
                readers[source[v]].add(at)
    mine = {}
    for name, v in zip(program.outputs, jaxpr.outvars[2:], strict=True):
        if name not in local:
            continue
        at = stage_of(v, max(readers[name], default=count - 1))
        if readers[name] - {at}:
            raise PlanError(
                f"the model's variable {name} is read or changed by layers of stages "
                f"{sorted(readers[name] | {at})}; put these layers in one stage"
            )
        mine[name] = at
    return total_at, weight_at, mine


def _again(
    program: CutProgram,
    wanted: set[Any],
    level: Mapping[Any, int],
    positions: frozenset[int],
) -> tuple[Again, ...]:
    """What a stage computes itself because it depends on no data, in program order."""
    eqns = program.closed.jaxpr.eqns
    needed = {v for v in wanted if level.get(v, _DATA) < _DATA}
    out = []
    for position in range(len(eqns) - 1, -1, -1):
        eqn = eqns[position]
        outputs = [v for v in eqn.outvars if not is_dropped(v) and v in needed]
        if not outputs or position in positions:
            continue
        invars = list(dict.fromkeys(v for v in eqn.invars if not is_literal(v)))
        alone = subjaxpr(program.closed, [eqn], invars, outputs)
        closed, used = only(alone, list(range(len(outputs))))
        inputs = tuple(invars[i] for i in used)
        needed |= set(inputs)
        out.append(Again(position, tuple(outputs), as_function(closed), inputs))
    return tuple(reversed(out))


def reads_of(segment: Segment) -> Sequence[str]:
    """The model's variables that a stage is given."""
    return (*segment.counters, *segment.local)
