"""Plans of several stages and pipelines over two processes with four virtual devices each."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import optax
import pytest

from shardpar.lowering.program import Program
from shardpar.spec.plan import Pipeline
from shardpar.spec.text import plan_to_text
from tests.lowering.random_plans import random_plan
from tests.lowering.test_pipelined import SIZES, plan_over, stage, unequal
from tests.lowering.test_transfer_two_processes import ROOT, free_port
from tests.lowering.tiny import BATCH, batches, captured, uniform
from tests.lowering.two_process_training import STEPS


def far_pair():
    """Two stages, one in each process."""
    stages = (
        stage([2, 3], "embed..blocks[0]", tensor=("a",)),
        stage([4, 5, 6, 7], "blocks[1]..outside", fsdp=("a",)),
    )
    return plan_over(Pipeline(BATCH, 4, stages))


@pytest.mark.slow
def test_two_processes_train_unequal_plans_like_one_device(tmp_path):
    source = captured(**SIZES)
    plans = {
        "far": far_pair(),
        "unequal": unequal(),
        "random": random_plan(random.Random(5), source.graph, BATCH),
    }
    for name, plan in plans.items():
        (tmp_path / f"{name}.yaml").write_text(plan_to_text(plan))
    port = free_port()
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.lowering.two_process_training", str(process), str(port),
             str(tmp_path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=500)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n".join(s[-3000:] for s in said)

    one = Program(source, uniform(1), optax.adamw(3e-3))
    state, expected = one.init(0), []
    for batch in batches(STEPS):
        state, metrics = one.step(state, batch)
        expected.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    for name in plans:
        for process in (0, 1):
            found = json.loads((tmp_path / f"{name}-{process}.json").read_text())
            np.testing.assert_allclose(found["seen"], expected, rtol=5e-5, err_msg=name)
