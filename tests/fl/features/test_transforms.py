"""Transforms fitted over parties against scikit-learn's, fitted to the pooled rows."""

import msgspec
import numpy as np
import pytest
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import KBinsDiscretizer, MinMaxScaler, OneHotEncoder, StandardScaler

from shardpar.errors import DataError, SpecError
from shardpar.fl.features.binning import Binning, equal_frequency, equal_width
from shardpar.fl.features.imputation import Imputation, imputation
from shardpar.fl.features.one_hot import OneHot, one_hot
from shardpar.fl.features.scaling import Scaling, min_max, standard
from shardpar.fl.features.selection import Selection, by_correlation, by_information, by_variance
from shardpar.fl.features.woe import evidence, weight_of_evidence
from shardpar.fl.stats import Ranges, moments, pearson, resolution
from shardpar.fl.sums import Alone
from tests.fl.analysis import together

RANGES = Ranges.of([(-5, 5), (0, 100), (-1, 1), (0, 9)])


def pooled_rows() -> np.ndarray:
    random = np.random.default_rng(0)
    rows = np.stack(
        [
            np.clip(random.normal(0, 1, 600), -5, 5),
            random.exponential(10, 600).clip(0, 100),
            np.full(600, 0.1),
            random.integers(0, 10, 600),
        ],
        axis=1,
    )
    rows[::7, 0] = np.nan
    rows[5, 3] = np.nan
    return rows


ROWS = pooled_rows()
PARTS = [ROWS[:90], ROWS[90:400], ROWS[400:], ROWS[:0]]


def same_after_writing(fitted):
    data = msgspec.msgpack.encode(fitted)
    assert msgspec.msgpack.decode(data, type=type(fitted)) == fitted
    assert msgspec.json.decode(msgspec.json.encode(fitted), type=type(fitted)) == fitted


def test_standard_scaling_is_scikit_learns():
    fitted = together(PARTS, lambda s, rows: standard(s, rows, RANGES))
    expected = StandardScaler().fit_transform(ROWS)
    np.testing.assert_allclose(fitted.apply(ROWS), expected, rtol=1e-6, atol=1e-6)
    same_after_writing(fitted)


def test_min_max_scaling_is_scikit_learns_where_single_rows_may_be_shown():
    fitted = together(PARTS, lambda s, rows: min_max(s, rows, RANGES, minimum=1))
    expected = MinMaxScaler().fit_transform(ROWS)
    # The constant column keeps what its low end is off by.
    np.testing.assert_allclose(fitted.apply(ROWS), expected, atol=1e-7)
    same_after_writing(fitted)


def test_min_max_scaling_shows_no_single_row():
    fitted = together(PARTS, lambda s, rows: min_max(s, rows, RANGES, minimum=10))
    lowest = np.sort(ROWS[:90, 1])[:11].mean(), np.sort(ROWS[90:400, 1])[:10].mean()
    third = np.sort(ROWS[400:, 1])[:10].mean()
    assert fitted.offset[1] == pytest.approx(min(*lowest, third), abs=1e-6)
    assert fitted.offset[1] > np.nanmin(ROWS[:, 1]) + 1e-3
    assert fitted.apply(ROWS)[:, 1].min() < 0


def test_bins_of_equal_width_are_scikit_learns():
    binning = equal_width(RANGES, 5)
    whole = np.vstack([np.nan_to_num(ROWS), RANGES.low, RANGES.high])
    oracle = KBinsDiscretizer(5, encode="ordinal", strategy="uniform").fit(whole)
    np.testing.assert_array_equal(binning.apply(whole), oracle.transform(whole))


@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_bins_of_equal_frequency_are_scikit_learns(column):
    there = ROWS[~np.isnan(ROWS[:, column])][:, [column]]
    parts = np.array_split(there, [100, 300])
    ranges = Ranges.of([(RANGES.low[column], RANGES.high[column])])
    binning = together(parts, lambda s, rows: equal_frequency(s, rows, ranges, 4, minimum=1))
    oracle = KBinsDiscretizer(
        4, encode="ordinal", strategy="quantile", quantile_method="averaged_inverted_cdf"
    ).fit(there)
    edges = oracle.bin_edges_[0][1:-1]
    if column == 2:
        # A constant column: all rows are above the one edge, and in one bin here and there.
        assert set(binning.apply(there).ravel().tolist()) == {1}
        return
    inner = np.array([e for e in binning.edges[0] if e > np.nanmin(there)])
    np.testing.assert_allclose(inner, edges, atol=resolution(ranges)[0])
    drop = len(binning.edges[0]) - len(inner)
    np.testing.assert_array_equal(binning.apply(there) - drop, oracle.transform(there))
    same_after_writing(binning)


def test_bins_of_few_neighbours_have_about_equally_many_rows():
    binning = together(PARTS, lambda s, rows: equal_frequency(s, rows, RANGES, 4, minimum=10))
    counts = np.bincount(binning.apply(ROWS)[:, 1], minlength=6)
    assert counts[5] == counts[4] == 0
    assert (np.abs(counts[:4] - 150) <= 30).all()


@pytest.mark.parametrize(
    ("how", "strategy"), [("mean", "mean"), ("median", "median"), ("mode", "most_frequent")]
)
def test_imputation_is_scikit_learns(how, strategy):
    columns = [3] if how == "mode" else [0, 1, 3]
    parts = [part[:, columns] for part in PARTS]
    ranges = Ranges.of([(RANGES.low[c], RANGES.high[c]) for c in columns])
    fitted = together(parts, lambda s, rows: imputation(s, rows, ranges, how, minimum=1))
    rows = ROWS[:, columns]
    expected = SimpleImputer(strategy=strategy).fit_transform(rows)
    np.testing.assert_allclose(fitted.apply(rows), expected, atol=1e-6)
    same_after_writing(fitted)


