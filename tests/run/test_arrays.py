"""What Orbax's threads say after an error that was reported already."""

from __future__ import annotations

import asyncio
import concurrent.futures

import pytest

from shardpar.run.arrays import ArrayStore


def end_after(loop: asyncio.AbstractEventLoop) -> None:
    """Ends a write whose event loop is closed, as those of a full disk do."""
    write: concurrent.futures.Future[None] = concurrent.futures.Future()
    write.add_done_callback(lambda _: loop.call_soon_threadsafe(print))
    write.set_result(None)


def test_writes_that_end_after_the_error_do_not_log_a_traceback_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    ArrayStore().close()
    end_after(loop)
    assert caplog.text == ""


def test_other_errors_of_callbacks_are_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    ArrayStore().close()
    write: concurrent.futures.Future[None] = concurrent.futures.Future()
    write.add_done_callback(lambda _: 1 / 0)
    write.set_result(None)
    assert "ZeroDivisionError" in caplog.text
