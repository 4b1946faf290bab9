"""The files in deploy/ are right as far as that can be known without a cluster."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from shardpar.cli.main import app
from shardpar.config.load import load
from shardpar.errors import UserError
from shardpar.run.rendezvous import Rendezvous, find
from shardpar.run.supervised import HEARTBEAT, STOPPED, Supervised
from tests.deploy.schema import problems, read_schema

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SBATCH = sorted((DEPLOY / "slurm").glob("*.sbatch"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def parse(arguments: list[str]) -> dict[str, Any]:
    """What shardpar's own command line makes of a command, without running it."""
    group = get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    return command.make_context(arguments[0], list(arguments[1:])).params


# SLURM.

OPTIONS = {
    "job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": r"1", "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+", "exclusive": "", "time": r"\d+:\d\d:\d\d", "output": r"\S*%j\S*",
    "open-mode": "append", "requeue": "", "no-kill": "", "signal": r"B:USR1@\d+",
}  # fmt: skip
"""Options of sbatch (its manual, version 24.05), and what these scripts may say with them."""


def sbatch_problems(text: str) -> list[str]:
    found = []
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    for n, line in enumerate(lines):
        if not line.startswith("#SBATCH"):
            continue
        option = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        if n > first:
            found.append(f"sbatch does not see {line!r}: it comes after a command")
        elif option is None or option[1] not in OPTIONS:
            found.append(f"sbatch has no such option: {line!r}")
        elif re.fullmatch(OPTIONS[option[1]], option[2] or "") is None:
            found.append(f"{line!r}: the value is not like {OPTIONS[option[1]]!r}")
    return found


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_a_batch_script_says_what_bash_and_sbatch_understand(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert sbatch_problems(path.read_text()) == []
    given = re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(), re.MULTILINE)
    needed = {"ntasks-per-node", "requeue", "open-mode", "signal"}
    assert needed <= set(given)
    assert ("no-kill" in given) == (path.name == "supervised.sbatch")


def test_a_wrong_option_is_noticed():
    good = "#!/bin/bash\n#SBATCH --requeue\n\nsrun x\n"
    assert sbatch_problems(good) == []
    for wrong, words in (
        ("#SBATCH --requeued", "no such option"),
        ("#SBATCH --signal=TERM@120", "not like"),
        ("#SBATCH --open-mode append", "no such option"),
    ):
        assert words in sbatch_problems(good.replace("#SBATCH --requeue", wrong))[0]
    assert "after a command" in sbatch_problems(good + "#SBATCH --requeue\n")[0]


