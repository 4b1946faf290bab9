"""The code's own rules: lint, format, types, floors, and what stands where."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("shardpar", "models", "tests", "benchmarks")


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    run("ruff", "check", *CODE)


def test_everything_is_formatted():
    run("ruff", "format", "--check", *CODE)


@pytest.mark.slow
def test_spec_and_planner_are_strictly_typed():
    run("mypy")


def test_each_floor_imports_only_floors_below_it():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def sources() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "shardpar").rglob("*.py")}


def test_partition_specs_are_built_in_one_file_only():
    found = [name for name, text in sources().items() if re.search(r"\bPartitionSpec\(", text)]
    assert found == ["shardpar/lowering/shardings.py"]


def test_private_jax_is_touched_in_compat_files_only():
    private = re.compile(r"jax\._src|jax\.extend|from jax\.interpreters")
    found = {name for name, text in sources().items() if private.search(text)}
    assert found <= {"shardpar/capture/_compat.py"}


def test_no_file_has_a_name_that_says_nothing():
    vague = {"util", "utils", "helper", "helpers", "misc", "common", "manager"}
    assert not [name for name in sources() if Path(name).stem in vague]


def test_every_module_says_what_it_decides():
    silent = [
        name for name, text in sources().items() if not text.lstrip().startswith(('"""', 'r"""'))
    ]
    assert not silent


def test_nothing_names_the_machine_it_was_written_on():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    trace = re.compile(r"/" r"work/|/" r"root/|\.\./" r"shared")
    found = [
        name
        for name in files
        if Path(name).suffix in {".py", ".md", ".toml", ".yaml", ".gin", ".txt", ".html", ""}
        and (ROOT / name).is_file()
        and trace.search((ROOT / name).read_text(errors="ignore"))
    ]
    assert not found


def test_ci_runs_exactly_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.slow
def test_the_wheel_carries_models_and_configs(tmp_path):
    run("pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), ".")
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("models/gpt.py", "configs/gpt.gin", "configs/clusters/h100x8.yaml"):
        assert f"shardpar/_bundled/{wanted}" in names
    assert "shardpar/run/report.html.j2" in names
    assert not [name for name in names if name.startswith(("models/", "tests/"))]


def test_public_names_are_sorted_and_importable():
    import shardpar

    assert shardpar.__all__ == sorted(shardpar.__all__)
    for name in shardpar.__all__:
        assert getattr(shardpar, name).__doc__, name
