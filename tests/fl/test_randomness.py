"""No generator that can be guessed feeds a mask, a share, a key or noise outside simulation."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shardpar.fl

PACKAGE = Path(shardpar.fl.__file__).parent
SIMULATION = {
    "cohort.py": "who takes part in a simulated round",
    "event_clock.py": "who trains when in a simulation",
    "examples.py": "in which order a client reads its examples",
    "partition.py": "whose example is whose in a simulation",
    "simulated_noise.py": "noise of simulations, which says so in its name",
    "simulate.py": "nothing is hidden in one process",
}
KEYS_OF_SIMULATIONS = {
    "private_sgd.py": {"jax.random", "jax.random.key", "jax.random.fold_in", "scipy.stats"},
    "private_users.py": {"jax.random", "jax.random.key", "jax.random.fold_in", "jax.random.split"},
}
"""They may derive keys for `simulated_noise`, which draws, and read a quantile; nothing else."""
WEAK = ("random", "numpy.random", "np.random", "jax.random", "jrandom", "scipy.stats", "uuid")


def weak_in(source: str) -> list[str]:
    """Every use of a generator that is none for secrets, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        elif isinstance(node, ast.Attribute):
            # A parameter may be called `random`; the module of that name must be imported first.
            names = [name for name in [ast.unparse(node)] if not name.startswith("random.")]
        for name in names:
            if any(name == weak or name.startswith(f"{weak}.") for weak in WEAK):
                found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_secrets_come_from_generators_for_secrets(path):
    if path.name not in SIMULATION:
        used = {found.split(": ")[1] for found in weak_in(path.read_text())}
        assert used <= KEYS_OF_SIMULATIONS.get(path.name, set())


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import shuffle",
        "from numpy import random",
        "from jax import random as r",
        "import numpy as np\nnp.random.default_rng(0)",
        "import jax\nkey = jax.random.key(0)",
        "import numpy.random",
    ],
)
def test_the_scan_finds_every_way_to_write_it(source):
    assert weak_in(source)


def test_files_of_simulations_are_still_there():
    assert set(SIMULATION) <= {path.name for path in PACKAGE.rglob("*.py")}
