"""What people are shown of plans of several stages, and of errors that are not theirs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shardpar.cli import tables
from shardpar.cli.ending import ending
from shardpar.cli.why import verdict
from shardpar.spec.text import plan_from_text
from tests.lowering.tiny import captured

TWO = """\
format: shardpar-plan/1
cluster: here
global_batch: 8
pipelines:
- sequences: 8
  microbatch: 4
  schedule: 1f1b
  stages:
  - {devices: [0, 1], mesh: {a: 2}, layers: [{layers: "embed..blocks[0]", fsdp: [a]}]}
  - {devices: [2], mesh: {}, layers: [{layers: "blocks[1]..outside"}]}
"""


def shown(what):
    screen = Console(file=io.StringIO(), width=200)
    screen.print(what)
    return screen.file.getvalue()


def test_layouts_are_shown_stage_by_stage_each_parameter_once():
    graph = captured().graph
    text = shown(tables.shardings_view(plan_from_text(TWO), graph))
    first, second = text.split("parameter layouts of pipeline 0, stage 1")
    assert "parameter layouts of pipeline 0, stage 0" in first
    for name, layer, _ in graph.parameters:
        here = first if layer.name in ("embed", "blocks[0]") else second
        assert (name in first) + (name in second) == 1, name
        assert name in here


class Costs:
    """As much of a price as a verdict looks at."""

    def __init__(self, step_s):
        self.step_s, self.peak_bytes = step_s, 0


def test_a_plan_by_hand_that_is_faster_is_said_to_be(monkeypatch):
    monkeypatch.setattr("shardpar.cli.why._step_terms", lambda _, cost: [("compute", cost.step_s)])
    found = (None, Costs(0.002))
    assert "yours is 50.0% faster" in verdict(found, (None, Costs(0.001)), 1)
    assert "as fast as" in verdict(found, (None, Costs(0.002)), 1)
    assert "yours is 100.0% slower" in verdict(found, (None, Costs(0.004)), 1)


class JaxRuntimeError(RuntimeError):
    """As jax's, which cannot be made by hand in every version."""


@pytest.mark.parametrize(
    ("text", "crash"),
    [
        ("UNKNOWN: Gloo all-reduce failed: [external/gloo] Connection reset by peer", False),
        ("INTERNAL: something else", True),
    ],
)
def test_a_lost_peer_is_no_crash_of_this_process(capsys, monkeypatch, tmp_path, text, crash):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ending(JaxRuntimeError(text)) == 1
    said = capsys.readouterr().err
    assert ("another process of this run has ended" in said) != crash
    assert ("the traceback is in" in said) == crash
    assert bool(list(tmp_path.iterdir())) == crash
