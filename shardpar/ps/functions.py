"""psFunc: a user's function is sent to the shards instead of the rows to the user.

A get function maps every shard's rows to something small, and merges these; an update
function makes new rows in place. Both are compiled onto the shards, as Angel's psFuncs run
on its servers (Jiang et al., "Angel: a new large-scale machine learning system", 2018).
The common aggregates, maps and zips are here, ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from shardpar.errors import PlanError
from shardpar.lowering.shardings import grid_sharding
from shardpar.ps.exchange import COLUMNS, ROWS
from shardpar.ps.table import PlacedTable, TableState

Merge = Literal["sum", "max", "min"]
Map = Callable[[jax.Array, jax.Array], Any]
Change = Callable[[jax.Array, jax.Array], jax.Array]

_MERGES: dict[str, Callable[..., Any]] = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}


def get(
    placed: PlacedTable, state: TableState, run: Map, merge: Merge, *, column_wise: bool = False
) -> Any:
    """What a function of the rows comes to over all shards.

    Args:
      placed: the table.
      state: its arrays.
      run: `run(rows [n, width], ids int32[n])` gives arrays of one shape whichever shard it
        sees; a shard has all rows of its range and `width` of its columns. Rows whose id is
        negative do not exist: their values are 0.
      merge: how shards' results become one.
      column_wise: the results have the shard's columns as their last dim: they are joined
        over column shards instead of merged.

    Returns:
      The merged result, numpy-like, on every device.

    Example:
      >>> import jax
      >>> from shardpar.ps.placement import Placement
      >>> from shardpar.ps.table import Table, device_grid
      >>> placed = PlacedTable(Table(5, 2), Placement(), device_grid(jax.devices()[:1], 1, 1))
      >>> state = placed.init(jax.random.key(0))
      >>> int(get(placed, state, lambda rows, ids: (ids >= 0).sum(), "sum"))
      5
    """
    if merge not in _MERGES:
        raise PlanError(f"results are merged by 'sum', 'max' or 'min', not {merge!r}")
    return _got(placed, run, merge, column_wise)(state.rows)


def update(placed: PlacedTable, state: TableState, run: Change) -> TableState:
    """The state whose rows are what `run(rows [n, width], ids int32[n])` makes of them.

    The old state's rows are donated and must not be used again.
    """
    return replace(state, rows=_changed(placed, run, 1)(state.rows))


def zipped(
    placed: PlacedTable,
    state: TableState,
    other: TableState,
    run: Callable[[jax.Array, jax.Array], jax.Array],
) -> TableState:
    """The state whose rows are `run(rows, other's rows)`: two tables laid out alike.

    Raises:
      PlanError: the tables have other shapes.
    """
    if state.rows.shape != other.rows.shape:
        raise PlanError(
            f"tables of {state.rows.shape} and {other.rows.shape} stored values are not zipped; "
            "give both the same rows, dim and placement"
        )
    return replace(state, rows=_changed(placed, run, 2)(state.rows, other.rows))


def _got(placed: PlacedTable, run: Map, merge: Merge, column_wise: bool) -> Callable[..., Any]:
    """Compiled anew for each call: `run` may be any closure, which jit would hold on to."""
    alone = placed.placement.replicated
    axes: tuple[str, ...] = () if alone else ((ROWS,) if column_wise else (ROWS, COLUMNS))
    columns = column_wise and placed.placement.columns > 1

    def local(rows: jax.Array) -> Any:
        out = run(*_seen(placed, rows))
        merged = _MERGES[merge](out, axes) if axes else out
        if not columns:
            return merged
        return jax.tree.map(
            lambda x: lax.all_gather(x, COLUMNS, axis=x.ndim - 1, tiled=True), merged
        )

    whole = grid_sharding(placed.mesh, (), 0).spec
    return jax.jit(
        jax.shard_map(
            local,
            mesh=placed.mesh,
            in_specs=(placed.sharding().spec,),
            out_specs=whole,
            check_vma=False,
        )
    )


def _changed(placed: PlacedTable, run: Callable[..., jax.Array], tables: int) -> Callable[..., Any]:
    spec = placed.sharding().spec

    def local(*rows: jax.Array) -> jax.Array:
        seen, ids = _seen(placed, rows[0])
        new = run(seen, ids) if tables == 1 else run(*rows)
        return jnp.where((ids >= 0)[:, None], new, 0).astype(rows[0].dtype)

    return jax.jit(
        jax.shard_map(
            local, mesh=placed.mesh, in_specs=(spec,) * tables, out_specs=spec, check_vma=False
        ),
        donate_argnums=0,
    )


def _seen(placed: PlacedTable, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of this shard, and their ids."""
    shard = jnp.int32(0) if placed.placement.replicated else lax.axis_index(ROWS)
    place = jnp.arange(rows.shape[0], dtype=jnp.int32)
    ids = placed.placement.row_at(shard, place, placed.table.rows)
    return jnp.where((ids >= 0)[:, None], rows, 0), ids


