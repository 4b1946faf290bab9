"""Functions sent to shards against NumPy on the whole table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpar import ps
from shardpar.ps import functions
from shardpar.ps.table import PlacedTable, Table, TableState, device_grid

ROWS, DIM = 11, 4


@pytest.fixture(scope="module", params=["rows", "grid"])
def table(request: pytest.FixtureRequest) -> tuple[PlacedTable, np.ndarray]:
    columns = 1 if request.param == "rows" else 2
    placement = ps.Placement(rows=4 // columns, columns=columns)
    mesh = device_grid(jax.devices()[:4], placement.rows, columns)
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32) - 3
    values[2] = 0
    return PlacedTable(Table(ROWS, DIM, ps.SGD()), placement, mesh), values


def test_aggregates_do_not_see_places_without_a_row(table: tuple[PlacedTable, np.ndarray]) -> None:
    placed, values = table
    state = placed.placed([values], 0)
    for found, expected in [
        (functions.sum_, values.sum()),
        (functions.abs_sum, np.abs(values).sum()),
        (functions.nrm2, np.linalg.norm(values)),
        (functions.nnz, np.count_nonzero(values)),
        (functions.max_, values.max()),
        (functions.min_, values.min()),
        (functions.amax, np.abs(values).max()),
        (functions.amin, np.abs(values).min()),
    ]:
        np.testing.assert_allclose(found(placed, state), expected, rtol=1e-5)
    np.testing.assert_allclose(
        functions.dot(placed, state, state), (values * values).sum(), rtol=1e-5
    )


def rows_of(placed: PlacedTable, state: TableState) -> np.ndarray:
    return placed.whole(state)[0]


def test_updates_change_rows_in_place(table: tuple[PlacedTable, np.ndarray]) -> None:
    placed, values = table

    def fresh() -> TableState:
        return placed.placed([values], 0)

    np.testing.assert_allclose(
        rows_of(placed, functions.mapped(placed, fresh(), jnp.abs)), np.abs(values)
    )
    np.testing.assert_allclose(
        rows_of(placed, functions.axpy(placed, fresh(), 0.5, fresh())), 1.5 * values, rtol=1e-6
    )
    even = functions.update(
        placed, fresh(), lambda rows, ids: jnp.where((ids % 2 == 0)[:, None], 7.0, rows)
    )
    expected = np.where((np.arange(ROWS) % 2 == 0)[:, None], 7.0, values)
    np.testing.assert_allclose(rows_of(placed, even), expected)


def test_column_wise_results_are_joined(table: tuple[PlacedTable, np.ndarray]) -> None:
    placed, values = table
    found = functions.get(
        placed, placed.placed([values], 0), lambda rows, _: rows.sum(0), "sum", column_wise=True
    )
    np.testing.assert_allclose(found, values.sum(0), rtol=1e-5)
