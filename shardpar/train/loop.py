"""The training loop: batches in, metrics and checkpoints out, stoppable at any moment.

A checkpoint holds the state and the position in the data, and metrics later than
the checkpoint are dropped on resume, so a run that was killed anywhere and resumed
is the run that was never killed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from shardpar.errors import PlanError, RunError
from shardpar.lowering.devices import peak_bytes_in_use
from shardpar.lowering.lower import AnyProgram
from shardpar.lowering.state import TrainState
from shardpar.lowering.switch import Programs
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.metrics import MetricsLog, Unwritten
from shardpar.run.options import CheckpointOptions
from shardpar.run.peers import ANSWER_S, Peers
from shardpar.run.progress import Figures, Progress
from shardpar.run.retention import due
from shardpar.run.watchdog import Watchdog
from shardpar.spec.plan import Plan
from shardpar.spec.text import plan_from_text, plan_to_text
from shardpar.train.clock import Clock
from shardpar.train.data import Batch, Batches, TextData, eval_batches, train_batches
from shardpar.train.options import TrainOptions
from shardpar.train.requests import Change
from shardpar.train.stepping import Feed, OneLength, Start
from shardpar.train.watch import SpeedWatch

_LONGEST_S = 24 * 3600.0
POSITION = "position.json"
PLAN = "plan.yaml"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      program: the last plan's.
      state: the last state.
      step: steps done in all.
      loss: last training loss; None if no step ran.
      eval_loss: last evaluation's loss; None if there was none.
      stopped: whether a signal ended it before `train.steps`.
      skipped: steps whose gradient was not finite.
    """

    program: AnyProgram
    state: TrainState
    step: int
    loss: float | None
    eval_loss: float | None
    stopped: bool
    skipped: int

    @property
    def diverged(self) -> bool:
        """Whether the last loss was not finite, on the evaluation text neither if there is one."""
        last = [loss for loss in (self.loss, self.eval_loss) if loss is not None]
        return bool(last) and not any(map(math.isfinite, last))


@dataclass(frozen=True)
class Surroundings:
    """What the loop touches outside itself.

    Attributes:
      checkpoints, metrics, progress: of the run directory.
      files: small texts to keep beside each checkpoint; the plan in force is kept too.
      begun: called when the state is there and steps will be done.
      should_stop: asked after every step.
      peak_flops: of all devices in the compute dtype; None where unknown, then MFU is n/a.
      peers: the processes that train together.
      wanted_plan: asked in the first process which plan takes over after so many steps, given
        the one in force; None leaves that.
      switched: told in the first process which plan is in force from now on.
      devices: asked in the first process which devices are not lost.
      speeds: probes the devices now and then; None where that would say nothing.
      supervised: whether a supervisor starts this process again when it ends.
      stepping: how a step is made of a batch, under the plan in force.
      underway: called when the first step has been made.
    """

    checkpoints: Checkpoints
    metrics: MetricsLog | Unwritten
    progress: Progress
    files: Mapping[str, str]
    begun: Callable[[], None]
    should_stop: Callable[[], bool]
    peak_flops: float | None
    peers: Peers
    wanted_plan: Callable[[int, Plan], Change | None]
    switched: Callable[[Plan], None]
    devices: Callable[[], Collection[int]] = tuple
    speeds: SpeedWatch | None = None
    supervised: bool = False
    stepping: Start = OneLength
    underway: Callable[[], None] = lambda: None


def train(
    programs: Programs,
    plan: Plan,
    data: TextData,
    options: TrainOptions,
    saving: CheckpointOptions,
    around: Surroundings,
) -> Outcome:
    """Trains until `options.steps`, from the newest good checkpoint if there is one.

    Args:
      programs: of the model, under any plan.
      plan: the one to begin with.
      data: training and evaluation windows.
      options: steps, batch, evaluation.
      saving: when to save.
      around: checkpoints, metrics, progress, the other processes.

    Raises:
      DataError: the data do not fit the checkpoint or the batch.
      CheckpointError: every checkpoint is damaged, or the disk is full.
      RunError: another process does not answer.
    """
    with train_batches(data.train, options.global_batch, options.seed) as batches:
        loop = _Loop(programs, plan, batches, data, options, saving, around)
        state, start = _begin(loop.program, batches, options, around)
        if start < options.steps:
            around.begun()
        try:
            return loop.run(state, start)
        finally:
            loop.feed.close()


