"""shardpar's compiled step against the same model written by hand with jit, optax and shardings.

Both steps run interleaved in one process, in pairs, and the ratio of each pair's
times is reported, so a machine that slows down slows both. Collectives are counted
in both compiled programs.

    python benchmarks/step_overhead.py [--pairs 40] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from shardpar.lowering.devices import use_virtual_devices

use_virtual_devices(8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from shardpar.capture.trace import trace  # noqa: E402
from shardpar.config.model_source import load_model_source  # noqa: E402
from shardpar.lowering.collectives import collectives, op_counts  # noqa: E402
from shardpar.lowering.options import ProgramOptions  # noqa: E402
from shardpar.lowering.program import Program  # noqa: E402
from shardpar.spec import mesh as spec  # noqa: E402
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage  # noqa: E402

BATCH, LENGTH = 16, 128
gpt: Any = load_model_source(Path(__file__).parents[1] / "models" / "gpt.py")
OPTIONS = gpt.GPTOptions(vocab_size=512, layers=4, width=256, heads=8, max_length=LENGTH)
TENSOR = {"vocab", "mlp", "heads"}
WHO = ("hand", "ours")


@dataclass(frozen=True)
class Case:
    """One way to lay the model out: devices, shardpar's strategy, and the expert's mesh axes."""

    name: str
    devices: int
    strategy: dict[str, tuple[str, ...]]
    data: int = 1
    fsdp: bool = False
    tensor: int = 1
    zero1: bool = False
    gather: bool = False  # the expert asks for whole parameters once, before the model runs


CASES = (
    Case("1 device", 1, {}),
    Case("dp8", 8, {}, data=8),
    Case("fsdp8", 8, {"fsdp": ("a", "b", "c")}, data=8, fsdp=True),
    Case("fsdp8, gathered", 8, {"fsdp": ("a", "b", "c")}, data=8, fsdp=True, gather=True),
    Case("tp8", 8, {"tensor": ("a", "b", "c")}, tensor=8),
    Case("dp2 x tp4", 8, {"tensor": ("b", "c")}, data=2, tensor=4),
    Case("zero1", 8, {"zero1": ("a", "b", "c")}, data=8, zero1=True),
)


def by_hand(case: Case) -> tuple[Any, Any]:
    """The expert's step: (compiled step, state, batch sharding)."""
    mesh = Mesh(
        np.array(jax.devices()[: case.devices]).reshape(case.data, case.tensor),
        ("data", "tensor"),
        axis_types=(AxisType.Auto,) * 2,
    )
    with nnx.use_eager_sharding(False):
        model = gpt.build(OPTIONS, nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)
    names = {
        path: tuple(variable.get_metadata().get("out_sharding") or ())
        for path, variable in nnx.to_flat_state(params)
    }
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(params)}

    def spec_of(path: Any, split_all: bool) -> P:
        shape = flat[path].shape
        entries: list[Any] = [None] * len(shape)
        if case.tensor > 1:
            for dim, name in enumerate(names[path]):
                if name in TENSOR:
                    entries[dim] = "tensor"
                    break
        if split_all and flat[path].size >= 2**14:
            free = [d for d, n in enumerate(shape) if entries[d] is None and n % case.data == 0]
            entries[max(free, key=lambda d: (shape[d], -d))] = "data"
        return P(*entries)

    param_sh = {p: NamedSharding(mesh, spec_of(p, case.fsdp)) for p in flat}
    slot_sh = {p: NamedSharding(mesh, spec_of(p, case.fsdp or case.zero1)) for p in flat}
    optimizer = optax.adamw(1e-3)
    shapes = jax.eval_shape(optimizer.init, flat)
    whole = NamedSharding(mesh, P())
    opt_sh = jax.tree_util.tree_map_with_path(
        lambda path, _: next(
            (slot_sh[k.key] for k in path if isinstance(k, jax.tree_util.DictKey)), whole
        ),
        shapes,
    )
    batch_sh = NamedSharding(mesh, P("data"))
    template = nnx.to_flat_state(params)

    def loss(flat: Any, batch: Any) -> Any:
        if case.gather:
            flat = {p: jax.lax.with_sharding_constraint(x, whole) for p, x in flat.items()}
        state = nnx.from_flat_state(
            [(path, variable.replace(flat[path])) for path, variable in template]
        )
        total, weight = gpt.loss(nnx.merge(graphdef, state), batch)
        return total / weight

    def step(flat: Any, opt: Any, batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(flat, batch)
        grads = {p: jax.lax.with_sharding_constraint(g, slot_sh[p]) for p, g in grads.items()}
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / jnp.maximum(norm, 1e-16)), grads)
        updates, opt = optimizer.update(grads, opt, flat)
        return optax.apply_updates(flat, updates), opt, {"loss": value, "grad_norm": norm}

    jitted = jax.jit(
        step,
        donate_argnums=(0, 1),
        in_shardings=(param_sh, opt_sh, batch_sh),
        out_shardings=(param_sh, opt_sh, whole),
    )
    flat = jax.device_put(flat, param_sh)
    opt = jax.device_put(optimizer.init(flat), opt_sh)
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    compiled = jitted.lower(flat, opt, {"inputs": tokens, "targets": tokens}).compile()
    return compiled, (flat, opt, batch_sh)


