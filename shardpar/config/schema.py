"""What a whole config is: one frozen dataclass of the options that each floor reads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from shardpar.config.values import Plain
from shardpar.fl.options import (
    FederatedDataOptions,
    FederatedOptions,
    FederatedTrainOptions,
    NetOptions,
)
from shardpar.fl.privacy_options import PrivacyOptions
from shardpar.fl.secagg_options import SecAggOptions
from shardpar.lowering.options import ProgramOptions
from shardpar.planner.options import ReplanOptions, SearchOptions, StragglerOptions
from shardpar.ps.data.options import SparseDataOptions
from shardpar.ps.graph.options import NodeCheckpointOptions, NodeDataOptions, NodeTrainOptions
from shardpar.ps.options import DenseOptions, ServerOptions, SparseTrainOptions, TableOptions
from shardpar.run.options import CheckpointOptions, SuperviseOptions
from shardpar.train.options import (
    BucketOptions,
    DataOptions,
    DispatchOptions,
    OptimizerOptions,
    TrainOptions,
)


@dataclass(frozen=True)
class ModelConfig:
    """Section `model` of a config.

    Attributes:
      source: the name of a bundled model, or the absolute path of a model file.
      options: every field of the model's options with its value, in the model's order.
    """

    source: str = "gpt"
    options: tuple[tuple[str, Plain], ...] = ()

    def get(self, name: str, default: Plain = None) -> Plain:
        """The value of an option, or `default` if the model has no such option.

        >>> ModelConfig("gpt", (("layers", 4),)).get("layers")
        4
        """
        return dict(self.options).get(name, default)


@dataclass(frozen=True)
class RunConfig:
    """All of a run, resolved: every key has its value.

    Build one with `load`, which fills in and checks `model.options`; the other floors are
    each given only their own section.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataOptions = field(default_factory=DataOptions)
    buckets: BucketOptions = field(default_factory=BucketOptions)
    dispatch: DispatchOptions = field(default_factory=DispatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    program: ProgramOptions = field(default_factory=ProgramOptions)
    plan: SearchOptions = field(default_factory=SearchOptions)
    replan: ReplanOptions = field(default_factory=ReplanOptions)
    stragglers: StragglerOptions = field(default_factory=StragglerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    supervise: SuperviseOptions = field(default_factory=SuperviseOptions)


@dataclass(frozen=True)
class SparseConfig:
    """All of a run that trains tables: what a model file with TRAINS = "tables" is for."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("linear"))
    data: SparseDataOptions = field(default_factory=SparseDataOptions)
    table: TableOptions = field(default_factory=TableOptions)
    ps: ServerOptions = field(default_factory=ServerOptions)
    optimizer: DenseOptions = field(default_factory=DenseOptions)
    train: SparseTrainOptions = field(default_factory=SparseTrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)


@dataclass(frozen=True)
class NodesConfig:
    """All of a run that learns vectors of a graph's nodes: TRAINS = "nodes"."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("node2vec"))
    data: NodeDataOptions = field(default_factory=NodeDataOptions)
    train: NodeTrainOptions = field(default_factory=NodeTrainOptions)
    checkpoint: NodeCheckpointOptions = field(default_factory=NodeCheckpointOptions)


@dataclass(frozen=True)
class FederatedConfig:
    """All of a federation, simulated or deployed: what a config with a key `federated.*` is for."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig("mlp"))
    data: FederatedDataOptions = field(default_factory=FederatedDataOptions)
    federated: FederatedOptions = field(default_factory=FederatedOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    secagg: SecAggOptions = field(default_factory=SecAggOptions)
    net: NetOptions = field(default_factory=NetOptions)
    train: FederatedTrainOptions = field(default_factory=FederatedTrainOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)


AnyConfig = RunConfig | SparseConfig | NodesConfig | FederatedConfig

CONFIGS: dict[str, type[RunConfig] | type[SparseConfig] | type[NodesConfig]] = {
    "plan": RunConfig,
    "tables": SparseConfig,
    "nodes": NodesConfig,
}
"""By what a model file says it TRAINS; one that says nothing is planned."""

FEDERATED = "federated"
"""The section that makes a config of a planned model one of a federation."""


def config_class(trains: str, sections: Collection[str]) -> type[AnyConfig]:
    """What a config is, from what its model TRAINS and the sections it has keys of.

    >>> config_class("plan", {"model", "federated"}).__name__
    'FederatedConfig'
    """
    return FederatedConfig if FEDERATED in sections and trains == "plan" else CONFIGS[trains]


def section_classes(config: type[AnyConfig] = RunConfig) -> dict[str, type]:
    """The dataclass of each section but `model`, whose keys are the model file's to name.

    >>> sorted(section_classes())[:4]
    ['buckets', 'checkpoint', 'data', 'dispatch']
    >>> "table" in section_classes(SparseConfig)
    True
    """
    return {name: cls for name, cls in get_type_hints(config).items() if name != "model"}


def field_hints(cls: type) -> dict[str, Any]:
    """The type of each field of an options dataclass, bounds included."""
    return get_type_hints(cls, include_extras=True)
