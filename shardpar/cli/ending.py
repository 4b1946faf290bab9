"""How a command ends: the one message that an error becomes, and the exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from shardpar.errors import ShardparError


def ending(error: BaseException) -> int:
    """Says what went wrong, on stderr.

    Args:
      error: what ended the command.

    Returns:
      The exit code: 2 for bad input, 130 after Ctrl-C, else 1.
    """
    if isinstance(error, ShardparError):
        _say(f"error: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return 130
    if (lost := _lost_peer(error)) is not None:
        _say(
            f"error: another process of this run has ended or cannot be reached ({lost}); see what "
            "it said, and start all of them again: the run goes on from its newest checkpoint"
        )
        return 1
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe (head, less) has gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    with tempfile.NamedTemporaryFile(
        "w", prefix="shardpar-crash-", suffix=".txt", delete=False
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    first = (str(error).splitlines() or [""])[0]
    _say(f"error: {type(error).__name__}: {first}\n  the traceback is in {file.name}")
    return 1


def _lost_peer(error: BaseException) -> str | None:
    """What XLA says where a collective of several processes has lost one; None for other errors."""
    first = (str(error).splitlines() or [""])[0]
    gone = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "Read error")
    if type(error).__name__ != "JaxRuntimeError" or "Gloo" not in first:
        return None
    return next((words for words in gone if words in first), None)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201
