"""`buckets` in a config: the losses of a run without them, resumed exactly, refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.errors import ConfigError, PlanError
from tests.cli.command import losses, rows
from tests.cli.mixed import GPT, TINY, texts, train

WIDE = """\
format: shardpar-plan/1
cluster: here
global_batch: 4
pipelines:
- sequences: 4
  microbatch: 4
  schedule: 1f1b
  stages:
  - {devices: [2, 3], mesh: {a: 2}, layers: [{layers: embed..outside, fsdp: [a]}]}
"""
SIX = (
    WIDE.replace("[2, 3], mesh: {a: 2}", "[0], mesh: {}").replace(", fsdp: [a]", "")
    .replace("4\n", "6\n")
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    texts(tmp_path)
    (tmp_path / "wide.yaml").write_text(WIDE)
    (tmp_path / "six.yaml").write_text(SIX)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_buckets_have_the_losses_of_one_length_and_go_on_where_they_stopped(here):
    one = ("buckets.lengths=[32]", "buckets.plans=[six.yaml]", "plan.file=six.yaml")
    train(GPT, *TINY, *one, "train.steps=4", "train.run_dir=calm")
    two = ("buckets.lengths=[8,32]", "buckets.plans=[wide.yaml,six.yaml]")
    train(GPT, *TINY, *two, "plan.file=six.yaml", "train.steps=2", "train.run_dir=wild")
    # The run keeps what it needs: the files it began with may go.
    (here / "wide.yaml").unlink()
    said = train("--resume", "wild", "train.steps=4", "--json")
    runs = "calm", "wild"
    calm, wild = (losses(here / run) for run in runs)
    assert [samples for *_, samples in wild] == [samples for *_, samples in calm]
    assert len(calm) == 4
    np.testing.assert_allclose([x[1] for x in wild], [x[1] for x in calm], rtol=2e-5)
    of_calm, of_wild = (rows((here / run / "metrics.jsonl").read_text()) for run in runs)
    for found, expected in zip(
        [row for row in of_wild if "loss" in row], [row for row in of_calm if "loss" in row],
        strict=True,
    ):  # fmt: skip
        short, long = found["bucket_8_tokens"], found["bucket_32_tokens"]
        assert short > 0
        assert short + long == expected["bucket_32_tokens"]
    np.testing.assert_allclose(of_wild[-1]["eval_loss"], of_calm[-1]["eval_loss"], rtol=2e-5)
    assert '"bucket_8_tokens"' in said
    with pytest.raises(ConfigError, match="buckets or none was 'buckets', now 'none'"):
        train("--resume", "wild", "train.steps=5", "buckets.lengths=[]", "buckets.plans=[]")


def test_a_plan_that_does_not_fit_is_refused(here):
    (here / "wide.yaml").write_text(WIDE.replace("[2, 3]", "[2, 13]"))
    given = ("buckets.lengths=[8,32]", "buckets.plans=[wide.yaml,null]", "plan.file=six.yaml")
    with pytest.raises(PlanError) as caught:
        train(GPT, *TINY, *given, "train.steps=1", "--dry-run")
    assert str(caught.value) == (
        f"buckets.plans: {here / 'wide.yaml'} uses device 13, and there are 8 devices, counted "
        "from 0; plan for these"
    )