def _begin(
    program: AnyProgram, batches: Batches, options: TrainOptions, around: Surroundings
) -> tuple[TrainState, int]:
    checkpoints = around.checkpoints
    if not checkpoints.steps():
        checkpoints.require_none_lost()
        around.metrics.truncate_after(0)
        with around.progress.phase("initialising"):
            state = program.init(options.seed)
            jax.block_until_ready(state)
        return state, 0
    return _restored(program, batches, around)


def _restored(
    program: AnyProgram, batches: Batches, around: Surroundings
) -> tuple[TrainState, int]:
    """The newest good checkpoint, with the data and the metrics taken back to it."""
    checkpoints = around.checkpoints
    with around.progress.phase("restoring"):
        restored = checkpoints.restore(None, program.saved_shapes)
        checkpoints.discard_after(restored.step)
    around.metrics.truncate_after(restored.step)
    batches.restore(json.loads(restored.files[POSITION]))
    around.progress.say(f"resumed from step {restored.step}")
    return program.from_saved(restored.state), restored.step


def _evaluation_batches(
    program: AnyProgram, data: TextData, options: TrainOptions
) -> tuple[Batch, ...]:
    """Batches of the plan's micro-batch size; the samples in them do not depend on the plan."""
    size = program.pipeline.microbatch
    wanted = min(options.eval_batches * options.global_batch, len(data.evaluation))
    # Every plan's micro-batch divides the global batch, so whole ones suit them all.
    wanted -= wanted % (options.global_batch if wanted >= options.global_batch else size)
    if wanted == 0:
        return ()
    samples = eval_batches(data.evaluation, 1, wanted)
    count = len(samples) // size
    return tuple(
        {
            key: np.concatenate([sample[key] for sample in samples[i * size : (i + 1) * size]])
            for key in samples[0]
        }
        for i in range(count)
    )


