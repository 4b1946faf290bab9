"""From one plan to another while training runs: the whole state in one fused reshard, no disk.

Programs and what the reshards between them do are kept, so that a run that comes back to a
plan compiles nothing again (HotSPa, SOSP 2024). Where a plan computes but another one owns
the state, only parameters go there and only gradients come back (Hydraulis).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from shardpar.capture.trace import Captured
from shardpar.errors import PlanError
from shardpar.lowering.allocator import return_freed_memory
from shardpar.lowering.homes import Move
from shardpar.lowering.lower import AnyProgram, lower
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.state import Gathered, TrainState
from shardpar.lowering.union import UnionArray
from shardpar.spec.plan import Plan

Kind = Literal["state", "state and gradients", "weights", "gradients"]


@dataclass(frozen=True)
class Switched:
    """What a switch gives.

    Attributes:
      program: of the new plan.
      state: where that plan wants it.
      gathered: what the step under way had gathered, there too; None if nothing.
    """

    program: AnyProgram
    state: TrainState
    gathered: Gathered | None = None


@dataclass(frozen=True)
class Rescued:
    """What is left of a state after devices were lost, where another plan wants it.

    Attributes:
      program: of that plan.
      found: leaves by path.
      missing: paths of leaves of which some slice has no living copy.
    """

    program: AnyProgram
    found: Mapping[str, UnionArray]
    missing: tuple[str, ...]

    def state(self, restored: Mapping[str, UnionArray] = {}) -> TrainState:
        """The whole state.

        Args:
          restored: the missing leaves, in the program's layouts.
        """
        return self.program.homes.settled({**self.found, **restored})  # type: ignore[no-any-return]


class Programs:
    """The programs of one model under any number of plans, and the ways between them.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from shardpar.capture.trace import trace
      >>> from shardpar.spec.mesh import Mesh
      >>> from shardpar.spec.plan import LayerStrategy, Pipeline, Stage
      >>> captured = trace(
      ...     lambda model, batch: jnp.mean(model(batch["x"]) ** 2),
      ...     lambda rngs: nnx.Linear(2, 1, rngs=rngs),
      ...     {"x": jax.ShapeDtypeStruct((4, 2), jnp.float32)},
      ... )
      >>> def on(*devices):
      ...     stage = Stage(devices, Mesh.factored(len(devices)), (LayerStrategy("outside"),))
      ...     return Plan("here", 4, (Pipeline(4, 4, (stage,)),))
      >>> programs = Programs(captured, optax.sgd(0.1))
      >>> program = programs.program(on(0))
      >>> switched = programs.switch(program, program.init(0), on(0))
      >>> switched.program is program
      True
    """

    def __init__(
        self,
        captured: Captured,
        optimizer: optax.GradientTransformation,
        options: ProgramOptions = ProgramOptions(),
        devices: Sequence[jax.Device] | None = None,
        of_pipelines: Callable[[Plan], Sequence[Captured]] = lambda _: (),
    ) -> None:
        """Nothing is lowered yet.

        Args:
          captured: from `capture.trace`.
          optimizer: any optax transformation.
          options: dtype, loops, clipping.
          devices: of the cluster, in order; None takes `jax.devices()`.
          of_pipelines: the model captured for the rows of each pipeline of a plan; empty where
            they are those of `captured`.
        """
        self._of_pipelines = of_pipelines
        self.captured, self.optimizer, self.options = captured, optimizer, options
        self.devices = tuple(jax.devices() if devices is None else devices)
        self._programs: dict[tuple[Captured, Plan], AnyProgram] = {}
        self._moves: dict[tuple[AnyProgram, AnyProgram, Kind], Move] = {}

    def program(self, plan: Plan, captured: Captured | None = None) -> AnyProgram:
        """The program of a plan, lowered when it is first asked for.

        Args:
          plan: what it follows.
          captured: the same model for batches of another shape, such as longer sequences; None
            takes the one these programs were made for.

        Raises:
          PlanError: the plan does not fit the model or the devices, or `captured` is another
            model.
        """
        captured = captured or self.captured
        if (captured, plan) not in self._programs:
            _require_same_model(captured, self.captured)
            own = self._of_pipelines(plan) if captured is self.captured else ()
            self._programs[captured, plan] = lower(
                captured, plan, self.optimizer, self.options, self.devices, own
            )
        return self._programs[captured, plan]

    def switch(
        self,
        program: AnyProgram,
        state: TrainState,
        plan: Plan,
        gathered: Gathered | None = None,
    ) -> Switched:
        """Brings a state to another plan: parameters, optimizer state, step, random keys.

        The old state's memory is given back when everything has arrived: if the switch fails,
        the old state is as it was.

        Args:
          program: of the plan in force.
          state: under it; donated.
          plan: the new one.
          gathered: what the step under way has gathered; donated.

        Raises:
          PlanError: the plan does not fit the model or the devices.
        """
        new = self.program(plan)
        if new is program:
            return Switched(program, state, gathered)
        names = ("state",) if gathered is None else ("state", "gathered")
        come: dict[str, Any] = {}
        go: dict[str, Any] = {}
        trees = {"state": (state, program.homes, new.homes)}
        if gathered is not None:
            trees["gathered"] = (gathered, program.gathered_homes, new.gathered_homes)  # type: ignore[assignment]
        for name, (tree, here, there) in trees.items():
            come |= {f"{name}{path}": a for path, a in here.unions(tree).items()}
            go |= {f"{name}{path}": h.layout for path, h in there.leaves.items()}
        kind: Kind = "state" if gathered is None else "state and gradients"
        moved = self._move(program, new, kind, go)(come)
        settled = [
            trees[name][2].settled({path: moved[f"{name}{path}"] for path in trees[name][2].leaves})
            for name in names
        ]
        if self.devices[0].platform == "cpu":
            return_freed_memory()
        return Switched(new, *settled)

    def rescue(
        self, program: AnyProgram, state: TrainState, plan: Plan, lost: Collection[int]
    ) -> Rescued:
        """Brings what living devices hold of a state to a plan that does without the lost ones.

        Each slice comes from a living copy in any group. The old state is left as it is.

        Args:
          program: of the plan in force.
          state: under it.
          plan: the new one.
          lost: devices whose memory is not to be read.

        Raises:
          SpecError: the plan uses a lost device.
        """
        new = self.program(plan)
        go = {path: home.layout for path, home in new.homes.leaves.items()}
        found, missing = Move(go, self.devices).without(lost, program.homes.unions(state))
        return Rescued(new, found, missing)

    def accumulate(
        self,
        program: AnyProgram,
        state: TrainState,
        plan: Plan,
        batch: Mapping[str, Any],
        gathered: Gathered | None = None,
        captured: Captured | None = None,
    ) -> Gathered:
        """Gradients of a batch computed under another plan than the one that owns the state.

        Args:
          program: of the plan that owns the state.
          state: stays where it is.
          plan: what computes; its global batch is this batch's.
          batch: arrays whose dim 0 counts sequences.
          gathered: of the step's batches before, under the owning plan; it must not be used
            again.
          captured: the model for batches of this one's shape, as in `program`.

        Returns:
          What was gathered so far, under the owning plan.
        """
        worker = self.program(plan, captured)
        if worker is program:
            return program.accumulate(state, batch, gathered)
        state_unions = program.homes.unions(state)
        if gathered is not None:
            # Random keys and such are those after the batches before.
            state_unions |= {
                path: union
                for path, union in program.gathered_homes.unions(gathered).items()
                if path.startswith(".rest")
            }
        come = {p: u for p, u in state_unions.items() if p.startswith((".params", ".rest"))}
        homes = worker.homes.leaves
        move = self._move(program, worker, "weights", {p: homes[p].layout for p in come})
        lent = {p: homes[p].settled(u) for p, u in move(come, donate=False).items()}
        found = worker.gather(
            *(
                {
                    name: _leaf(worker, lent[f".{kind}['{name}']"])
                    for name in getattr(worker.captured.model, kind)
                }
                for kind in ("params", "rest")
            ),
            batch,
        )
        go = {path: home.layout for path, home in program.gathered_homes.leaves.items()}
        back = self._move(worker, program, "gradients", go)
        moved = back(worker.gathered_homes.unions(found))
        return program.add(gathered, program.gathered_homes.settled(moved))

    def _move(self, old: AnyProgram, new: AnyProgram, kind: Kind, go: Mapping[str, Any]) -> Move:
        if (old, new, kind) not in self._moves:
            self._moves[old, new, kind] = Move(go, self.devices)
        return self._moves[old, new, kind]


def _require_same_model(captured: Captured, first: Captured) -> None:
    for kind in ("params", "rest"):
        got, want = (
            {name: (leaf.shape, leaf.dtype) for name, leaf in getattr(c.model, kind).items()}
            for c in (captured, first)
        )
        if got != want:
            name = next(n for n in (*want, *got) if got.get(n) != want.get(n))
            raise PlanError(
                f"the captured model's {name} is {_array(got.get(name))}, but these programs are "
                f"of a model where it is {_array(want.get(name))}; capture the same model, with "
                "nothing changed but the batch"
            )


def _array(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _leaf(program: AnyProgram, union: UnionArray) -> Any:
    return union.arrays[0] if program.homes.single else union
