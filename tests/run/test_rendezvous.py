"""How processes find each other: flags, JAX_* variables, SLURM, Open MPI, TPU hosts."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import UserError
from shardpar.run.rendezvous import Rendezvous, find

JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def slurm(**changes: str | None) -> dict[str, str]:
    """What srun gives to task 1 of 2 on node002, with one task on each node."""
    found = {
        "SLURM_JOB_ID": "4100",
        "SLURM_STEP_NODELIST": "node[001-002]",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


# Flags and JAX_* variables.


def test_flags_win_over_all_that_the_environment_says():
    where = find({**JAX, **slurm()}, "n1:4000", 3, 2)
    assert where == Rendezvous("n1:4000", 3, 2, None, "flags")


def test_jax_variables_win_over_a_launcher():
    assert find({**slurm(), **JAX}) == Rendezvous("a:1", 2, 1, None, "JAX_* variables")


@given(
    count=st.integers(2, 4096),
    data=st.data(),
    host=st.from_regex(r"[a-z][a-z0-9.-]*", fullmatch=True),
)
def test_flags_and_variables_say_the_same(count, data, host):
    index = data.draw(st.integers(0, count - 1))
    coordinator = f"{host}:{data.draw(st.integers(1, 65535))}"
    by_flags = find({}, coordinator, count, index)
    by_variables = find(
        {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    )
    assert by_flags == Rendezvous(coordinator, count, index)
    assert by_variables == Rendezvous(coordinator, count, index, None, "JAX_* variables")


def test_nothing_means_alone():
    assert find({}) is None
    assert find({"JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}) is None


@pytest.mark.parametrize("launcher", [{}, slurm(), {"TPU_WORKER_HOSTNAMES": "a,b"}])
def test_one_process_is_alone_whatever_a_launcher_says(launcher):
    # A supervisor says so when the other nodes are gone: SLURM goes on counting them.
    alone = {**JAX, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert find({**launcher, **alone}) is None
    assert find(launcher, "a:1", 1, 0) is None


@pytest.mark.parametrize("missing", JAX)
def test_a_variable_that_is_missing_is_named(missing):
    # Such a process would train alone while the others wait for it.
    left = {name: value for name, value in JAX.items() if name != missing}
    with pytest.raises(UserError, match=f"there is no {missing}; give all three, or none"):
        find(left)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 2, 1), "there is no --coordinator; give all three"),
        (("a:1", None, None), "there is no --processes and no --process; give all three"),
        (("a:1", 2, 2), r"process 2 of 2 \(--coordinator.*count from 0 to 1"),
        (("a:1", 2, -1), r"process -1 of 2 .*count from 0 to 1"),
        (("a:1", 0, 0), "there cannot be 0 processes .*give 1 or more"),
        (("a", 2, 0), r"coordinator is 'a' \(--coordinator\); write the host and a free port"),
        (("a:", 2, 0), "such as node1:12345"),
        ((":1", 2, 0), "such as node1:12345"),
        (("a:0", 2, 0), "such as node1:12345"),
        (("a:70000", 2, 0), "such as node1:12345"),
        (("a b:1", 2, 0), "such as node1:12345"),
    ],
)
def test_flags_that_contradict_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        find({}, *flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two' .*must be a number"),
        ({"JAX_PROCESS_ID": "1.0"}, "JAX_PROCESS_ID is '1.0' .*must be a number"),
        ({"JAX_PROCESS_ID": "2"}, "process 2 of 2 .*JAX_PROCESS_ID.*from 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": "a"}, r"'a' \(JAX_COORDINATOR_ADDRESS\)"),
    ],
)
def test_variables_that_contradict_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        find({**JAX, **changes})


# SLURM.


def test_one_task_on_each_node_has_all_its_devices():
    # 61440 + 4100 % 4096: the port follows from the job, so that all tasks know it.
    assert find(slurm()) == Rendezvous("node001:61444", 2, 1, None, "SLURM")


def test_a_task_for_each_gpu_has_one_device():
    where = find(
        slurm(
            SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="8", SLURM_STEP_TASKS_PER_NODE="4(x2)",
            SLURM_PROCID="6", SLURM_LOCALID="2",
        )
    )  # fmt: skip
    assert where == Rendezvous("node001:61444", 8, 6, (2,), "SLURM")


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_a_task_that_sees_one_gpu_only_takes_that_one(name):
    # srun --gpus-per-task=1: the third task's GPU is the first, and the only one, it sees.
    several = slurm(SLURM_STEP_TASKS_PER_NODE="4(x2)", SLURM_LOCALID="2")
    assert find({**several, name: "2"}).local_devices is None
    assert find({**several, name: "0,1,2,3"}).local_devices == (2,)


@pytest.mark.parametrize(
    ("per_node", "nodes", "alone"),
    [
        ("1", "2", True), ("1(x16)", "2", True), ("2(x3)", "2", False), ("2,1", "2", False),
        ("1(x2),2", "2", False), ("11", "2", False), (None, "2", True), (None, "1", False),
        (None, None, False),
    ],
)  # fmt: skip
def test_tasks_for_each_node_as_slurm_writes_them(per_node, nodes, alone):
    where = find(slurm(SLURM_STEP_TASKS_PER_NODE=per_node, SLURM_STEP_NUM_NODES=nodes))
    assert where.local_devices == (None if alone else (0,))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[001-004,009]", "node001"),
        ("node[009,001-004]", "node009"),
        ("node[7]", "node7"),
        ("gpu-a[1-2],gpu-b[3-4]", "gpu-a1"),
        ("login,node[1-2]", "login"),
        ("rack[1-2]n[07-09]", "rack1n07"),
        ("n[1-2]-ib,m", "n1-ib"),
        ("tux[0A-0F]", "tux0A"),
    ],
)
def test_the_first_node_is_where_process_0_is(nodes, first):
    assert find(slurm(SLURM_STEP_NODELIST=nodes)).coordinator == f"{first}:61444"


@given(
    prefix=st.from_regex(r"[a-z][a-z-]{0,6}[a-z]", fullmatch=True),
    width=st.integers(1, 4),
    data=st.data(),
)
def test_the_first_node_is_that_of_the_list_written_out(prefix, width, data):
    numbers = st.integers(0, 10**width - 1)
    ranges = data.draw(
        st.lists(st.tuples(numbers, numbers).map(sorted), min_size=1, max_size=4), "ranges"
    )
    written = [f"{a:0{width}}" + (f"-{b:0{width}}" if b > a else "") for a, b in ranges]
    nodes = [f"{prefix}{n:0{width}}" for a, b in ranges for n in range(a, b + 1)]
    text = f"{prefix}[{','.join(written)}]" + data.draw(st.sampled_from(["", ",other", ",x[1-2]"]))
    assert find(slurm(SLURM_STEP_NODELIST=text)).coordinator == f"{nodes[0]}:61444"


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no SLURM here")
def test_the_first_node_is_what_scontrol_says():
    text = "rack[1-2]n[07-09],x"
    shown = subprocess.check_output(["scontrol", "show", "hostnames", text], text=True)
    first = shown.split()[0]
    assert find(slurm(SLURM_STEP_NODELIST=text)).coordinator == f"{first}:61444"


@pytest.mark.parametrize("nodes", ["", ",", "node[", "node]", "node[]", "node[1-2", "a b"])
def test_a_list_without_a_first_node_is_refused(nodes):
    with pytest.raises(UserError, match=rf"{re.escape(repr(nodes))}.*give --coordinator"):
        find(slurm(SLURM_STEP_NODELIST=nodes))


def test_a_single_task_and_a_shell_in_a_larger_job_are_alone():
    assert find(slurm(SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")) is None
    assert find(slurm(SLURM_NTASKS="8", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0")) is None


def test_the_batch_script_itself_is_alone():
    # It has SLURM_NTASKS and SLURM_PROCID, but is no step.
    assert find(slurm(SLURM_STEP_NODELIST=None, SLURM_PROCID="0")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID is 'x'"),
        ({"SLURM_PROCID": "2"}, "process 2 of 2 .*SLURM_PROCID"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'"),
    ],
)
def test_what_slurm_would_never_say_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        find(slurm(**changes))


@given(job=st.integers(1, 2**31), nodes=st.integers(1, 9), each=st.integers(1, 8), data=st.data())
def test_all_tasks_of_a_step_agree(job, nodes, each, data):
    if nodes * each == 1:
        return
    found = [
        find(
            slurm(
                SLURM_JOB_ID=str(job),
                SLURM_STEP_NODELIST=f"n[1-{nodes}]",
                SLURM_STEP_NUM_TASKS=str(nodes * each),
                SLURM_STEP_TASKS_PER_NODE=f"{each}(x{nodes})" if nodes > 1 else str(each),
                SLURM_PROCID=str(node * each + local),
                SLURM_LOCALID=str(local),
            )
        )
        for node in range(nodes)
        for local in range(each)
    ]
    assert {(where.coordinator, where.count) for where in found} == {
        (f"n1:{61440 + job % 4096}", nodes * each)
    }
    assert [where.index for where in found] == list(range(nodes * each))
    assert [where.local_devices for where in found] == [
        None if each == 1 else (local,) for _ in range(nodes) for local in range(each)
    ]


def test_the_coordinator_is_the_one_jax_would_choose(monkeypatch):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for nodes in ("node001", "a,b", "node[001-004,009]", "n[3,5],x"):
        environment = slurm(SLURM_STEP_NODELIST=nodes)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert find(environment).coordinator == SlurmCluster.get_coordinator_address(1, None)


# Open MPI.


def open_mpi(**changes: str | None) -> dict[str, str]:
    found = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "3",
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def test_open_mpi_4_is_left_to_jax():
    assert find(open_mpi()) == Rendezvous(None, 4, 3, None, "Open MPI")
    assert find(open_mpi(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0")) is None


def test_open_mpi_5_needs_the_variables_and_says_so():
    message = (
        r"JAX_COORDINATOR_ADDRESS to its host .*JAX_NUM_PROCESSES to \$OMPI_COMM_WORLD_SIZE and "
        r"JAX_PROCESS_ID to \$OMPI_COMM_WORLD_RANK"
    )
    with pytest.raises(UserError, match=message):
        find(open_mpi(OMPI_MCA_orte_hnp_uri=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"OMPI_COMM_WORLD_RANK": None}, "there is no OMPI_COMM_WORLD_RANK"),
        ({"OMPI_COMM_WORLD_RANK": "4"}, "process 4 of 4"),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, "OMPI_COMM_WORLD_SIZE is 'x'"),
    ],
)
def test_what_open_mpi_would_never_say_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        find(open_mpi(**changes))


# TPU hosts.


def test_several_tpu_hosts_are_left_to_jax():
    hosts = {"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3", "TPU_WORKER_ID": "2"}
    assert find(hosts) == Rendezvous(None, 4, 2, None, "TPU hosts")


@pytest.mark.parametrize("hosts", ["", "localhost", "localhost,"])
def test_one_tpu_host_is_alone(hosts):
    assert find({"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": "0"}) is None


def test_slices_count_too(monkeypatch):
    found = []
    for piece in range(2):
        for worker in range(2):
            environment = {
                "TPU_WORKER_HOSTNAMES": "h0,h1",
                "TPU_WORKER_ID": str(worker),
                "MEGASCALE_COORDINATOR_ADDRESS": "h0",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": str(piece),
            }
            found.append(find(environment))
            # It is jax that counts in the end.
            from jax._src.clusters.cloud_tpu_cluster import GkeTpuCluster

            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            assert found[-1].index == GkeTpuCluster.get_process_id()
            assert found[-1].count == GkeTpuCluster.get_process_count()
    assert [(where.coordinator, where.count, where.index) for where in found] == [
        (None, 4, n) for n in range(4)
    ]


def test_single_hosts_of_several_slices_are_not_alone():
    hosts = {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_COORDINATOR_ADDRESS": "h0"}
    assert find({**hosts, "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}) == Rendezvous(
        None, 2, 1, None, "TPU hosts"
    )


def test_a_worker_id_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="TPU_WORKER_ID is 'x'"):
        find({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "x"})


# Whatever is there, the answer is a place to meet, none, or an error that a person can read.

NAMES = (
    *JAX, *slurm(), *open_mpi(), "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "CUDA_VISIBLE_DEVICES",
    "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "2", "a", "a:1", "a,b", "n[1-3]", "1(x2)", "-1"]), st.text()
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_any_environment_is_understood_or_refused(environment):
    try:
        where = find(environment)
    except UserError:
        return
    assert where is None or (where.count >= 1 and isinstance(where.index, int))
