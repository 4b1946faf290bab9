"""A federation's checkpoints: the server's state, what clients keep, and models still in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from shardpar.fl.simulated_rounds import Position, Rounds
from shardpar.run.checkpoints import Checkpoints

_COUNTS = "counts.json"


@dataclass(frozen=True)
class Savings:
    """The checkpoints of one run; steps are rounds.

    Attributes:
      checkpoints: of the run's directory.
    """

    checkpoints: Checkpoints

    def save(self, position: Position, files: Mapping[str, str]) -> None:
        """Begins to write; training may go on once this returns.

        Raises:
          CheckpointError: the disk is full, or the save before this one failed.
        """
        tree: dict[str, Any] = {"state": position.state}
        counts = {"kept": 0, "sent": len(position.sent)}
        if not position.kept.is_empty and len(position.kept.clients):
            # Rounds to come write into what `kept` holds.
            arrays = {name: np.array(array) for name, array in position.kept.arrays().items()}
            tree["kept"] = jax.tree.map(_on_host, arrays)
            counts["kept"] = len(arrays["clients"])
        if position.sent:
            tree["versions"] = _on_host(np.array(sorted(position.sent), np.int32))
            tree["sent"] = {
                str(place): position.sent[version]
                for place, version in enumerate(sorted(position.sent))
            }
        self.checkpoints.save(position.round_, tree, {**files, _COUNTS: json.dumps(counts)})

    def latest(self, rounds: Rounds) -> Position | None:
        """Where the newest checkpoint that is whole left off, or None where there is none.

        Args:
          rounds: of the run.

        Raises:
          CheckpointError: there are checkpoints, but none is whole or of this model.
        """
        if not self.checkpoints.steps():
            self.checkpoints.require_none_lost()
            return None
        told = self.checkpoints.restore(None, {}, partial=True)
        counts = json.loads(told.files[_COUNTS])
        begun = rounds.begin()
        target: dict[str, Any] = {"state": begun.state}
        here = SingleDeviceSharding(_host())
        if counts["kept"]:
            target["kept"] = {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
                for name, (shape, dtype) in begun.kept.shapes(counts["kept"]).items()
            }
        if counts["sent"]:
            target["versions"] = jax.ShapeDtypeStruct((counts["sent"],), np.int32, sharding=here)
            target["sent"] = {str(place): begun.sent[0] for place in range(counts["sent"])}
        found = self.checkpoints.restore(told.step, target).state
        if counts["kept"]:
            begun.kept.restore({name: np.asarray(x) for name, x in found["kept"].items()})
        sent = {
            int(version): found["sent"][str(place)]
            for place, version in enumerate(np.asarray(found.get("versions", ())))
        }
        return Position(told.step, found["state"], begun.kept, sent)


def _host() -> jax.Device:
    return jax.local_devices(backend="cpu")[0]


def _on_host(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, _host())
