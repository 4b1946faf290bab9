"""What living devices hold of a state, after others were lost whose memory is poisoned here."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from shardpar.errors import SpecError
from shardpar.lowering.switch import Programs
from shardpar.spec.plan import Pipeline
from tests.lowering.test_pipelined import LONG, SIZES, bits_of, host, plan_over, stage, unequal
from tests.lowering.tiny import BATCH, captured, uniform


@pytest.fixture(scope="module")
def programs():
    return Programs(captured(dropout=0.1, **SIZES), optax.adamw(3e-3))


def poisoned(program, tree, lost):
    """The same arrays with other bytes on the lost devices."""
    gone = {program.devices[d] for d in lost}

    def poison(x):
        keys = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
        data = jax.random.key_data(x) if keys else x
        pieces = [
            jax.device_put(np.full(s.data.shape, 77, data.dtype), s.device)
            if s.device in gone
            else s.data
            for s in data.addressable_shards
        ]
        made = jax.make_array_from_single_device_arrays(data.shape, data.sharding, pieces)
        return jax.random.wrap_key_data(made, impl=x.dtype) if keys else made

    return jax.tree.map(poison, tree)


def values(program, state):
    return [host(x).tobytes() for x in jax.tree.leaves(program.homes.first_copies(state))]


def on(one, two, three):
    """Two stages on three devices that are left."""
    return plan_over(
        Pipeline(
            BATCH, 4,
            (
                stage([one, two], "embed..blocks[0]", tensor=("a",)),
                stage([three], "blocks[1]..outside"),
            ),
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost", [{1, 4}, pytest.param({5, 6, 7}, marks=LONG), pytest.param({1, 3, 7}, marks=LONG)]
)
def test_a_state_is_put_together_from_copies_that_live(programs, lost):
    program = programs.program(unequal())
    state = program.init(0)
    before = values(program, state)
    left = on(*[d for d in (0, 1, 2, 3, 6) if d not in lost][:3])
    rescued = programs.rescue(program, poisoned(program, state, lost), left, lost)
    assert rescued.missing == ()
    assert values(rescued.program, rescued.state()) == before


@pytest.mark.slow
@LONG
def test_data_parallel_copies_inside_a_group_are_used(programs):
    program = programs.program(uniform(8, fsdp=("a",), tensor=("b",)))
    state = program.init(0)
    before = values(program, state)
    # Axis c holds copies: one device of each pair is enough, whichever it is.
    lost = {0, 3, 4, 7}
    plan = plan_over(Pipeline(BATCH, 4, (stage([1, 2], "embed..outside", fsdp=("a",)),)))
    rescued = programs.rescue(program, poisoned(program, state, lost), plan, lost)
    assert rescued.missing == ()
    assert values(rescued.program, rescued.state()) == before


@pytest.mark.slow
def test_what_nobody_holds_any_more_is_named_and_nothing_else(programs):
    program = programs.program(uniform(4, fsdp=("a",), tensor=("b",)))
    state = program.init(0)
    lost = {3}
    rescued = programs.rescue(program, poisoned(program, state, lost), uniform(2), lost)
    split = {
        path
        for path, home in program.homes.leaves.items()
        if any(entry.parts > 1 for group in home.layout.groups for entry in group.entries
               if type(entry).__name__ == "Split")
    }  # fmt: skip
    assert split
    assert set(rescued.missing) == {
        path for path in split if not has_copy(program.homes.leaves[path], lost)
    }
    whole = programs.switch(program, state, uniform(2))
    kept = {path: bits_of(u.arrays[0]) for path, u in rescued.found.items()}
    expected = whole.program.homes.unions(whole.state)
    for path, got in kept.items():
        assert np.array_equal(got, bits_of(expected[path].arrays[0])), path


def has_copy(home, lost):
    """Whether each index of an array is on some living device, found element by element."""
    shape = tuple(home.shapes[0].shape)
    seen = np.zeros(shape, bool)
    for layout in home.layout.groups:
        for piece in layout.pieces(shape):
            if piece.device not in lost:
                for starts in np.ndindex(*[len(spans) for spans in piece.spans]):
                    chosen = [s[i] for s, i in zip(piece.spans, starts, strict=True)]
                    seen[tuple(slice(a, b) for a, b in chosen)] = True
    return bool(seen.all())


def test_a_plan_on_a_lost_device_is_refused(programs):
    program = programs.program(uniform(2))
    with pytest.raises(SpecError, match="on device 0, which is lost"):
        programs.rescue(program, program.init(0), uniform(1), {0})
