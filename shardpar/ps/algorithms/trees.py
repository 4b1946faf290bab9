"""Gradient-boosted trees on the same data as the other models, by LightGBM.

Friedman, "Greedy function approximation: a gradient boosting machine", 2001; Ke et al.,
"LightGBM", 2017, whose library does the work (extra `trees`). Features are columns: for hashed
ids of millions, a table of embeddings is the better model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.embeddings import Progress, quiet

Objective = Literal["binary", "regression", "multiclass"]


@dataclass(frozen=True)
class TreeOptions:
    """Attributes of boosting.

    Attributes:
      objective: "binary", labels 0 and 1; "regression"; or "multiclass", labels 0, 1, 2, ...
      trees: at most; of each class, where there are several.
      leaves: of a tree, at most.
      depth: of a tree, at most; None leaves it to the leaves.
      learning_rate: what each tree counts.
      least_samples: of a leaf.
      penalty: of the squares of leaves.
      patience: ends when the loss of the evaluation data has not fallen for so many trees;
        None takes all trees.
      threads: None takes all processors.
    """

    objective: Objective = "binary"
    trees: int = 100
    leaves: int = 31
    depth: int | None = None
    learning_rate: float = 0.1
    least_samples: int = 20
    penalty: float = 0.0
    patience: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("binary", "regression", "multiclass"):
            raise ConfigError(
                f"trees are for 'binary', 'regression' or 'multiclass', not {self.objective!r}"
            )
        for name, least in (("trees", 1), ("leaves", 2), ("depth", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} of trees is at least {least}, not {value}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is above 0, not {self.learning_rate}")


@dataclass(frozen=True, eq=False)
class TreeModel:
    """Boosted trees.

    Attributes:
      text: the model as LightGBM writes it; `lightgbm.Booster(model_str=text)` reads it.
      columns: of the features.
      losses: of the evaluation data after each tree; empty without such data.
    """

    text: str
    columns: int
    losses: tuple[float, ...]

    def predict(self, features: Any) -> np.ndarray:
        """Probabilities [n] or [n, classes], or values [n].

        Args:
          features: [n, columns], a scipy matrix or an array; fewer columns are filled with 0.

        Raises:
          DataError: there are more columns than the model knows.
        """
        matrix = _widened(_matrix(features), self.columns)
        return np.asarray(_lightgbm().Booster(model_str=self.text).predict(matrix))

    def importance(self) -> np.ndarray:
        """How much each column lowered the loss, float64[columns]."""
        booster = _lightgbm().Booster(model_str=self.text)
        return booster.feature_importance("gain")


Part = tuple[Any, Any] | tuple[Any, Any, Any]
"""Features [n, columns], labels [n], and weights [n] if any; samples of weight 0 do not count."""


def fit(
    options: TreeOptions,
    data: Iterable[Part],
    evaluation: Iterable[Part] = (),
    *,
    seed: int = 0,
    progress: Progress = quiet,
) -> TreeModel:
    """Grows trees on all the data, which is gathered in memory as a sparse matrix.

    Args:
      options: of the algorithm.
      data: parts of it, such as batches made by `csr_of_slots`.
      evaluation: likewise, of which losses are reported and waited for.
      seed: of everything random.
      progress: called after each tree with the evaluation's loss, NaN without one.

    Raises:
      ConfigError: LightGBM is not installed, or `patience` is asked for without evaluation.
      DataError: there is no data, labels do not fit the objective, or values are not finite.
    """
    lightgbm = _lightgbm()
    features, labels, weights = _gathered(data, "the data")
    _require_labels(labels, options.objective)
    parameters: dict[str, Any] = {
        "objective": options.objective,
        "num_leaves": options.leaves,
        "max_depth": options.depth or -1,
        "learning_rate": options.learning_rate,
        "min_data_in_leaf": options.least_samples,
        "lambda_l2": options.penalty,
        "num_threads": options.threads or 0,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    if options.objective == "multiclass":
        parameters["num_class"] = int(labels.max()) + 1
    columns = features.shape[1]
    train = lightgbm.Dataset(features, labels, weight=weights, params=parameters)
    sets, losses = [], []
    parts = list(evaluation)
    if parts:
        held, truth, held_weights = _gathered(parts, "the evaluation data")
        sets.append(
            lightgbm.Dataset(_widened(held, columns), truth, weight=held_weights, reference=train)
        )
    elif options.patience:
        raise ConfigError("patience waits for the loss of evaluation data; give some, or None")
    callbacks: list[Callable[..., Any]] = [_told(options.trees, losses, progress)]
    if options.patience:
        callbacks.append(lightgbm.early_stopping(options.patience, verbose=False))
    booster = lightgbm.train(parameters, train, options.trees, valid_sets=sets, callbacks=callbacks)
    best = booster.best_iteration if options.patience else None
    return TreeModel(booster.model_to_string(num_iteration=best), columns, tuple(losses))


def csr_of_slots(ids: np.ndarray, values: np.ndarray, columns: int) -> sparse.csr_array:
    """Batches of at most so many features a sample, as a sparse matrix.

    Args:
      ids: int[n, slots], the columns.
      values: float[n, slots]; 0 where there is no feature. Repeated columns are added.
      columns: of the matrix.

    >>> csr_of_slots(np.array([[2, 0], [1, 1]]), np.array([[5.0, 0], [1, 2]]), 3).toarray().tolist()
    [[0.0, 0.0, 5.0], [0.0, 3.0, 0.0]]
    """
    rows, places = np.nonzero(values)
    if rows.size and not 0 <= ids[rows, places].min() <= ids[rows, places].max() < columns:
        raise DataError(
            f"features are {ids[rows, places].min()} to {ids[rows, places].max()}, outside a "
            f"matrix of {columns} columns"
        )
    matrix = sparse.csr_array(
        (values[rows, places], (rows, ids[rows, places])), shape=(len(ids), columns)
    )
    matrix.sum_duplicates()
    return matrix


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise ConfigError(
            "trees need LightGBM, which is not installed: pip install 'shardpar[trees]'"
        ) from error
    return lightgbm


def _matrix(features: Any) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(features, dtype=np.float32)
    if not np.isfinite(matrix.data).all():
        raise DataError("a feature is not finite; leave features out that are not known")
    return matrix


def _widened(matrix: sparse.csr_matrix, columns: int) -> sparse.csr_matrix:
    if matrix.shape[1] > columns:
        raise DataError(f"there are {matrix.shape[1]} features, but the model knows {columns}")
    parts = (matrix.data, matrix.indices, matrix.indptr)
    return sparse.csr_matrix(parts, shape=(matrix.shape[0], columns))


def _gathered(
    parts: Iterable[Part], what: str
) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray | None]:
    """One matrix, as wide as the widest part, its labels, and weights where there are any."""
    matrices, labels, weights = [], [], []
    for number, part in enumerate(parts):
        matrix, label = _matrix(part[0]), np.asarray(part[1], np.float64)
        weight = np.ones(len(label)) if len(part) == 2 else np.asarray(part[2], np.float64)
        if not matrix.shape[0] == len(label) == len(weight):
            raise DataError(
                f"part {number} of {what} has {matrix.shape[0]} samples, {len(label)} labels and "
                f"{len(weight)} weights"
            )
        counts = weight > 0
        matrices.append(matrix if counts.all() else matrix[counts])
        labels.append(label[counts])
        weights.append(weight[counts])
    if not sum(map(len, labels)):
        raise DataError(f"{what} has no samples")
    columns = max(matrix.shape[1] for matrix in matrices)
    whole = sparse.vstack([_widened(matrix, columns) for matrix in matrices], format="csr")
    weight = np.concatenate(weights)
    return whole, np.concatenate(labels), None if (weight == 1).all() else weight


def _require_labels(labels: np.ndarray, objective: Objective) -> None:
    if not np.isfinite(labels).all():
        raise DataError("a label is not finite")
    whole = (labels == np.floor(labels)).all() and labels.min() >= 0
    if objective == "binary" and not (whole and labels.max() <= 1):
        raise DataError(
            f"labels are {labels.min():g} to {labels.max():g}; of objective 'binary' they are 0 "
            "and 1: use 'multiclass' or 'regression'"
        )
    if objective == "multiclass" and not whole:
        raise DataError("labels of objective 'multiclass' are 0, 1, 2, ...; use 'regression'")


def _told(trees: int, losses: list[float], progress: Progress) -> Callable[[Any], None]:
    def tell(state: Any) -> None:
        loss = float("nan")
        if state.evaluation_result_list:
            loss = float(state.evaluation_result_list[0][2])
            losses.append(loss)
        progress(state.iteration + 1, trees, loss)

    return tell
