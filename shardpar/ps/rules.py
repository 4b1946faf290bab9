"""Options become rules: the row optimizer of tables, and optax's for everything else."""

from __future__ import annotations

from dataclasses import replace

import optax
from flax import nnx

from shardpar.ps.embed import Embed, tables_of
from shardpar.ps.optimizers import (
    FTRL,
    SGD,
    AdaGrad,
    LazyAdam,
    Momentum,
    RowOptimizer,
    RowWiseAdaGrad,
)
from shardpar.ps.options import DenseOptions, TableOptions


def row_optimizer(options: TableOptions) -> RowOptimizer:
    """The rule that section `table` names.

    >>> row_optimizer(TableOptions(optimizer="sgd", learning_rate=0.5))
    SGD(learning_rate=0.5)
    """
    rate = options.learning_rate
    eps = {} if options.eps is None else {"eps": options.eps}
    if options.optimizer == "sgd":
        return SGD(rate)
    if options.optimizer == "momentum":
        return Momentum(rate, options.momentum, options.nesterov)
    if options.optimizer == "adagrad":
        return AdaGrad(rate, options.initial, **eps)
    if options.optimizer == "rowwise_adagrad":
        return RowWiseAdaGrad(rate, options.initial, **eps)
    if options.optimizer == "adam":
        return LazyAdam(rate, options.b1, options.b2, **eps)
    return FTRL(rate, options.beta, options.l1, options.l2)


def dense_optimizer(options: DenseOptions) -> optax.GradientTransformation:
    """The optax rule that section `optimizer` names."""
    if options.name == "adam":
        return optax.adam(options.learning_rate, options.b1, options.b2)
    if options.name == "adagrad":
        return optax.adagrad(options.learning_rate, initial_accumulator_value=0.0, eps=1e-10)
    return optax.sgd(options.learning_rate, options.momentum or None)


def with_rule(model: nnx.Module, rule: RowOptimizer) -> nnx.Module:
    """The model, whose tables without a rule of their own have this one."""
    for _, layer in tables_of(model):
        give_rule(layer, rule)
    return model


def give_rule(layer: Embed, rule: RowOptimizer) -> None:
    """Sets the rule of a table that was made without one."""
    if not layer.has_own_rule:
        layer.table = replace(layer.table, optimizer=rule)
