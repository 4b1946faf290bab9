"""A model with tables as its config names it: small enough to send to another process.

A model file is imported by whoever needs it, so that what is sent is its path and options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.schema import ModelConfig
from shardpar.errors import ConfigError
from shardpar.ps.options import TableOptions
from shardpar.ps.rules import row_optimizer, with_rule


@dataclass(frozen=True)
class TablesModel:
    """What a model file with TRAINS = "tables" offers, with a config's options.

    Attributes:
      config: which file, and the model's options.
      table: the rule of rows that have none of their own.

    >>> from shardpar.config.load import load_any
    >>> config = load_any(None, ["model.source=fm"])
    >>> TablesModel(config.model, config.table).module.__name__.split("_")[3]
    'fm'
    """

    config: ModelConfig
    table: TableOptions

    @property
    def module(self) -> ModuleType:
        """The model file, imported.

        Raises:
          ConfigError: it cannot be.
        """
        return load_model_source(find_model(self.config.source))

    def init(self, rngs: Any) -> Any:
        """The Flax model."""
        module = self.module
        model = module.build(build_options(module, self.config), rngs)
        return with_rule(model, row_optimizer(self.table))

    def loss(self, model: Any, batch: Any) -> Any:
        """What the model file's `loss` gives."""
        return self.module.loss(model, batch)

    @property
    def predict(self) -> Callable[[Any, Any], Any]:
        """The model file's `predict`.

        Raises:
          ConfigError: it has none.
        """
        predict: Callable[[Any, Any], Any] | None = getattr(self.module, "predict", None)
        if predict is None:
            raise ConfigError(
                f"{self.config.source} has no function `predict(model, batch)`, which evaluation "
                "needs; write one that gives a score for each sample"
            )
        return predict
