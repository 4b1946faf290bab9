"""The clusters that come with shardpar: they load, read back, and agree with the datasheets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardpar.errors import SpecError
from shardpar.spec.datasheet import KNOWN
from shardpar.spec.text import cluster_from_text, cluster_to_text

FILES = sorted((Path(__file__).parents[2] / "configs" / "clusters").glob("*.yaml"))
SHEETS = {sheet.name: (sheet, link) for _, sheet, link in KNOWN}

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_there_are_clusters_for_each_kind_with_a_datasheet():
    used = {kind.name for file in FILES for kind in cluster_from_text(file.read_text()).kinds}
    assert used - {"cpu"} == {name for name in SHEETS if name not in ("h100-pcie", "a100-40g")}
    assert {"h100x8", "cpu-laptop", "h800x16-h20x32", "tpu-v5e-16"} <= {f.stem for f in FILES}


@every_file
def test_a_cluster_is_called_what_its_file_is_and_has_so_many_devices(file):
    cluster = cluster_from_text(file.read_text(), str(file))
    assert cluster.name == file.stem
    counts = [int(n) for n in re.findall(r"(?:x|-)(\d+)(?=-|$)", file.stem)]
    assert cluster.num_devices == (sum(counts) if file.stem != "cpu-laptop" else 8)
    for hosts in cluster.hosts:
        # Of hosts with several kinds, the name counts each: h800x16-h20x32.
        if len(cluster.kinds) > 1:
            assert f"{hosts.kind}x{hosts.devices * hosts.count}" in file.stem


@every_file
def test_a_cluster_file_is_a_comment_and_what_would_be_written(file):
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    comment = [line for line in lines if line.startswith("#")]
    assert comment
    assert lines[: len(comment)] == comment
    cluster = cluster_from_text(text, str(file))
    assert "".join(lines[len(comment) :]) == cluster_to_text(cluster)
    assert cluster_from_text(cluster_to_text(cluster)) == cluster


@every_file
def test_a_cluster_has_the_figures_of_its_datasheets(file):
    cluster = cluster_from_text(file.read_text(), str(file))
    known = [kind for kind in cluster.kinds if kind.name in SHEETS]
    for kind in known:
        assert kind == SHEETS[kind.name][0]
    if known:
        slowest = min((SHEETS[kind.name][1] for kind in known), key=lambda link: link.bandwidth)
        assert cluster.intra_host == slowest


@every_file
def test_each_figure_says_where_it_came_from(file):
    cluster = cluster_from_text(file.read_text(), str(file))
    for figure in (*cluster.kinds, cluster.intra_host, cluster.inter_host):
        assert figure.note
    # Between hosts things are slower than inside one, or the planner's preference is wrong.
    assert cluster.inter_host.bandwidth <= cluster.intra_host.bandwidth
    assert cluster.inter_host.latency_s >= cluster.intra_host.latency_s


H100 = (FILES[0].parent / "h100x8.yaml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "memory_bandwidth: 3350000000000.0",
            "memory_bandwidth: 0",
            "c line 8: kinds.h100.memory_bandwidth is 0.0; write a positive number",
        ),
        (
            "memory_bytes: 80000000000.0",
            "memory_bytes: -80e9",
            "c line 7: kinds.h100.memory_bytes is -80000000000.0; write a positive number",
        ),
        (
            "memory_bytes: 80000000000.0",
            "memory_bytes: 80 GB",
            "c line 7: kinds.h100.memory_bytes: expected `float`, got `str`",
        ),
        (
            "- {kind: h100, devices",
            "- {kind: h200, devices",
            'c line 13: hosts[0].kind is "h200", which is not among its kinds: h100',
        ),
        (
            "{bfloat16: 989000000000000.0,",
            "{bfloat16: fast,",
            "c line 6: kinds.h100.matmul_flops.bfloat16: expected `float`, got `str`",
        ),
        (
            "    source: datasheet\n    note: 'NVIDIA",
            "    source: rumour\n    note: 'NVIDIA",
            "c line 10: kinds.h100.source: invalid enum value 'rumour'; write measured, datasheet "
            "or assumed",
        ),
        (
            "    bandwidth: 450000000000.0",
            "    bandwith: 450000000000.0",
            'c line 16: links.intra_host: unknown key "bandwith"; did you mean "bandwidth"?',
        ),
        (
            "devices: 8, count: 1}",
            "devices: 0, count: 1}",
            "c line 13: hosts[0]: 1 hosts with 0 devices; both must be at least 1",
        ),
        (
            "devices: 8, count: 1}",
            "devices: 1000000, count: 1000000}",
            "c line 13: hosts have 1,000,000,000,000 devices in all; a cluster may have 32,768",
        ),
        (
            "  intra_host:\n    bandwidth: 450000000000.0",
            "  intra_host:\n    bandwidth: 0",
            "c line 16: links.intra_host.bandwidth is 0.0; write positive bytes per second",
        ),
        (
            "  inter_host:\n    bandwidth: 50000000000.0\n    latency_s: 1.0e-05",
            "  inter_host:\n    bandwidth: 50000000000.0\n    latency_s: -1",
            "c line 22: links.inter_host.latency_s is -1.0; write seconds, 0 or more",
        ),
    ],
)
def test_a_wrong_figure_is_one_error_that_names_it(old, new, message):
    assert old in H100
    with pytest.raises(SpecError) as error:
        cluster_from_text(H100.replace(old, new, 1), "c")
    assert str(error.value) == message
