"""Predicted against compiled bytes per device, over models, plans and targets.

    python benchmarks/memory_error.py cpu
    python benchmarks/memory_error.py h100     # needs the extra cuda-aot
    python benchmarks/memory_error.py v5e      # needs the extra tpu-aot

Each pair is a model and a plan of one stage on eight devices: data, fsdp, tensor and sequence
parallelism, ZeRO-1, every recompute choice, one and two micro-batches. The prediction is made
before the plan is compiled, from what the target's compiler says of single layers. A plan is
called fitting when it is predicted to fill at most nine tenths of a device
(`plan.memory_fraction`); it is counted as wrong when a device of just that size could not hold
the compiled program. Two models are held out: the cost model was never adjusted to them, and their
figures are given apart, too. `--every 3` takes a third of the pairs, another one of each model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models import gpt, llama
from shardpar.capture.trace import Captured, trace
from shardpar.lowering.devices import CPU_EXTRA_COPIES, use_virtual_devices
from shardpar.lowering.options import ProgramOptions
from shardpar.lowering.program import Program
from shardpar.lowering.target import Target, compile_for, prepare_environment
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.setting import Workload
from shardpar.planner.strategies import describe
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage

DEVICES, BATCH = 8, 16
MIB = 2**20
TARGETS = {
    "cpu": None,
    "h100": Target("cuda", "h100", (1, 8)),
    "v5e": Target("tpu", "v5e", (2, 4)),
}


@dataclass(frozen=True)
class Model:
    """One model of the benchmark; `held_out` if nothing was adjusted to it."""

    name: str
    module: Any
    options: Any
    length: int
    held_out: bool = False


def models() -> tuple[Model, ...]:
    small = llama.LlamaOptions(
        vocab_size=4096, layers=8, width=1024, heads=8, kv_heads=8, mlp_width=2816, max_length=512
    )
    wide = gpt.GPTOptions(vocab_size=8192, layers=12, width=768, heads=8, max_length=512)
    grouped = llama.LlamaOptions(
        vocab_size=8192, layers=6, width=768, heads=16, kv_heads=8, mlp_width=2048, max_length=1024
    )
    untied = gpt.GPTOptions(
        vocab_size=2048, layers=16, width=512, heads=8, max_length=256, tied=False
    )
    return (
        Model("llama 8x1024", llama, small, 512),
        Model("gpt 12x768", gpt, wide, 512),
        Model("llama 6x768, grouped queries", llama, grouped, 1024, held_out=True),
        Model("gpt 16x512, untied", gpt, untied, 256, held_out=True),
    )


def plans() -> Iterator[tuple[LayerStrategy, int]]:
    """(strategy of all layers, micro-batches)."""
    axes = Mesh.factored(DEVICES).names
    layouts: tuple[dict[str, Any], ...] = (
        {},
        {"fsdp": axes},
        {"zero1": axes},
        {"tensor": axes},
        {"tensor": axes[2:], "fsdp": axes[:2], "sequence_parallel": True},
        {"tensor": axes[1:], "fsdp": axes[:1]},
        {"fsdp": axes[1:], "zero1": axes[:1]},
    )
    for layout in layouts:
        for recompute in ("none", "selective", "full"):
            for microbatches in (1, 2):
                yield LayerStrategy("embed..outside", recompute=recompute, **layout), microbatches


def cluster(target: str) -> Cluster:
    kind = DeviceKind(
        "unit", (("bfloat16", 1e14), ("float32", 1e13)), 1e12, 1e12,
        extra_copies=CPU_EXTRA_COPIES if target == "cpu" else 0.0,
    )  # fmt: skip
    return Cluster("eight", (kind,), (Hosts("unit", DEVICES),), Link(1e11), Link(1e10))


def capture(model: Model, dtype: str, device: Any) -> Captured:
    tokens = jax.ShapeDtypeStruct((BATCH, model.length), jnp.int32)
    return trace(
        model.module.loss,
        lambda rngs: model.module.build(model.options, rngs),
        {"inputs": tokens, "targets": tokens},
        compute_dtype=dtype,
        device=device,
    )


def compiled_bytes(program: Program, target: Target | None) -> int:
    lowered = program.lower_step()
    if target is not None:
        return compile_for(target, lowered).needed_bytes
    memory = lowered.compile().memory_analysis()
    return int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--every", type=int, default=1, help="Take each N-th pair only.")
    parser.add_argument("--held-out", action="store_true", help="Take held-out models only.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    target = TARGETS[args.target]
    if target is None:
        use_virtual_devices(DEVICES)
        devices = list(jax.devices())
    else:
        prepare_environment()
        devices = target.devices()
    dtype = "float32" if target is None else "bfloat16"
    fraction = SearchOptions().memory_fraction
    found: list[tuple[bool, float, bool]] = []
    for position, model in enumerate(models()):
        if args.held_out and not model.held_out:
            continue
        captured = capture(model, dtype, devices[0])
        for number, (strategy, microbatches) in enumerate(plans()):
            if (number + position) % args.every:
                continue
            stage = Stage(tuple(range(DEVICES)), Mesh.factored(DEVICES), (strategy,))
            plan = Plan("eight", BATCH, (Pipeline(BATCH, BATCH // microbatches, (stage,)),))
            work = Workload(BATCH, dtype)
            predicted = plan_cost(plan, captured.graph, cluster(args.target), work).peak_bytes
            options = ProgramOptions(compute_dtype=dtype, layers="scan")
            program = Program(captured, plan, optax.adamw(1e-3), options, devices)
            actual = compiled_bytes(program, target)
            error = predicted / actual - 1
            found.append((model.held_out, error, actual > predicted / fraction))
            if not args.json:
                print(
                    f"{args.target} {model.name}: {describe(strategy, stage.mesh)}, "
                    f"{microbatches} micro-batches: predicted {predicted / MIB:.0f} MiB, compiled "
                    f"{actual / MIB:.0f}, {error:+.1%}",
                    flush=True,
                )
    for which, pairs in (("all", found), ("held out", [pair for pair in found if pair[0]])):
        if pairs:
            print(json.dumps({"target": args.target, "models": which, **summary(pairs)}))


def summary(pairs: list[tuple[bool, float, bool]]) -> dict[str, float]:
    """Figures of some pairs: (held out, relative error, called fitting though it is not)."""
    errors = [error for _, error, _ in pairs]
    sizes = sorted(map(abs, errors))
    return {
        "pairs": len(pairs),
        "median": round(statistics.median(sizes), 4),
        "p90": round(sizes[int(0.9 * (len(sizes) - 1))], 4),
        "worst": round(sizes[-1], 4),
        "lowest": round(min(errors), 4),
        "called_fitting_but_not": sum(unsafe for _, _, unsafe in pairs),
    }


if __name__ == "__main__":
    main()
