"""Plans, clusters and graphs as text: round trips, the exact form, and every message."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings

from shardpar.errors import PlanError, SpecError
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.spec.text import (
    cluster_from_text,
    cluster_to_text,
    graph_from_text,
    graph_to_text,
    plan_from_text,
    plan_to_text,
)
from tests.spec.values import clusters, gpt_like, graphs, plans

GOLDEN = Path(__file__).parents[1] / "golden"


@settings(deadline=None)
@given(plans())
def test_a_plan_read_back_is_equal(plan):
    text = plan_to_text(plan)
    assert plan_from_text(text) == plan
    assert plan_to_text(plan_from_text(text)) == text


@settings(deadline=None, max_examples=60)
@given(clusters())
def test_a_cluster_read_back_is_equal(cluster):
    text = cluster_to_text(cluster)
    assert cluster_from_text(text) == cluster
    assert cluster_to_text(cluster_from_text(text)) == text


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_a_graph_read_back_is_equal(graph):
    text = graph_to_text(graph)
    assert graph_from_text(text) == graph
    assert graph_to_text(graph_from_text(text)) == text


@pytest.mark.parametrize(
    "name", ["1e5", "no", "null", "12", "2001-01-01", "a: b", "- x", "é\u2028"]
)
def test_names_that_yaml_would_misread_are_quoted(name):
    one = Stage((0,), Mesh(), (LayerStrategy(name),))
    plan = Plan(name, 1, (Pipeline(1, 1, (one,)),), tensor_dims=(name,))
    assert plan_from_text(plan_to_text(plan)) == plan


# DESIGN.md's example: two pipelines, the second of two stages.
DESIGN = """\
format: shardpar-plan/1
cluster: h100x4+a100x2
objective: {step_s: 0.412, lower_bound_s: 0.412, gap: 0.0, search_s: 0.31}
global_batch: 64
pipelines:
- sequences: 44
  microbatch: 2
  schedule: 1f1b
  stages:
  - devices: [0, 1, 2, 3]
    mesh: {a: 2, b: 2}                 # prime factors, last = fastest links
    peak_bytes: 61.2e9                 # predicted, per device; limit 80e9
    layers:
    - {layers: embed, tensor: [b]}
    - {layers: "blocks[0:20]", fsdp: [a], tensor: [b], recompute: full}
    - {layers: "blocks[20:32]", fsdp: [a, b]}
    - {layers: head, tensor: [b]}
- sequences: 20
  microbatch: 1
  schedule: 1f1b
  stages:
  - {devices: [4], mesh: {}, layers: [{layers: "embed..blocks[14]", recompute: full}]}
  - {devices: [5], mesh: {}, layers: [{layers: "blocks[15:32]..head", recompute: full}]}