class Job:
    """A batch script that runs with SLURM's commands replaced by `fake_slurm`."""

    def __init__(self, script: Path, folder: Path, *arguments: str, **variables: str) -> None:
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir()
        for name in ("srun", "scancel", "scontrol", "shardpar"):
            file = commands / name
            fake = Path(__file__).with_name("fake_slurm.py")
            file.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{fake}" {name} "$@"\n')
            file.chmod(0o755)
        self.process = subprocess.Popen(
            ["bash", str(script), *arguments],
            env={
                "PATH": f"{commands}:{os.environ['PATH']}", "FAKE_SLURM": str(folder),
                "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS": "3",
                "SLURM_CPUS_PER_TASK": "64", **variables,
            },
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def log(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["name"] == name]

    def wait_for(self, name: str, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.log(name)) < count:
            assert time.monotonic() < deadline, f"no {name} in {self.log('srun')}"
            time.sleep(0.05)

    def wait(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(params=SBATCH, ids=lambda path: path.name)
def script(request):
    return request.param


def test_a_batch_script_starts_one_process_on_each_node(script, tmp_path):
    job = Job(
        script, tmp_path, "configs/gpt.gin", "/runs/with space", "train.steps=50", FAKE_CODE="0"
    )
    assert job.wait() == 0
    tasks = job.log("shardpar")
    assert len(tasks) == 3
    for task in tasks:
        given = parse(task["arguments"])
        assert given["config"] == ["configs/gpt.gin", "train.steps=50"]
        assert given["run_dir"] == "/runs/with space"
        assert given["supervise"] == (script.name == "supervised.sbatch")
        node = task["environment"]["SLURMD_NODENAME"]
        if given["supervise"]:
            assert (given["nodes"], given["node"], given["address"]) == (3, node, node)
        else:
            assert (given["nodes"], given["node"], given["address"]) == (1, None, None)
    options = job.log("srun")[0]["options"]
    assert "--cpus-per-task=64" in options
    if script.name == "supervised.sbatch":
        assert {"--kill-on-bad-exit=0", "--no-kill", "--wait=0"} <= set(options)
    found = [find(task["environment"]) for task in tasks]
    assert sorted(found, key=lambda where: where.index) == [
        Rendezvous("node001:61517", 3, n, None, "SLURM") for n in range(3)
    ]
    assert job.log("scontrol") == []


def test_before_the_time_limit_the_run_saves_and_the_job_is_queued_again(script, tmp_path):
    job = Job(script, tmp_path, "configs/gpt.gin", "/runs/a")
    job.wait_for("shardpar", 3)
    # What SLURM sends for --signal=B:USR1@300: to the script, and to nothing else.
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0
    assert sorted(row["task"] for row in job.log("saved")) == ["0", "1", "2"]
    assert [row["arguments"] for row in job.log("scontrol")] == [["requeue", "77"]]


def test_a_signal_through_srun_would_lose_the_last_steps(script, tmp_path):
    # Why the scripts use scancel: this is the form that is often written.
    text = script.read_text().replace('scancel --signal=TERM "$SLURM_JOB_ID"', 'kill -TERM "$step"')
    other = tmp_path / "other.sbatch"
    other.write_text(text)
    job = Job(other, tmp_path, "configs/gpt.gin", "/runs/a")
    job.wait_for("shardpar", 3)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 137
    assert job.log("saved") == []


def test_a_task_that_fails_is_the_outcome_and_is_not_queued_again(script, tmp_path):
    job = Job(script, tmp_path, "configs/gpt.gin", "/runs/a", FAKE_CODE="2")
    assert job.wait() in (2, 137)
    assert job.log("scontrol") == []


def test_a_batch_script_says_what_it_needs(script, tmp_path):
    job = Job(script, tmp_path, "configs/gpt.gin")
    assert job.wait() == 2
    assert "usage: sbatch" in job.process.stderr.read()


# Kubernetes.


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_only_fields_that_kubernetes_knows(path):
    assert problems(yaml.safe_load(path.read_text()), read_schema()) == []


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every key of every mapping in a document."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(value, dict):
            found.append((*at, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*at, key))
    return found


FREE = {"annotations", "labels", "nodeSelector", "limits", "requests"}
"""Maps with keys of one's own."""


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_any_misspelt_field_is_noticed(path):
    document = yaml.safe_load(path.read_text())
    schema = read_schema()
    for *above, key in places(document):
        if above and above[-1] in FREE:
            continue
        wrong = copy.deepcopy(document)
        inner = wrong
        for step in above:
            inner = inner[step]
        inner[f"{key}s"] = inner.pop(key)
        assert problems(wrong, schema), f"{'.'.join(map(str, above))}.{key}s is not noticed"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("completions: 4", "completions: four", "JobSet.spec.replicatedJobs[0].template.spec"),
        ("completions: 4", "completions: 0", "less than 1"),
        ('value: "4"', "value: 4", "4 is no string"),
        ("restartPolicy: Never", "restartPolicy: Always", "not one of"),
        ("action: FailJobSet", "action: FailJob", "not one of"),
        ("jobset.x-k8s.io/v1alpha2", "jobset.x-k8s.io/v1alpha1", "apiVersion"),
        ("sizeLimit: 16Gi", "sizeLimit: 16GB", "not like"),
        ("name: shardpar\n", "name: Shardpar\n", "metadata.name"),
    ],
)
def test_a_wrong_value_is_noticed(old, new, words):
    text = (DEPLOY / "kubernetes" / "jobset.yaml").read_text()
    assert old in text
    found = problems(yaml.safe_load(text.replace(old, new, 1)), read_schema())
    assert words in " ".join(found)


