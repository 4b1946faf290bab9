"""Where runs go, and how they are found again."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from shardpar.errors import RunError, UserError
from shardpar.run.checkpoints import LOCK_NAME, Checkpoints
from shardpar.run.directory import RunDirectory

NOW = datetime(2025, 1, 2, 3, 4, 5)


def test_runs_that_start_in_the_same_second_do_not_share_a_directory(tmp_path: Path) -> None:
    runs = [RunDirectory.fresh("gpt", NOW, tmp_path) for _ in range(11)]
    assert [run.path.name for run in runs[:3]] == [
        "20250102-030405",
        "20250102-030405-2",
        "20250102-030405-3",
    ]
    assert len({run.path for run in runs}) == 11
    assert all(run.path.parent == tmp_path / "gpt" for run in runs)


def test_the_newest_run_is_found_from_the_directory_above(tmp_path: Path) -> None:
    runs = [RunDirectory.fresh("gpt", NOW, tmp_path) for _ in range(11)]
    runs.insert(0, RunDirectory.fresh("gpt", datetime(2024, 12, 31, 23, 59, 59), tmp_path))
    for run in runs[:-1]:
        run.config_yaml.write_text("")
    assert RunDirectory.existing(tmp_path / "gpt") == runs[-2]
    runs[-1].checkpoints.mkdir()
    assert RunDirectory.existing(tmp_path / "gpt") == runs[-1]
    assert RunDirectory.existing(runs[0].path) == runs[0]


def test_a_directory_without_a_run_is_an_error_that_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run.*name a directory such as"):
        RunDirectory.existing(tmp_path)
    with pytest.raises(UserError, match="is not there"):
        RunDirectory.existing(tmp_path / "none")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp"])
def test_a_name_that_is_a_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="use a plain name"):
        RunDirectory.fresh(name, NOW, tmp_path)


def test_a_root_that_cannot_hold_runs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunDirectory.fresh("gpt", NOW, tmp_path / "file")


def test_the_lock_is_the_one_that_checkpoints_take(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.lock == run.checkpoints / LOCK_NAME


def test_checkpoints_that_cannot_be_written_are_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written: Not a directory; choose another"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_checkpoint_is_not_taken_for_a_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    step = run.checkpoints / "10"
    step.mkdir(parents=True)
    run.config_yaml.write_text("")
    (step / "config.yaml").write_text("")
    for inside in (run.checkpoints, step):
        with pytest.raises(UserError, match=f"is inside a run; name the run, {run.path}"):
            RunDirectory.existing(inside)


def test_among_runs_with_names_of_their_own_none_is_guessed(tmp_path: Path) -> None:
    for name in ("aa_new", "zz_old"):
        (tmp_path / name).mkdir()
        RunDirectory(tmp_path / name).config_yaml.write_text("")
        if name == "aa_new":
            assert RunDirectory.existing(tmp_path).path.name == name
    with pytest.raises(UserError, match=r"holds 2 runs, and aa_new does not say when"):
        RunDirectory.existing(tmp_path)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"cannot be made: .*; choose another"):
            RunDirectory(path).make()
