"""Tables on disk: bit for bit over any number of shards, deltas, and damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from shardpar import ps
from shardpar.errors import CheckpointError
from shardpar.ps.ids import IdMap, IdOptions
from shardpar.ps.saving import Savings
from shardpar.run.options import CheckpointOptions

ROWS = 29


class Scores(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rows = ps.Embed(ROWS, 3, bag="sum", rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.out(self.rows(batch["ids"]))[:, 0]


def loss(model: Any, batch: Any) -> jax.Array:
    return ((model(batch) - 1.0) ** 2).mean()


def batch(step: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(step).integers(0, ROWS, (24, 2))
    # Early steps touch a few rows only, so that a delta is smaller than the table.
    return {"ids": (ids % 5 if step else ids).astype(np.int32)}


def program(devices: int) -> ps.SparseProgram:
    return ps.SparseProgram(
        loss, Scores, optax.adam(0.1), batch=batch(0), devices=jax.devices()[:devices]
    )


def opened(
    path: Path,
    made: ps.SparseProgram,
    full_every: int,
    said: list[str],
    ids: IdMap | None = None,
) -> Savings:
    return Savings.open(path, made, CheckpointOptions(), full_every, said.append, ids)


def everything(made: ps.SparseProgram, state: Any) -> list[np.ndarray]:
    leaves = [*made.tables["rows"].whole(state.tables["rows"])]
    leaves += jax.tree.leaves((state.dense, state.rest, state.optimizer, state.step))
    return [np.array(leaf) for leaf in leaves]


def trained(path: Path, full_every: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What a run on 8 devices had at its full checkpoint and at its end, three steps later."""
    made, said = program(8), []
    state = made.init(seed=1)
    with opened(path, made, full_every, said) as savings:
        for step in range(4):
            arrays, wanted = made.prepared(batch(step))
            state, _ = made.take(state, arrays, wanted)
            savings.mark(wanted)
            if step == 0:
                first = everything(made, state)
            savings.save(step + 1, state, {"position.json": str(step + 1)})
        last = everything(made, state)
    assert not said
    return first, last


@pytest.mark.parametrize("full_every", [1, 9], ids=["full", "deltas"])
def test_eight_shards_are_read_by_three_bit_for_bit(tmp_path: Path, full_every: int) -> None:
    _, last = trained(tmp_path, full_every)
    made, said = program(3), []
    with opened(tmp_path, made, full_every, said) as savings:
        found = savings.latest()
    assert found is not None
    assert (found.step, found.files["position.json"]) == (4, "4")
    for ours, theirs in zip(everything(made, found.state), last, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not said
    deltas = list((tmp_path / "deltas").glob("[0-9]*"))
    assert len(deltas) == (0 if full_every == 1 else 1)


def test_a_flipped_byte_in_a_delta_is_told_and_the_full_one_is_used(tmp_path: Path) -> None:
    first, _ = trained(tmp_path, 9)
    arrays = [
        file for file in (tmp_path / "deltas").rglob("*") if file.is_file() and "/d/" in str(file)
    ]
    victim = max(arrays, key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    made, said = program(1), []
    with opened(tmp_path, made, 9, said) as savings:
        found = savings.latest()
    assert found is not None
    assert found.step == 1
    for ours, theirs in zip(everything(made, found.state), first, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any("cannot be read" in line for line in said)


def test_the_map_of_ids_is_kept_with_the_rows(tmp_path: Path) -> None:
    made, ids, said = program(1), IdMap(ROWS, IdOptions(admit_after=2)), []
    wide = np.random.default_rng(0).integers(0, 2**62, 60)
    for _ in range(3):
        ids(wide[:40])
    with opened(tmp_path, made, 1, said, ids) as savings:
        savings.save(1, made.init(), {})
    other = IdMap(ROWS, IdOptions(admit_after=2))
    with opened(tmp_path, made, 1, said, other) as savings:
        assert savings.latest() is not None
    assert not said
    for step in (wide[20:], wide):
        ours, theirs = ids(step), other(step)
        np.testing.assert_array_equal(ours.rows, theirs.rows)
        np.testing.assert_array_equal(ours.evicted_ids, theirs.evicted_ids)


def test_another_table_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, 1)

    class Wider(Scores):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.rows = ps.Embed(ROWS + 1, 3, bag="sum", rngs=rngs)

    made = ps.SparseProgram(loss, Wider, optax.adam(0.1), batch=batch(0), devices=jax.devices()[:1])
    with (
        opened(tmp_path, made, 1, []) as savings,
        pytest.raises(CheckpointError, match="tables/rows/rows"),
    ):
        savings.latest()
