"""Weights of evidence of columns here and labels there are those of one party that has both."""

import numpy as np
import pytest

from shardpar.errors import PartyError
from shardpar.fl.features.binning import Binning, equal_width
from shardpar.fl.features.vertical_woe import BinSums, BinWeights, column_party, label_party
from shardpar.fl.features.woe import weight_of_evidence
from shardpar.fl.he import okamoto_uchiyama, paillier
from shardpar.fl.messages import Tensor, tensor_of
from shardpar.fl.stats import Ranges
from shardpar.fl.sums import Alone
from tests.fl.intersections import blames, in_threads

RANGES = Ranges.of([(0, 1)] * 2)


@pytest.fixture(scope="module")
def secret():
    return paillier.generate(2048)


def rows_and_labels(count=150):
    random = np.random.default_rng(0)
    rows = random.uniform(0, 1, (count, 2))
    rows[::9, 1] = np.nan
    return rows, (random.uniform(0, 1, count) < 0.2 + 0.6 * rows[:, 0]).astype(int)


def run(secret, rows, labels, binning, change=None, **options):
    """What both parties return; `change` sees every message that the column party sends."""

    def columns(end):
        send = end.send
        if change is not None:
            end.send = lambda to, topic, message: send(to, topic, change(message))
        return column_party(end, "labels", rows, binning, **options)

    trusted = {"trusted": True} if "scheme" in options else {}
    minimum = {k: v for k, v in options.items() if k == "minimum"}
    return in_threads(
        {
            "labels": lambda end: label_party(end, "columns", labels, secret, **trusted, **minimum),
            "columns": columns,
        }
    )


@pytest.mark.parametrize("minimum", [1, 5])
def test_they_are_those_of_one_party_that_has_all(secret, minimum):
    rows, labels = rows_and_labels()
    binning = Binning(((0.02, 0.25, 0.5), (0.5, 0.99)))
    found = run(secret, rows, labels, binning, minimum=minimum)
    if minimum == 1:
        pooled = weight_of_evidence(Alone(), rows, labels, binning, minimum=1)
        assert found["columns"] == pooled
    assert found["labels"] == found["columns"].information
    counts = np.bincount(binning.apply(rows)[:, 0], minlength=5)
    assert 0 < counts[0] < 5
    assert (found["columns"].weights[0][0] == 0) == (minimum == 5)


def test_okamoto_uchiyama_gives_the_same():
    rows, labels = rows_and_labels(80)
    binning = equal_width(RANGES, 3)
    secret = okamoto_uchiyama.generate(2048)
    found = run(secret, rows, labels, binning, scheme="okamoto-uchiyama", minimum=1)
    assert found["columns"] == weight_of_evidence(Alone(), rows, labels, binning, minimum=1)


def test_labels_of_other_rows_are_refused(secret):
    rows, labels = rows_and_labels(40)
    found = run(secret, rows, labels[:39], equal_width(RANGES, 2))
    assert "labels of 39 rows, here are 40" in blames(found["columns"])


def changed(**fields):
    def change(message):
        if not isinstance(message, BinSums):
            return message
        whole = {name: getattr(message, name) for name in ("sizes", "counts", "ones")}
        return BinSums(**(whole | {n: f(whole[n]) for n, f in fields.items()}))

    return change


def counts(*numbers):
    return lambda _: tensor_of(np.array(numbers, np.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(sizes=lambda s: (3,)), "counts of other bins"),
        (changed(sizes=lambda s: (5, -1)), "counts of other bins"),
        (changed(sizes=lambda s: ()), "counts of other bins"),
        (changed(counts=lambda t: Tensor("int32", t.shape, t.data[: len(t.data) // 2])), "other"),
        (changed(counts=counts(40, 3, 40, 0)), "a bin of fewer than 10"),
        (changed(counts=counts(40, -3, 40, 0)), "a bin of fewer than 10"),
        (changed(counts=counts(41, 0, 40, 0)), "more than 40 rows"),
        (changed(counts=counts(0, 0, 0, 0)), "more labels than rows"),
        (changed(ones=lambda m: type(m)(m.key, 1, m.width_bytes, bytes(m.width_bytes))), "no cip"),
        (changed(ones=lambda m: type(m)(bytes(16), m.count, m.width_bytes, m.data)), "another key"),
    ],
)
def test_sums_that_cannot_be_are_refused(secret, change, message):
    rows, labels = rows_and_labels(40)
    found = run(secret, rows, labels, Binning(((), ())), change)
    assert message in blames(found["labels"])


def test_sums_of_more_labels_than_there_are_are_noticed(secret):
    rows, labels = rows_and_labels(40)

    def change(message):
        if not isinstance(message, BinSums):
            return message
        forged = secret.public.encrypt([1 << 1000]).to_message()
        return BinSums(message.sizes, message.counts, forged)

    found = run(secret, rows, labels, Binning(((), ())), change)
    assert "more labels than there are" in blames(found["labels"])


def test_what_the_label_party_gets_does_not_show_how_it_was_made(secret):
    rows, labels = rows_and_labels(40)
    sent = []

    def change(message):
        sent.append(message)
        return message

    run(secret, rows, labels, Binning(((), ())), change)
    run(secret, rows, labels, Binning(((), ())), change)
    sums = [m for m in sent if isinstance(m, BinSums)]
    assert len(sums) == 2
    assert sums[0].counts == sums[1].counts
    assert sums[0].ones.data != sums[1].ones.data


def test_weights_that_cannot_be_are_refused(secret):
    rows, labels = rows_and_labels(40)

    def weights(end, numbers):
        send = end.send

        def other(to, topic, message):
            if isinstance(message, BinWeights):
                message = BinWeights(tensor_of(np.array(numbers)), message.information)
            send(to, topic, message)

        end.send = other
        return label_party(end, "columns", labels, secret)

    for numbers in ([1.0], [np.nan] * 4):
        found = in_threads(
            {
                "labels": lambda end, n=numbers: weights(end, n),
                "columns": lambda end: column_party(end, "labels", rows, Binning(((), ()))),
            }
        )
        assert isinstance(found["columns"], PartyError)
        assert "weights of other bins" in str(found["columns"])
