"""Optimizer state shared out over groups, element by element and as golden text."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import PlanError
from shardpar.spec.layout import Group, Layout, Replicate, Split
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.reshard import reshard
from shardpar.spec.text import plan_from_text, plan_to_text
from shardpar.spec.zero import holdings, sliced
from tests.spec.values import gpt_like

GOLDEN = Path(__file__).parents[1] / "golden"


def indices(spans):
    return np.concatenate([np.arange(a, b) for a, b in spans])


def counted(layout, shape, group):
    """How often each element is on a device of a group."""
    out = np.zeros(shape, int)
    for piece in layout.pieces(shape)[group]:
        out[np.ix_(*map(indices, piece.spans))] += 1
    return out


@st.composite
def cases(draw):
    """Groups that lay out the whole of an array, each in its own way, and the array's shape."""
    shape = tuple(
        draw(st.sampled_from([1, 2, 3, 6, 12, 16])) for _ in range(draw(st.integers(1, 3)))
    )
    groups, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        entries, left = [], list(shape)
        for parts in draw(st.lists(st.sampled_from([2, 3]), max_size=2)):
            able = [dim for dim, size in enumerate(left) if size % parts == 0]
            dim = draw(st.sampled_from([None, *able]))
            entries.append(Replicate(parts) if dim is None else Split(dim, parts))
            if dim is not None:
                left[dim] //= parts
        size = math.prod(e.parts for e in entries)
        groups.append(Group(tuple(range(first, first + size)), tuple(entries)))
        first += size
    return groups, shape


@given(cases())
def test_each_element_is_in_one_group_and_stays_where_it_was(case):
    groups, shape = case
    layout = sliced(groups, shape)
    assert layout.groups == tuple(groups)
    if layout.across == "dup":
        return
    copies = Layout(tuple(groups))
    seen = [counted(layout, shape, n) for n in range(len(groups))]
    assert (sum((one > 0).astype(int) for one in seen) == 1).all()
    for n in range(len(groups)):
        assert set(np.unique(seen[n])) <= {0, counted(copies, shape, n).max()}
        for mine, before in zip(layout.pieces(shape)[n], copies.pieces(shape)[n], strict=True):
            for dim, spans in enumerate(mine.spans):
                assert set(indices(spans)) <= set(indices(before.spans[dim]))


@given(cases())
def test_an_array_is_shared_out_wherever_some_dim_can_be(case):
    groups, shape = case
    pieces = [p for of_group in Layout(tuple(groups)).pieces(shape) for p in of_group]
    able = False
    for dim in range(len(shape)):
        cuts = sorted({i for p in pieces for span in p.spans[dim] for i in span})
        lengths = {b - a for a, b in itertools.pairwise(cuts)}
        # Parts that are equal everywhere always fit; where lengths differ, remainders may not.
        able |= all(n % len(groups) == 0 for n in lengths)
        able |= len(lengths) == 1 and min(lengths) >= len(groups)
    if able and len(groups) > 1:
        assert sliced(groups, shape).across != "dup"


@given(cases())
def test_a_reduction_to_slices_and_a_gather_of_them_send_what_must_be_sent(case):
    groups, shape = case
    layout = sliced(groups, shape)
    if layout.across == "dup":
        return
    down = reshard(Layout(layout.groups, "partial"), layout, shape, 4)
    up = reshard(layout, Layout(layout.groups), shape, 4)
    assert up.total_bytes == up.lower_bound_bytes
    no_copies = all(not isinstance(e, Replicate) for g in groups for e in g.entries)
    if no_copies:
        assert down.total_bytes == down.lower_bound_bytes == up.total_bytes


def unequal(zero="pipelines"):
    """TP2 by two stages beside single devices by three."""

    def pipeline(sequences, microbatch, *stages):
        return Pipeline(
            sequences, microbatch,
            tuple(
                Stage(devices, Mesh.factored(len(devices)), (LayerStrategy(layers, **how),))
                for devices, layers, how in stages
            ),
        )  # fmt: skip

    wide = pipeline(
        6, 2, ((0, 1), "embed..blocks[0]", {"tensor": ("a",)}),
        ((2, 3), "blocks[1]..outside", {"zero1": ("a",)}),
    )  # fmt: skip
    thin = pipeline(
        2, 1, ((4,), "embed", {}), ((5,), "blocks[0:2]", {}), ((6,), "head..outside", {})
    )
    return Plan("hand", 8, (wide, thin), zero=zero)


def test_a_plan_says_that_its_pipelines_share_optimizer_state_out():
    text = plan_to_text(unequal())
    assert text == (GOLDEN / "zero_plan.txt").read_text()
    assert plan_from_text(text) == unequal()
    assert "zero:" not in plan_to_text(unequal("none"))


def test_layouts_and_their_reshards_as_people_read_them():
    lines = []
    for name, holding in holdings(unequal(), gpt_like(blocks=2)).items():
        shape, there = holding.parameter.shape, holding.in_optimizer
        lines += [
            f"{name} {list(shape)}",
            f"  at rest    {holding.at_rest}",
            f"  optimizer  {there}",
        ]
        for source, target in ((Layout(there.groups, "partial"), there), (there, holding.at_rest)):
            lines += [
                f"  {c.kind}, {c.num_bytes} bytes"
                for c in reshard(source, target, shape, 4).communications
            ]
    assert "\n".join(lines) + "\n" == (GOLDEN / "zero_layouts.txt").read_text()


def test_without_it_every_group_keeps_all():
    for holding in holdings(unequal("none"), gpt_like(blocks=2)).values():
        assert holding.in_optimizer.across == "dup"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zero: stages", r"zero.*none.*pipelines|Invalid enum value 'stages'"),
        ("zero: pipelines", "there is one; leave it out, or write zero1 or fsdp"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused(text, message):
    one = (
        "format: shardpar-plan/1\ncluster: c\nglobal_batch: 1\npipelines:\n"
        "- {sequences: 1, microbatch: 1, stages: [{devices: [0], layers: [{layers: all}]}]}\n"
    )
    plan_from_text(one)
    with pytest.raises(PlanError, match=message):
        plan_from_text(one + text)


def test_pipelines_in_one_program_share_nothing_out():
    two = (
        "format: shardpar-plan/1\ncluster: c\nglobal_batch: 4\nzero: pipelines\npipelines:\n"
        "- {sequences: 2, microbatch: 1, schedule: single_jit, stages: "
        "[{devices: [0], layers: [{layers: embed}]}, {devices: [1], layers: [{layers: head}]}]}\n"
        "- {sequences: 2, microbatch: 1, schedule: single_jit, stages: "
        "[{devices: [2], layers: [{layers: embed}]}, {devices: [3], layers: [{layers: head}]}]}\n"
    )
    with pytest.raises(PlanError, match="single_jit makes one of them"):
        plan_from_text(two)
