"""Which nodes train together, and when they begin again: decisions of one node for all.

Nodes say how they are; the leader answers with an epoch: who takes part and where they meet.
A node that is lost, or one that comes, ends an epoch (torchelastic's agreement, on a shared
directory instead of a server). Pure: clocks and files are the supervisor's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from shardpar.run.options import SuperviseOptions

State = Literal["waiting", "running", "stopped", "failed", "refused", "done"]


@dataclass(frozen=True)
class Node:
    """What a node says of itself.

    Attributes:
      name: unique in the run.
      born: unique to this start of its supervisor.
      address: where other nodes reach it.
      port: free on it, for the coordinator of the next epoch.
      state: of its trainer: not started, running, stopped because it was asked to, failed, refused
        its input, or done.
      epoch: the one the state is of.
      code: the exit code, if the trainer has ended.
    """

    name: str
    born: str
    address: str = "localhost"
    port: int = 0
    state: State = "waiting"
    epoch: int = 0
    code: int = 0


@dataclass(frozen=True)
class Epoch:
    """What the leader has decided.

    Attributes:
      number: counts up.
      members: names, in the order of their processes; none while nodes gather.
      born: of each member, when the epoch began.
      coordinator: where they meet.
      stop: members shall save and stop, because the next epoch has other members.
      over: why there will be no other epoch; None while the run goes on.
      code: then, the exit code of the supervisors.
    """

    number: int = 0
    members: tuple[str, ...] = ()
    born: tuple[str, ...] = ()
    coordinator: str = ""
    stop: bool = False
    over: str | None = None
    code: int = 0


@dataclass(frozen=True)
class Memory:
    """What the leader keeps between two looks.

    Attributes:
      failures: in a row, without a new checkpoint between them.
      progress: the newest checkpoint at the last failure.
      not_before_s: when the next epoch may begin.
      waiting_since_s: since when nodes have been gathering; None while an epoch runs.
    """

    failures: int = 0
    progress: int = -1
    not_before_s: float = 0.0
    waiting_since_s: float | None = None


@dataclass(frozen=True)
class Decision:
    """What comes of one look: the epoch in force, what to remember, and what happened in words."""

    epoch: Epoch
    memory: Memory
    events: tuple[tuple[str, str], ...] = ()


def decide(
    nodes: Mapping[str, Node],
    epoch: Epoch,
    memory: Memory,
    options: SuperviseOptions,
    *,
    now_s: float,
    wanted: int,
    progress: int,
) -> Decision:
    """Looks at the nodes that are alive, and goes on, ends an epoch, or begins one.

    Args:
      nodes: those that gave a sign of life lately.
      epoch: in force.
      memory: of the last look.
      options: how patient to be.
      now_s: a clock that only goes forward.
      wanted: nodes the run was meant for.
      progress: the step of the newest checkpoint; -1 for none.

    >>> nodes = {"a": Node("a", "1", port=1), "b": Node("b", "2", port=2)}
    >>> options = SuperviseOptions()
    >>> first = decide(nodes, Epoch(), Memory(), options, now_s=0, wanted=2, progress=-1)
    >>> first.epoch.members, first.epoch.coordinator
    (('a', 'b'), 'localhost:1')
    >>> del nodes["b"]
    >>> lost = decide(nodes, first.epoch, first.memory, options, now_s=9, wanted=2, progress=7)
    >>> lost.epoch.members, lost.events
    (('a',), (('lost', 'b'), ('epoch', '2: a')))
    """
    if epoch.over is not None:
        return Decision(epoch, memory)
    if not epoch.members:
        return _gather(nodes, epoch, memory, options, (), now_s, wanted)
    # A node whose supervisor was started anew knows nothing of its trainer: it counts as lost.
    here = [
        name
        for name, born in zip(epoch.members, epoch.born, strict=True)
        if name in nodes and nodes[name].born == born
    ]
    lost = tuple(name for name in epoch.members if name not in here)
    states = {
        name: nodes[name].state if nodes[name].epoch == epoch.number else "running" for name in here
    }
    if not lost and all(state == "done" for state in states.values()):
        return Decision(replace(epoch, over="the run is done"), memory, (("done", ""),))
    refused = [name for name, state in states.items() if state == "refused"]
    if refused:
        why = f"{refused[0]}: the trainer refuses its input; see what it printed"
        return Decision(replace(epoch, over=why, code=2), memory, (("refused", refused[0]),))
    failed = [name for name, state in states.items() if state == "failed"]
    events = tuple(("lost", name) for name in lost)
    events += tuple(("failed", f"{name}: exit code {nodes[name].code}") for name in failed)
    if events:
        if memory.waiting_since_s is None:
            memory = _after_failure(memory, options, now_s, progress)
            if memory.failures > options.give_up_after:
                why = (
                    f"{memory.failures} failures in a row without a new checkpoint "
                    "(supervise.give_up_after)"
                )
                return Decision(
                    replace(epoch, over=why, code=1), memory, (*events, ("gave up", why))
                )
        else:
            events = ()
        return _gather(nodes, epoch, memory, options, events, now_s, len(nodes))
    if epoch.stop or all(state == "stopped" for state in states.values()):
        if any(state == "running" for state in states.values()):
            return Decision(epoch, memory)
        return _gather(nodes, epoch, memory, options, (), now_s, len(nodes))
    newcomers = [name for name in nodes if name not in epoch.members]
    if newcomers:
        joined = tuple(("joined", name) for name in newcomers)
        return Decision(replace(epoch, stop=True), memory, joined)
    return Decision(epoch, replace(memory, waiting_since_s=None))


def _after_failure(
    memory: Memory, options: SuperviseOptions, now_s: float, progress: int
) -> Memory:
    failures = 1 if progress > memory.progress else memory.failures + 1
    # The first failure is most likely chance: begin again at once.
    wait_s = 0.0
    if failures > 1:
        wait_s = min(options.most_backoff_s, options.backoff_s * 2.0 ** (failures - 2))
    return Memory(failures, progress, now_s + wait_s, now_s)


def _gather(
    nodes: Mapping[str, Node],
    epoch: Epoch,
    memory: Memory,
    options: SuperviseOptions,
    events: tuple[tuple[str, str], ...],
    now_s: float,
    wanted: int,
) -> Decision:
    """Begins an epoch with all that are there, once enough are or enough time has passed."""
    since_s = memory.waiting_since_s if memory.waiting_since_s is not None else now_s
    memory = replace(memory, waiting_since_s=since_s)
    enough = len(nodes) >= max(wanted, options.least_nodes)
    late = now_s >= since_s + options.join_s and len(nodes) >= options.least_nodes
    if now_s < memory.not_before_s or not nodes or not (enough or late):
        return Decision(epoch, memory, events)
    # Those that were members keep their order: process 0 stays where its devices are.
    members = tuple(n for n in epoch.members if n in nodes)
    members += tuple(sorted(n for n in nodes if n not in members))
    first = nodes[members[0]]
    born = tuple(nodes[name].born for name in members)
    begun = Epoch(epoch.number + 1, members, born, f"{first.address}:{first.port}")
    words = f"{begun.number}: {', '.join(members)}"
    return Decision(begun, replace(memory, waiting_since_s=None), (*events, ("epoch", words)))
