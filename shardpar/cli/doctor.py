"""`shardpar doctor`: what this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import json as json_format
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from shardpar.cli.arguments import Devices, Json
from shardpar.cli.later import later
from shardpar.cli.tables import console

_RANGES = {"jax": ("0.10.2", "0.11.1"), "flax": ("0.12.4", "0.13")}
_EXTRAS = {
    "tokenizers": ("tokenizers", "BPE tokenizers (data.tokenizer='bpe')"),
    "parquet": ("pyarrow", "Parquet data (data.source='parquet')"),
    "graph": ("networkit", "faster graph algorithms, and Louvain (shardpar graph)"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: ok, note or problem, and the fix for it."""

    level: str
    what: str
    fix: str = ""


def doctor(devices: Devices = None, json: Json = False) -> None:
    """Show devices and versions, and what is missing with the command that mends it.

    Exit code 1 if something must be mended before training can work.
    """
    findings = [*_python(), *_packages(), *_extras(), *_disk()]
    if not any(f.level == "problem" for f in findings):
        findings += [Finding(*found) for found in later("sampling").diagnose(devices)]
    if json:
        print(json_format.dumps({"findings": [asdict(f) for f in findings]}))  # noqa: T201
    else:
        _show(findings)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _python() -> list[Finding]:
    return [Finding("ok", f"Python {platform.python_version()} on {platform.platform()}")]


def _packages() -> list[Finding]:
    findings = []
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding("problem", f"{name} is missing", "pip install shardpar"))
            continue
        low, high = _RANGES.get(name, ("0", "999"))
        if _parts(low) <= _parts(version) < _parts(high):
            findings.append(Finding("ok", f"{name} {version}"))
        else:
            fix = f"pip install '{name}>={low},<{high}'"
            findings.append(Finding("problem", f"{name} {version} is untested with shardpar", fix))
    return findings


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _extras() -> list[Finding]:
    return [
        Finding("ok", f"extra {extra}: installed")
        if util.find_spec(module)
        else Finding("note", f"extra {extra} is missing: {use}", f"pip install 'shardpar[{extra}]'")
        for extra, (module, use) in _EXTRAS.items()
    ]


def _disk() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    if free < 2**30:
        return [Finding("note", text, "free some space, or set train.run_dir to another disk")]
    if not os.access(Path.cwd(), os.W_OK):
        return [Finding("problem", f"{Path.cwd()} is not writable", "run in another folder")]
    return [Finding("ok", text)]


def _show(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    marks = {
        "ok": Text("✓", style="green"),
        "note": Text("•", style="yellow"),
        "problem": Text("✗", style="red"),
    }
    for finding in findings:
        table.add_row(marks[finding.level], finding.what, Text(finding.fix, style="dim"))
    console().print(table)
