"""Weight of evidence where one party has the labels and another the columns of the same rows.

The label party encrypts its labels; the column party adds them up bin by bin, unread, and sends
the sums back packed and re-randomised, as FATE's binning does (Yang et al., TIST'19). Rows must be
lined up first (`shardpar.fl.psi.align`).

Revealed to the label party: how many columns and bins there are, and for each bin how many rows and
how many with label 1 it has, but neither where its edges are nor which rows are in it. To the
column party: how many rows there are, and each bin's weight and each column's information value,
from which the share of label 1 in each bin follows. Bins of fewer rows than the minimum are not
sent, and cells of fewer rows of a label have no part in a weight. Binning the same rows in another
way is another answer, and two answers have a difference: bin once.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from shardpar.errors import PartyError, SpecError
from shardpar.fl.channel import Channel
from shardpar.fl.features.binning import Binning
from shardpar.fl.features.woe import WeightOfEvidence, checked_labels, evidence
from shardpar.fl.he import okamoto_uchiyama, paillier
from shardpar.fl.he.ciphertexts import Ciphertexts, CiphertextsMessage
from shardpar.fl.he.packing import Packing
from shardpar.fl.he.pool import Pool, SecretKey
from shardpar.fl.messages import Message, Tensor, array_of, tensor_of
from shardpar.fl.stats import counted
from shardpar.fl.suppression import MINIMUM, kept_cells

Scheme = Literal["paillier", "okamoto-uchiyama"]
_SCHEMES: dict[Scheme, Any] = {"paillier": paillier, "okamoto-uchiyama": okamoto_uchiyama}
# Labels in one message: 1 MiB under a key of 2048 bits.
_BATCH = 2048


class LabelledRows(Message):
    """Label party to column party, first: how many rows there are."""

    count: int


class BinSums(Message):
    """Column party to label party.

    Attributes:
      sizes: how many bins each column has.
      counts: int64, rows in each bin of all columns, those left out as 0.
      ones: encrypted sums of labels in each bin, several to a ciphertext.
    """

    sizes: tuple[int, ...]
    counts: Tensor
    ones: CiphertextsMessage


class BinWeights(Message):
    """Label party to column party: float64, the weight of each bin and the value of each column."""

    weights: Tensor
    information: Tensor


def label_party(
    channel: Channel,
    peer: str,
    labels: np.ndarray,
    secret: SecretKey,
    *,
    topic: str = "woe",
    minimum: int = MINIMUM,
    trusted: bool = False,
    pool: Pool | None = None,
    timeout_s: float | None = None,
) -> tuple[float, ...]:
    """The side of the party with the labels; returns the information value of each column.

    Args:
      channel: to the party with the columns.
      peer: that party.
      labels: 0 or 1 for each row.
      secret: a key of this run, by `paillier.generate` or `okamoto_uchiyama.generate`.
      topic: names the run.
      minimum: fewest rows that any number may be of.
      trusted: the column party is trusted to follow the protocol, as an Okamoto-Uchiyama key
        demands.
      pool: of processes that encrypt; None for this process alone.
      timeout_s: how long to wait for each answer; None for the channel's patience.

    Raises:
      DataError: labels are not all 0 or 1.
      PartyError: the other sent sums that cannot be.
    """
    labels, pool = checked_labels(labels, len(labels)), pool or Pool(1)
    channel.send(peer, f"{topic}/key", secret.public.to_message())
    channel.send(peer, f"{topic}/rows", LabelledRows(len(labels)))
    for part in pool.encrypt_in_batches(secret, labels.tolist(), _BATCH):
        channel.send(peer, f"{topic}/labels", part.to_message())
    message = channel.receive(peer, f"{topic}/sums", BinSums, timeout_s)
    counts = array_of(message.counts, party=peer)
    sizes = message.sizes
    if counts.dtype != np.int64 or counts.shape != (sum(sizes),) or min(sizes, default=0) < 1:
        raise PartyError(f"{peer} sent counts of other bins than {sizes}", party=peer)
    if ((counts < minimum) & (counts != 0)).any() or counts.max(initial=0) > len(labels):
        raise PartyError(
            f"{peer} sent a bin of fewer than {minimum} or more than {len(labels)} rows", party=peer
        )
    packing = _packing(secret.public, len(labels))
    held = Ciphertexts.from_message(
        secret.public, message.ones, count=packing.count(counts.size), party=peer
    )
    ones = np.array(_unpacked(packing, pool, secret, held, counts.size, trusted, peer))
    if not ((ones >= 0) & (ones <= counts)).all():
        raise PartyError(f"{peer} sent a bin with more labels than rows", party=peer)
    weights, information = [], []
    for cells in zip(*(np.split(a, np.cumsum(sizes)[:-1]) for a in (ones, counts)), strict=True):
        both = np.stack([cells[0], cells[1] - cells[0]])
        both = np.where(kept_cells(both, minimum), both, 0)
        weight, value = evidence(both[0], both[1], minimum / 2)
        weights.append(weight)
        information.append(value)
    answer = BinWeights(tensor_of(np.concatenate(weights)), tensor_of(np.array(information)))
    channel.send(peer, f"{topic}/weights", answer)
    return tuple(information)


def column_party(
    channel: Channel,
    peer: str,
    rows: np.ndarray,
    binning: Binning,
    *,
    scheme: Scheme = "paillier",
    topic: str = "woe",
    minimum: int = MINIMUM,
    pool: Pool | None = None,
    timeout_s: float | None = None,
) -> WeightOfEvidence:
    """The side of the party with the columns.

    Args:
      channel: to the party with the labels.
      peer: that party.
      rows: float [rows, columns], NaN where a value is missing, in the order of the labels.
      binning: of this party's own choice, with as few bins as will do.
      scheme: of the other's key.
      topic: names the run.
      minimum: fewest rows that any number may be of.
      pool: of processes that re-randomise; None for this process alone.
      timeout_s: how long to wait for each message; None for the channel's patience.

    Raises:
      PartyError: the other has another number of rows, or sent something else than ciphertexts.
    """
    bins, pool, kind = binning.apply(rows), pool or Pool(1), _SCHEMES[scheme]
    if not binning.sizes:
        raise SpecError("there are no columns to weigh")
    sent = channel.receive(peer, f"{topic}/key", kind.PublicKeyMessage, timeout_s)
    key = kind.PublicKey.from_message(sent, party=peer)
    count = channel.receive(peer, f"{topic}/rows", LabelledRows, timeout_s).count
    if count != len(bins):
        raise PartyError(
            f"{peer} has labels of {count} rows, here are {len(bins)}; line them up first with "
            "shardpar.fl.psi.align",
            party=peer,
        )
    counts = [counted(b, n) for b, n in zip(bins.T, binning.sizes, strict=True)]
    kept = [kept_cells(c, minimum) for c in counts]
    sums = [key.zero(n) for n in binning.sizes]
    for start in range(0, count, _BATCH):
        part = bins[start : start + _BATCH]
        message = channel.receive(peer, f"{topic}/labels", CiphertextsMessage, timeout_s)
        labels = Ciphertexts.from_message(key, message, count=len(part), party=peer)
        for at, size in enumerate(binning.sizes):
            groups = np.where(kept[at][part[:, at]], part[:, at], -1)
            sums[at] = sums[at] + labels.sums(groups, size)
    shown = np.concatenate([np.where(k, c, 0) for k, c in zip(kept, counts, strict=True)])
    packed = _packing(key, count).pack_ciphertexts(sums[0].concat(*sums[1:]))
    ones = pool.rerandomised(packed).to_message()
    channel.send(peer, f"{topic}/sums", BinSums(binning.sizes, tensor_of(shown), ones))
    answer = channel.receive(peer, f"{topic}/weights", BinWeights, timeout_s)
    weights, information = (array_of(t, party=peer) for t in (answer.weights, answer.information))
    right = weights.shape == shown.shape and information.shape == (len(binning.sizes),)
    if not (right and np.isfinite(weights).all() and np.isfinite(information).all()):
        raise PartyError(f"{peer} sent weights of other bins", party=peer)
    split = np.split(weights, np.cumsum(binning.sizes)[:-1])
    return WeightOfEvidence(
        binning, tuple(tuple(w.tolist()) for w in split), tuple(information.tolist())
    )


def _packing(key: Any, rows: int) -> Packing:
    return Packing.of(key, most=1, additions=max(rows, 1))


def _unpacked(
    packing: Packing,
    pool: Pool,
    secret: SecretKey,
    held: Ciphertexts,
    count: int,
    trusted: bool,
    party: str,
) -> list[int]:
    try:
        return packing.unpack(pool.decrypt(secret, held, trusted=trusted), count)
    except OverflowError:
        raise PartyError(f"{party} sent sums of more labels than there are", party=party) from None
