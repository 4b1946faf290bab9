"""Plans that are asked for while training runs."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardpar.errors import UserError
from shardpar.planner.options import ReplanOptions, SearchOptions
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.spec.text import plan_from_text, plan_to_text
from shardpar.train.requests import Machines, Request, Requests, Task, answer, read_request
from tests.planner.cases import cluster_of, gpt


@pytest.fixture(scope="module")
def setting():
    graph, cluster = gpt(), cluster_of(8)
    work = Workload(8)
    task = Task(graph, work, SearchOptions(), ReplanOptions(compile_s=0))
    plan = plan_from_text(plan_to_text(search(graph, cluster, work).plan), "p")
    return task, plan, Machines(cluster, frozenset(range(8)))


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("", Request()),
        ("# nothing\n", Request()),
        ("devices: [0, 1]", Request(devices=(0, 1))),
        ("lost: [3]\nspeeds: {1: 0.5, 2: 1}", Request(lost=(3,), speeds=((1, 0.5), (2, 1.0)))),
    ],
)
def test_requests_are_read(text, request_):
    assert read_request(text) == request_


def test_a_whole_plan_is_a_request(setting):
    _, plan, _ = setting
    assert read_request(plan_to_text(plan)).plan == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "write a plan, or some of devices, lost, speeds"),
        ("device: [1]", "write a plan, or some of devices, lost, speeds"),
        ("devices: 4", r"devices is 4; write numbers, such as \[0, 1\]"),
        ("lost: [-1]", r"lost is \[-1\]; write numbers"),
        ("devices: [true]", r"devices is \[True\]; write numbers"),
        ("speeds: {1: fast}", "speeds is {1: 'fast'}; write {DEVICE: SHARE, ...}"),
        ("a: [", "it is no YAML"),
        ("format: shardpar-plan/1", "plan.request"),
    ],
)
def test_wrong_requests_say_what_to_write(text, says):
    with pytest.raises(UserError, match=says):
        read_request(text)


@given(st.text(max_size=60))
def test_any_text_is_a_request_or_an_error_for_people(text):
    with contextlib.suppress(UserError):
        read_request(text)


def test_lost_devices_lead_to_a_plan_without_them(setting):
    task, plan, machines = setting
    change, after, why = answer(Request(lost=(4, 5)), plan, machines, task)
    assert not {4, 5} & set(change.plan.devices)
    assert change.lost == (4, 5)
    assert after.devices == {0, 1, 2, 3, 6, 7}
    assert "cannot go on" in why
    # They are not there for the next request either, until it names them.
    again, same, _ = answer(Request(), change.plan, after, task)
    assert not {4, 5} & set(again.plan.devices)
    back, all_, _ = answer(Request(devices=tuple(range(8))), change.plan, same, task)
    assert all_.devices == set(range(8))
    assert len(back.plan.devices) > 6
    assert back.lost == ()


def test_slow_devices_are_known_until_they_are_well(setting):
    task, plan, machines = setting
    change, after, _ = answer(Request(speeds=((3, 0.2),)), plan, machines, task)
    assert plan_to_text(change.plan) != plan_to_text(plan)
    well, healed, _ = answer(Request(speeds=((3, 1.0),)), change.plan, after, task)
    assert dict(healed.speeds) == {3: 1.0}
    assert len(well.plan.devices) == 8


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(devices=(9,)), "there is no device 9; this run has 0 to 7"),
        (Request(lost=(8,)), "there is no device 8"),
        (Request(lost=tuple(range(8))), "no device would be left"),
        (Request(speeds=((1, 0.0),)), "speed"),
        (Request(speeds=((99, 0.5),)), "99"),
    ],
)
def test_impossible_requests_are_refused_in_words(setting, request_, says):
    task, plan, machines = setting
    with pytest.raises(UserError, match=says):
        answer(request_, plan, machines, task)


def test_a_request_is_answered_once_beside_the_steps_and_bad_ones_change_nothing(setting, tmp_path):
    task, plan, machines = setting
    said = []
    requests = Requests(tmp_path, machines, task, said.append)

    def steps(now):
        for _ in range(600):
            change = requests.ready(now)
            if change is not None or (said and said[-1].startswith("the plan stays")):
                return change
            time.sleep(0.05)
        raise AssertionError("no answer")

    assert requests.ready(plan) is None
    (tmp_path / "plan.request").write_text("lost: [0]")
    change = steps(plan)
    assert 0 not in change.plan.devices
    assert not (tmp_path / "plan.request").exists()
    assert requests.ready(change.plan) is None
    (tmp_path / "plan.request").write_text("devices: [77]")
    assert steps(change.plan) is None
    assert "there is no device 77" in said[-1]
    (tmp_path / "plan.request").write_bytes(b"devices: [")
    assert steps(change.plan) is None
    requests.ask()
    assert requests.ready(change.plan) is None
    requests.close()


def test_every_process_keeps_a_device(setting):
    task, plan, machines = setting
    several = Machines(machines.cluster, machines.devices, processes=(0, 0, 0, 0, 1, 1, 1, 1))
    change, _, _ = answer(Request(lost=(4, 5, 6)), plan, several, task)
    assert 7 in change.plan.devices
    with pytest.raises(UserError, match="would leave process 1 without a device"):
        answer(Request(lost=(4, 5, 6, 7)), plan, several, task)
    # One device each: a slow one cannot stand by.
    each = Machines(machines.cluster, machines.devices, processes=tuple(range(8)))
    change, _, _ = answer(Request(speeds=((3, 0.01),)), plan, each, task)
    assert each.idle(change.plan) == []
