"""Plans that are asked for while training runs: by a file, by a signal, or by slow devices.

The file `plan.request` in the run directory holds a plan, or says what has changed:

    devices: [0, 1, 2, 3]     # train on these from now on
    lost: [4, 5]              # do not read the memory of these any more
    speeds: {3: 0.4}          # this one reaches 40% of its rate

Empty, it asks to plan again. Steps go on while the planner thinks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from shardpar.errors import PlanError, UserError
from shardpar.planner.options import ReplanOptions, SearchOptions
from shardpar.planner.replan import replan
from shardpar.planner.setting import Workload
from shardpar.spec.check import check
from shardpar.spec.cluster import Cluster
from shardpar.spec.graph import LayerGraph
from shardpar.spec.plan import Plan
from shardpar.spec.text import PLAN_FORMAT, plan_from_text, plan_to_text

REQUEST = "plan.request"
_KEYS = ("devices", "lost", "speeds")


@dataclass(frozen=True)
class Machines:
    """The devices of a run, as far as requests have told.

    Attributes:
      cluster: all of them.
      devices: those to train on.
      speeds: of slow ones.
      processes: the process of each device; each must keep a device, or it could not go on.
    """

    cluster: Cluster
    devices: frozenset[int]
    speeds: tuple[tuple[int, float], ...] = ()
    processes: tuple[int, ...] = ()

    def idle(self, plan: Plan) -> list[int]:
        """Processes that a plan leaves without a device."""
        busy = {self.processes[device] for device in plan.devices} if self.processes else set()
        return sorted(set(self.processes) - busy)


@dataclass(frozen=True)
class Change:
    """A plan that takes over.

    Attributes:
      plan: it.
      lost: devices whose memory is not to be read any more.
    """

    plan: Plan
    lost: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
      plan: a whole plan; None asks the planner.
      devices: to train on; None leaves them.
      lost: no longer there.
      speeds: of slow devices, added to those that are known.
    """

    plan: Plan | None = None
    devices: tuple[int, ...] | None = None
    lost: tuple[int, ...] = ()
    speeds: tuple[tuple[int, float], ...] = ()


