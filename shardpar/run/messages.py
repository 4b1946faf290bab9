"""Decides how checkpoints speak to people: one line each, with what is wrong and what to do."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardpar.run.manifest import Fault

_SHOWN_FAULTS = 3
_DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def listing(steps: Sequence[int], aside: Sequence[str]) -> str:
    """Says what a checkpoint directory holds.

    Args:
      steps: the committed steps.
      aside: the names of those moved aside.

    Returns:
      A phrase.

    >>> print(listing((10, 20), ("30.damaged",)))
    steps 10, 20 are stored (moved aside: 30.damaged)
    """
    named = ", ".join(map(str, steps))
    verb = "steps {} are" if len(steps) > 1 else "step {} is"
    stored = verb.format(named) + " stored" if steps else "no step is stored"
    return stored + (f" (moved aside: {', '.join(aside)})" if aside else "")


def faults_of(step: int, faults: Sequence[Fault]) -> str:
    """Names what is wrong with a step, the first few files of it.

    Args:
      step: which one.
      faults: what its check found.

    Returns:
      A phrase.

    >>> print(faults_of(30, [Fault("arrays/d/0f", "damaged")]))
    step 30: arrays/d/0f (damaged)
    """
    rest = len(faults) - _SHOWN_FAULTS
    shown = ", ".join(map(str, faults[:_SHOWN_FAULTS]))
    return f"step {step}: {shown}" + (f" and {rest} more" if rest > 0 else "")


def save_failed(directory: Path, step: int, error: BaseException, held: str) -> str:
    """Says why a step could not be saved.

    Args:
      directory: where the steps are.
      step: the one that failed.
      error: what went wrong; of Orbax's long texts only a full disk is recognised.
      held: the `listing` of what is safe.

    Returns:
      One line.

    >>> error = ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")
    >>> print(save_failed(Path("runs/a/checkpoints"), 30, error, "step 20 is stored"))
    step 30 could not be saved in runs/a/checkpoints: the disk is full. Nothing else was touched:
    step 20 is stored. Make room or move the run to another disk, then resume
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    for code, words in _DISK_FULL.items():
        if getattr(error, "errno", None) == code or f"os_error_code='{code}'" in reason:
            reason = words
    return (
        f"step {step} could not be saved in {directory}: {reason}. Nothing else was touched: "
        f"{held}. Make room or move the run to another disk, then resume"
    )


def passed_over(step: int, faults: Sequence[Fault], moved: str | None, used: int) -> str:
    """Says that a damaged step was not used.

    Args:
      step: the damaged one.
      faults: what is wrong with it.
      moved: its new name, or None where it was left alone.
      used: the older step that is used instead.

    Returns:
      One line.

    >>> print(passed_over(30, [Fault("data.json", "missing")], "30.damaged", 20))
    checkpoint damaged, step 30: data.json (missing); moved to 30.damaged; step 20 is used instead
    """
    where = f"; moved to {moved}" if moved else ""
    return f"checkpoint damaged, {faults_of(step, faults)}{where}; step {used} is used instead"


def none_whole(directory: Path, passed: Mapping[int, Sequence[Fault]], held: str) -> str:
    """Says why nothing could be restored.

    Args:
      directory: where the steps are.
      passed: what is wrong with each step that was tried.
      held: the `listing` of the directory.

    Returns:
      One line.

    >>> print(none_whole(Path("runs/a"), {}, "no step is stored"))
    nothing to restore in runs/a: no step is stored
    """
    if not passed:
        return f"nothing to restore in {directory}: {held}"
    found = "; ".join(faults_of(step, faults) for step, faults in passed.items())
    return (
        f"{directory} has no checkpoint that is whole: {found}. "
        "Put these files back from a copy, or start a new run"
    )
