"""Rows from their owners and gradients back to them: the two reshards of a sharded table.

Runs inside a shard_map over a grid of row and column shards, every device with its part of
the batch. A pull is rows Split -> requesters; a push is Partial rows -> owners. Each device
asks each owner for at most `capacity` rows at a time. Where more are asked, all devices go
more rounds: the places of a row say in which round it goes, so that all gradients of a row
meet in the same round and a nonlinear rule sees their sum. Nothing is ever dropped.

Where a device's requests lie in parts, one per owner, and the backend has a ragged all-to-all,
only what is in the parts travels, not what fills them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from shardpar.ps.dedup import representatives
from shardpar.ps.placement import Placement

ROWS, COLUMNS = "rows", "columns"

Rounds = int | jax.Array
"""1 where one round is certain to do, else counted while the program runs."""

Rule = Callable[[tuple[jax.Array, ...], jax.Array], tuple[jax.Array, ...]]
"""From rows and their slots, [n, width] each, and their gradients to new rows and slots."""


@dataclass(frozen=True)
class Route:
    """How the requests of a step go; made by `Exchange.route`, inside a program.

    Attributes:
      wanted: int32[columns * u], of all devices of this one's grid row.
      rounds: of exchange.
      arrived: int32[shards, n], the places that others ask this device for; None where they
        are told anew in every round.
      sent: int32[shards, columns], how many of each part are requests; None where whole parts
        travel.
      received: the same of `arrived`.
    """

    wanted: jax.Array
    rounds: Rounds
    arrived: jax.Array | None
    sent: jax.Array | None = None
    received: jax.Array | None = None

    @property
    def back(self) -> Route:
        """The way of the answers."""
        return replace(self, sent=self.received, received=self.sent)


@dataclass(frozen=True)
class Exchange:
    """How one table's rows travel.

    Attributes:
      placement: of the table, whose grid is the mesh's axes ROWS and COLUMNS.
      rows, dim: of the whole table.
      capacity: rows that one device asks of one owner in a round.
      by_owner: a device's requests come in equal parts, one for each owner, as `HostFinder`
        makes them; one round then does, and no device has to look where its requests go.
      ragged: only what is in those parts travels.
    """

    placement: Placement
    rows: int
    dim: int
    capacity: int
    by_owner: bool = False
    ragged: bool = False

    def route(self, ids: jax.Array) -> Route:
        """Who asks whom for what.

        Args:
          ids: int32[u], what this device wants, no id twice; negative ones are padding.
        """
        wanted = ids
        if self.placement.columns > 1:
            wanted = lax.all_gather(ids, COLUMNS, tiled=True)
        if self.placement.rows == 1 or not self.by_owner:
            return Route(wanted, self._rounds(wanted), None)
        asked = self._to_owners(self._places(wanted))
        route = Route(wanted, 1, None)
        if self.ragged:
            parts = asked.reshape(self.placement.rows, self.placement.columns, -1)
            sent = (parts >= 0).sum(axis=-1, dtype=jnp.int32)
            route = replace(route, sent=sent, received=lax.all_to_all(sent, ROWS, 0, 0, tiled=True))
        return replace(route, arrived=_swapped(asked, route, fill=-1))

    def pull(self, table: jax.Array, route: Route) -> tuple[jax.Array, jax.Array | None]:
        """The wanted rows, float[u, dim]; zeros where an id is negative.

        Args:
          table: this device's piece, [shard rows, shard columns].
          route: from `route`.

        Returns:
          The rows; and what this device read of its own piece, for `push`, which need not
          read that again. None where it would have to.
        """
        if self.placement.rows == 1:
            found = read(table, self._places(route.wanted))
            return self._narrowed(found), None if self.placement.replicated else found
        if route.arrived is not None:
            found = read(table, route.arrived.reshape(-1))
            answers = found.reshape(*route.arrived.shape, -1)
            back = _swapped(answers, route.back, fill=0)
            return self._narrowed(self._from_owners(back)), found
        shard, place = self._home(route.wanted)
        out = jnp.zeros((route.wanted.shape[0], table.shape[1]), table.dtype)

        def one(turn: jax.Array, out: jax.Array) -> jax.Array:
            asked, slot, here = self._sent(shard, place, turn, route.rounds)
            got = lax.all_to_all(asked, ROWS, 0, 0, tiled=True)
            found = read(table, got.reshape(-1))
            back = lax.all_to_all(found.reshape(*got.shape, -1), ROWS, 0, 0, tiled=True)
            flat = back.reshape(-1, table.shape[1])
            return jnp.where(here[:, None], flat.at[slot].get(mode="fill", fill_value=0), out)

        return self._narrowed(_each(route.rounds, one, out)), None

    def push(
        self,
        route: Route,
        gradient: jax.Array,
        table: tuple[jax.Array, ...],
        scratch: jax.Array,
        rule: Rule,
        *,
        found: jax.Array | None = None,
        take: bool | jax.Array = True,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Gives the owners their rows' gradients, summed, and lets them take these.

        Args:
          route: that they were pulled by.
          gradient: float[u, dim], of this device's rows.
          table: this device's piece and its slots.
          scratch: int32[shard rows].
          rule: how rows take gradients.
          found: what `pull` read, if the table is still the same.
          take: where False, all rows stay as they are; the same on all devices.

        Returns:
          The new pieces, and the scratch.
        """

        def taken(places: jax.Array) -> jax.Array:
            return jnp.where(take, places, -1)

        if self.placement.replicated:
            everyone = (ROWS, COLUMNS)
            places = lax.all_gather(route.wanted, everyone, tiled=True)
            sums = lax.all_gather(gradient, everyone, tiled=True)
            places, sums, scratch = summed(places, sums, scratch)
            return applied(table, taken(places), sums, rule), scratch
        sums = self._widened(gradient)
        if self.placement.rows == 1:
            places = self._places(route.wanted)
            if self.placement.columns > 1:
                places, sums, scratch = summed(places, sums, scratch)
            return applied(table, taken(places), sums, rule, found), scratch
        if route.arrived is not None:
            places = route.arrived.reshape(-1)
            parts = _swapped(self._to_owners(sums), route, fill=0)
            places, total, scratch = summed(places, parts.reshape(places.size, -1), scratch)
            return applied(table, taken(places), total, rule, found), scratch
        shard, place = self._home(route.wanted)

        def one(turn: jax.Array, carry: tuple) -> tuple:
            table, scratch = carry
            asked, slot, _ = self._sent(shard, place, turn, route.rounds)
            size = asked.shape[0] * asked.shape[1]
            filled = jnp.zeros((size, sums.shape[1]), sums.dtype)
            filled = filled.at[slot].set(sums, mode="drop", unique_indices=True)
            got = lax.all_to_all(asked, ROWS, 0, 0, tiled=True).reshape(-1)
            parts = lax.all_to_all(
                filled.reshape(*asked.shape, -1), ROWS, 0, 0, tiled=True
            ).reshape(size, -1)
            places, total, scratch = summed(got, parts, scratch)
            return applied(table, taken(places), total, rule), scratch

        return _each(route.rounds, one, (table, scratch))

    def _rounds(self, wanted: jax.Array) -> Rounds:
        """How many rounds the requests of all devices need: a power of two, mostly 1."""
        limit = max(self.capacity, self.placement.columns)
        if self.placement.rows == 1 or limit >= wanted.shape[0]:
            return 1
        shard, place = self._home(wanted)

        def too_few(rounds: jax.Array) -> jax.Array:
            def fullest(turn: jax.Array, most: jax.Array) -> jax.Array:
                counts = self._here(shard, place, turn, rounds).sum(0, dtype=jnp.int32)
                return jnp.maximum(most, counts.max())

            most = lax.fori_loop(0, rounds, fullest, jnp.int32(0))
            return lax.pmax(most, (ROWS, COLUMNS)) > limit

        # The answer of too_few is carried: collectives in a loop's condition would
        # be run once more by devices that are done.
        def wider(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            rounds = carry[0] * 2
            return rounds, too_few(rounds)

        one = jnp.int32(1)
        return lax.while_loop(lambda carry: carry[1], wider, (one, too_few(one)))[0]

    def _places(self, wanted: jax.Array) -> jax.Array:
        """Where ids are in their owner's piece; negative for padding."""
        return jnp.where(wanted >= 0, self._home(wanted)[1], -1)

    def _home(self, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
        shard, place = self.placement.home(wanted, self.rows)
        return jnp.where(wanted >= 0, shard, -1), place

    def _to_owners(self, requests: jax.Array) -> jax.Array:
        """[columns * shards * n, ...] of a grid row's devices to [shards, columns * n, ...]."""
        rows, columns = self.placement.rows, self.placement.columns
        parts = requests.reshape(columns, rows, -1, *requests.shape[1:])
        return jnp.moveaxis(parts, 0, 1).reshape(rows, -1, *requests.shape[1:])

    def _from_owners(self, answers: jax.Array) -> jax.Array:
        """The inverse of `_to_owners`."""
        rows, columns = self.placement.rows, self.placement.columns
        parts = answers.reshape(rows, columns, -1, *answers.shape[2:])
        return jnp.moveaxis(parts, 0, 1).reshape(-1, *answers.shape[2:])

    def _here(
        self, shard: jax.Array, place: jax.Array, turn: jax.Array, rounds: Rounds
    ) -> jax.Array:
        """Which requests go to which owner in this round: bool[u, shards]."""
        owners = jnp.arange(self.placement.rows, dtype=shard.dtype)
        return (shard[:, None] == owners) & ((place % rounds) == turn)[:, None]

    def _sent(
        self, shard: jax.Array, place: jax.Array, turn: jax.Array, rounds: Rounds
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The requests of a round: int32[shards, capacity], and where each one is in them."""
        capacity = max(self.capacity, self.placement.columns)
        to = self._here(shard, place, turn, rounds)
        here = to.any(axis=1)
        rank = (jnp.cumsum(to, axis=0, dtype=jnp.int32) * to).sum(axis=1, dtype=jnp.int32) - 1
        size = self.placement.rows * capacity
        slot = jnp.where(here, shard * capacity + rank, size)
        asked = jnp.full(size, -1, jnp.int32).at[slot].set(place, mode="drop", unique_indices=True)
        return asked.reshape(self.placement.rows, capacity), slot, here

    def _narrowed(self, rows: jax.Array) -> jax.Array:
        """From pieces of everyone's rows to whole rows of this device's own."""
        if self.placement.columns == 1:
            return rows
        own = rows.reshape(self.placement.columns, -1, rows.shape[1])
        pieces = lax.all_to_all(own, COLUMNS, 0, 0, tiled=True)
        return jnp.moveaxis(pieces, 0, 1).reshape(own.shape[1], -1)

    def _widened(self, gradient: jax.Array) -> jax.Array:
        """The inverse: the piece that this device's columns take of everyone's gradients."""
        if self.placement.columns == 1:
            return gradient
        pieces = gradient.reshape(gradient.shape[0], self.placement.columns, -1)
        own = lax.all_to_all(jnp.moveaxis(pieces, 1, 0), COLUMNS, 0, 0, tiled=True)
        return own.reshape(-1, own.shape[2])


def usual_capacity(requests: int, placement: Placement) -> int:
    """Rows that a device may ask of an owner in one round: twice the mean, and a few.

    >>> usual_capacity(1000, Placement(rows=4))
    564
    """
    return 2 * -(-requests * placement.columns // placement.rows) + 64


def _swapped(parts: jax.Array, route: Route, *, fill: int) -> jax.Array:
    """[shards, columns * n, ...]: part i of device j becomes part j of device i.

    Where the route says how much of each part there is, only that travels, and `fill` is in the
    place of the rest.
    """
    if route.sent is None or route.received is None:
        return lax.all_to_all(parts, ROWS, 0, 0, tiled=True)
    shards, columns = route.sent.shape
    size = parts.shape[1] // columns
    begins = jnp.arange(shards * columns, dtype=jnp.int32) * size
    mine = lax.axis_index(ROWS).astype(jnp.int32) * columns * size
    flat = parts.reshape(-1, *parts.shape[2:])
    swapped = lax.ragged_all_to_all(
        flat,
        jnp.full_like(flat, fill),
        begins,
        route.sent.reshape(-1),
        mine + begins % (columns * size),
        route.received.reshape(-1),
        axis_name=ROWS,
    )
    return swapped.reshape(parts.shape)


def _each(rounds: Rounds, one: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
    if isinstance(rounds, int):
        return one(jnp.int32(0), carry)
    return lax.fori_loop(0, rounds, one, carry)


def read(table: jax.Array, places: jax.Array) -> jax.Array:
    """Rows [n, width] of a piece of a table; zeros where a place is negative."""
    at = jnp.where(places < 0, table.shape[0], places)
    return table.at[at].get(mode="fill", fill_value=0)


def summed(
    places: jax.Array, parts: jax.Array, scratch: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums what belongs to one place: each place once, the others negative; and the scratch."""
    winners, scratch = representatives(places, scratch)
    iota = jnp.arange(places.shape[0], dtype=jnp.int32)
    total = jnp.zeros_like(parts).at[winners].add(parts)
    return jnp.where(winners == iota, places, -1), total, scratch


def applied(
    table: tuple[jax.Array, ...],
    places: jax.Array,
    gradient: jax.Array,
    rule: Rule,
    rows: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The pieces after these places, each at most once, took their gradients.

    `rows` are those at the places, where they were read before.
    """
    known = () if rows is None else (rows,)
    old = known + tuple(read(piece, places) for piece in table[len(known) :])
    at = jnp.where(places < 0, table[0].shape[0], places)
    return tuple(
        piece.at[at].set(rows.astype(piece.dtype), mode="drop", unique_indices=True)
        for piece, rows in zip(table, rule(old, gradient), strict=True)
    )
