"""Exchanges that send only what is asked for train as those that send whole parts.

XLA on CPUs has no ragged all-to-all, so that an emulation of what its documentation says stands in
here; that TPUs' and GPUs' compilers take the program is seen with their compilers:

python -m tests.ps.test_ragged CLUSTER
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh

from shardpar import ps
from shardpar.errors import PlanError
from shardpar.lowering.target import prepare_environment, target_of
from shardpar.ps import table as table_module
from shardpar.ps.exchange import ROWS, Exchange
from shardpar.ps.table import TableState
from shardpar.spec.text import cluster_from_text
from tests.ps.test_program import Bag, batch, require_equal, squared, trained, trained_dense

ROOT = Path(__file__).parents[2]


def emulated(
    operand: Any, output: Any, input_offsets: Any, send_sizes: Any, output_offsets: Any,
    recv_sizes: Any, *, axis_name: str,
) -> Any:  # fmt: skip
    """`lax.ragged_all_to_all`, slice by slice; absurd where the receiver's sizes are wrong."""
    everyones = partial(lax.all_gather, axis_name=axis_name)
    data, begins, sizes, targets = map(
        everyones, (operand, input_offsets, send_sizes, output_offsets)
    )
    devices, slices = sizes.shape
    each, me = slices // devices, lax.axis_index(axis_name)
    place = jnp.arange(output.shape[0])
    for source in range(devices):
        for turn in range(each):
            which = me * each + turn
            begin, size, at = (x[source, which] for x in (begins, sizes, targets))
            wrong = recv_sizes[source * each + turn] != size
            values = data[source][jnp.clip(place - at + begin, 0, operand.shape[0] - 1)]
            values = jnp.where(wrong, jnp.array(-(2**30), values.dtype), values)
            inside = (place >= at) & (place < at + size)
            output = jnp.where(inside.reshape(-1, *[1] * (output.ndim - 1)), values, output)
    return output


@pytest.fixture
def sent(monkeypatch) -> list[int]:
    """Makes every exchange ragged; how many there were, traced."""
    calls: list[int] = []

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given[0].shape[0])
        return emulated(*given, **more)

    monkeypatch.setattr(lax, "ragged_all_to_all", counted)
    monkeypatch.setattr(table_module, "Exchange", lambda *given: Exchange(*given[:-1], True))
    return calls


@pytest.mark.parametrize(
    ("devices", "placement"),
    [
        (4, ps.Placement(rows=4)),
        (8, ps.Placement(rows=4, columns=2)),
        (8, ps.Placement(rows=2, columns=4)),
        (2, ps.Placement(rows=2, deal="ranges", extents=(3, 50))),
    ],
    ids=["rows", "grid", "another grid", "ranges"],
)
def test_ragged_exchanges_train_as_the_whole_table_would(sent, devices, placement):
    found, _ = trained(ps.AdaGrad(0.1), devices, ps.SparseOptions(placement))
    require_equal(found, trained_dense(ps.AdaGrad(0.1)))
    # Places there, rows back, gradients there.
    assert len(sent) % 3 == 0
    assert sent


def test_the_emulation_does_what_the_documentation_shows():
    def run(data, begins, sizes, targets, received):
        return emulated(
            data[0], jnp.zeros(4, jnp.int32), begins[0], sizes[0], targets[0], received[0],
            axis_name=ROWS,
        )[None]  # fmt: skip

    mesh = Mesh(np.array(jax.devices()[:2]), (ROWS,))
    given = [
        [[1, 2, 2], [3, 4, 0]], [[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]],
        [[1, 1], [2, 1]],
    ]  # fmt: skip
    spec = jax.P(ROWS)
    swapped = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)
    found = swapped(*(jnp.array(x, jnp.int32) for x in given))
    assert found.tolist() == [[1, 3, 0, 0], [2, 2, 4, 0]]


def test_cpus_are_refused_in_words():
    with pytest.raises(PlanError, match="no ragged all-to-all"):
        trained(ps.AdaGrad(0.1), 2, ps.SparseOptions(ragged=True))


# With the compilers.


def compiled(name: str) -> dict[str, int]:
    """How many ragged exchanges a step has that is compiled for a bundled cluster."""
    prepare_environment()
    text = (ROOT / "configs" / "clusters" / f"{name}.yaml").read_text()
    devices = target_of(cluster_from_text(text, name)).devices()
    size = len(devices)
    given = {n: np.repeat(x, size, axis=0) for n, x in batch(0).items()}
    program = ps.SparseProgram(
        squared, lambda rngs: Bag(ps.AdaGrad(0.1), rngs), optax.adam(1e-2), batch=given,
        devices=devices, options=ps.SparseOptions(ragged=True),
    )  # fmt: skip
    placed = program.tables["embed"]
    pieces = jax.ShapeDtypeStruct((placed.stored_rows, 4), np.float32)
    count, scratch = jax.ShapeDtypeStruct((), np.int32), np.zeros(placed.stored_rows, np.int32)
    table = TableState(pieces, (pieces,), count, scratch, np.zeros(2, np.uint32))
    tables = {
        "embed": jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            table, placed.shardings,
        )
    }  # fmt: skip
    state = program.state_shapes
    arrays, wanted = program.prepared(given)
    state = type(state)(state.dense, state.rest, state.optimizer, tables, state.step)
    text = program._step.lower(state, arrays, wanted).compile().as_text()
    return {"ragged": len(re.findall(r" ragged-all-to-all(?:-start)?\(", text))}


@pytest.mark.manual
@pytest.mark.parametrize(
    ("name", "wheel"), [("tpu-v5e-8", "libtpu"), ("h100x8", "jax_cuda12_plugin")]
)
def test_compilers_of_accelerators_take_it(name, wheel):
    if importlib.util.find_spec(wheel) is None:
        pytest.skip(f"no {wheel}; pip install 'shardpar[tpu-aot]' or 'shardpar[cuda-aot]'")
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ps.test_ragged", name],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["ragged"] >= 3


if __name__ == "__main__":
    print(json.dumps(compiled(sys.argv[1])))
