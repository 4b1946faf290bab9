"""What the planner may choose: every uniform strategy once, and only what the pins allow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.planner.options import SearchOptions
from shardpar.planner.strategies import Candidate, candidates
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy
from tests.planner.cases import gpt
from tests.spec.values import layered


def degrees(candidate, mesh):
    s = candidate.strategy
    shards = mesh.size_of(s.data_axes(mesh))
    return (
        shards // mesh.size_of(s.fsdp),
        mesh.size_of(s.fsdp),
        mesh.size_of(s.tensor),
        s.sequence_parallel,
        s.recompute,
        candidate.microbatch // shards,
    )


def brute_force(devices, batch, options):
    """Every combination of degrees whose axes come apart along the mesh, tensor innermost."""
    sizes = Mesh.factored(devices).sizes
    cuts = range(len(sizes) + 1)
    for i in cuts:
        for j in cuts[i:]:
            data, fsdp, tensor = (math.prod(part) for part in (sizes[:i], sizes[i:j], sizes[j:]))
            for parallel in (False, True):
                for recompute in ("none", "selective", "full"):
                    for each in range(1, batch + 1):
                        pins = {
                            "data": data, "fsdp": fsdp, "tensor": tensor, "recompute": recompute,
                            "microbatch": each,
                        }  # fmt: skip
                        if parallel and tensor == 1:
                            continue
                        if tensor > 1 and options.sequence_parallel not in (None, parallel):
                            continue
                        if any(getattr(options, k) not in (None, v) for k, v in pins.items()):
                            continue
                        if batch % (each * data * fsdp) == 0:
                            yield (data, fsdp, tensor, parallel, recompute, each)


def pinned(values):
    return st.none() | st.sampled_from(values)


options = st.builds(
    SearchOptions,
    data=pinned([1, 2, 3, 4, 8]),
    fsdp=pinned([1, 2, 3, 4, 8]),
    tensor=pinned([1, 2, 3, 4, 8]),
    sequence_parallel=pinned([True, False]),
    recompute=pinned(["none", "selective", "full"]),
    microbatch=pinned([1, 2, 3]),
)


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.sampled_from([1, 4, 6, 12, 16]), options)
def test_candidates_are_all_that_the_pins_allow_and_each_once(devices, batch, options):
    mesh = Mesh.factored(devices)
    found = list(candidates(gpt(), mesh, batch, options))
    assert len(set(found)) == len(found)
    assert sorted(degrees(c, mesh) for c in found) == sorted(brute_force(devices, batch, options))


def test_tensor_parallelism_takes_the_fastest_links_and_fsdp_the_next():
    mesh = Mesh.factored(8)
    options = SearchOptions(data=2, fsdp=2, tensor=2, recompute="none", sequence_parallel=True)
    (first, *_) = candidates(gpt(), mesh, 16, options)
    assert first == Candidate(
        LayerStrategy("embed..outside", ("c",), ("b",), sequence_parallel=True), 16
    )


def test_microbatches_are_offered_largest_first():
    options = SearchOptions(data=2, fsdp=1, tensor=1, recompute="none")
    found = candidates(gpt(), Mesh.factored(2), 12, options)
    assert [c.microbatch for c in found] == [12, 6, 4, 2]


@pytest.mark.parametrize(
    ("names", "selector"), [(("embed", "b[0]", "head"), "embed..head"), (("all",), "all")]
)
def test_one_selector_names_all_layers(names, selector):
    (candidate, *_) = candidates(layered(*names), Mesh(), 1, SearchOptions())
    assert candidate.strategy.layers == selector


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ({}, "dp8, micro-batch 4"),
        ({"fsdp": ("a", "b", "c")}, "fsdp8, micro-batch 4"),
        ({"zero1": ("a",), "tensor": ("c",)}, "dp2 zero2 tp2, micro-batch 4"),
        (
            {"fsdp": ("b",), "tensor": ("c",), "sequence_parallel": True, "recompute": "full"},
            "dp2 fsdp2 tp2 sp, recompute full, micro-batch 4",
        ),
    ],
)
def test_a_candidate_describes_itself_as_people_write_it(strategy, text):
    assert Candidate(LayerStrategy("all", **strategy), 4).describe(Mesh.factored(8)) == text


def test_a_candidate_for_one_device_says_so():
    assert Candidate(LayerStrategy("all"), 4).describe(Mesh()) == "one device, micro-batch 4"
