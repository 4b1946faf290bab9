"""How good a global model is on examples that nobody trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardpar.fl.task import Params, Task

_ROWS = 1024

Predict = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Loss and accuracy on held-out examples.

    Attributes:
      task: the model and its loss.
      held: by field, [rows, ...] each; read in batches, so it may be mapped from disk.
      predict: `predict(model, batch)`; if it gives a score for each class, [rows, classes], and
        the examples have whole `labels`, there is an accuracy.
    """

    task: Task
    held: Mapping[str, np.ndarray]
    predict: Predict | None = None

    def __call__(self, params: Params) -> dict[str, float]:
        """`eval_loss`, the mean over the examples, and `accuracy` where there is one."""
        rows = len(next(iter(self.held.values())))
        size = min(_ROWS, rows)
        sums = [0.0, 0.0, 0.0]
        for begin in range(0, rows, size):
            batch = {name: _padded(x[begin : begin + size], size) for name, x in self.held.items()}
            real = (np.arange(size) < rows - begin).astype(np.float32)
            found = self._sums(params, batch, real)
            sums = [old + float(new) for old, new in zip(sums, found, strict=True)]
        loss, weight, right = sums
        scores = {"eval_loss": loss / weight if weight else float("nan")}
        return scores | ({"accuracy": right / rows} if self._classifies else {})

    @cached_property
    def _classifies(self) -> bool:
        labels = self.held.get("labels")
        if self.predict is None or labels is None or labels.ndim != 1 or labels.dtype.kind != "i":
            return False
        batch = {name: jax.ShapeDtypeStruct(x[:1].shape, x.dtype) for name, x in self.held.items()}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.task.init(0))
        return len(jax.eval_shape(self._scores, shapes, batch).shape) == 2

    def _scores(self, params: Params, batch: Mapping[str, Any]) -> Any:
        assert self.predict is not None
        return self.predict(self.task.model.merge(params, self.task.rest), batch)

    @cached_property
    def _sums(self) -> Any:
        classifies = self._classifies

        def sums(params: Params, batch: Mapping[str, Any], real: Any) -> tuple[Any, Any, Any]:
            given = batch.get("weights", jnp.ones(real.shape, jnp.float32))
            shown = real.reshape(-1, *[1] * (given.ndim - 1)) * given
            loss, weight = self.task.loss_sum(params, {**batch, "weights": shown})
            right = jnp.float32(0)
            if classifies:
                chosen = jnp.argmax(self._scores(params, batch), axis=1)
                right = jnp.sum(real * (chosen == batch["labels"]))
            return loss, weight, right

        return jax.jit(sums)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    padding = np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, padding])
