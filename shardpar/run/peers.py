"""What the processes of one run tell each other: who decides, what was decided, who is late.

Words go through jax's coordination service, not through devices, so that they arrive while
devices wait. The first process decides; the others do the same at the same step.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import jax

from shardpar.capture import _compat
from shardpar.errors import RunError, ShardparError, UserError
from shardpar.run.rendezvous import Rendezvous

MEET_S = 300
"""How long processes wait for one another to start."""
ANSWER_S = 600
"""How long they wait for a word of another while the run is prepared or saved."""
SILENCE_S = 60
"""How long a process may be silent before jax takes it for dead."""
_KEPT = 64
"""Words kept for processes that have not asked yet, of what is asked again and again.

No process gets so far ahead of another: every step waits for all.
"""


class _Client(Protocol):
    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_try_get(self, key: str) -> str: ...
    def key_value_delete(self, key: str) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class Peers:
    """The processes of a run, seen from one of them; alone, everything is said to oneself.

    Calls are made by all processes in the same order, but for `tell` and `told`.

    >>> ALONE.decide("step", lambda: 3), ALONE.is_first
    (3, True)
    """

    def __init__(self, index: int = 0, count: int = 1, client: _Client | None = None) -> None:
        """From what `meet` found out."""
        self.index, self.count, self._client = index, count, client
        self._said: dict[str, int] = {}

    @property
    def is_first(self) -> bool:
        """Whether this process decides, and writes what only one may write."""
        return self.index == 0

    def decide(self, what: str, choose: Callable[[], Any], timeout_s: float = ANSWER_S) -> Any:
        """What the first process chose, in every process.

        Args:
          what: names the decision in errors.
          choose: asked in the first process only; returns what JSON can hold.
          timeout_s: how long the others wait.

        Raises:
          ShardparError: what `choose` raised, in every process; the first process did not
            answer in time.
        """
        if self._client is None:
            return choose()
        key = self._key(f"decide/{what}")
        if not self.is_first:
            return _value(self._wait(key, 0, what, timeout_s))
        try:
            value = choose()
        except ShardparError as error:
            kind = "user" if isinstance(error, UserError) else "run"
            self._client.key_value_set(key, json.dumps({kind: str(error)}))
            raise
        except BaseException as error:
            self._client.key_value_set(key, json.dumps({"run": f"process 0 failed: {error!r}"}))
            raise
        self._client.key_value_set(key, json.dumps({"value": value}))
        old = self._said[f"decide/{what}"] - _KEPT
        if old >= 0:
            self._client.key_value_delete(f"shardpar/decide/{what}#{old}")
        return value

    def gather(self, what: str, mine: Any, timeout_s: float = ANSWER_S) -> list[Any]:
        """What every process says, in their order.

        Args:
          what: names the question in errors.
          mine: what this one says; JSON must hold it.
          timeout_s: how long to wait for each.

        Raises:
          RunError: a process did not answer in time.
        """
        if self._client is None:
            return [mine]
        key = self._key(f"gather/{what}")
        self._client.key_value_set(f"{key}/{self.index}", json.dumps(mine))
        old = self._said[f"gather/{what}"] - _KEPT
        if old >= 0:
            self._client.key_value_delete(f"shardpar/gather/{what}#{old}/{self.index}")
        return [
            mine
            if other == self.index
            else json.loads(self._wait(f"{key}/{other}", other, what, timeout_s))
            for other in range(self.count)
        ]

    def agree(self, what: str, mine: str) -> None:
        """Refuses to go on where processes differ.

        Raises:
          RunError: naming the processes that differ from the first.
        """
        said = self.gather(what, mine)
        others = [n for n, text in enumerate(said) if text != said[0]]
        if others:
            raise RunError(
                f"processes {others} have another {what} than process 0 ({said[others[0]]}, not "
                f"{said[0]}); start all of them with the same code, config and files"
            )

    def tell(self, key: str, value: str) -> None:
        """Leaves a word for whoever asks; a later word takes its place."""
        if self._client is not None:
            self._client.key_value_set(f"shardpar/tell/{key}", value, allow_overwrite=True)

    def told(self, key: str) -> str | None:
        """The last word under a key; None if there is none."""
        if self._client is None:
            return None
        with suppress(jax.errors.JaxRuntimeError):
            return self._client.key_value_try_get(f"shardpar/tell/{key}")
        return None

    def _key(self, what: str) -> str:
        number = self._said[what] = self._said.get(what, -1) + 1
        return f"shardpar/{what}#{number}"

    def _wait(self, key: str, other: int, what: str, timeout_s: float) -> str:
        assert self._client is not None
        try:
            return self._client.blocking_key_value_get(key, int(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RunError(
                f"process {self.index} of {self.count} waited {timeout_s:.0f} s for process "
                f"{other} to say its {what}: {reason}; see what that process printed last"
            ) from None


ALONE = Peers()
"""One process trains."""


def _value(text: str) -> Any:
    said = json.loads(text)
    if "user" in said:
        raise UserError(said["user"])
    if "run" in said:
        raise RunError(said["run"])
    return said["value"]


def meet(where: Rendezvous | None, *, timeout_s: int = MEET_S, silence_s: int = SILENCE_S) -> Peers:
    """Joins the other processes; call it before jax has started its backend.

    Args:
      where: from `rendezvous.find`; None trains alone.
      timeout_s: how long to wait for the others.
      silence_s: how long one may be silent before all others end.

    Raises:
      RunError: the others are not there in time.
    """
    if where is None:
        return ALONE
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Signals are ours: the first process decides when all of them stop.
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {}
    if where.coordinator is not None:
        given = {
            "coordinator_address": where.coordinator,
            "num_processes": where.count,
            "process_id": where.index,
            "local_device_ids": where.local_devices,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=silence_s,
            shutdown_timeout_seconds=silence_s,
            **given,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {where.index} of {where.count} on {socket.gethostname()} did not meet the "
            f"others at {where.coordinator or where.found} within {timeout_s} s: "
            f"{str(error).splitlines()[0]}; start all processes, and let them reach that address"
        ) from None
    client = _compat.coordination_client()
    return Peers(jax.process_index(), jax.process_count(), client)
