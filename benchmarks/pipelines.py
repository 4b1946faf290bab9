"""What stage programs cost beyond their work: dispatch per action, and a step against one jit.

    python -m benchmarks.pipelines [--json]

Two stages of one virtual device each. The dispatch is that of a model so small that its work
does not count. Steps are in CPU-seconds of the whole process, interleaved: the same model through
programs of stages (1f1b), as equal stages in one program (single_jit), and as one jit on one
device. All train the same batches and must have the same losses. Stages in one program compute
on every tick, so with m micro-batches they do (m + 1) / m of the work of the layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import gpt
from shardpar.capture.trace import Captured, trace
from shardpar.lowering.devices import use_virtual_devices
from shardpar.lowering.pipelined import PipelinedProgram
from shardpar.lowering.program import Program
from shardpar.lowering.shares import shares_of
from shardpar.lowering.single_jit import SingleJitProgram
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage

LENGTH, ROUNDS, STEPS = 64, 9, 13


def captured(width: int, batch: int) -> Captured:
    sizes = gpt.GPTOptions(vocab_size=256, layers=4, width=width, heads=4, max_length=LENGTH)
    tokens = jax.ShapeDtypeStruct((batch, LENGTH), jnp.int32)
    return trace(
        gpt.loss, lambda rngs: gpt.build(sizes, rngs), {"inputs": tokens, "targets": tokens}
    )


def plan_of(batch: int, microbatch: int, *runs: str, devices: int = 1) -> Plan:
    stages = []
    for number, run in enumerate(runs):
        first = number * devices
        mesh = Mesh.factored(devices)
        stages.append(Stage(tuple(range(first, first + devices)), mesh, (LayerStrategy(run),)))
    return Plan("bench", batch, (Pipeline(batch, microbatch, tuple(stages)),))


def batch_of(batch: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    names = ("inputs", "targets")
    return {n: random.integers(0, 256, (batch, LENGTH)).astype(np.int32) for n in names}


def dispatch_ms(devices: int, batch: int = 64) -> tuple[float, float]:
    """Median milliseconds per action of a model whose work does not count: as the clock has it,
    which counts waiting for cores that devices keep busy, and of the dispatching thread's CPU.
    """
    halves = ("embed..blocks[1]", "blocks[2]..outside")
    program = PipelinedProgram(
        captured(16, batch), plan_of(batch, devices, *halves, devices=devices), optax.sgd(1e-3)
    )
    state, rows = program.init(0), batch_of(batch)
    seen, used = [], []
    for _ in range(ROUNDS):
        parts = program.homes.split(state)
        run = program.begin(
            [p.params for p in parts], [p.rest for p in parts], shares_of(rows, program.plan)
        )
        jax.block_until_ready(run.weights)
        start, cpu_s = time.perf_counter(), time.thread_time()
        for task in program.order.tasks:
            run.do(task)
        seen.append((time.perf_counter() - start) / len(program.order.tasks))
        used.append((time.thread_time() - cpu_s) / len(program.order.tasks))
        jax.block_until_ready(run.gathered)
        state, _ = program.step(state, rows)
    return 1e3 * statistics.median(seen), 1e3 * statistics.median(used)


def step_cpu_s(step: Callable[[Any, Any], Any], state: Any, rows: Any) -> tuple[Any, float, float]:
    start = time.process_time()
    state, metrics = step(state, rows)
    jax.block_until_ready((state, metrics))
    return state, time.process_time() - start, float(metrics["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    use_virtual_devices(8)
    out: dict[str, Any] = {}
    for devices, name in ((1, "1_device"), (2, "2_devices")):
        clock, cpu = dispatch_ms(devices)
        out[f"dispatch_ms_{name}"] = round(clock, 3)
        out[f"dispatch_cpu_ms_{name}"] = round(cpu, 3)
    batch, microbatch = 16, 2
    source, rule = captured(256, batch), optax.sgd(1e-3)
    halves = plan_of(batch, microbatch, "embed..blocks[1]", "blocks[2]..outside")
    (pipeline,) = halves.pipelines
    equal = replace(halves, pipelines=(replace(pipeline, schedule="single_jit"),))
    programs: dict[str, Any] = {
        "stage_programs": PipelinedProgram(source, halves, rule),
        "single_jit": SingleJitProgram(source, equal, rule),
        "one_jit": Program(source, plan_of(batch, microbatch, "embed..outside"), rule),
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    states = {}
    for name, program in programs.items():
        program.compile()
        states[name] = program.init(0)
    rows = batch_of(batch)
    for turn in range(STEPS):
        losses = []
        # Each goes first as often as the others.
        order = list(programs)[turn % len(programs) :] + list(programs)[: turn % len(programs)]
        for name in order:
            states[name], cpu_s, loss = step_cpu_s(programs[name].step, states[name], rows)
            losses.append(loss)
            if turn:
                times[name].append(cpu_s)
        assert max(losses) / min(losses) - 1 < 1e-5, losses
    for name, seen in times.items():
        out[f"{name}_cpu_s"] = round(statistics.median(seen), 3)
    for one, other in (("stage_programs", "one_jit"), ("stage_programs", "single_jit"),
                       ("single_jit", "one_jit")):  # fmt: skip
        ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
        out[f"{one}_over_{other}"] = round(statistics.median(ratios), 3)
    if args.json:
        print(json.dumps(out))
    else:
        for name, value in out.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
