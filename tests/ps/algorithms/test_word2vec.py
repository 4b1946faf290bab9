"""Word2Vec: one step equals the textbook's sum over pairs; several devices equal one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from shardpar.errors import ConfigError, DataError
from shardpar.ps.algorithms.lookup_program import Lookup, LookupProgram
from shardpar.ps.algorithms.skipgram_blocks import BlockShape, batches, sentences_of
from shardpar.ps.algorithms.word2vec import Word2VecOptions, fit, skip_gram
from shardpar.ps.initializers import Normal
from shardpar.ps.optimizers import SGD, RowWiseAdaGrad
from shardpar.ps.placement import Placement
from shardpar.ps.table import Table

VOCABULARY, DIM, SHAPE, NEGATIVES = 30, 8, BlockShape(4, 8, 2, 5), 3


def a_batch(seed=0):
    random = np.random.default_rng(seed)
    text = [random.integers(0, VOCABULARY, n) for n in (9, 1, 7, 6, 5)]
    noise = np.linspace(0, 1, VOCABULARY + 1)[1:]
    (batch,) = batches(sentences_of(text, VOCABULARY), SHAPE, noise, None, random)
    return batch


def program(devices=1, rule=None, placement=None):
    tables = [Table(VOCABULARY, DIM, rule or SGD(0.1), Normal(0.5))] * 2
    return LookupProgram(
        tables,
        (Lookup(0, "centres"), Lookup(1, "others")),
        skip_gram(SHAPE.window, NEGATIVES),
        devices=jax.devices()[:devices],
        placement=placement,
    )


def after_a_step(made, batch):
    states, metrics = made.step(made.init(0), batch)
    rows = [placed.whole(state)[0] for placed, state in zip(made.tables, states, strict=True)]
    return rows, {name: float(value) for name, value in metrics.items()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_a_step_is_the_sum_over_pairs_and_negatives():
    made, batch = program(), a_batch()
    inside, outside = (
        placed.whole(state)[0].astype(np.float64)
        for placed, state in zip(made.tables, made.init(0), strict=True)
    )
    new_in, new_out, losses, pairs = inside.copy(), outside.copy(), 0.0, 0
    for block in range(SHAPE.blocks):
        others = batch["others"][block]
        for at, centre in enumerate(batch["centres"][block]):
            left, right = batch["left"][block, at], batch["right"][block, at]
            here = at + SHAPE.window
            terms = [
                (others[place], 1.0, 1.0)
                for place in range(here - left, here + right + 1)
                if place != here
            ]
            weight = NEGATIVES * (left + right) / SHAPE.shared
            if centre >= 0:
                terms += [(other, 0.0, weight) for other in others[SHAPE.contexts :]]
            for other, label, weight in terms if centre >= 0 else []:
                score = inside[centre] @ outside[other]
                slope = weight * (sigmoid(score) - label)
                new_in[centre] -= 0.1 * slope * outside[other]
                new_out[other] -= 0.1 * slope * inside[centre]
                if block == 0:
                    losses -= weight * np.log(sigmoid(score if label else -score))
            pairs += left + right if block == 0 else 0
    (got_in, got_out), metrics = after_a_step(made, batch)
    np.testing.assert_allclose(got_in, new_in, atol=1e-5)
    np.testing.assert_allclose(got_out, new_out, atol=1e-5)
    assert metrics["weight"] == pairs
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-5)


def test_two_devices_learn_what_one_does():
    batch, rule = a_batch(), RowWiseAdaGrad(0.1)
    one, said = after_a_step(program(rule=rule), batch)
    two, also = after_a_step(program(2, rule), batch)
    for got, want in zip(two, one, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert also["loss"] > said["loss"] > 0, "each device reports on an eighth of its own blocks"


def test_a_grid_of_devices_learns_what_one_does():
    batch = a_batch()
    one, _ = after_a_step(program(), batch)
    four, _ = after_a_step(program(4, placement=Placement(2, 2)), batch)
    for got, want in zip(four, one, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_words_of_a_topic_lie_together():
    random = np.random.default_rng(0)
    text = [random.integers(0, 10, 12) + 10 * (n % 3) for n in range(600)]
    said = []
    found = fit(
        Word2VecOptions(dim=16, window=3, passes=2),
        30,
        text,
        devices=jax.devices()[:1],
        progress=lambda done, steps, loss: said.append((done, steps, loss)),
    )
    topic = np.arange(30) // 10
    for word in range(30):
        assert (topic[found.nearest(word, 5)] == topic[word]).all()
    assert len(found.losses) == 2
    assert found.losses[1] < found.losses[0]
    assert said[-1][0] == pytest.approx(said[-1][1], abs=2)


@pytest.mark.parametrize("text", [[], [[3], [2]]])
def test_text_without_pairs_is_refused(text):
    with pytest.raises(DataError, match="at least two"):
        fit(Word2VecOptions(dim=4), 5, text, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"window": 0}, {"subsample": -1.0}, {"last_rate": 2.0}]
)
def test_options_that_make_no_model_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Word2VecOptions(**wrong)
