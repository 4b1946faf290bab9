"""profile hardware and profile model as people run them."""

from __future__ import annotations

import json
import re

import pytest

from shardpar.spec.plan import Plan
from shardpar.spec.profile import COLLECTIVES, measured_cluster
from shardpar.spec.profile_text import hardware_from_text, model_from_text
from shardpar.spec.text import cluster_from_text, plan_from_text
from tests.cli.command import ROOT, TINY, shardpar

GPT = str(ROOT / "configs" / "gpt.gin")


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """A folder with the measured cluster of two virtual devices, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    done = shardpar(
        "profile", "hardware", "--devices", "2", "--quick", "--out", "new/here.yaml", cwd=folder
    )
    return folder / "new", done


@pytest.mark.slow
def test_measured_devices_can_be_planned_for(two_devices, tmp_path):
    folder, _ = two_devices
    cluster = cluster_from_text((folder / "here.yaml").read_text())
    assert (cluster.name, cluster.num_devices) == ("cpux2", 2)
    for figure in (*cluster.kinds, cluster.intra_host):
        assert figure.source == "measured"
        assert figure.note.startswith("shardpar profile hardware --devices 2 --quick: ")
    # No other host was there to measure.
    assert cluster.inter_host.source == "assumed"
    done = shardpar(
        "plan", GPT, *TINY, "--cluster", str(folder / "here.yaml"), "--out", "plan.yaml",
        cwd=tmp_path,
    )  # fmt: skip
    assert "plan for cpux2" in done.stdout
    plan = plan_from_text((tmp_path / "plan.yaml").read_text())
    assert isinstance(plan, Plan)
    assert plan.cluster == "cpux2"


@pytest.mark.slow
def test_the_curves_lie_beside_the_cluster_and_are_what_it_was_made_of(two_devices):
    folder, done = two_devices
    assert sorted(path.name for path in folder.iterdir()) == ["here.profile.yaml", "here.yaml"]
    profile = hardware_from_text((folder / "here.profile.yaml").read_text())
    cluster = cluster_from_text((folder / "here.yaml").read_text())
    assert measured_cluster(cluster, profile).intra_host == cluster.intra_host
    assert profile.memory_bandwidth == pytest.approx(cluster.kinds[0].memory_bandwidth, rel=1e-3)
    assert {(c.kind, c.group_size) for c in profile.collectives} == {(k, 2) for k in COLLECTIVES}
    assert [n for n, _ in profile.collectives[0].times] == [2**10, 2**15, 2**20, 2**23]
    assert profile.overlap is not None
    for words in ("float32", "bfloat16", "all-reduce", "overlap: products take", "cluster cpux2"):
        assert words in done.stdout
    assert "written to new/here.yaml, the curves to new/here.profile.yaml" in done.stderr
    assert "9/9 matrix products and all-reduce together" in done.stderr


@pytest.mark.slow
def test_one_device_is_measured_without_collectives_as_one_json_object(tmp_path):
    done = shardpar("profile", "hardware", "--devices", "1", "--quick", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    cluster = cluster_from_text(found["cluster"])
    assert (cluster.num_devices, cluster.intra_host.source) == (1, "assumed")
    assert found["profile"]["overlap"] is None
    assert found["profile"]["collectives"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_layers_are_measured_beside_what_was_captured_and_predicted(two_devices, tmp_path):
    folder, _ = two_devices
    done = shardpar(
        "profile", "model", GPT, *TINY, "--quick", "--cluster", str(folder / "here.yaml"),
        "--out", "model.yaml", cwd=tmp_path,
    )  # fmt: skip
    profile = model_from_text((tmp_path / "model.yaml").read_text())
    assert profile.command == f"shardpar profile model {GPT} {' '.join(TINY)} --quick"
    assert (profile.batch, profile.length, profile.compute_dtype) == (8, 32, "float32")
    assert [(c.name, c.layers) for c in profile.classes] == [
        ("Embed", 1), ("Block", 2), ("Head", 1), ("outside", 1),
    ]  # fmt: skip
    for cls in profile.classes:
        assert [(t.batch, t.length) for t in cls.times] == [(1, 32), (2, 32), (2, 16)]
        assert cls.forward is not None
    # The block's parameters: two norms, qkv, out, and a hidden layer four times as wide.
    width = 128
    elements = 4 * width + 3 * width**2 + 3 * width + width**2 + width + 8 * width**2 + 5 * width
    assert profile.classes[1].captured.parameter_bytes == 4 * elements
    assert re.search(r"Block\s+│\s+1 x 32", done.stdout)
    assert "predictions are for cpu of cpux2, whose rates are measured" in done.stdout


@pytest.mark.slow
def test_a_model_profile_is_one_json_object(tmp_path):
    done = shardpar("profile", "model", GPT, *TINY, "--quick", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert set(found) == {"profile", "predicted"}
    assert [(p["class"], p["batch"]) for p in found["predicted"]] == [
        (cls, batch) for cls in ("Embed", "Block", "Head", "outside") for batch in (1, 2)
    ]
    assert all(p["forward_backward_s"] > p["forward_s"] > 0 for p in found["predicted"])


def test_help_shows_examples(tmp_path):
    top = shardpar("profile", "--help", cwd=tmp_path)
    assert "hardware" in top.stdout
    assert "model" in top.stdout
    for verb in ("hardware", "model"):
        done = shardpar("profile", verb, "--help", cwd=tmp_path)
        assert f"shardpar profile {verb}" in done.stdout


WRONG = {
    ("profile", "hardware", "--out", "."): "--out . is a folder; name a file in it",
    ("profile", "hardware", "--out", "file/here.yaml"): "file is not a folder; write another path",
    ("profile", "model", "nowhere.gin"): "nowhere.gin",
    ("profile", "model", GPT, "--cluster", "nowhere.yaml"): "cluster file nowhere.yaml: No such",
    ("profile", "model", GPT, "model.layer=2"): "model.layer",
    (
        "profile",
        "model",
        GPT,
        "--cluster",
        "zero.yaml",
    ): "memory_bandwidth is 0.0; write a positive",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_said_before_anything_is_measured(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    good = (ROOT / "configs" / "clusters" / "h100x8.yaml").read_text()
    bad = good.replace("memory_bandwidth: 3350000000000.0", "memory_bandwidth: 0")
    (tmp_path / "zero.yaml").write_text(bad)
    done = shardpar(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert WRONG[arguments] in done.stderr
    assert "Traceback" not in done.stderr
    assert "…" not in done.stderr  # no phase has begun
