from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from shardpar.config import bundled_configs, bundled_models, load
from shardpar.errors import ConfigError

GOLDEN = Path(__file__).with_name("golden_errors.txt").read_text()
CASES = dict(case.split("\n", 1) for case in re.split(r"^=== ", GOLDEN, flags=re.MULTILINE)[1:])


@pytest.mark.parametrize("title", CASES)
def test_the_whole_message(folder, write, title):
    _, *parts = re.split(r"^--- (.*)\n", CASES[title], flags=re.MULTILINE)
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    expected, overrides = files.pop("error"), files.pop("overrides", "").splitlines()
    for name, text in files.items():
        write(name, text)
    with pytest.raises(ConfigError) as error:
        load(next(iter(files)), overrides)
    expected = expected.replace("BUNDLED", ", ".join(bundled_models()))
    assert str(error.value) == expected.replace("FOLDER", str(folder)).strip()


def message(path: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path)
    return str(error.value)


def test_a_config_that_is_not_there(folder):
    bundled = f"(bundled are {', '.join(bundled_configs())})"
    assert message("nope.gin") == f"nope.gin: there is no such config file {bundled}"
    assert message("configs/gtp.gin") == (
        f"configs/gtp.gin: there is no such config file; did you mean configs/gpt.gin? {bundled}"
    )
    assert message("gpt2_small") == (
        f"gpt2_small: there is no such config file; did you mean configs/gpt2_small.gin? {bundled}"
    )
    assert message("train.steps=5") == (
        "train.steps=5: there is no such config file; to override a setting, name the config "
        f"first and the override after it {bundled}"
    )


def test_a_folder_instead_of_a_config(folder, write):
    write("sub/run.gin", "train.seed = 1")
    assert message("sub") == "sub: is a folder; name a config file, such as sub/run.gin"


def test_bytes_that_are_no_text(folder):
    (folder / "run.gin").write_bytes(b"train\x00\xff")
    assert message("run.gin") == (
        "run.gin: is not a text file: byte 0xff at position 6 is not UTF-8"
    )


def test_a_file_too_big_to_be_a_config(folder):
    (folder / "run.yaml").write_bytes(b"#" * 3_000_000)
    assert message("run.yaml") == (
        "run.yaml: has 3000000 bytes, a config at most 1048576; is it data?"
    )


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "run.gin")
    assert message("run.gin") == "run.gin: is not a regular file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder, write):
    (folder / write("run.gin", "train.seed = 1")).chmod(0)
    assert message("run.gin") == "run.gin: cannot be read: Permission denied"


def test_configs_errors_end_the_command_with_2(folder):
    with pytest.raises(ConfigError) as error:
        load("nope.gin")
    assert error.value.exit_code == 2
