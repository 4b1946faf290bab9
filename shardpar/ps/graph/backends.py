"""Which library does the work: chosen by algorithm, size, devices, and what is installed."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from importlib import util
from typing import Literal

from shardpar.errors import UserError

Algorithm = Literal[
    "pagerank", "components", "kcore", "louvain", "label-propagation", "triangles",
    "common-neighbours",
]  # fmt: skip
BackendName = Literal["scipy", "jax", "igraph", "networkit"]

SUPPORTED: dict[Algorithm, tuple[BackendName, ...]] = {
    "pagerank": ("scipy", "jax"),
    "components": ("scipy", "jax"),
    "kcore": ("scipy", "igraph", "networkit"),
    "louvain": ("networkit", "igraph"),
    "label-propagation": ("scipy", "jax"),
    "triangles": ("scipy", "networkit", "igraph"),
    "common-neighbours": ("scipy",),
}
"""What each algorithm can run on; of those for one host, the fastest first.

That counts what it takes to hand a graph over: igraph needs 1.0 CPU-s to build a graph of a
million edges, networkit 0.4, and NumPy has all core numbers in 0.1.
"""

ACCELERATOR_EDGES = 2_000_000
"""Below it, one host is done before jax has compiled."""
LOUVAIN_IGRAPH_EDGES = 200_000
"""Up to here igraph takes at most about a second, and its result depends on the seed alone."""
TRIANGLES_SCIPY_NODES = 1_000_000
"""Above it, the table of neighbours that NumPy looks in holds too few nodes at a time."""
_EXTRAS: tuple[BackendName, ...] = ("igraph", "networkit")


@dataclass(frozen=True)
class Backend:
    """A library, and why it was chosen."""

    name: BackendName
    reason: str


@dataclass(frozen=True)
class Devices:
    """What jax has found: "cpu", "gpu" or "tpu", and how many; `asked` if the user chose them."""

    platform: str
    count: int
    asked: bool = False


def installed_backends() -> frozenset[BackendName]:
    """Those of the extra `graph` that can be imported here."""
    return frozenset(name for name in _EXTRAS if util.find_spec(name))


def needs_devices(algorithm: Algorithm, edges: int) -> bool:
    """Whether the choice depends on devices; if not, jax need not be started."""
    return "jax" in SUPPORTED[algorithm] and edges >= ACCELERATOR_EDGES


def choose_backend(
    algorithm: Algorithm,
    nodes: int,
    edges: int,
    devices: Devices | None,
    installed: Set[BackendName],
) -> Backend:
    """The library for one computation.

    Args:
      algorithm: what is computed.
      nodes: of the graph.
      edges: of the graph, as it was read.
      devices: None if jax was not asked.
      installed: which of igraph and networkit there are.

    Raises:
      UserError: what it needs is not installed.

    >>> choose_backend("pagerank", 1000, 5000, None, frozenset()).name
    'scipy'
    >>> choose_backend("pagerank", 10**6, 10**8, Devices("gpu", 8), frozenset()).name
    'jax'
    """
    supported = SUPPORTED[algorithm]
    if "jax" in supported and devices is not None:
        if devices.asked:
            return Backend("jax", f"{devices.count} {devices.platform} devices were asked for")
        if devices.platform != "cpu" and edges >= ACCELERATOR_EDGES:
            return Backend(
                "jax",
                f"{edges} edges are spread over {devices.count} {devices.platform} device"
                f"{'' if devices.count == 1 else 's'}",
            )
    if algorithm == "louvain" and "igraph" in installed and edges <= LOUVAIN_IGRAPH_EDGES:
        return Backend("igraph", f"with {edges} edges it is fast enough, and it is repeatable")
    if algorithm == "triangles" and "networkit" in installed and nodes > TRIANGLES_SCIPY_NODES:
        return Backend("networkit", f"with {nodes} nodes its own lists pay")
    for name in supported:
        if name == "scipy":
            return Backend("scipy", "on one host it is the fastest")
        if name in installed:
            return Backend(name, "the fastest of those that are installed")
    raise UserError(
        f"{algorithm} needs {' or '.join(supported)}, and neither is installed; {_INSTALL}"
    )


def asked_backend(algorithm: Algorithm, name: str, installed: Set[BackendName]) -> Backend:
    """The library that the user named.

    Raises:
      UserError: the algorithm does not run on it, or it is not installed.

    >>> asked_backend("kcore", "jax", frozenset())
    Traceback (most recent call last):
    ...
    shardpar.errors.UserError: --backend jax: kcore runs on scipy, igraph or networkit
    """
    supported = SUPPORTED[algorithm]
    for known in supported:
        if known == name:
            if known in _EXTRAS and known not in installed:
                raise UserError(f"--backend {name}: it is not installed; " + _INSTALL)
            return Backend(known, "asked for")
    *others, last = supported
    choices = f"{', '.join(others)} or {last}" if others else last
    raise UserError(f"--backend {name}: {algorithm} runs on {choices}")


_INSTALL = "pip install 'shardpar[graph]'"
