"""What model files say of batches that they cannot learn from, before a step is taken."""

from __future__ import annotations

import numpy as np
import pytest

from shardpar.config.schema import ModelConfig
from shardpar.config.tables_model import TablesModel
from shardpar.errors import DataError
from shardpar.ps.options import TableOptions

ONES = np.ones(3, np.float32)


def model(source, **options):
    return TablesModel(ModelConfig(source, tuple(options.items())), TableOptions())


def labelled(*labels, **more):
    return {"labels": np.array(labels, np.float32), "weights": ONES, **more}


@pytest.mark.parametrize("source", ["linear", "fm", "ffm", "wide_deep", "deepfm", "dcn"])
def test_models_of_clicks_take_two_classes_only(source):
    clicks = model(source)
    clicks.require(labelled(0, 1, -1))
    with pytest.raises(DataError, match="a label is 2, and this model tells two classes apart"):
        clicks.require(labelled(0, 1, 2))
    # What has no weight is no sample.
    clicks.require(labelled(0, 1, 2) | {"weights": np.array([1, 1, 0], np.float32)})


def test_a_regression_takes_any_number():
    model("linear", loss="squared").require(labelled(0.3, -5, 7))


def test_classes_are_whole_numbers_below_their_count():
    classes = model("softmax", classes=3)
    classes.require(labelled(0, 1, 2))
    with pytest.raises(DataError, match=r"write model\.classes=4"):
        classes.require(labelled(0, 1, 3))
    for bad in (-1, 0.5, np.inf, np.nan):
        with pytest.raises(DataError, match="classes are whole numbers"):
            classes.require(labelled(0, 1, bad))


def test_fields_beyond_the_model_are_refused():
    fields = model("ffm", fields=4)
    fields.require(labelled(0, 1, 1, fields=np.array([[0, 3]]), values=np.ones((1, 2))))
    with pytest.raises(DataError, match=r"write model\.fields=5"):
        fields.require(labelled(0, 1, 1, fields=np.array([[0, 4]]), values=np.ones((1, 2))))
    # A slot of value 0 has no feature.
    fields.require(labelled(0, 1, 1, fields=np.array([[0, 4]]), values=np.array([[1.0, 0.0]])))
