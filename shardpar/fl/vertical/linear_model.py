"""A party's half of a vertical regression: trained, kept in a file, and asked for predictions.

Each half holds shares of all weights, so that neither says anything alone, and predictions take
both parties. `predict` tells the guest the sum z of both parties' columns times weights; as it does
not know its own weights, it cannot tell what part of z is the host's. The host learns how many rows
were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from scipy.special import expit

from shardpar.errors import DataError, PartyError
from shardpar.fl.channel import Channel
from shardpar.fl.he.pool import Pool
from shardpar.fl.messages import Message
from shardpar.fl.vertical.files import read, write
from shardpar.fl.vertical.linear import Epoch, WeightShares, scores_of, train
from shardpar.fl.vertical.link import Link, Role, greet
from shardpar.fl.vertical.options import KeyOptions, LinearOptions
from shardpar.fl.vertical.ring import MODULUS, from_bytes, signed, to_bytes
from shardpar.fl.vertical.scaling import Scaling

_MOST_LABEL = 1 << 10


class ScoresMessage(Message):
    """The host's shares of predictions, 16 bytes each."""

    shares: bytes


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="vertical-linear-1"):
    role: Role
    model: bytes
    names: tuple[str, ...]
    options: LinearOptions
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    own: bytes
    other: bytes


@dataclass(frozen=True)
class LinearHalf:
    """One party's half.

    Attributes:
      role: the party's.
      model: 16 random bytes that both halves of a model have.
      names: of this party's columns.
      options: as trained.
      scaling: of this party's columns.
      weights: shares.
    """

    role: Role
    model: bytes
    names: tuple[str, ...]
    options: LinearOptions
    scaling: Scaling
    weights: WeightShares

    def save(self, path: Path) -> None:
        """Writes the half, whole or not at all."""
        scaling, weights = self.scaling, self.weights
        own, other = to_bytes(weights.own), to_bytes(weights.other)
        write(
            path,
            _File(
                self.role, self.model, self.names, self.options,
                scaling.mean, scaling.deviation, own, other,
            ),
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> LinearHalf:
        """The half in a file.

        Raises:
          DataError: there is none.
        """
        file = read(path, _File)
        options = file.options
        intercept = options.intercept and file.role == "guest"
        scaling = Scaling(file.mean, file.deviation, options.feature_bits, intercept)
        weights = WeightShares(from_bytes(file.own), from_bytes(file.other))
        if len(weights.own) != scaling.width or len(file.names) != len(file.mean):
            raise DataError(f"{path} holds {len(weights.own)} weights for {scaling.width} columns")
        return cls(file.role, file.model, file.names, options, scaling, weights)


def fit(
    channel: Channel,
    role: Role,
    columns: np.ndarray,
    labels: np.ndarray | None,
    options: LinearOptions,
    keys: KeyOptions,
    *,
    names: Sequence[str] | None = None,
    row_ids: Sequence[str] | None = None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> LinearHalf:
    """Trains with the other party, which calls it too.

    Args:
      channel: to the other.
      role: this party's.
      columns: this party's, float [rows, columns], none missing.
      labels: the guest's, [rows]: 0 and 1, or real numbers up to 1024 for linear regression; None
        at the host.
      options: as agreed.
      keys: how keys are made.
      names: of the columns; None numbers them.
      row_ids: of the rows, to be sure that both have the same.
      on_epoch: is told about each.

    Raises:
      DataError: columns or labels that cannot be trained on.
      PartyError: the other is gone, has other rows or options, or breaks the protocol.
    """
    targets = _targets(role, labels, len(columns), options)
    scaling = Scaling.of(
        columns,
        fraction_bits=options.feature_bits,
        intercept=options.intercept and role == "guest",
    )
    if not scaling.width:
        raise DataError(f"the {role} has no columns: add one, or an intercept at the guest")
    integers = scaling.integers(columns)
    with Pool(keys.processes) as pool:
        link = greet(
            channel, role, options, keys,
            topic="linear/fit", rows=len(columns), columns=scaling.width, row_ids=row_ids,
            pool=pool,
        )  # fmt: skip
        model = _named(link)
        weights = train(link, options, integers, targets, on_epoch)
    names = [str(at) for at in range(columns.shape[1])] if names is None else names
    return LinearHalf(role, model, tuple(names), options, scaling, weights)


def predict(
    channel: Channel,
    half: LinearHalf,
    columns: np.ndarray,
    keys: KeyOptions,
    *,
    row_ids: Sequence[str] | None = None,
) -> np.ndarray | None:
    """Predictions for rows of which each party has its columns; both call it.

    Returns:
      At the guest probabilities, or for linear regression numbers, float64 [rows]; None at the
      host.

    Raises:
      DataError: other columns than trained on.
      PartyError: the other is gone, has another model or other rows, or breaks the protocol.
    """
    options = half.options
    integers = half.scaling.integers(columns)
    agreed = _Prediction(half.model.hex(), options.batch, options.mask_bits)
    with Pool(keys.processes) as pool:
        link = greet(
            channel, half.role, agreed, keys,
            topic="linear/predict", rows=len(columns), columns=half.scaling.width,
            row_ids=row_ids, pool=pool,
        )  # fmt: skip
        if link.peer_columns != len(half.weights.other):
            raise PartyError(f"{link.peer} has a half for other columns", party=link.peer)
        scores = [
            _opened(link, scores_of(link, options, integers[start : start + options.batch],
                                    half.weights))
            for start in range(0, len(integers), options.batch)
        ]  # fmt: skip
    if half.role == "host":
        return None
    z = np.ldexp(np.array([score for part in scores for score in part]), -options.weight_bits)
    # The polynomial that was trained with leaves [0, 1]; the sigmoid keeps the order of its scores.
    return z if options.kind == "linear" else expit(z)


@dataclass(frozen=True)
class _Prediction:
    """What both must have alike to predict."""

    model: str
    batch: int
    mask_bits: int


class _Name(Message):
    """A model's name."""

    model: bytes


def _named(link: Link) -> bytes:
    """A name for the model: no other has the host's fresh key."""
    if link.is_guest:
        link.send("name", _Name(link.key.fingerprint))
        return link.key.fingerprint
    return link.receive("name", _Name).model


def _opened(link: Link, share: np.ndarray) -> list[int]:
    """The numbers at the guest; nothing at the host."""
    if not link.is_guest:
        link.send("scores", ScoresMessage(to_bytes(share)))
        return []
    message = link.receive("scores", ScoresMessage)
    if len(message.shares) != len(to_bytes(share)):
        raise PartyError(f"{link.peer} sent scores of other rows", party=link.peer)
    return signed((share + from_bytes(message.shares)) % MODULUS)


def _targets(
    role: Role, labels: np.ndarray | None, rows: int, options: LinearOptions
) -> np.ndarray | None:
    if role == "host":
        if labels is not None:
            raise DataError("the host has no labels: give none, or be the guest")
        return None
    if labels is None:
        raise DataError("the guest has the labels: give them, or be the host")
    labels = np.asarray(labels, np.float64)
    if labels.shape != (rows,):
        raise DataError(f"labels shaped {labels.shape} for {rows} rows")
    if options.kind == "logistic" and not np.isin(labels, (0, 1)).all():
        raise DataError("labels of logistic regression are 0 and 1")
    if not (np.abs(labels) <= _MOST_LABEL).all():
        raise DataError(f"labels are finite numbers up to {_MOST_LABEL}: scale them")
    return np.rint(np.ldexp(labels, options.weight_bits)).astype(np.int64)
