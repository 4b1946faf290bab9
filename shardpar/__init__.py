"""shardpar: decides how a Flax model is laid out over machines, proves it, and trains it."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CaptureError": "shardpar.errors",
    "CheckpointError": "shardpar.errors",
    "Cluster": "shardpar.spec.cluster",
    "ConfigError": "shardpar.errors",
    "DataError": "shardpar.errors",
    "InfeasibleError": "shardpar.errors",
    "Layout": "shardpar.spec.layout",
    "LayerGraph": "shardpar.spec.graph",
    "LayerStrategy": "shardpar.spec.plan",
    "PartyError": "shardpar.errors",
    "Plan": "shardpar.spec.plan",
    "PlanError": "shardpar.errors",
    "Program": "shardpar.lowering.program",
    "ProgramOptions": "shardpar.lowering.options",
    "SearchOptions": "shardpar.planner.options",
    "ShardparError": "shardpar.errors",
    "SpecError": "shardpar.errors",
    "TrainState": "shardpar.lowering.state",
    "UnionArray": "shardpar.lowering.union",
    "compile": "shardpar.train.compile",
    "layer": "shardpar.capture.layers",
    "layout_from_text": "shardpar.spec.layout_text",
    "local_cluster": "shardpar.lowering.devices",
    "place": "shardpar.lowering.union",
    "reshard": "shardpar.spec.reshard",
    "trace": "shardpar.capture.trace",
    "transfer": "shardpar.lowering.transfer",
    "use_virtual_devices": "shardpar.lowering.devices",
}

__all__ = sorted(_HOME)  # noqa: PLE0605
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Names are fetched on first use, so that `shardpar --help` need not wait for jax.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shardpar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