def _there(ids: jax.Array) -> jax.Array:
    return (ids >= 0)[:, None]


def sum_(placed: PlacedTable, state: TableState) -> jax.Array:
    """Of all values."""
    return get(placed, state, lambda rows, _: rows.sum(), "sum")


def abs_sum(placed: PlacedTable, state: TableState) -> jax.Array:
    """The 1-norm."""
    return get(placed, state, lambda rows, _: jnp.abs(rows).sum(), "sum")


def nrm2(placed: PlacedTable, state: TableState) -> jax.Array:
    """The 2-norm."""
    return jnp.sqrt(get(placed, state, lambda rows, _: (rows * rows).sum(), "sum"))


def nnz(placed: PlacedTable, state: TableState) -> jax.Array:
    """How many values are not 0."""
    return get(placed, state, lambda rows, _: (rows != 0).sum(), "sum")


def max_(placed: PlacedTable, state: TableState) -> jax.Array:
    """The largest value."""
    return get(placed, state, lambda rows, ids: jnp.where(_there(ids), rows, -jnp.inf).max(), "max")


def min_(placed: PlacedTable, state: TableState) -> jax.Array:
    """The smallest value."""
    return get(placed, state, lambda rows, ids: jnp.where(_there(ids), rows, jnp.inf).min(), "min")


def amax(placed: PlacedTable, state: TableState) -> jax.Array:
    """The largest absolute value."""
    return get(placed, state, lambda rows, _: jnp.abs(rows).max(), "max")


def amin(placed: PlacedTable, state: TableState) -> jax.Array:
    """The smallest absolute value."""
    return get(
        placed, state, lambda rows, ids: jnp.where(_there(ids), jnp.abs(rows), jnp.inf).min(), "min"
    )


def dot(placed: PlacedTable, state: TableState, other: TableState) -> jax.Array:
    """Of all values of two tables laid out alike."""
    product = zipped(placed, replace(state, rows=state.rows.copy()), other, jnp.multiply)
    return sum_(placed, product)


def fill(placed: PlacedTable, state: TableState, value: float) -> TableState:
    """All values the same."""
    return update(placed, state, lambda rows, _: jnp.full_like(rows, value))


def mapped(
    placed: PlacedTable, state: TableState, run: Callable[[jax.Array], jax.Array]
) -> TableState:
    """An elementwise function of all values: jnp.abs, jnp.exp, `lambda x: 2 * x`, ..."""
    return update(placed, state, lambda rows, _: run(rows))


def axpy(placed: PlacedTable, state: TableState, a: float, other: TableState) -> TableState:
    """rows + a * other's rows."""
    return zipped(placed, state, other, partial(_axpy, a))


def _axpy(a: float, rows: jax.Array, other: jax.Array) -> jax.Array:
    return rows + a * other
