"""The metrics of a run as any other program reads them: with a plain JSON parser."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from shardpar.errors import RunError
from shardpar.run.metrics import MetricsLog, read_metrics
from tests.run.run_states import run_child


def strict(line: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(line, parse_constant=refuse)


def test_each_row_is_a_line_of_strict_json_visible_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": jnp.float32(2.5), "tokens": np.int64(7), "note": "é\n", "mfu": None})
        assert [strict(line) for line in path.read_text().splitlines()] == [
            {"step": 1, "loss": 2.5, "tokens": 7, "note": "é\n", "mfu": None}
        ]
        log.write(2, {"loss": math.nan, "grad_norm": math.inf, "ok": True})
    assert strict(path.read_text().splitlines()[1]) == {
        "step": 2,
        "loss": None,
        "grad_norm": None,
        "ok": True,
        "nonfinite": ["loss", "grad_norm"],
    }
    assert read_metrics(path)[1]["nonfinite"] == ["loss", "grad_norm"]


def test_what_is_no_plain_value_is_refused_and_leaves_no_row(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log:
        for value in (jnp.ones(2), [1], {"a": 1}, b"x"):
            with pytest.raises(TypeError, match="metric 'loss' is a"):
                log.write(1, {"loss": value})
    assert read_metrics(tmp_path / "m") == []


def test_a_line_that_a_kill_cut_off_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, {"loss": 3.0})
        log.write(2, {"loss": 2.0})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(path)] == [1]
        with MetricsLog(path) as log:
            log.write(2, {"loss": 2.0})
        assert path.read_bytes() == whole


def test_training_again_from_a_checkpoint_joins_the_log_without_a_seam(tmp_path: Path) -> None:
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    with MetricsLog(unbroken) as log:
        for step in range(1, 11):
            log.write(step, {"loss": 1 / step})
    with MetricsLog(resumed) as log:
        for step in range(1, 8):
            log.write(step, {"loss": 1 / step})
    with MetricsLog(resumed) as log:
        log.truncate_after(4)
        assert [row["step"] for row in read_metrics(resumed)] == [1, 2, 3, 4]
        for step in range(5, 11):
            log.write(step, {"loss": 1 / step})
    assert resumed.read_bytes() == unbroken.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "unbroken"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for broken in ('{"step": 2, "lo\n', "[]\n", '{"loss": 1}\n'):
        path.write_text('{"step": 1}\n' + broken + '{"step": 3}\n')
        with pytest.raises(RunError, match=r"m, line 2 is no row of metrics"):
            read_metrics(path)
    assert read_metrics(tmp_path / "none") == []


def test_rows_are_printed_for_machines_until_they_stop_reading(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    out = io.StringIO()
    with MetricsLog(tmp_path / "m", stdout=out) as log:
        log.write(1, {"loss": 3.0})
        assert strict(out.getvalue()) == {"step": 1, "loss": 3.0}
    with MetricsLog(tmp_path / "m", stdout=Closed()) as log:
        log.write(2, {"loss": 2.0})
        log.write(3, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "m")] == [1, 2, 3]


def test_a_full_disk_is_an_error_and_leaves_no_part_of_a_row(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from shardpar.errors import RunError
from shardpar.run.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with MetricsLog(Path(sys.argv[1])) as log:
    log.write(1, {"loss": 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, -1))
    try:
        log.write(2, {"loss": 2.0})
    except RunError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    log.write(3, {"loss": 3.0})
"""
    path = tmp_path / "m"
    child = run_child(script, str(path))
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{path} cannot be written: File too large; make room, then resume\n"
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 3, "loss": 3.0}\n'


def events(directory: Path) -> list[Event]:
    """TensorBoard's files, read by their documented framing."""
    found = []
    for file in sorted(directory.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            found.append(Event.FromString(content[place + 12 : place + 12 + length]))
            place += 12 + length + 4
    return found


def test_tensorboard_gets_the_numbers_and_forgets_what_is_made_anew(tmp_path: Path) -> None:
    board = tmp_path / "tensorboard"
    with MetricsLog(tmp_path / "m", tensorboard=board) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0 / step, "note": "text", "mfu": None, "ok": True})
        log.truncate_after(1)
        log.write(2, {"loss": 5.0})
    values = [
        (event.step, value.tag, round(value.simple_value, 3))
        for event in events(board)
        for value in event.summary.value
    ]
    assert values == [(1, "loss", 1.0), (2, "loss", 0.5), (3, "loss", 0.333), (2, "loss", 5.0)]
    restarts = [event.step for event in events(board) if event.session_log.status == 1]
    assert restarts == [2]
