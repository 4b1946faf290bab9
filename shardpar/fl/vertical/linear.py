"""Logistic and linear regression of two parties, no third one, whose weights nobody sees.

After Chen et al., "When homomorphic encryption marries secret sharing" (KDD'21), as FATE's SSHE-LR.
Weights, predictions, errors and gradients are shares modulo 2^128 between guest and host from
beginning to end; columns never leave their owner. A step, on a batch of rows X = [X_guest, X_host]:

    z = X w                      each party multiplies its columns (`products`)
    e = sigmoid(z) - y           a polynomial of shares; linear regression: e = z - y
    g = Xᵀ e / rows              `products` again
    w = w - (learning_rate (g + l2 w) + momentum * last change)

In fixed point, with f = feature_bits and b = weight_bits: columns have f fraction bits; w, z, e and
g have b; 2^32 stands for 1 in learning_rate / rows, l2 and momentum. Each shortening is off by at
most 1 unit of 2^-b; otherwise the weights are those of the same integers in the clear.

Revealed: to both, the number of rows, each other's number of columns, the options and, unless the
tolerance is 0, the norm of each epoch's change of weights. To the guest, predictions it asks for.
Nobody learns a gradient, a weight, a label, or any z of training: gradients told to the owner of
their columns would give it the errors, hence labels (reverse multiplication, Weng et al., 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from shardpar.errors import RunError
from shardpar.fl.streams import KeyStream, derived_key
from shardpar.fl.vertical.cubes import cubes
from shardpar.fl.vertical.link import Link
from shardpar.fl.vertical.options import LinearOptions
from shardpar.fl.vertical.products import answer, collect, offer, squared_norm
from shardpar.fl.vertical.ring import MODULUS, product, shares_of, shortened, zeros

STEP_BITS = 32
"""Fraction bits of learning rates, l2 and momentum."""
CUBIC = (0.197, -0.004)
CUBIC_BITS = 16
"""Fraction bits of the cubic's coefficients."""
_CUBE_FRACTION_BITS = 20
_MOST_MOVE = 1 << 20


@dataclass(frozen=True)
class WeightShares:
    """One party's shares, modulo 2^128.

    Attributes:
      own: of the weights of its own columns.
      other: of those of the other's.
    """

    own: np.ndarray
    other: np.ndarray

    def each(
        self, change: Callable[[np.ndarray, np.ndarray], np.ndarray], with_: WeightShares
    ) -> WeightShares:
        """Both, changed alike."""
        return WeightShares(change(self.own, with_.own), change(self.other, with_.other))


@dataclass(frozen=True)
class Epoch:
    """What is known after a pass over the rows.

    Attributes:
      number: from 1.
      moved: the L2 norm of the weights' change; None where it is not told.
    """

    number: int
    moved: float | None


