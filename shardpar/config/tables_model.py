"""A model with tables as its config names it: small enough to send to another process.

A model file is imported by whoever needs it, so that what is sent is its path and options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.schema import ModelConfig
from shardpar.errors import ConfigError, DataError
from shardpar.ps.options import TableOptions
from shardpar.ps.rules import row_optimizer, with_rule


@dataclass(frozen=True)
class TablesModel:
    """What a model file with TRAINS = "tables" offers, with a config's options.

    Attributes:
      config: which file, and the model's options.
      table: the rule of rows that have none of their own.

    >>> TablesModel(ModelConfig("fm"), TableOptions()).module.__doc__.partition(":")[0]
    'Factorisation machines'
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

    def require(self, batch: Mapping[str, np.ndarray]) -> None:
        """Lets the model file look at a batch, if it wants to: `require(options, batch)`.

        Args:
          batch: numpy arrays, as `loss` sees them.

        Raises:
          DataError: in the words of the ValueError that the model file raised.
        """
        require = getattr(self.module, "require", None)
        if require is None:
            return
        try:
            require(build_options(self.module, self.config), batch)
        except ValueError as error:
            raise DataError(f"{self.config.source} does not take this data: {error}") from None

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
