"""What a run pinned holds while its devices are there and nobody asks for another plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.cli.preparing import resumed_config
from shardpar.cli.stored import earlier_run
from shardpar.config.load import load
from shardpar.config.save import to_yaml
from shardpar.config.schema import FederatedConfig, NodesConfig, SparseConfig
from shardpar.errors import ConfigError
from shardpar.planner.options import PINS, SearchOptions
from shardpar.ps.data.options import SparseDataOptions
from shardpar.run.directory import RunDirectory

PLAN = """\
format: shardpar-plan/1
cluster: {cluster}
global_batch: 8
pipelines:
- sequences: 8
  microbatch: 8
  schedule: 1f1b
  stages:
  - {{devices: [{devices}], mesh: {{a: 2}}, layers: [{{layers: embed..outside, fsdp: [a]}}]}}
"""
PINNED = {
    "data": 1, "fsdp": 2, "tensor": 1, "zero1": 1, "sequence_parallel": False, "recompute": "full",
    "context": 1, "attention": "gather", "microbatch": 8, "stages": 1, "pipelines": 1,
    "zero": "none", "fix": "head fsdp=1",
}  # fmt: skip
CLICKS = SparseConfig(data=SparseDataOptions(format="clicks"))
FREE = SearchOptions(epsilon=0.01, schedule="fastest")


@pytest.fixture
def run(tmp_path):
    """A run of two devices with every pin there is."""
    assert set(PINNED) == set(PINS)
    given = [f"plan.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in PINNED.items()]
    config = load(None, [*given, "plan.epsilon=0.01", "plan.schedule=single_jit"])
    directory = RunDirectory(tmp_path / "run")
    directory.make()
    directory.write({"config.yaml": to_yaml(config)})
    return directory


def follows(run, cluster, devices):
    run.write({"plan.yaml": PLAN.format(cluster=cluster, devices=devices)})


def test_on_the_same_devices_all_pins_hold(run):
    follows(run, "8 x cpu", ", ".join(map(str, range(8))))
    run.write({"plan.yaml": run.plan.read_text().replace("a: 2", "a: 8")})
    options = resumed_config(run, ["train.steps=5"], None).plan
    assert {name: getattr(options, name) for name in PINS} == PINNED


@pytest.mark.parametrize("overrides", [[], ["train.steps=5"]])
def test_on_other_devices_none_holds(run, overrides):
    follows(run, "2 x cpu", "0, 1")
    assert resumed_config(run, overrides, None).plan == FREE


def test_another_plan_drops_what_was_pinned(run, tmp_path):
    follows(run, "8 x cpu", ", ".join(map(str, range(8))))
    run.write({"plan.yaml": run.plan.read_text().replace("a: 2", "a: 8")})
    found = resumed_config(run, ["plan.tensor=4"], None).plan
    assert found == replace(FREE, tensor=4)
    file = tmp_path / "mine.yaml"
    file.write_text(run.plan.read_text())
    found = resumed_config(run, [], str(file)).plan
    assert found == replace(FREE, file=str(file))


@pytest.mark.parametrize("config", [CLICKS, NodesConfig(), FederatedConfig()])
def test_a_run_of_another_kind_is_not_gone_on_with(run, config):
    here = replace(config, train=replace(config.train, run_dir=str(run.path)))
    with pytest.raises(ConfigError, match=r"a run of another kind, of model\.source=gpt"):
        earlier_run(here)
    run.write({"config.yaml": to_yaml(here)})
    directory, then = earlier_run(here)
    assert (directory.path, then.train) == (run.path, here.train)
    assert earlier_run(replace(config, train=replace(config.train, run_dir=None))) is None
