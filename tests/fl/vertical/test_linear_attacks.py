"""Reverse multiplication (Weng et al., 2020): on gradients that are told, and on ours.

The broken variants are the real training with one addition: after each step the shares of
something are put together at a party, as protocols do that tell gradients to the owner of their
columns, or have a coordinator that a party is in league with.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from shardpar.fl.messages import Message
from shardpar.fl.vertical import linear
from shardpar.fl.vertical.linear_model import fit
from shardpar.fl.vertical.options import LinearOptions
from shardpar.fl.vertical.ring import MODULUS, from_bytes, signed, to_bytes
from tests.fl.vertical.parties import SHORT, together


class Leak(Message):
    share: bytes


class Watched:
    """Training that notes what one party sees of each step, alone or with the other's shares."""

    def __init__(self, monkeypatch, role: str, told: bool):
        self.gradients, self.scores = [], []
        self._role, self._told = role, told
        gradients_of, scores_of = linear.gradients_of, linear.scores_of

        def noting_gradients(link, *rest):
            shares = gradients_of(link, *rest)
            host = shares.own if link.role == "host" else shares.other
            self._note(link, self.gradients, host)
            return shares

        def noting_scores(link, options, columns, weights):
            scores = scores_of(link, options, columns, weights)
            self._note(link, self.scores, scores)
            return scores

        monkeypatch.setattr(linear, "gradients_of", noting_gradients)
        monkeypatch.setattr(linear, "scores_of", noting_scores)

    def _note(self, link, notes, share):
        if link.role != self._role:
            if self._told:
                link.send("leak", Leak(to_bytes(share)))
            return
        if self._told:
            share = (share + from_bytes(link.receive("leak", Leak).share)) % MODULUS
        notes.append(np.array(signed(share), float))


def run(x_guest, x_host, y, options):
    together(
        lambda end: fit(end, "guest", x_guest, y, options, SHORT),
        lambda end: fit(end, "host", x_host, None, options, SHORT),
    )


@pytest.mark.parametrize("told", [True, False])
def test_a_host_reads_labels_out_of_gradients_that_are_told_and_not_out_of_ours(monkeypatch, told):
    """A batch with fewer rows than the host has columns: Xᵀ e = g has one solution e."""
    random = np.random.default_rng(11)
    y = (random.random(60) > 0.5).astype(float)
    x_guest, x_host = random.normal(size=(60, 2)), random.normal(size=(60, 80))
    options = LinearOptions(epochs=1, batch=60, tolerance=0)
    seen = Watched(monkeypatch, "host", told)
    run(x_guest, x_host, y, options)
    scaled = (x_host - x_host.mean(0)) / x_host.std(0)
    [rows] = linear.batches_of(60, options, 0)
    errors, *_ = np.linalg.lstsq(scaled[rows].T, seen.gradients[0])
    # An error is sigmoid(z) - y: labels of 1 have the smaller ones.
    found = roc_auc_score(y[rows], -errors)
    if told:
        assert found == 1
    else:
        # Of 60 labels, chance has a deviation of 0.075.
        assert 0.2 < found < 0.8


@pytest.mark.parametrize("told", [True, False])
def test_a_guest_reads_columns_out_of_scores_and_gradients_and_not_out_of_ours(monkeypatch, told):
    """From step to step z moves by X times the change of weights: one equation for each step."""
    random = np.random.default_rng(12)
    x_host = random.normal(size=(30, 3))
    y = (random.random(30) > 0.5).astype(float)
    options = LinearOptions(epochs=6, batch=30, learning_rate=1.0, l2=0, tolerance=0)
    monkeypatch.setattr(linear, "batches_of", lambda rows, *_: iter([np.arange(rows)]))
    seen = Watched(monkeypatch, "guest", told)
    # The guest has only an intercept, whose part of z it takes away by comparing with the mean.
    run(np.zeros((30, 0)), x_host, y, options)
    moves = np.diff(np.stack(seen.scores), axis=0)
    moves -= moves.mean(axis=1, keepdims=True)
    changes = np.stack(seen.gradients[:-1]) / (4 * 30)
    columns, *_ = np.linalg.lstsq(-changes, moves)
    scaled = (x_host - x_host.mean(0)) / x_host.std(0)
    alike = [abs(np.corrcoef(columns[at], scaled[:, at])[0, 1]) for at in range(3)]
    if told:
        assert min(alike) > 0.999
    else:
        # Chance has a deviation of 0.19 each.
        assert max(alike) < 0.95
        assert np.mean(alike) < 0.7


def test_what_a_party_holds_and_decrypts_is_uniform(monkeypatch):
    """Shares of scores and gradients use the whole ring, whatever they are shares of."""
    x = np.random.default_rng(0).normal(size=(200, 3))
    for role in ("guest", "host"):
        with monkeypatch.context() as patch:
            seen = Watched(patch, role, told=False)
            options = LinearOptions(epochs=1, batch=100, tolerance=0)
            run(x[:, :1], x[:, 1:], (x[:, 0] > 0).astype(float), options)
        # Shortening by 12 bits leaves 116, positive at the guest and negative at the host.
        shares = np.concatenate(seen.scores) * (1 if role == "guest" else -1) / 2.0**116
        assert 0 <= shares.min() < 0.1
        assert 0.9 < shares.max() <= 1
        assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
        assert np.std(shares) == pytest.approx(12**-0.5, abs=0.06)
