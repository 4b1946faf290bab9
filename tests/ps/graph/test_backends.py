"""Which library is chosen, and what is said when there is none."""

from __future__ import annotations

import pytest

from shardpar.errors import UserError
from shardpar.ps.graph.backends import (
    ACCELERATOR_EDGES,
    LOUVAIN_IGRAPH_EDGES,
    SUPPORTED,
    TRIANGLES_SCIPY_NODES,
    Devices,
    asked_backend,
    choose_backend,
    needs_devices,
)

BOTH = frozenset({"igraph", "networkit"})
GPUS = Devices("gpu", 8)


@pytest.mark.parametrize(
    ("algorithm", "nodes", "edges", "devices", "installed", "name"),
    [
        ("pagerank", 10, 10, None, BOTH, "scipy"),
        ("pagerank", 10, 10, GPUS, BOTH, "scipy"),
        ("pagerank", 10, ACCELERATOR_EDGES, GPUS, BOTH, "jax"),
        ("components", 10, 10**9, Devices("cpu", 8), BOTH, "scipy"),
        ("components", 10, 10, Devices("cpu", 8, asked=True), BOTH, "jax"),
        ("label-propagation", 10, 10**9, GPUS, frozenset(), "jax"),
        ("kcore", 10, 10**9, GPUS, BOTH, "scipy"),
        ("common-neighbours", 10, 10**9, GPUS, BOTH, "scipy"),
        ("louvain", 10, LOUVAIN_IGRAPH_EDGES, None, BOTH, "igraph"),
        ("louvain", 10, LOUVAIN_IGRAPH_EDGES + 1, None, BOTH, "networkit"),
        ("louvain", 10, 10**9, None, frozenset({"igraph"}), "igraph"),
        ("louvain", 10, 10, None, frozenset({"networkit"}), "networkit"),
        ("triangles", TRIANGLES_SCIPY_NODES, 10**8, None, BOTH, "scipy"),
        ("triangles", TRIANGLES_SCIPY_NODES + 1, 10**8, None, BOTH, "networkit"),
        ("triangles", 10**9, 10**9, None, frozenset(), "scipy"),
    ],
)
def test_the_choice_follows_size_devices_and_what_is_installed(
    algorithm, nodes, edges, devices, installed, name
):
    found = choose_backend(algorithm, nodes, edges, devices, installed)
    assert found.name == name
    assert found.reason


def test_jax_is_started_only_where_it_could_be_chosen():
    for algorithm, supported in SUPPORTED.items():
        for edges in (10, ACCELERATOR_EDGES - 1, ACCELERATOR_EDGES):
            names = {
                choose_backend(algorithm, 10, edges, devices, BOTH).name
                for devices in (None, GPUS, Devices("cpu", 1))
            }
            assert needs_devices(algorithm, edges) or names <= set(supported) - {"jax"}
            assert needs_devices(algorithm, edges) == ("jax" in names)


def test_what_is_missing_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"louvain needs networkit or igraph.*shardpar\[graph\]"):
        choose_backend("louvain", 10, 10, None, frozenset())
    with pytest.raises(UserError, match=r"--backend igraph: it is not installed; pip install"):
        asked_backend("kcore", "igraph", frozenset({"networkit"}))
    with pytest.raises(UserError, match="--backend igraph: pagerank runs on scipy or jax"):
        asked_backend("pagerank", "igraph", BOTH)
    assert asked_backend("kcore", "igraph", BOTH).name == "igraph"
