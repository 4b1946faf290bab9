"""Vectors learnt through stops are those learnt without, bit for bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shardpar.errors import ConfigError
from shardpar.ps.algorithms import deepwalk, line, node2vec
from shardpar.ps.algorithms.deepwalk import DeepWalkOptions
from shardpar.ps.algorithms.keeping import Checkpointing, StoppedError
from shardpar.ps.algorithms.line import LineOptions
from shardpar.ps.algorithms.node2vec import Node2VecOptions
from shardpar.ps.graph.planted import planted
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.options import CheckpointOptions

ALL = {
    "deepwalk": (deepwalk, DeepWalkOptions(length=8, walks_per_node=4, dim=8, passes=3)),
    "node2vec": (node2vec, Node2VecOptions(length=8, walks_per_node=4, p=2.0, dim=8, passes=3)),
    "line of both orders": (line, LineOptions(dim=8, samples_per_edge=10, batch_edges=256)),
    "line of the second": (line, LineOptions(dim=8, order="second", samples_per_edge=20)),
}


def graph():
    return planted(120, 4, 6, 0.05, 0).graph


def learnt(name, folder=None, *, stops_at=None, saves_every=0, devices=1, identity="this one"):
    """The vectors; and at which step it began."""
    algorithm, options = ALL[name]
    edges = graph()
    given = {"seed": 3, "devices": jax.devices()[:devices]}
    if folder is None:
        found = algorithm.fit(options, edges.num_nodes, edges.sources, edges.targets, **given)
        return found, 0
    asked = iter(range(10**9))
    how_often = CheckpointOptions(every_steps=saves_every, keep=2)
    with Checkpoints(folder, how_often) as checkpoints:
        keeper = Checkpointing(
            checkpoints, how_often, {"the graph": identity},
            lambda: stops_at is not None and next(asked) >= stops_at,
        )  # fmt: skip
        found = algorithm.fit(
            options, edges.num_nodes, edges.sources, edges.targets, keeper=keeper, **given
        )
    return found, keeper.step


def require_same(found, expected):
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("devices", [1, 4])
def test_what_was_stopped_again_and_again_is_what_was_not(tmp_path, name, devices):
    expected, _ = learnt(name, devices=devices)
    for stops_at in (0, 1, 4, 9):
        with pytest.raises(StoppedError):
            learnt(name, tmp_path, stops_at=stops_at, devices=devices)
    found, step = learnt(name, tmp_path, devices=devices)
    assert step == 1 + 2 + 5 + 10
    require_same(found, expected)


@pytest.mark.parametrize("name", ["node2vec", "line of both orders"])
def test_what_died_goes_on_from_its_last_save(tmp_path, name, monkeypatch):
    expected, _ = learnt(name)
    real, count = Checkpoints.save, iter(range(100))

    class Died(BaseException):
        pass

    def mortal(self, *given):
        if next(count) == 4:
            raise Died
        real(self, *given)

    monkeypatch.setattr(Checkpoints, "save", mortal)
    with pytest.raises(Died):
        learnt(name, tmp_path, saves_every=3)
    found, step = learnt(name, tmp_path, saves_every=3)
    assert step == 12
    require_same(found, expected)


def test_tables_go_on_on_another_number_of_devices(tmp_path):
    with pytest.raises(StoppedError):
        learnt("node2vec", tmp_path, stops_at=5, devices=4)
    found, step = learnt("node2vec", tmp_path, devices=2)
    assert step == 6
    np.testing.assert_allclose(found.vectors, learnt("node2vec")[0].vectors, atol=1e-5)


def test_another_graph_and_other_batches_are_refused(tmp_path):
    with pytest.raises(StoppedError):
        learnt("node2vec", tmp_path, stops_at=5)
    with pytest.raises(ConfigError, match="the graph is not what it began with"):
        learnt("node2vec", tmp_path, identity="another")
    # 256 tokens a step are 8 blocks, which 3 devices share as 9.
    with pytest.raises(ConfigError, match="began on 1 devices"):
        learnt("node2vec", tmp_path, devices=3)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    expected, _ = learnt("node2vec")
    with pytest.raises(StoppedError):
        learnt("node2vec", tmp_path, stops_at=11, saves_every=4)
    newest = max((p for p in tmp_path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    with pytest.warns(UserWarning, match="damaged"):
        found, step = learnt("node2vec", tmp_path)
    assert step == 8
    require_same(found, expected)
