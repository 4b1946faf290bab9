"""The sparse step against the same model trained with its whole tables as ordinary parameters."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from shardpar import ps
from shardpar.errors import CaptureError, DataError, PlanError
from shardpar.ps.embed import TableRows

ROWS, DIM, BATCH, STEPS = 53, 4, 16, 3


class Bag(nnx.Module):
    """A weighted bag, so that ids repeat within samples, batches and devices."""

    def __init__(self, rule: Any, rngs: nnx.Rngs) -> None:
        self.embed = ps.Embed(ROWS, DIM, bag="sum", optimizer=rule, init=ps.Normal(0.1), rngs=rngs)
        self.out = nnx.Linear(DIM, 1, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.out(jnp.tanh(self.embed(batch["ids"], batch["values"])))[:, 0]


def squared(model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    miss = (model(batch) - batch["labels"]) ** 2
    return (miss * batch["weights"]).sum(), batch["weights"].sum()


def batch(seed: int) -> dict[str, np.ndarray]:
    """Zipf ids with padding, and the last samples without weight."""
    draw = np.random.default_rng(seed)
    ids = (draw.zipf(1.3, (BATCH, 5)) % ROWS).astype(np.int32)
    ids[draw.random(ids.shape) < 0.2] = -1
    weights = np.ones(BATCH, np.float32)
    weights[-3:] = 0
    return {
        "ids": ids,
        "values": draw.random(ids.shape).astype(np.float32),
        "labels": draw.normal(size=BATCH).astype(np.float32),
        "weights": weights,
    }


@dataclass
class Dense:
    """What ordinary training with the whole table gives."""

    losses: np.ndarray
    rows: np.ndarray
    slots: list[np.ndarray]
    kernel: np.ndarray


def trained_dense(rule: Any) -> Dense:
    optimizer = optax.adam(1e-2)
    model = Bag(rule, nnx.Rngs(jax.random.key(3)))
    graph, params, table, rest = nnx.split(model, nnx.Param, TableRows, ...)
    state = optimizer.init(params)
    rows = jax.tree.leaves(table)[0]
    slots = tuple(jnp.full((ROWS, width), first) for width, first in rule.slots(DIM))
    losses = []

    @jax.jit
    def gradients(params: Any, rows: jax.Array, seen: Any) -> Any:
        def mean(params: Any, rows: jax.Array) -> jax.Array:
            table_ = jax.tree.unflatten(jax.tree.structure(table), [rows])
            total, weight = squared(nnx.merge(graph, params, table_, rest), seen)
            return total / weight

        return jax.value_and_grad(mean, (0, 1))(params, rows)

    for step in range(STEPS):
        seen = batch(step)
        loss, (dense, sparse) = gradients(params, rows, seen)
        losses.append(float(loss))
        updates, state = optimizer.update(dense, state, params)
        params = optax.apply_updates(params, updates)
        new, new_slots = rule.update(rows, slots, sparse, step + 1, 1.0)
        # Rows that no lookup asks for rest, their slots too.
        asked = np.isin(np.arange(ROWS), seen["ids"])[:, None]
        rows = jnp.where(asked, new, rows)
        slots = tuple(jnp.where(asked, a, b) for a, b in zip(new_slots, slots, strict=True))
    kernel = nnx.merge(graph, params, table, rest).out.kernel[...]
    return Dense(np.array(losses), np.asarray(rows), [np.asarray(s) for s in slots], kernel)


def trained(rule: Any, devices: int, options: ps.SparseOptions) -> tuple[Dense, int]:
    program = ps.SparseProgram(
        squared,
        lambda rngs: Bag(rule, rngs),
        optax.adam(1e-2),
        batch=batch(0),
        devices=jax.devices()[:devices],
        options=options,
    )
    state = program.init(seed=3)
    losses, rounds = [], 0
    for step in range(STEPS):
        state, metrics = program.step(state, batch(step))
        losses.append(float(metrics["loss"]))
        rounds = max(rounds, int(metrics["rounds"]))
    rows, *slots = program.tables["embed"].whole(state.tables["embed"])
    return Dense(np.array(losses), rows, slots, np.asarray(state.dense["out.kernel"])), rounds


def require_equal(found: Dense, expected: Dense) -> None:
    np.testing.assert_allclose(found.losses, expected.losses, rtol=2e-6)
    np.testing.assert_allclose(found.rows, expected.rows, atol=1e-6)
    np.testing.assert_allclose(found.kernel, expected.kernel, atol=1e-6)
    for ours, theirs in zip(found.slots, expected.slots, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.fixture(scope="module")
def adagrad() -> Dense:
    return trained_dense(ps.AdaGrad(0.1))


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (1, ps.SparseOptions()),
        (4, ps.SparseOptions()),
        (2, ps.SparseOptions(find="program")),
        (4, ps.SparseOptions(ps.Placement(rows=2, columns=2))),
        (8, ps.SparseOptions(ps.Placement(rows=4, columns=2))),
        (2, ps.SparseOptions(ps.Placement(rows=2, deal="ranges", extents=(3, 50)))),
        (2, ps.SparseOptions(ps.Placement(replicated=True))),
    ],
    ids=[
        "one device",
        "rows",
        "ids found in the program",
        "grid",
        "oblong grid",
        "ranges",
        "replicated",
    ],
)
def test_every_placement_trains_as_the_whole_table_would(
    devices: int, options: ps.SparseOptions, adagrad: Dense
) -> None:
    found, rounds = trained(ps.AdaGrad(0.1), devices, options)
    require_equal(found, adagrad)
    assert rounds == 1


def test_what_exceeds_the_capacity_goes_further_rounds_and_nothing_is_dropped(
    adagrad: Dense,
) -> None:
    found, rounds = trained(ps.AdaGrad(0.1), 2, ps.SparseOptions(capacity=1))
    require_equal(found, adagrad)
    assert rounds > 1


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, ps.SparseOptions()),
        (1, ps.SparseOptions()),
        (2, ps.SparseOptions(capacity=1)),
        (2, ps.SparseOptions(ps.Placement(replicated=True))),
    ],
    ids=["by owner", "one device", "rounds", "replicated"],
)
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(
    devices: int, options: ps.SparseOptions
) -> None:
    program = ps.SparseProgram(
        squared, lambda rngs: Bag(ps.AdaGrad(), rngs), optax.adam(1e-2), batch=batch(0),
        devices=jax.devices()[:devices], options=options,
    )  # fmt: skip
    state = program.init()
    before = [*program.tables["embed"].whole(state.tables["embed"]), state.dense["out.kernel"]]
    before = [np.array(x) for x in before]
    bad = batch(0) | {"labels": np.full(BATCH, np.nan, np.float32)}
    state, metrics = program.step(state, bad)
    after = [*program.tables["embed"].whole(state.tables["embed"]), state.dense["out.kernel"]]
    assert not np.isfinite(metrics["loss"])
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def predicted(model: Any, seen: Any) -> jax.Array:
    return model(seen)


@pytest.mark.parametrize("capacity", [None, 1], ids=["by owner", "rounds"])
def test_four_devices_predict_what_one_does(capacity: int | None) -> None:
    found = []
    for devices in (1, 4):
        program = ps.SparseProgram(
            squared, lambda rngs: Bag(ps.AdaGrad(), rngs), optax.adam(1e-2), batch=batch(0),
            devices=jax.devices()[:devices], options=ps.SparseOptions(capacity=capacity),
        )  # fmt: skip
        state, _ = program.step(program.init(1), batch(0))
        found.append(np.asarray(program.apply(state, batch(1), predicted)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_batch_is_prepared_right_while_another_thread_prepares_others() -> None:
    program = ps.SparseProgram(
        squared, lambda rngs: Bag(ps.AdaGrad(), rngs), optax.adam(1e-2), batch=batch(0),
        devices=jax.devices()[:2],
    )  # fmt: skip
    batches = [batch(seed) for seed in range(4)]

    def ids_found(index: int) -> bool:
        _, wanted = program.prepared(batches[index % 4])
        assert wanted is not None
        positions = wanted.positions[0].reshape(2, -1)
        found = np.take_along_axis(wanted.ids[0].reshape(2, -1), positions, axis=1)
        return np.array_equal(found.reshape(-1), batches[index % 4]["ids"].reshape(-1))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(ids_found, range(2000)))
    finally:
        sys.setswitchinterval(before)


def test_ids_beyond_the_table_are_named_before_a_step() -> None:
    program = ps.SparseProgram(
        squared, lambda rngs: Bag(ps.AdaGrad(), rngs), optax.sgd(0.1), batch=batch(0),
        devices=jax.devices()[:1],
    )  # fmt: skip
    state = program.init()
    wrong = batch(0)
    wrong["ids"][2, 1] = ROWS + 7
    with pytest.raises(DataError, match=rf"rows 0 to {ROWS - 1}, but id {ROWS + 7}.*\[2, 1\]"):
        program.step(state, wrong)


class Computed(nnx.Module):
    """Ids that the model makes: those of the batch, moved by one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = ps.Embed(ROWS, DIM, bag="mean", rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return self.embed(jnp.where(batch["ids"] < 0, -1, batch["ids"] + 1)).sum(-1)


def test_ids_that_the_model_computes_are_found_in_the_program() -> None:
    program = ps.SparseProgram(
        squared, Computed, optax.sgd(0.1), batch=batch(0), devices=jax.devices()[:1]
    )
    assert not program.finds_on_host
    state = program.init(seed=1)
    outside = int((batch(0)["ids"] + 1 >= ROWS).sum())
    _, metrics = program.step(state, batch(0))
    assert int(metrics["ids_outside"]) == outside
    with pytest.raises(PlanError, match="find='host' needs ids that come straight"):
        ps.SparseProgram(
            squared, Computed, optax.sgd(0.1), batch=batch(0),
            devices=jax.devices()[:1], options=ps.SparseOptions(find="host"),
        )  # fmt: skip


class Looped(nnx.Module):
    """A lookup inside a loop of the program."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = ps.Embed(ROWS, DIM, rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        def one(total: jax.Array, ids: jax.Array) -> tuple[jax.Array, None]:
            return total + self.embed(ids).sum(), None

        return jax.lax.scan(one, jnp.float32(0), batch["ids"])[0] + jnp.zeros(BATCH)


def test_a_lookup_inside_a_loop_is_refused() -> None:
    with pytest.raises(CaptureError, match="inside a part of the program that is traced by itself"):
        ps.SparseProgram(squared, Looped, optax.sgd(0.1), batch=batch(0), devices=jax.devices()[:1])


def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(PlanError, match="16 samples, which 3 devices do not share evenly"):
        ps.SparseProgram(
            squared, lambda rngs: Bag(ps.SGD(), rngs), optax.sgd(0.1), batch=batch(0),
            devices=jax.devices()[:3],
        )  # fmt: skip


def test_renewed_rows_begin_as_they_began() -> None:
    program = ps.SparseProgram(
        squared, lambda rngs: Bag(ps.AdaGrad(), rngs), optax.sgd(0.1), batch=batch(0),
        devices=jax.devices()[:2],
    )  # fmt: skip
    state = program.init(seed=5)
    first = [np.array(x) for x in program.tables["embed"].whole(state.tables["embed"])]
    state, _ = program.step(state, batch(0))
    moved = program.tables["embed"].whole(state.tables["embed"])
    gone = np.flatnonzero((moved[0] != first[0]).any(1))[:3]
    state = program.renew(state, "embed", gone)
    after = program.tables["embed"].whole(state.tables["embed"])
    for now, then, between in zip(after, first, moved, strict=True):
        expected = np.array(between)
        expected[gone] = then[gone]
        np.testing.assert_array_equal(now, expected)


class Shared(nnx.Module):
    """One table for two arrays of the batch."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.items = ps.Embed(ROWS, DIM, init=ps.Normal(1.0), rngs=rngs)

    def __call__(self, batch: Any) -> jax.Array:
        return (self.items(batch["left"]) * self.items(batch["right"])).sum(-1)


def test_one_table_asked_twice_gets_the_sum_of_both_gradients() -> None:
    draw = np.random.default_rng(0)
    ids = {name: draw.integers(0, 5, 8).astype(np.int32) for name in ("left", "right")}

    def loss(model: Any, batch: Any) -> jax.Array:
        return model(batch).mean()

    program = ps.SparseProgram(loss, Shared, optax.sgd(0.1), batch=ids, devices=jax.devices()[:2])
    state = program.init(seed=2)
    (before, _) = program.tables["items"].whole(state.tables["items"])
    expected = jax.grad(lambda rows: (rows[ids["left"]] * rows[ids["right"]]).sum(-1).mean())(
        jnp.asarray(before)
    )
    state, _ = program.step(state, ids)
    _, squares = program.tables["items"].whole(state.tables["items"])
    np.testing.assert_allclose(squares, np.asarray(expected) ** 2, rtol=1e-5)