def by_shardpar(case: Case) -> Program:
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    captured = trace(
        gpt.loss,
        lambda rngs: gpt.build(OPTIONS, rngs),
        {"inputs": tokens, "targets": tokens},
        causal=True,
    )
    strategy = LayerStrategy("embed..outside", **case.strategy)
    stage = Stage(tuple(range(case.devices)), spec.Mesh.factored(case.devices), (strategy,))
    plan = Plan("bench", BATCH, (Pipeline(BATCH, BATCH, (stage,)),))
    options = ProgramOptions(gradient_clip=1.0, skip_nonfinite=False, layers="unroll")
    return Program(captured, plan, optax.adamw(1e-3), options)


def measure(case: Case, pairs: int) -> dict[str, Any]:
    compiled, (flat, opt, batch_sh) = by_hand(case)
    program = by_shardpar(case)
    random = np.random.default_rng(0)
    batch = {
        k: random.integers(0, OPTIONS.vocab_size, (BATCH, LENGTH)).astype(np.int32)
        for k in ("inputs", "targets")
    }
    state = program.init(0)
    _ = program.compiled_step

    def hand() -> float:
        nonlocal flat, opt
        flat, opt, metrics = compiled(flat, opt, jax.device_put(batch, batch_sh))
        return float(metrics["loss"])

    def ours() -> float:
        nonlocal state
        state, metrics = program.step(state, batch)
        return float(metrics["loss"])

    def seconds(run: Callable[[], float]) -> tuple[float, float]:
        start = time.perf_counter()
        value = run()
        return time.perf_counter() - start, value

    for _ in range(3):
        gap = abs(hand() - ours())
    ratios = []
    for pair in range(pairs):
        first, second = (hand, ours) if pair % 2 else (ours, hand)
        a, b = seconds(first)[0], seconds(second)[0]
        ratios.append(b / a if pair % 2 else a / b)
    low, high = interval(ratios)
    texts = compiled.as_text(), program.compiled_step.as_text()
    counted = [
        {(c.kind, c.group_size): (c.count, c.num_bytes) for c in collectives(text)}
        for text in texts
    ]
    heavy = [{k: op_counts(text).get(k, 0) for k in ("dot", "fusion", "while")} for text in texts]
    return {
        "case": case.name,
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(low, 4), round(high, 4)],
        "pairs": pairs,
        "collectives_hand": {f"{k}/{g}": v for (k, g), v in counted[0].items()},
        "collectives_ours": {f"{k}/{g}": v for (k, g), v in counted[1].items()},
        "ops_hand": heavy[0],
        "ops_ours": heavy[1],
        "loss_gap": gap,
    }


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float]:
    """A 95% bootstrap interval of the median."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (draws, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--case", help="only the case of this name")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [c for c in CASES if arguments.case in (None, c.name)]
    rows = [measure(case, arguments.pairs) for case in cases]
    if arguments.json:
        for row in rows:
            print(json.dumps(row))
        return
    print("| case | ratio | 95% interval | dot, fusion | collectives by hand | shardpar |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        text = [
            ", ".join(f"{n} {k} {b:,} B" for k, (n, b) in row[f"collectives_{who}"].items())
            or "none"
            for who in WHO
        ]
        ops = [f"{row[f'ops_{who}']['dot']}, {row[f'ops_{who}']['fusion']}" for who in WHO]
        low, high = row["interval"]
        print(
            f"| {row['case']} | {row['ratio']:.3f} | {low:.3f}–{high:.3f} | {ops[0]} → {ops[1]} | "
            f"{text[0]} | {'the same' if text[0] == text[1] else text[1]} |"
        )


if __name__ == "__main__":
    main()
