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


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)  # noqa: T201