class _Loop:
    """One run of the loop; fields are what stays the same, `run` holds what changes."""

    def __init__(
        self,
        programs: Programs,
        plan: Plan,
        batches: Batches,
        data: TextData,
        options: TrainOptions,
        saving: CheckpointOptions,
        around: Surroundings,
    ) -> None:
        self.programs, self.program = programs, programs.program(plan)
        self.batches, self.data = batches, data
        self.stepping = around.stepping(self.program, ())
        self.feed: Feed = batches
        self.evaluation = _evaluation_batches(self.program, data, options)
        self.options, self.saving, self.around = options, saving, around
        self.flops_per_token = programs.captured.graph.flops_per_token
        self.warned_mfu = False
        self.is_underway = False
        self.watchdog = Watchdog(
            around.peers,
            options.stuck_after_s,
            self._waiting_for,
            around.progress.say_always,
            alone=around.supervised,
        )

    def run(self, state: TrainState, start: int) -> Outcome:
        around, steps = self.around, self.options.steps
        if start >= steps:
            around.progress.say(
                f"nothing to do: {start} steps are done and train.steps is {steps}; "
                "raise train.steps to go on"
            )
            return Outcome(self.program, state, start, None, None, False, 0)
        self.watchdog.saw(start)
        with self.watchdog:
            return self._steps(state, start)

    def _waiting_for(self) -> str:
        return self.stepping.waiting_for()

    def _steps(self, state: TrainState, start: int) -> Outcome:
        around, steps = self.around, self.options.steps
        self.feed = self.stepping.feed(self.batches)
        state, start = self._under(self._decide(start, start, time.monotonic()), state, start)
        self._compile()
        clock = Clock()
        loss: float | None = None
        eval_loss: float | None = None
        last_saved, last_saved_s = start, time.monotonic()
        pending: _Pending | None = None
        skipped, step, stopped = 0, start, False
        while step < steps:
            with clock.waiting():
                batch = next(self.feed)
            state, metrics = self.stepping.step(state, batch)
            step += 1
            if pending is not None:
                # The step just sent is running while the one before is written down.
                loss, skip = self._record(pending, clock)
                skipped += skip
            pending = _Pending(step, metrics, batch["sample"], self.stepping.tokens(batch))
            decided = self._decide(step, last_saved, last_saved_s, pending.tokens)
            stopped = decided["stop"]
            evaluate = self._evaluation_due(step)
            if evaluate or decided["save"] or "plan" in decided or decided["probe"]:
                loss, skip = self._record(pending, clock)
                skipped, pending = skipped + skip, None
            if evaluate and not stopped:
                eval_loss = self._evaluate(state, step)
                clock.restart()
            if decided["save"]:
                self._save(step, state)
                last_saved, last_saved_s = step, time.monotonic()
                clock.restart()
            if stopped:
                break
            if decided["probe"] and around.speeds is not None:
                around.speeds.look(time.monotonic(), decided["probe"])
                clock.restart()
            if "plan" in decided:
                state, step = self._under(decided, state, step)
                last_saved = min(last_saved, step)
                self._compile()
                clock.restart()
        with self.watchdog.paused():
            around.checkpoints.wait()
        return Outcome(self.program, state, step, loss, eval_loss, stopped, skipped)

    def _decide(
        self,
        step: int,
        last_saved: int,
        last_saved_s: float,
        tokens: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """What is to be done after so many steps: the same in every process."""
        around, steps = self.around, self.options.steps

        if around.should_stop() and not around.peers.is_first:
            around.peers.tell("stop", "asked")

        def choose() -> dict[str, Any]:
            asked = around.should_stop() or around.peers.told("stop") is not None
            stop = step < steps and asked
            timely = due(
                self.saving,
                step=step,
                now_s=time.monotonic(),
                last_step=last_saved,
                last_s=last_saved_s,
            )
            save = step > last_saved and (stop or step == steps or timely)
            due_ = around.speeds is not None and around.speeds.is_due(time.monotonic())
            probe = sorted(around.devices()) if due_ else []
            decided: dict[str, Any] = {"stop": stop, "save": save, "probe": probe}
            decided["tokens"] = dict(tokens)
            if not stop and step < steps:
                change = around.wanted_plan(step, self.program.plan)
                if change is not None:
                    decided |= {"plan": plan_to_text(change.plan), "lost": change.lost}
            return decided

        stuck_s = self.options.stuck_after_s
        # The first process may still be compiling what its first step needs.
        wait_s = max(2 * stuck_s, ANSWER_S) if stuck_s else _LONGEST_S
        decided = around.peers.decide("next step", choose, wait_s)
        if decided["tokens"] != dict(tokens):
            raise RunError(
                f"step {step} was shared out otherwise here than in the first process "
                f"({dict(tokens)}, there {decided['tokens']}); use the same data and the same "
                "versions of shardpar, numpy and scipy in all processes"
            )
        return decided  # type: ignore[no-any-return]

    def _under(
        self, decided: Mapping[str, Any], state: TrainState, step: int
    ) -> tuple[TrainState, int]:
        """The state under the plan that was decided on, and the step it is of."""
        if "plan" not in decided:
            return state, step
        plan = plan_from_text(decided["plan"], "the plan decided on")
        lost = decided["lost"]
        try:
            self.stepping = self.around.stepping(self.programs.program(plan), lost)
        except PlanError as error:
            if lost:
                raise
            self.around.progress.say(f"the plan stays: {error}")
            return state, step
        begun = time.perf_counter()
        self._rewind()
        with self.watchdog.paused(), self.around.progress.phase("switching to another plan"):
            if lost:
                state, step = self._without(lost, plan, state, step)
            else:
                switched = self.programs.switch(self.program, state, plan)
                self.program, state = switched.program, switched.state
            jax.block_until_ready(state)
        self.feed = self.stepping.feed(self.batches)
        self.evaluation = _evaluation_batches(self.program, self.data, self.options)
        if self.around.peers.is_first:
            self.around.switched(plan)
            self.around.metrics.write(
                step, {"switch_s": round(time.perf_counter() - begun, 6), "plan": plan.in_short}
            )
        return state, step

    def _rewind(self) -> None:
        """Takes the batches back to where steps have used them up."""
        if self.feed is not self.batches:
            position = self.feed.position
            self.feed.close()
            self.batches.restore(position)

    def _without(
        self, lost: Sequence[int], plan: Plan, state: TrainState, step: int
    ) -> tuple[TrainState, int]:
        """The state from devices that live; what they do not have from a checkpoint."""
        around = self.around
        around.checkpoints.wait()
        rescued = self.programs.rescue(self.program, state, plan, lost)
        self.program = rescued.program
        if not rescued.missing:
            return rescued.state(), step
        saved = around.checkpoints.steps()
        if not saved:
            raise RunError(
                f"devices {list(lost)} held the only copy of {rescued.missing[0]} and "
                f"{len(rescued.missing) - 1} others, and there is no checkpoint to take them "
                "from; save more often (checkpoint.every_steps), or keep copies (plan.data=2)"
            )
        # Slices of an older step would not fit the others: all or nothing is taken from it.
        around.progress.say(
            f"{len(rescued.missing)} arrays have no living copy: going back to step {saved[-1]}"
        )
        return _restored(self.program, self.batches, around)

    def _compile(self) -> None:
        progress = self.around.progress
        with self.watchdog.paused(), progress.phase("compiling the step"):
            begun = time.perf_counter()
            self.stepping.compile()
            progress.say(f"compiled in {time.perf_counter() - begun:.1f} s")
            # Connections are made in the first step, and wait for the others only so long.
            self.around.peers.gather("compiled", True, _LONGEST_S)

    def _evaluation_due(self, step: int) -> bool:
        if not self.evaluation:
            return False
        every = self.options.eval_every
        return step == self.options.steps or (every > 0 and step % every == 0)

    def _record(self, pending: _Pending, clock: Clock) -> tuple[float, int]:
        values = {name: np.asarray(value).item() for name, value in pending.metrics.items()}
        clock.tick(pending.tokens["tokens"])
        self.watchdog.saw(pending.step)
        if not self.is_underway:
            self.is_underway = True
            self.around.underway()
        row: dict[str, Any] = {"loss": values["loss"], "grad_norm": values["grad_norm"]}
        tokens_per_s = mfu = None
        if clock.step_s:
            tokens_per_s = clock.tokens / clock.step_s
            row["tokens_per_s"] = round(tokens_per_s, 1)
            row["step_s"] = round(clock.step_s, 6)
            if self.around.peak_flops:
                mfu = tokens_per_s * self.flops_per_token / self.around.peak_flops
                row["mfu"] = round(mfu, 4)
                self._warn_mfu(mfu)
        peak_bytes = peak_bytes_in_use(self.program.used_devices)
        row["peak_bytes"] = int(peak_bytes)
        row["data_wait_s"] = round(clock.wait_s, 6)
        row |= {name: x for name, x in pending.tokens.items() if name != "tokens"}
        if self.options.log_samples:
            row["samples"] = _ids(pending.samples)
        if values["skipped"]:
            row["skipped"] = True
            row["samples"] = _ids(pending.samples)
            self.around.progress.say(
                f"step {pending.step}: the gradient is not finite, update skipped; "
                f"samples {row['samples']}"
            )
        self.around.metrics.write(pending.step, row)
        if pending.step % self.options.log_every == 0 or pending.step == self.options.steps:
            self.around.progress.update(
                Figures(
                    pending.step,
                    self.options.steps,
                    values["loss"],
                    tokens_per_s,
                    clock.step_s,
                    mfu,
                    peak_bytes,
                    min(1.0, clock.wait_s / clock.step_s) if clock.step_s else None,
                )
            )
        return values["loss"], int(values["skipped"])

    def _warn_mfu(self, mfu: float) -> None:
        if mfu > 1.0 and not self.warned_mfu:
            self.warned_mfu = True
            self.around.progress.say(
                f"MFU is {mfu:.0%}: above 100% the device's peak rate in its datasheet entry, "
                "or the FLOP count, is wrong"
            )

    def _evaluate(self, state: TrainState, step: int) -> float:
        with self.watchdog.paused(), self.around.progress.phase("evaluating"):
            sums = [self.program.evaluate(state, batch) for batch in self.evaluation]
            total = float(sum(np.asarray(t, np.float64) for t, _ in sums))
            weight = float(sum(np.asarray(w, np.float64) for _, w in sums))
        # A loss may mask every token of the evaluation text: then there is nothing to say.
        mean = total / weight if weight else math.nan
        self.around.metrics.write(step, {"eval_loss": mean})
        self.around.progress.say(f"step {step}: eval loss {mean:.4f}")
        return mean

    def _save(self, step: int, state: TrainState) -> None:
        files = {
            **self.around.files,
            PLAN: plan_to_text(self.program.plan),
            POSITION: json.dumps(self.feed.position),
        }
        with self.watchdog.paused():
            self.around.checkpoints.save(step, self.program.to_saved(state), files)


@dataclass(frozen=True)
class _Pending:
    """A step that was sent to the devices and not yet written down."""

    step: int
    metrics: Mapping[str, jax.Array]
    samples: np.ndarray
    tokens: Mapping[str, float]


def _ids(samples: np.ndarray) -> str:
    return ",".join(str(int(s)) for s in samples)