"""


def test_the_plan_in_the_design_is_read_as_it_is_meant():
    plan = plan_from_text(DESIGN)
    first, second = plan.pipelines
    (stage,) = first.stages
    assert (plan.global_batch, first.sequences, second.sequences) == (64, 44, 20)
    assert (stage.mesh, stage.peak_bytes) == (Mesh.factored(4), 61.2e9)
    assert stage.layers[1] == LayerStrategy("blocks[0:20]", ("b",), ("a",), recompute="full")
    assert [s.devices for s in second.stages] == [(4,), (5,)]
    assert [s.layers[0].layers for s in second.stages] == [
        "embed..blocks[14]",
        "blocks[15:32]..head",
    ]
    assert plan.objective is not None
    assert (plan.objective.step_s, plan.objective.gap) == (0.412, 0.0)


def test_the_plan_in_the_design_is_written_in_the_settled_form():
    text = plan_to_text(plan_from_text(DESIGN))
    assert text == (GOLDEN / "design_plan.txt").read_text()
    assert plan_from_text(text) == plan_from_text(DESIGN)


def test_a_graph_is_written_in_the_settled_form():
    assert graph_to_text(gpt_like(blocks=2)) == (GOLDEN / "hand_graph.txt").read_text()


# Messages. Each case changes one piece of a good file.

PLAN = """\
format: shardpar-plan/1
cluster: h100x8
global_batch: 8
objective: {step_s: 1.0, lower_bound_s: 1.0, search_s: 0.5}
pipelines:
- sequences: 8
  microbatch: 8
  schedule: 1f1b
  stages:
  - devices: [0, 1]
    mesh: {a: 2}
    layers:
    - {layers: embed, tensor: [a]}
    - layers: head
      recompute: full
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cluster:", "clustr:", 'line 2: unknown key "clustr"; did you mean "cluster"?'),
        (
            "recompute: full", "recmpute: full",
            'line 15: pipelines[0].stages[0].layers[1]: unknown key "recmpute"; '
            'did you mean "recompute"?',
        ),
        (
            "tensor: [a]", "tnsor: [a]",
            'line 13: pipelines[0].stages[0].layers[0]: unknown key "tnsor"; '
            'did you mean "tensor"?',
        ),
        (
            "  microbatch: 8", "  microbatch: 8\n  zzz: 1",
            'line 8: pipelines[0]: unknown key "zzz"; '
            "known keys are sequences, microbatch, stages, schedule",
        ),
        (
            "search_s", "serch_s",
            'line 4: objective: unknown key "serch_s"; did you mean "search_s"?',
        ),
        ("global_batch: 8\n", "", "line 1: object missing required field `global_batch`"),
        (
            "{layers: embed, tensor: [a]}", "{tensor: [a]}",
            "line 13: pipelines[0].stages[0].layers[0]: object missing required field `layers`",
        ),
        ("h100x8", "8", "line 2: cluster: expected `str`, got `int`"),
        ("h100x8", "1e5", "line 2: cluster: expected `str`, got `float`"),
        ("batch: 8\nobj", "batch: 8.0\nobj", "line 3: global_batch: expected `int`, got `float`"),
        ("{a: 2}", "{a: x}", "line 11: pipelines[0].stages[0].mesh.a: expected `int`, got `str`"),
        (
            "{a: 2}", "{a: 2, no: 1}",
            'line 11: pipelines[0].stages[0].mesh: a key is not text; write "no" in quotes',
        ),
        (
            "schedule: 1f1b", "1: 1",
            'line 8: pipelines[0]: a key is not text; write "1" in quotes',
        ),
        (
            "[0, 1]", "[0, true]",
            "line 10: pipelines[0].stages[0].devices[1]: expected `int`, got `bool`",
        ),
        (
            "1f1b", "1f2b",
            "line 8: pipelines[0].schedule: invalid enum value '1f2b'; "
            "write 1f1b, gpipe, interleaved or single_jit",
        ),
        (
            "full", "everything",
            "line 15: pipelines[0].stages[0].layers[1].recompute: invalid enum value "
            "'everything'; write none, selective or full",
        ),
        ("{a: 2}", "{a: 1, a: 2}", 'line 11: not YAML: key "a" is given twice'),
        ("{a: 2}", "{a: 2", "line 12: not YAML: expected ',' or '}', but got ':'"),
        ("h100x8", "*x", "line 2: not YAML: found undefined alias 'x'"),
        ("h100x8", "!!int ''", 'line 2: not YAML: "" cannot be read as int: string index '
         "out of range; if it is text, write it in quotes"),
        ("h100x8", "2001-99-99", 'line 2: not YAML: "2001-99-99" cannot be read as timestamp: '
         "month must be in 1..12; if it is text, write it in quotes"),
        ("h100x8", "\x00", "not YAML: unacceptable character #x0000: special characters are not "
         "allowed"),
        (
            "shardpar-plan/1", "shardpar-plan/9",
            'format is \'shardpar-plan/9\'; this version reads "shardpar-plan/1"',
        ),
        ("format: shardpar-plan/1\n", "", 'format is None; this version reads "shardpar-plan/1"'),
        (
            "{a: 2}", "{b: 2}",
            'line 11: pipelines[0].stages[0]: the mesh has no axis "a"; its axes are b',
        ),
        (
            "[0, 1]", "[0, 1, 2]",
            "line 10: pipelines[0].stages[0]: a stage has 3 devices but its mesh {a: 2} holds 2; "
            "their numbers must agree",
        ),
        ("batch: 8\nobj", "batch: 9\nobj",
         "line 6: the pipelines take 8 = 8 sequences, but global_batch is 9"),
    ],
)  # fmt: skip
def test_a_plan_that_is_wrong_says_where_and_what_to_write(old, new, message):
    assert PLAN.count(old) == 1, old
    with pytest.raises(PlanError) as error:
        plan_from_text(PLAN.replace(old, new), "my plan.yaml")
    place = "my plan.yaml " if message.startswith("line") else "my plan.yaml: "
    assert str(error.value) == place + message


CLUSTER = """\
format: shardpar-cluster/1
name: two
kinds:
  h100-sxm:
    matmul_flops: {bfloat16: 989e12}
    memory_bytes: 80e9
    memory_bandwidth: 3.35e12
  a100.80:
    matmul_flops:
      float32: 19.5e12
    memory_bytes: 80e9
    memory_bandwidth: 2e12
    source: measured
hosts:
- {kind: h100-sxm, devices: 4}
links:
  intra_host: {bandwidth: 450e9}
  inter_host: {bandwidth: 50e9}
"""


def test_a_cluster_may_leave_out_what_has_a_default():
    cluster = cluster_from_text(CLUSTER)
    assert [kind.source for kind in cluster.kinds] == ["datasheet", "measured"]
    assert cluster.kinds[0].flops("bfloat16") == 989e12
    assert cluster.hosts[0].count == 1


