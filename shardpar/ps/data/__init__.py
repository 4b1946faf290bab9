"""Sparse samples: files of many formats, streamed as batches of one shape."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "ClickLog": "shardpar.ps.data.clicks",
    "Process": "shardpar.ps.data.batches",
    "SparseBatch": "shardpar.ps.data.batch",
    "SparseBatches": "shardpar.ps.data.batches",
    "SparseDataOptions": "shardpar.ps.data.options",
    "eval_batches": "shardpar.ps.data.batches",
    "open_data": "shardpar.ps.data.open",
    "open_parts": "shardpar.ps.data.open",
    "train_batches": "shardpar.ps.data.batches",
    "write": "shardpar.ps.data.write",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    # Options are read before numpy is needed.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shardpar.ps.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
