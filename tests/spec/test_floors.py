"""Which floor may import and build what; a search through the sources keeps it so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("shardpar", "models") for path in (ROOT / folder).rglob("*.py")
)


def files_with(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in SOURCES if re.search(pattern, path.read_text())]


def test_only_shardings_builds_partition_specs():
    # The docstring's example prints one; nothing else may call the class, whatever its name.
    assert files_with(r"PartitionSpec\(") == ["shardpar/lowering/shardings.py"]
    assert files_with(r"import.*\bPartitionSpec\b|\bPartitionSpec as\b|[^\w]P\(") == [
        "shardpar/lowering/shardings.py"
    ]


def test_only_the_compat_file_imports_private_jax():
    assert files_with(r"jax\._src|from jax import _src") == ["shardpar/capture/_compat.py"]


def test_only_capture_touches_jaxpr_internals():
    assert files_with(r"jax\.extend") == ["shardpar/capture/_compat.py"]


@pytest.mark.parametrize("floor", ["errors", "spec", "planner"])
def test_a_pure_floor_imports_no_jax_flax_or_gin(floor):
    program = f"""
import importlib, json, pkgutil, sys
package = importlib.import_module("shardpar.{floor}")
for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
    importlib.import_module("shardpar.{floor}." + module.name)
print(json.dumps(sorted(sys.modules)))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = json.loads(ran.stdout)
    expected = [p.stem for p in (ROOT / "shardpar" / floor).glob("*.py") if p.stem != "__init__"]
    assert {f"shardpar.{floor}.{name}" for name in expected} <= set(modules)
    tops = {name.partition(".")[0] for name in modules}
    assert not tops & {"jax", "jaxlib", "flax", "gin", "optax", "orbax", "models"}
    floors = {name.split(".")[1] for name in modules if name.startswith("shardpar.")}
    assert floors <= {"errors", "spec"} | {floor}


def test_models_import_flax_and_the_decorators_only():
    imports = {
        found
        for path in (ROOT / "models").glob("*.py")
        for found in re.findall(r"^(?:from|import) ([\w.]+)", path.read_text(), re.M)
    }
    assert imports <= {
        "__future__", "dataclasses", "typing", "functools", "math", "jax", "jax.numpy", "flax",
        "msgspec", "shardpar",
    }  # fmt: skip
