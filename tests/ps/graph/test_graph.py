"""The graph value: checked when it is made, unchanged afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import DataError
from shardpar.ps.graph.graph import from_arrays, incoming, simple


def test_arrays_cannot_be_written_to_and_the_givers_stay_as_they_are():
    sources = np.array([0, 1], np.int32)
    graph = from_arrays(sources, [1, 2], [1.0, 2.0])
    for array in (graph.sources, graph.targets, graph.weights, graph.names):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    sources[0] = 2
    assert graph.sources.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1]), r"sources are \(2,\) and targets \(1,\)"),
        (([0.5], [1]), "nodes are float64 and int64; give indices"),
        (([-1], [1]), "node indices run from -1 to 1"),
        (([0], [1], None, 1), "run from 0 to 1; with 1 nodes they run from 0 to 0"),
        (([0], [1], [float("nan")]), "the weight of edge 0 is nan"),
        (([0], [1], [1.0, 2.0]), r"\(2,\) weights for \(1,\) edges"),
        (([0], [2**31], None), "at most 2147483647 nodes"),
    ],
)
def test_arrays_that_are_no_graph_are_refused(arguments, message):
    sources, targets, weights, nodes = (*arguments, None, None)[:4]
    with pytest.raises(DataError, match=message):
        from_arrays(sources, targets, weights, num_nodes=nodes)
    with pytest.raises(DataError, match="names for 3 nodes"):
        from_arrays([0], [2], names=["a", "b"])


def test_nodes_are_found_by_name_in_any_order():
    graph = from_arrays([0, 1], [1, 2], names=np.array(["cy", "ann", "bob"], object))
    assert graph.indices_of(["bob", "cy"]).tolist() == [2, 0]
    assert graph.indices_of([]).tolist() == []
    with pytest.raises(DataError, match="there is no node zoe; there is cy, for example"):
        graph.indices_of(["ann", "zoe"])
    numbers = from_arrays([0, 1], [1, 2], names=[30, 10, 20])
    assert numbers.indices_of(["20", 30]).tolist() == [2, 0]
    for wrong in ("x", "1e3", str(2**70), "40"):
        with pytest.raises(DataError, match=f"there is no node {wrong}"):
            numbers.indices_of([wrong])


@pytest.mark.parametrize("directed", [False, True])
def test_the_matrix_holds_what_the_edges_say(directed):
    sources, targets, weights = [0, 0, 1, 2, 2], [1, 1, 0, 2, 0], [1.0, 2.0, 4.0, 8.0, 16.0]
    wanted = np.zeros((3, 3))
    for s, t, w in zip(sources, targets, weights, strict=True):
        wanted[t, s] += w
        if not directed and s != t:
            wanted[s, t] += w
    graph = from_arrays(sources, targets, weights)
    assert (incoming(graph, directed=directed).toarray() == wanted).all()


def test_a_simple_graph_has_each_edge_once_with_all_its_weight():
    graph = simple(from_arrays([2, 0, 1, 1, 0], [0, 2, 1, 2, 2], [1, 2, 4, 8, 16]))
    assert graph.sources.tolist() == [0, 1]
    assert graph.targets.tolist() == [2, 2]
    assert graph.weights.tolist() == [19, 8]
