"""`shardpar train` of vectors of nodes: what is printed, what is written, what is refused."""

from __future__ import annotations

import json
import shutil

import networkx
import numpy as np
import pytest

from shardpar.cli.node_training import word2vec_text
from tests.cli.command import ROOT, shardpar

NODE2VEC = str(ROOT / "configs" / "node2vec.gin")
SMALL = ("data.nodes=200", "data.groups=5", "model.dim=16", "model.passes=2")


def vectors_of(path):
    """What word2vec's text says: {name: vector}."""
    count, *lines = path.read_text().splitlines()
    found = {line.split()[0]: np.array(line.split()[1:], np.float32) for line in lines}
    assert count == f"{len(found)} {len(next(iter(found.values())))}"
    return found


@pytest.mark.slow
def test_held_out_edges_are_told_apart_on_one_device_and_on_several(tmp_path):
    rows = {}
    for devices in ("1", "2"):
        done = shardpar(
            "train", NODE2VEC, *SMALL, "checkpoint.every_steps=30", "--json", "--devices", devices,
            "--run-dir", devices, cwd=tmp_path,
        )  # fmt: skip
        rows[devices] = json.loads(done.stdout.splitlines()[-1])
        assert rows[devices]["groups_auc"] > 0.75
        assert rows[devices]["auc"] > rows[devices]["groups_auc"] - 0.05
        assert len(vectors_of(tmp_path / devices / "vectors.txt")) == 200
        assert (tmp_path / devices / "report.html").is_file()
    again = shardpar("train", "--resume", "1", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "is finished: its vectors are in 1/vectors.txt" in again.stderr
    # As a run looks that was killed before its end.
    shutil.copytree(tmp_path / "1", tmp_path / "killed")
    (tmp_path / "killed" / "vectors.txt").unlink()
    again = shardpar("train", "--resume", "killed", "--devices", "1", cwd=tmp_path)
    assert "going on from step" in again.stderr
    texts = [(tmp_path / run / "vectors.txt").read_text() for run in ("1", "killed")]
    assert texts[0] == texts[1]
    (tmp_path / "killed" / "vectors.txt").unlink()
    again = shardpar("train", "--resume", "killed", "model.dim=8", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "model.dim was 16, now 8" in again.stderr
    again = shardpar("train", NODE2VEC, "--run-dir", "1", cwd=tmp_path, check=False)
    assert again.returncode == 2
    assert "write another train.run_dir" in again.stderr


@pytest.mark.slow
def test_neighbours_in_one_s_own_file_lie_together(tmp_path):
    ring = networkx.ring_of_cliques(4, 8)
    lines = [f"n{a} n{b}" for a, b in ring.edges]
    (tmp_path / "ring.txt").write_text("\n".join(lines) + "\n")
    own = ("data.format=edges", "data.path=ring.txt", "train.held_share=0", "model.dim=8")
    shardpar(
        "train", NODE2VEC, *own, "model.passes=20", "--run-dir", "ring", "--devices", "1",
        cwd=tmp_path,
    )  # fmt: skip
    found = vectors_of(tmp_path / "ring" / "vectors.txt")
    units = {name: v / np.linalg.norm(v) for name, v in found.items()}
    clique = {f"n{node}": node // 8 for node in ring}
    inside = [units[a] @ units[b] for a in units for b in units if clique[a] == clique[b] and a < b]
    across = [units[a] @ units[b] for a in units for b in units if clique[a] != clique[b]]
    assert np.mean(inside) > np.mean(across) + 0.5


def test_a_bad_line_is_named_and_the_advice_is_for_configs(tmp_path):
    (tmp_path / "edges.txt").write_text("1 2\n2 three\n3 1\n")
    done = shardpar(
        "train", NODE2VEC, "data.format=edges", "data.path=edges.txt", cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "edges.txt:2: a node is not an integer" in done.stderr
    assert "data.ids=string" in done.stderr
    assert "data.bad_share=0.01" in done.stderr
    assert "--" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("data.path=edges.txt",), "there is no file 'edges.txt'"),
        (("data.format=edges",), "data.format is 'edges' but data.path is not set"),
        (("data.format=networkx", "data.path=karate"), "networkx carries karate_club"),
        (("data.groups=1500",), "write data.nodes=3000 or more"),
        (("model.p=0",), "model.p must be"),
        (("--plan", "plan.yaml"), "there is no section plan"),
        (("--supervise",), "--supervise is for models with a plan"),
    ],
    ids=["file", "path", "networkx", "groups", "p", "plan", "supervise"],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, given, message):
    done = shardpar("train", NODE2VEC, *given, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_names_with_spaces_stay_one_word():
    text = word2vec_text(["ann lee", " "], np.float32([[1], [2]]))
    assert text.splitlines() == ["2 1", "ann_lee 1.0", "_ 2.0"]
