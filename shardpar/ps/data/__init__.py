"""Sparse samples: files of many formats, streamed as batches of one shape."""

from shardpar.ps.data.batch import SparseBatch
from shardpar.ps.data.batches import Process, SparseBatches, eval_batches, train_batches
from shardpar.ps.data.clicks import ClickLog
from shardpar.ps.data.open import open_data, open_parts
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.data.write import write

__all__ = [
    "ClickLog",
    "Process",
    "SparseBatch",
    "SparseBatches",
    "SparseDataOptions",
    "eval_batches",
    "open_data",
    "open_parts",
    "train_batches",
    "write",
]
