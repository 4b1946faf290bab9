"""Stands in for srun, scancel, scontrol and shardpar, so that a batch script can run anywhere.

Called by the name of the command it stands in for. It keeps to what SLURM does where the
scripts depend on it: `srun` starts one task on each node and gives each its variables, answers a
SIGTERM of its own by killing the tasks, and ends with the highest exit code; `scancel --signal`
reaches the tasks, not the script.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("FAKE_SLURM", "."))
SRUN_OPTIONS = {"--kill-on-bad-exit", "--no-kill", "--wait", "--cpus-per-task"}
NODES = ("node001", "node002", "node003")


def log(name: str, **what: object) -> None:
    with open(FOLDER / "log.jsonl", "a") as file:
        file.write(json.dumps({"name": name, **what}) + "\n")


def srun(arguments: list[str]) -> int:
    options = []
    while arguments[0].startswith("--"):
        options.append(arguments.pop(0))
        assert options[-1].partition("=")[0] in SRUN_OPTIONS, f"srun has no {options[-1]}"
    log("srun", options=options)
    step = {
        "SLURM_STEP_NODELIST": "node[001-003]",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_NTASKS": "3",
        "SLURM_STEP_NUM_NODES": "3",
        "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
        "SLURM_LOCALID": "0",
    }
    tasks = [
        subprocess.Popen(
            arguments,
            env={**os.environ, **step, "SLURM_PROCID": str(n), "SLURMD_NODENAME": node},
        )
        for n, node in enumerate(NODES)
    ]
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))

    def killed(*_: object) -> None:
        for task in tasks:
            task.kill()

    signal.signal(signal.SIGTERM, killed)
    kill_others = "--kill-on-bad-exit=1" in options
    while any(task.poll() is None for task in tasks):
        if kill_others and any(task.returncode for task in tasks):
            killed()
        time.sleep(0.02)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def scancel(arguments: list[str]) -> int:
    log("scancel", arguments=arguments)
    assert arguments == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    for pid in (FOLDER / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    return 0


def scontrol(arguments: list[str]) -> int:
    log("scontrol", arguments=arguments)
    return 0


def shardpar(arguments: list[str]) -> int:
    """A trainer that waits to be stopped, or ends at once with the code in FAKE_CODE."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = [name for name in os.environ if name.startswith(("SLURM", "JAX"))]
    log("shardpar", arguments=arguments, environment={name: os.environ[name] for name in names})
    if "FAKE_CODE" in os.environ:
        return int(os.environ["FAKE_CODE"]) if os.environ["SLURM_PROCID"] == "1" else 0
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        log("saved", task=os.environ["SLURM_PROCID"])
        return 0
    return 9


if __name__ == "__main__":
    command = Path(sys.argv[1]).name
    verbs = {"srun": srun, "scancel": scancel, "scontrol": scontrol, "shardpar": shardpar}
    sys.exit(verbs[command](sys.argv[2:]))
