"""Sparse models and graphs whose parameters outgrow one device, over the same layouts."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AdaGrad": "shardpar.ps.optimizers",
    "Columns": "shardpar.ps.initializers",
    "Embed": "shardpar.ps.embed",
    "FTRL": "shardpar.ps.optimizers",
    "IdMap": "shardpar.ps.ids",
    "IdOptions": "shardpar.ps.ids",
    "LazyAdam": "shardpar.ps.optimizers",
    "Momentum": "shardpar.ps.optimizers",
    "Normal": "shardpar.ps.initializers",
    "Placement": "shardpar.ps.placement",
    "RowWiseAdaGrad": "shardpar.ps.optimizers",
    "SGD": "shardpar.ps.optimizers",
    "SparseOptions": "shardpar.ps.program",
    "SparseProgram": "shardpar.ps.program",
    "Uniform": "shardpar.ps.initializers",
    "Zeros": "shardpar.ps.initializers",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shardpar.ps' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
