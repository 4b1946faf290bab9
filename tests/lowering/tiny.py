"""A tiny GPT, its captured graph and plans over it, for the tests of lowering and training."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.capture.trace import Captured, trace
from shardpar.config.model_source import load_model_source
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage

BATCH, LENGTH = 8, 32
gpt: Any = load_model_source(Path(__file__).parents[2] / "models" / "gpt.py")


@cache
def captured(compute_dtype: str = "float32", **options: Any) -> Captured:
    sizes = {"vocab_size": 64, "layers": 2, "width": 64, "heads": 8, "max_length": LENGTH}
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    return trace(
        gpt.loss,
        lambda rngs: gpt.build(gpt.GPTOptions(**{**sizes, **options}), rngs),
        {"inputs": tokens, "targets": tokens},
        compute_dtype=compute_dtype,
        causal=True,
    )


def plan_of(*strategies: LayerStrategy, devices: int = 8, microbatch: int = BATCH) -> Plan:
    stage = Stage(tuple(range(devices)), Mesh.factored(devices), strategies)
    return Plan("test", BATCH, (Pipeline(BATCH, microbatch, (stage,)),))


def uniform(devices: int = 8, microbatch: int = BATCH, **choices: Any) -> Plan:
    strategy = LayerStrategy("embed..outside", **choices)
    return plan_of(strategy, devices=devices, microbatch=microbatch)


def batches(count: int, vocab: int = 64) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {
            name: random.integers(0, vocab, (BATCH, LENGTH)).astype(np.int32)
            for name in ("inputs", "targets")
        }
        for _ in range(count)
    ]