def test_imputation_of_what_nobody_has_is_refused():
    rows = np.full((20, 1), np.nan)
    for how in ("mean", "median", "mode"):
        with pytest.raises(DataError, match="column 0 has fewer than 10 values at every party"):
            imputation(Alone(), rows, Ranges.of([(0, 9)]), how)
    with pytest.raises(SpecError, match="use mean, median or mode"):
        imputation(Alone(), rows, Ranges.of([(0, 9)]), "best")
    with pytest.raises(DataError, match="whole numbers"):
        imputation(Alone(), np.full((20, 1), 0.5), Ranges.of([(0, 9)]), "mode")
    with pytest.raises(SpecError, match="candidates"):
        imputation(Alone(), rows, Ranges.of([(0, 1e9)]), "mode")


def test_one_hot_columns_are_scikit_learns():
    random = np.random.default_rng(1)
    rows = random.choice(["red", "green", "blue"], (300, 2), p=[0.5, 0.3, 0.2])
    rows[:4, 0] = "rare"
    vocabulary = ("blue", "green", "never", "rare", "red")
    parts = [rows[:100], rows[100:], rows[:0]]
    fitted = together(parts, lambda s, r: one_hot(s, r, [vocabulary] * 2))
    assert fitted.vocabularies == (("blue", "green", "red"),) * 2
    oracle = OneHotEncoder(
        categories=[list(v) for v in fitted.vocabularies],
        handle_unknown="ignore",
        sparse_output=False,
    ).fit(rows)
    np.testing.assert_array_equal(fitted.apply(rows), oracle.transform(rows))
    same_after_writing(fitted)
    with pytest.raises(SpecError, match="names a category twice"):
        OneHot((("a", "a"),))
    with pytest.raises(DataError, match="vocabularies of 2 columns"):
        fitted.apply(rows[:, :1])


def labelled():
    random = np.random.default_rng(2)
    rows = random.uniform(0, 1, (800, 2))
    rows[::9, 1] = np.nan
    labels = (random.uniform(0, 1, 800) < 0.2 + 0.6 * rows[:, 0]).astype(int)
    return rows, labels


def test_weights_of_evidence_are_those_of_the_pooled_rows():
    rows, labels = labelled()
    binning = equal_width(Ranges.of([(0, 1)] * 2), 4)
    parts = [(rows[:300], labels[:300]), (rows[300:], labels[300:])]
    fitted = together(parts, lambda s, p: weight_of_evidence(s, *p, binning, minimum=1))
    for column in range(2):
        bins = binning.apply(rows)[:, column]
        share = {
            label: np.array([((bins == b) & (labels == label)).sum() for b in range(5)])
            / (labels == label).sum()
            for label in (0, 1)
        }
        there = share[0] > 0
        expected = np.zeros(5)
        expected[there] = np.log(share[1][there] / share[0][there])
        np.testing.assert_allclose(fitted.weights[column], expected, rtol=1e-12)
        value = ((share[1] - share[0]) * expected).sum()
        assert fitted.information[column] == pytest.approx(value)
        np.testing.assert_array_equal(
            fitted.apply(rows)[:, column], np.array(fitted.weights[column])[bins]
        )
    assert fitted.information[0] > 10 * fitted.information[1]
    same_after_writing(fitted)
    assert by_information(fitted, 0.1).columns == (0,)


def test_bins_of_one_label_only_have_finite_weights():
    weights, value = evidence(np.array([5, 0, 3]), np.array([0, 0, 7]))
    assert weights[1] == 0
    assert np.isfinite(weights).all()
    assert np.isfinite(value)
    # What was left out may be many rows: the more, the less is claimed of the bin.
    assert 0 < evidence(np.array([50, 50]), np.array([0, 50]), 5)[0][0] < 3
    with pytest.raises(DataError, match="0 or 1"):
        weight_of_evidence(Alone(), np.zeros((2, 1)), np.array([0, 2]), Binning(((0.5,),)))


def test_selection_is_scikit_learns():
    found = together(PARTS, lambda s, rows: moments(s, rows, RANGES))
    chosen = by_variance(found, 2.0)
    oracle = VarianceThreshold(2.0).fit(ROWS)
    assert chosen.columns == tuple(oracle.get_support(indices=True))
    np.testing.assert_array_equal(chosen.apply(ROWS), oracle.transform(ROWS))
    same_after_writing(chosen)


def test_columns_like_better_ones_are_dropped():
    random = np.random.default_rng(3)
    base = random.uniform(-1, 1, (200, 3))
    rows = np.stack([base[:, 0], 0.99 * base[:, 0], base[:, 1], np.full(200, 0.5)], axis=1)
    ranges = Ranges.of([(-1, 1)] * 4)
    matrix = together(np.array_split(rows, 2), lambda s, part: pearson(s, part, ranges))
    assert by_correlation(matrix, [1, 2, 1, 9], 0.8).columns == (1, 2)
    assert by_correlation(matrix, [1, 1, 1, 9], 0.8).columns == (0, 2)
    assert Selection((2,)).apply(rows).shape == (200, 1)
    with pytest.raises(DataError, match="select columns"):
        Selection((4,)).apply(rows)


def test_rows_of_other_columns_are_refused():
    for fitted in (Scaling((0.0,), (1.0,)), Imputation((0.0,)), Binning(((0.5,),))):
        with pytest.raises(DataError, match="transform of 1 columns"):
            fitted.apply(np.zeros((2, 3)))
    with pytest.raises(SpecError, match="do not rise"):
        Binning(((1.0, 1.0),))
    with pytest.raises(SpecError, match="use 1 or more"):
        equal_width(RANGES, 0)