def job_of(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A JobSet, its only replicated job, and the only container of its pods."""
    jobset = yaml.safe_load((DEPLOY / "kubernetes" / name).read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return jobset, job, container


def hostnames(jobset: dict[str, Any], job: dict[str, Any], replica: int = 0) -> list[str]:
    """The DNS names of a job's pods, in the order of their completion indices.

    As in the API's comment on `Network.enableDNSHostnames`:
    <jobSet.name>-<spec.replicatedJob.name>-<job-index>-<pod-index>.<subdomain>, where the subdomain
    defaults to the JobSet's name.
    """
    name, network = jobset["metadata"]["name"], jobset["spec"].get("network", {})
    assert network.get("enableDNSHostnames") is True
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    subdomain = network.get("subdomain", name)
    return [f"{name}-{job['name']}-{replica}-{n}.{subdomain}" for n in range(spec["completions"])]


def environments(job: dict[str, Any], container: dict[str, Any]) -> list[dict[str, str]]:
    """What each pod finds in its environment, by its completion index."""
    found = []
    for n in range(job["template"]["spec"]["completions"]):
        metadata = {"metadata.annotations['batch.kubernetes.io/job-completion-index']": str(n)}
        variables: dict[str, str] = {}
        for entry in container["env"]:
            value = entry.get("value")
            if value is None:
                value = metadata[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            # Kubernetes puts in what stands above an entry; the rest stays as it is.
            value = re.sub(r"\$\((\w+)\)", lambda m, v=variables: v.get(m[1], m[0]), value)
            variables[entry["name"]] = value
        # The Job controller adds its own at the end.
        found.append({**variables, "JOB_COMPLETION_INDEX": str(n)})
    return found


def test_gpu_pods_meet_at_the_first_of_them():
    jobset, job, container = job_of("jobset.yaml")
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    assert job["replicas"] == 1
    hosts = hostnames(jobset, job)
    assert all(len(label) <= 63 for host in hosts for label in host.split("."))
    found = [find(environment) for environment in environments(job, container)]
    port = container["ports"][0]["containerPort"]
    assert found == [
        Rendezvous(f"{hosts[0]}:{port}", len(hosts), n, None, "JAX_* variables")
        for n in range(len(hosts))
    ]


def test_a_completion_index_that_kubernetes_does_not_put_in_is_noticed():
    # $(JOB_COMPLETION_INDEX) is not there yet when JAX_PROCESS_ID is made.
    _, job, container = job_of("jobset.yaml")
    for entry in container["env"]:
        if entry["name"] == "JAX_PROCESS_ID":
            del entry["valueFrom"]
            entry["value"] = "$(JOB_COMPLETION_INDEX)"
    with pytest.raises(UserError, match=r"JAX_PROCESS_ID is .*JOB_COMPLETION_INDEX"):
        find(environments(job, container)[0])


def test_tpu_pods_find_each_other_by_what_gke_tells_them():
    jobset, job, container = job_of("jobset-tpu.yaml")
    spec = job["template"]["spec"]
    assert spec["completions"] == spec["parallelism"]
    selector = spec["template"]["spec"]["nodeSelector"]
    sides = selector["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(sides[0]) * int(sides[1])
    assert chips == spec["completions"] * container["resources"]["limits"]["google.com/tpu"]
    hosts = hostnames(jobset, job)
    for n, environment in enumerate(environments(job, container)):
        told = {"TPU_WORKER_ID": str(n), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
        assert find({**environment, **told}) == Rendezvous(None, 4, n, None, "TPU hosts")


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-tpu.yaml"])
def test_pods_run_a_command_that_shardpar_understands(name, monkeypatch):
    _, _, container = job_of(name)
    program, *arguments = container["command"]
    assert program == "shardpar"
    given = parse(arguments)
    monkeypatch.chdir(ROOT)
    assert load(given["config"][0]).train.steps > 0
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(given["run_dir"].startswith(f"{mount}/") for mount in mounts)


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-tpu.yaml"])
def test_what_a_pod_names_is_there(name):
    _, job, container = job_of(name)
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    claim = yaml.safe_load((DEPLOY / "kubernetes" / "runs-claim.yaml").read_text())
    assert [c["claimName"] for c in claims] == [claim["metadata"]["name"]]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["onExitCodes"]["containerName"] == container["name"]
    # A Job refuses a policy with any other.
    assert pod["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-tpu.yaml"])
def test_a_pod_that_is_stopped_does_not_count_as_done(name):
    jobset, job, container = job_of(name)
    environment = environments(job, container)[0]
    assert HEARTBEAT in environment
    assert Supervised.find(environment) is not None
    assert STOPPED not in (0, 2)
    # So the pod fails, its job with it, and the JobSet starts all again: but after exit code 2.
    assert job["template"]["spec"]["backoffLimit"] == 0
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])


# The image.


def test_the_image_holds_what_the_build_needs():
    text = (DEPLOY / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {
        word.removeprefix("./")
        for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
        for word in line.split()
    }
    assert [word for word in copied if not (ROOT / word).exists()] == []
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"],
        *build["packages"], *build["force-include"],
    }  # fmt: skip
    assert copied == needed
    extras = project["project"]["optional-dependencies"]
    assert re.search(r"^ARG EXTRA=(\w+)$", text, re.MULTILINE)[1] in extras
    assert set(re.findall(r"EXTRA=(\w+)", text)) == {"cuda", "tpu", "fl"} <= set(extras)
    version = re.search(r"^FROM python:([\d.]+)-slim$", text, re.MULTILINE)[1]
    assert version == project["project"]["requires-python"].removeprefix(">=")
