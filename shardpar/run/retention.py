"""Decides when a checkpoint is due and which old ones may go: two pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from shardpar.run.options import CheckpointOptions


def due(
    options: CheckpointOptions,
    *,
    step: int,
    now_s: float,
    last_step: int,
    last_s: float,
) -> bool:
    """Whether the state after `step` steps should be saved.

    Args:
      options: how often to save.
      step: how many steps are done.
      now_s: seconds on any clock that only goes forward.
      last_step: the step of the newest checkpoint, or the one training started from.
      last_s: when that was, on the same clock.

    Returns:
      True when a multiple of `every_steps` is reached, or `every_s` seconds have passed.

    >>> options = CheckpointOptions(every_steps=100, every_s=60.0)
    >>> due(options, step=200, now_s=30.0, last_step=100, last_s=0.0)
    True
    >>> due(options, step=201, now_s=30.0, last_step=200, last_s=20.0)
    False
    >>> due(options, step=240, now_s=81.0, last_step=200, last_s=20.0)
    True
    """
    if step <= last_step:
        return False
    by_steps = options.every_steps > 0 and step % options.every_steps == 0
    by_time = options.every_s > 0 and now_s - last_s >= options.every_s
    return by_steps or by_time


def expired(steps: Iterable[int], options: CheckpointOptions) -> tuple[int, ...]:
    """Which committed checkpoints to delete, oldest first.

    Args:
      steps: the steps that are stored, in any order.
      options: how many to keep.

    Returns:
      All but the newest `keep` and the multiples of `keep_every_steps`.

    >>> expired([10, 20, 30, 40], CheckpointOptions(keep=2, keep_every_steps=20))
    (10,)
    >>> expired([10], CheckpointOptions(keep=1))
    ()
    """
    # At least one is always kept, whatever an unchecked `keep` says.
    older = sorted(steps)[: -max(options.keep, 1)]
    every = options.keep_every_steps
    return tuple(step for step in older if not (every > 0 and step % every == 0))