SPEEDS = """\
speeds:
- {speed: 0.4, devices: [0, 3]}
- {speed: 0.9, devices: [1]}
"""


def test_slow_devices_are_listed_by_their_speed():
    cluster = cluster_from_text(CLUSTER + SPEEDS)
    assert cluster.speeds == ((0, 0.4), (1, 0.9), (3, 0.4))
    assert cluster_to_text(cluster).endswith(SPEEDS)


@pytest.mark.parametrize(
    ("speeds", "message"),
    [
        (
            "[{speed: 0, devices: [1]}]",
            "speeds: device 1 has speed 0.0; it is a share of its kind's rates, write more than 0 "
            "and at most 1",
        ),
        ("[{speed: 0.5, devices: [4]}]", "speeds: there is no device 4; name one from 0 to 3"),
        (
            "[{speed: 0.5, devices: [1]}, {speed: 0.4, devices: [1]}]",
            "speeds: device 1 comes after device 1; name each device once, the smallest number "
            "first",
        ),
        (
            "[{speed: 0.5, device: [1]}]",
            'speeds[0]: unknown key "device"; did you mean "devices"?',
        ),
    ],
)
def test_a_speed_that_is_wrong_says_what_to_write(speeds, message):
    with pytest.raises(SpecError) as error:
        cluster_from_text(f"{CLUSTER}speeds: {speeds}\n", "two.yaml")
    assert str(error.value) == f"two.yaml line 19: {message}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "source: measured", "sorce: measured",
            ' line 13: kinds.a100.80: unknown key "sorce"; did you mean "source"?',
        ),
        (
            "float32: 19.5e12", "float32: fast",
            " line 10: kinds.a100.80.matmul_flops.float32: expected `float`, got `str`",
        ),
        (
            "bfloat16: 989e12", "bfloat16: fast",
            " line 5: kinds.h100-sxm.matmul_flops.bfloat16: expected `float`, got `str`",
        ),
        (
            "    memory_bandwidth: 2e12\n", "",
            " line 9: kinds.a100.80: object missing required field `memory_bandwidth`",
        ),
        ("devices: 4", "device: 4", ' line 15: hosts[0]: unknown key "device"; did you mean '
         '"devices"?'),
        (
            "{bandwidth: 50e9}", "{bandwith: 50e9}",
            ' line 18: links.inter_host: unknown key "bandwith"; did you mean "bandwidth"?',
        ),
        ("measured", "guessed",
         " line 13: kinds.a100.80.source: invalid enum value 'guessed'; write measured, "
         "datasheet or assumed"),
        (
            "450e9", "-1.0",
            " line 17: links.intra_host.bandwidth is -1.0; write positive bytes per second",
        ),
        (
            "kind: h100-sxm", "kind: h200",
            ' line 15: hosts[0].kind is "h200", which is not among its kinds: h100-sxm, a100.80',
        ),
    ],
)  # fmt: skip
def test_a_cluster_that_is_wrong_says_where_and_what_to_write(old, new, message):
    assert CLUSTER.count(old) == 1
    with pytest.raises(SpecError) as error:
        cluster_from_text(CLUSTER.replace(old, new), "two.yaml")
    assert str(error.value) == "two.yaml" + message


def test_of_two_faults_the_first_is_told_with_its_own_line():
    wrong = CLUSTER.replace("source: measured", "sorce: measured").replace(
        "devices: 4", "device: 4"
    )
    with pytest.raises(SpecError) as error:
        cluster_from_text(wrong, "two.yaml")
    assert str(error.value) == (
        'two.yaml line 13: kinds.a100.80: unknown key "sorce"; did you mean "source"?'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "graph: expected keys and values at the top, got NoneType"),
        ("- 1", "graph: expected keys and values at the top, got list"),
        (
            "format: shardpar-graph/2",
            "graph: format is 'shardpar-graph/2'; this version reads \"shardpar-graph/1\"",
        ),
        (
            "format: shardpar-graph/1\nclasses: 5",
            "graph: Expected `array`, got `int` - at `$.classes`",
        ),
        (
            "format: shardpar-graph/1\nclasses: [5]",
            "graph: Expected `object`, got `int` - at `$.classes[0]`",
        ),
        (
            "format: shardpar-graph/1\nlayers: {a: b}",
            "graph: Expected `array`, got `object` - at `$.layers`",
        ),
    ],
)
def test_a_graph_that_is_wrong_says_what(text, message):
    with pytest.raises(SpecError) as error:
        graph_from_text(text)
    assert str(error.value) == message


def test_a_graph_keeps_its_own_rules_when_read():
    text = graph_to_text(gpt_like()).replace("dtype: int32", "dtype: int31")
    with pytest.raises(SpecError, match=r"^mine: an activation of shape \(8, 16\) has dtype int31"):
        graph_from_text(text, "mine")
