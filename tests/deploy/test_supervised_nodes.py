"""What supervisors of several nodes tell trainers that a launcher has told something else."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from shardpar.cli import supervising
from shardpar.config.load import load
from shardpar.run.options import SuperviseOptions
from shardpar.run.rendezvous import find
from shardpar.run.supervised import STOPPED, Supervised
from shardpar.run.supervisor import Job, Supervisor

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
TELLS = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


def test_a_trainer_left_alone_does_not_wait_for_nodes_that_slurm_still_counts(
    tmp_path, monkeypatch
):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    told = tmp_path / "environment.json"
    command = [sys.executable, "-c", TELLS, str(told)]
    options = SuperviseOptions(join_s=0.0)
    job = Job(tmp_path / "run", command, command, "node002", 2, "localhost", options)
    with Supervisor(job, say=lambda _: None) as supervisor:
        assert supervisor.run() == 0
    environment = json.loads(told.read_text())
    assert find(SLURM) is not None
    assert SLURM.items() <= environment.items()
    assert find(environment) is None
    assert Supervised.find(environment) is not None


@pytest.mark.parametrize(
    ("nodes", "node", "address", "reached"),
    [
        (2, None, None, socket.gethostname()),
        (2, "node7", None, socket.gethostname()),
        (2, "node7", "10.0.0.7", "10.0.0.7"),
        (1, None, None, "localhost"),
        (1, "node7", None, "localhost"),
    ],
)
def test_other_nodes_reach_a_node_by_its_hosts_name(
    monkeypatch, tmp_path, nodes, node, address, reached
):
    jobs = []

    class Seen(Supervisor):
        def __init__(self, job, say):
            jobs.append(job)

        def run(self):
            return STOPPED

        def close(self):
            pass

    monkeypatch.setattr(supervising, "Supervisor", Seen)
    config = load(None, [f"train.run_dir={tmp_path}"])
    code = supervising.supervise(
        [], config, "a", resume=None, flags=[], nodes=nodes, node=node, address=address
    )
    assert code == STOPPED
    assert jobs[0].address == reached
