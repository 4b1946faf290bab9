"""Arrays of other processes: known by shape and sharding, none of their pieces here.

Every process runs the same controller and dispatches what its own devices do; for the rest
it keeps these, so that all of them go through the same tasks in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardpar.errors import PlanError
from shardpar.spec.plan import Plan


def is_here(devices: Sequence[jax.Device]) -> bool:
    """Whether any of the devices is this process's."""
    process = jax.process_index()
    return any(device.process_index == process for device in devices)


def require_here(plan: Plan, devices: Sequence[jax.Device]) -> None:
    """Refuses a plan of which this process has nothing to do.

    Args:
      plan: it uses devices by number.
      devices: those it uses.

    Raises:
      PlanError: none of them belongs to this process.
    """
    if not is_here(devices):
        raise PlanError(
            f"the plan uses devices {list(plan.devices)}, none of which belongs to process "
            f"{jax.process_index()} of {jax.process_count()}; plan for all devices, or start "
            "fewer processes"
        )


def in_order(jitted: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function with collectives, sent so that all processes run them in one order.

    Accelerators run what they are sent in order. XLA:CPU runs each program as soon as its inputs
    are there: collectives of the same devices would then meet in another order in another process,
    and those that wait would take all its threads. So there each is waited for.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return jitted
    return lambda *given: jax.block_until_ready(jitted(*given))


def first_device(devices: Sequence[jax.Device]) -> jax.Device:
    """The first of some devices that belongs to the first process which has any."""
    return min(devices, key=lambda device: device.process_index)


def absent(shapes: Any) -> Any:
    """Arrays for a tree of ShapeDtypeStructs on devices of other processes."""
    return jax.tree.map(
        lambda s: jax.make_array_from_single_device_arrays(s.shape, s.sharding, [], dtype=s.dtype),
        shapes,
    )


def placed(values: Sequence[Any], shardings: Sequence[NamedSharding]) -> list[jax.Array]:
    """Host arrays, the same in every process, on devices; each process puts its own pieces."""
    if all(s.is_fully_addressable for s in shardings):
        return jax.device_put(list(values), list(shardings))  # type: ignore[no-any-return]
    return [
        jax.make_array_from_callback(np.shape(x), s, lambda index, x=x: np.asarray(x)[index])
        for x, s in zip(values, shardings, strict=True)
    ]
