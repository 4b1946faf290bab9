"""A model far bigger than this machine is captured in seconds, without one of its parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, resource, sys, time
start = time.perf_counter()
import jax, jax.numpy as jnp
from models import llama
from shardpar.capture.trace import trace

tokens = jax.ShapeDtypeStruct((64, 4096), jnp.int32)
for sizes in json.loads(sys.argv[1]):
    options = llama.LlamaOptions(**sizes)
    captured = trace(llama.loss, lambda rngs: llama.build(options, rngs),
                     {"inputs": tokens, "targets": tokens}, compute_dtype="bfloat16", causal=True)
    print(json.dumps({
        "parameters": captured.graph.num_parameters,
        "layers": len(captured.graph.layers),
        "classes": [cls.name for cls in captured.graph.classes],
        "live_bytes": sum(array.nbytes for array in jax.live_arrays()),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "seconds": time.perf_counter() - start,
    }))
"""
SEVENTY = {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672}


@pytest.mark.slow
def test_llamas_of_7_and_70_billion_parameters_are_captured_on_a_laptop():
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([{}, SEVENTY])],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    seven, seventy = map(json.loads, ran.stdout.splitlines())
    assert (seven["parameters"], seven["layers"]) == (6_738_415_616, 35)
    assert (seventy["parameters"], seventy["layers"]) == (68_976_648_192, 83)
    for got in (seven, seventy):
        assert got["classes"] == ["Embed", "Block", "Head", "outside"]
        assert got["live_bytes"] < 1e6
        assert got["peak_bytes"] < 1.5e9
        assert got["seconds"] < 60