def train(
    link: Link,
    options: LinearOptions,
    columns: np.ndarray,
    labels: np.ndarray | None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> WeightShares:
    """Trains; both parties call it.

    Args:
      link: to the other.
      options: as agreed.
      columns: this party's, integers of feature_bits, [rows, columns].
      labels: the guest's, as integers of weight_bits [rows]; None at the host.
      on_epoch: is told about each.

    Raises:
      PartyError: the other is gone, or sent what is not of this protocol.
      RunError: the weights run away.
    """
    weights = WeightShares(zeros(columns.shape[1]), zeros(link.peer_columns))
    changes = weights
    for epoch in range(options.epochs):
        before = weights
        for rows in batches_of(len(columns), options, epoch):
            y = None if labels is None else labels[rows]
            gradients = gradients_of(link, options, columns[rows], y, weights)
            changes = changes_of(link, options, len(rows), gradients, weights, changes)
            weights = weights.each(lambda w, c: (w - c) % MODULUS, changes)
        moved = _moved(link, options, before, weights)
        on_epoch(Epoch(epoch + 1, moved))
        if moved is not None and moved <= options.tolerance:
            break
    return weights


def batches_of(rows: int, options: LinearOptions, epoch: int) -> Iterator[np.ndarray]:
    """The rows of each step, in an order that both parties know.

    >>> [len(rows) for rows in batches_of(10, LinearOptions(batch=4), epoch=0)]
    [4, 4, 2]
    """
    key = derived_key(
        str(options.seed).encode(),
        job="vertical",
        round_=str(epoch),
        first="guest",
        second="host",
        purpose="order of rows, known to both",
    )
    order = np.argsort(KeyStream(key).words(rows), kind="stable")
    for start in range(0, rows, options.batch):
        yield order[start : start + options.batch]


def scores_of(
    link: Link, options: LinearOptions, columns: np.ndarray, weights: WeightShares
) -> np.ndarray:
    """Shares of z = X w of some rows, in weight_bits."""
    offer(link, "weights", weights.other)
    own = answer(link, "weights", columns.T, options.mask_bits) + product(columns, weights.own)
    other = collect(link, "weights", len(weights.other), len(columns), options.mask_bits)
    return shortened((own + other) % MODULUS, options.feature_bits, first=link.is_guest)


def gradients_of(
    link: Link,
    options: LinearOptions,
    columns: np.ndarray,
    labels: np.ndarray | None,
    weights: WeightShares,
) -> WeightShares:
    """Shares of Xᵀ e of a batch, in weight_bits, times `error_scale`."""
    errors = errors_of(link, options, scores_of(link, options, columns, weights), labels)
    offer(link, "errors", errors)
    own = answer(link, "errors", columns, options.mask_bits) + product(columns.T, errors)
    other = collect(link, "errors", len(errors), len(weights.other), options.mask_bits)
    gradients = WeightShares(own % MODULUS, other)
    return gradients.each(
        lambda g, _: shortened(g, options.feature_bits, first=link.is_guest), gradients
    )


def error_scale(options: LinearOptions) -> int:
    """Errors are kept so many times as large, to spare them a division."""
    return 4 if options.kind == "logistic" and options.sigmoid == "linear" else 1


def errors_of(
    link: Link, options: LinearOptions, scores: np.ndarray, labels: np.ndarray | None
) -> np.ndarray:
    """Shares of sigmoid(z) - y, or z - y, times `error_scale`; the guest's has the labels in it."""
    scale, errors = error_scale(options), scores
    if options.sigmoid == "cubic":
        errors = _cubic(link, options, scores)
    if labels is not None:
        half = scale << (options.weight_bits - 1) if options.kind == "logistic" else 0
        errors = errors + half - scale * shares_of(labels.tolist())
    return errors % MODULUS


def changes_of(
    link: Link,
    options: LinearOptions,
    rows: int,
    gradients: WeightShares,
    weights: WeightShares,
    changes: WeightShares,
) -> WeightShares:
    """Shares of what is subtracted from the weights after a step on so many rows."""
    rate, decay, momentum = step_integers(options, rows)
    guests_first = options.intercept

    def changed(g: np.ndarray, w: np.ndarray, last: np.ndarray, intercept: bool) -> np.ndarray:
        shrunk = decay * w
        if intercept:
            shrunk[0] = 0
        total = (rate * g + shrunk + momentum * last) % MODULUS
        return shortened(total, STEP_BITS, first=link.is_guest)

    return WeightShares(
        changed(gradients.own, weights.own, changes.own, guests_first and link.is_guest),
        changed(gradients.other, weights.other, changes.other, guests_first and not link.is_guest),
    )


def step_integers(options: LinearOptions, rows: int) -> tuple[int, int, int]:
    """(learning rate per row, learning rate times l2, momentum), 2^32 standing for 1."""
    unit = float(1 << STEP_BITS)
    return (
        round(options.learning_rate / (rows * error_scale(options)) * unit),
        round(options.learning_rate * options.l2 * unit),
        round(options.momentum * unit),
    )


def _cubic(link: Link, options: LinearOptions, scores: np.ndarray) -> np.ndarray:
    """Shares of 0.197 z - 0.004 z³, in weight_bits."""
    first, bits = link.is_guest, options.weight_bits
    few = min(_CUBE_FRACTION_BITS, bits)
    third = cubes(link, shortened(scores, bits - few, first=first), options.mask_bits)
    third = shortened(third, 3 * few - bits, first=first)
    one, three = (round(coefficient * (1 << CUBIC_BITS)) for coefficient in CUBIC)
    return shortened((one * scores + three * third) % MODULUS, CUBIC_BITS, first=first)


def _moved(
    link: Link, options: LinearOptions, before: WeightShares, after: WeightShares
) -> float | None:
    if not options.tolerance:
        return None
    moves = after.each(lambda a, b: (a - b) % MODULUS, before)
    ordered = (moves.own, moves.other) if link.is_guest else (moves.other, moves.own)
    squared = squared_norm(link, np.concatenate(ordered), options.mask_bits)
    moved = math.ldexp(math.sqrt(squared), -options.weight_bits)
    if moved > _MOST_MOVE:
        raise RunError(
            f"the weights moved by {moved:.3g} in an epoch: use a lower learning_rate than "
            f"{options.learning_rate:g}"
        )
    return moved