def read_request(text: str, where: str = REQUEST) -> Request:
    """Reads a request.

    Raises:
      UserError: it is neither a plan nor a list of what has changed.

    >>> read_request("devices: [0, 1]").devices
    (0, 1)
    >>> read_request("speeds: {3: slow}")
    Traceback (most recent call last):
    ...
    shardpar.errors.UserError: plan.request: speeds is {3: 'slow'}; write {DEVICE: SHARE, ...}
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: it is no YAML: {str(error).splitlines()[0]}") from None
    if value is None:
        return Request()
    if isinstance(value, dict) and value.get("format") == PLAN_FORMAT:
        return Request(plan_from_text(text, where))
    if not isinstance(value, dict) or not set(value) <= set(_KEYS):
        raise UserError(
            f"{where}: write a plan, or some of {', '.join(_KEYS)}, or leave it empty to plan again"
        )
    for key in ("devices", "lost"):
        if not _are_devices(value.get(key, [])):
            raise UserError(f"{where}: {key} is {value[key]!r}; write numbers, such as [0, 1]")
    speeds = value.get("speeds", {})
    if not isinstance(speeds, dict) or not _are_devices(list(speeds)) or not all(
        type(share) in (int, float) for share in speeds.values()
    ):  # fmt: skip
        raise UserError(f"{where}: speeds is {speeds!r}; write {{DEVICE: SHARE, ...}}")
    return Request(
        None,
        tuple(value["devices"]) if "devices" in value else None,
        tuple(value.get("lost", [])),
        tuple((device, float(share)) for device, share in speeds.items()),
    )


def _are_devices(value: Any) -> bool:
    return isinstance(value, list) and all(type(d) is int and d >= 0 for d in value)


@dataclass(frozen=True)
class Task:
    """What is planned for.

    Attributes:
      graph, workload: the model and its batch.
      options: of searches; pins hold where all devices are there.
      costs: what a change costs.
    """

    graph: LayerGraph
    workload: Workload
    options: SearchOptions
    costs: ReplanOptions = ReplanOptions()


def answer(
    request: Request, now: Plan, machines: Machines, task: Task
) -> tuple[Change, Machines, str]:
    """The plan that a request leads to.

    Args:
      request: what is asked for.
      now: the plan in force.
      machines: what is known of the devices.
      task: what is planned for.

    Returns:
      The change, the machines as they are now, and why in a sentence.

    Raises:
      UserError: the request names devices that are not there, or nothing fits.
    """
    here = range(machines.cluster.num_devices)
    strange = [d for d in (*(request.devices or ()), *request.lost) if d not in here]
    if strange:
        raise UserError(
            f"{REQUEST}: there is no device {strange[0]}; this run has 0 to {len(here) - 1}"
        )
    devices = machines.devices if request.devices is None else frozenset(request.devices)
    devices -= frozenset(request.lost)
    if not devices:
        raise UserError(f"{REQUEST}: no device would be left to train on; leave at least one")
    speeds = dict(machines.speeds) | dict(request.speeds)
    after = replace(machines, devices=devices, speeds=tuple(sorted(speeds.items())))
    if request.plan is not None:
        plan = request.plan
        check(plan, task.graph, machines.cluster)
        if plan.global_batch != task.workload.global_batch:
            raise PlanError(
                f"{REQUEST}: global_batch is {plan.global_batch}, but the run's is "
                f"{task.workload.global_batch}; a plan must take the run's batch"
            )
        _require_busy(plan, machines)
        return Change(plan), after, "it was asked for"
    options = task.options
    if len(devices) < machines.cluster.num_devices:
        options = options.without_pins()
    decision = replan(
        task.graph, machines.cluster, task.workload, replace(options, file=None), now,
        speeds=speeds, devices=devices, costs=task.costs,
    )  # fmt: skip
    chosen, why = decision.plan, decision.why
    if machines.idle(chosen):
        others = [a for a in decision.alternatives if a.plan and not machines.idle(a.plan)]
        best = min(others, key=lambda a: a.total_s, default=None)
        if best is None or best.plan is None:
            _require_busy(chosen, machines)
        else:
            chosen, why = best.plan, f"{best.name}, which keeps a device of every process busy"
    # As its text says it: every process reads it from there.
    plan = plan_from_text(plan_to_text(chosen), REQUEST)
    return Change(plan, request.lost), after, why


def _require_busy(plan: Plan, machines: Machines) -> None:
    idle = machines.idle(plan)
    if idle:
        raise UserError(
            f"{REQUEST}: the plan would leave process {idle[0]} without a device, and it could not "
            "go on; leave each process a device, or start the run again with fewer processes"
        )


class Requests:
    """Looks for requests after every step, and answers them beside the steps."""

    def __init__(
        self, directory: Path, machines: Machines, task: Task, say: Callable[[str], None]
    ) -> None:
        """Nothing has been asked for.

        Args:
          directory: of the run.
          machines: its devices.
          task: what is planned for.
          say: prints a line for people.
        """
        self._file, self._say = directory / REQUEST, say
        self._machines, self._task = machines, task
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replan")
        self._answer: Future[tuple[Change, Machines, str]] | None = None
        self._asked: list[Request] = []
        self._first = True
        self._lost: set[int] = set()
        self.plan: Plan | None = None
        """What was asked for last and is in force since; None before."""

    def ask(self, request: Request = Request()) -> None:
        """Asks for a plan, as the file does; safe from a signal handler."""
        self._asked.append(request)

    def slow(self, speeds: Mapping[int, float]) -> None:
        """Asks for a plan for devices that were found to be slow, or well again."""
        self.ask(Request(speeds=tuple(sorted(speeds.items()))))

    def ready(self, now: Plan) -> Change | None:
        """The change to make after this step, if a request has been answered.

        Args:
          now: the plan in force.
        """
        self._read_file()
        if self._answer is None and self._asked:
            request = self._asked.pop(0)
            self._answer = self._thread.submit(answer, request, now, self._machines, self._task)
            self._say("planning again beside the steps")
        # What lies there before the first step is answered before it.
        first, self._first = self._first, False
        if self._answer is None or not (first or self._answer.done()):
            return None
        done, self._answer = self._answer, None
        try:
            change, self._machines, why = done.result()
        except UserError as error:
            self._say(f"the plan stays: {error}")
            return None
        if plan_to_text(change.plan) == plan_to_text(now):
            self._say(f"the plan stays: {why}")
            return None
        self._say(f"another plan takes over: {why}")
        self._lost = (self._lost | set(change.lost)) - set(change.plan.devices)
        self.plan = change.plan
        return change

    def there(self) -> frozenset[int]:
        """The devices that are not lost, those that stand by included."""
        return frozenset(range(self._machines.cluster.num_devices)) - self._lost

    def close(self) -> None:
        """Waits for the planner."""
        self._thread.shutdown(cancel_futures=True)

    def _read_file(self) -> None:
        try:
            text = self._file.read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            return
        # Taken away first: a request is answered once, whatever becomes of it.
        self._file.replace(self._file.with_name(f"{REQUEST}.taken"))
        try:
            self._asked.append(read_request(text))
        except UserError as error:
            self._say(f"the plan stays: {error}")
