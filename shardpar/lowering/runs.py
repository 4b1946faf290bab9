"""Which equal layers follow one another, so that one loop can run them.

A run is a chain of calls of one class under one strategy, where each call's
outputs feed the next call's inputs and everything else it reads was there
before the run began.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shardpar.capture._compat import is_literal
from shardpar.capture.cut import CutProgram, LayerCall
from shardpar.spec.plan import LayerStrategy


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive calls to be executed as one loop, or one call alone.

    Attributes:
      calls: the calls, in order.
      carry: (input position, output position) pairs that chain one call to the next.
      shared: input positions where every call reads the same variable.
    """

    calls: tuple[LayerCall, ...]
    carry: tuple[tuple[int, int], ...] = ()
    shared: tuple[int, ...] = ()

    @property
    def stacked(self) -> list[int]:
        """Input positions of which every call has its own."""
        chained = {i for i, _ in self.carry}
        count = len(self.calls[0].parameters)
        return [i for i in range(count) if i not in chained and i not in self.shared]


Step = Run | int
"""A run of layers, or the index of an equation outside all layers."""


def steps(
    program: CutProgram,
    strategies: Mapping[str, LayerStrategy],
    min_length: int,
    among: Collection[int] | None = None,
) -> tuple[Step, ...]:
    """The program's equations in an order in which runs of layers stand together.

    Args:
      program: the cut program.
      strategies: each layer's strategy; a run never crosses a change of it.
      min_length: shorter chains are left as single calls.
      among: only these equations, the others being another stage's; None takes all.
    """
    eqns = program.closed.jaxpr.eqns
    by_position = {call.position: k for k, call in enumerate(program.calls)}
    depends = _dependencies(program, by_position)
    out: list[Step] = []
    done: set[int] = set()
    for position in range(len(eqns)):
        if position in done or (among is not None and position not in among):
            continue
        if position not in by_position:
            out.append(position)
            continue
        first = by_position[position]
        run = _longest(program, first, depends, strategies)
        if len(run.calls) < min_length:
            run = Run(run.calls[:1])
        last = run.calls[-1].position
        # What lies between two calls of the run but does not need them goes before it.
        for between in range(position + 1, last):
            mine = among is None or between in among
            if mine and between not in by_position and depends[id(eqns[between])] < first:
                out.append(between)
                done.add(between)
        out.append(run)
        done |= {call.position for call in run.calls}
    return tuple(out)


def _dependencies(program: CutProgram, by_position: Mapping[int, int]) -> dict[int, int]:
    """For each variable and equation (by id), the last layer call it depends on; -1 for none."""
    last: dict[int, int] = {}
    for position, eqn in enumerate(program.closed.jaxpr.eqns):
        reads = [last.get(id(v), -1) for v in eqn.invars if not is_literal(v)]
        own = max(reads, default=-1)
        own = max(own, by_position.get(position, -1))
        last[id(eqn)] = own
        for var in eqn.outvars:
            last[id(var)] = own
    return last


def _longest(
    program: CutProgram,
    first: int,
    depends: Mapping[int, int],
    strategies: Mapping[str, LayerStrategy],
) -> Run:
    calls, eqns = program.calls, program.closed.jaxpr.eqns
    head = eqns[calls[first].position]
    carry: tuple[tuple[int, int], ...] | None = None
    shared = {i for i, v in enumerate(head.invars)}
    members = [calls[first]]
    for k in range(first + 1, len(calls)):
        call, before = calls[k], calls[k - 1]
        same = strategies.get(call.name) == strategies.get(calls[first].name)
        if not (same and alike(call, calls[first])):
            break
        eqn, previous = eqns[call.position], eqns[before.position]
        produced = {id(v): o for o, v in enumerate(previous.outvars)}
        links = tuple(
            (i, produced[id(v)])
            for i, v in enumerate(eqn.invars)
            if not is_literal(v) and id(v) in produced
        )
        fresh = all(
            is_literal(v) or id(v) in produced or depends.get(id(v), -1) < first for v in eqn.invars
        )
        same_type = all(eqn.invars[i].aval == previous.outvars[o].aval for i, o in links)
        if not links or not fresh or not same_type or (carry is not None and links != carry):
            break
        carry = links
        shared = {i for i in shared if _same(eqn.invars[i], head.invars[i])}
        members.append(call)
    chained = {i for i, _ in carry or ()}
    return Run(tuple(members), carry or (), tuple(sorted(shared - chained)))


def alike(a: LayerCall, b: LayerCall) -> bool:
    """Whether two layers compute the same of their inputs."""
    if a.class_name != b.class_name:
        return False
    # Equal blocks normally share one traced jaxpr; text decides where a constructor
    # made fresh (hence unequal) initialisers and Flax traced each block anew.
    return a.jaxpr is b.jaxpr or (
        not a.jaxpr.consts and not b.jaxpr.consts and str(a.jaxpr) == str(b.jaxpr)
    )


def _same(a: Any, b: Any) -> bool:
    if is_literal(a) or is_literal(b):
        return is_literal(a) and is_literal(b) and bool(a.val == b.val)
    return a is b
