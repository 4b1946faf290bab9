"""`shardpar fl vertical`: what is refused before anyone is dialled; the page tests the rest."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from shardpar.cli.main import app
from shardpar.errors import ConfigError, DataError, UserError

TRAIN = ["fl", "vertical", "train", "t.csv", "--party", "a", "--keys", "keys"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([*TRAIN, "--peer", "b", "epoch=5"], ConfigError, "'epoch=5' is no option of logistic"),
        ([*TRAIN, "--peer", "b", "epochs=many"], ConfigError, "options of logistic: .*epochs"),
        ([*TRAIN, "--peer", "b", "feature_bits=40"], ConfigError, "feature_bits"),
        ([*TRAIN, "--peer", "b", "--model", "trees", "epochs=5"], ConfigError, "max_depth"),
        ([*TRAIN, "--peer", "b", "--key-bits", "1024"], ConfigError, "use 2048"),
        ([*TRAIN, "--peer", "b"], UserError, "one party listens"),
        ([*TRAIN, "--peer", "b=h:1", "--listen", "h:2"], UserError, "not both"),
        ([*TRAIN, "--peer", "b=h:1", "--label", "y"], DataError, "no column 'y'"),
        (
            ["fl", "vertical", "predict", "t.csv", "--half", "t.csv", *TRAIN[4:], "--peer", "b"],
            DataError,
            "no half of a vertical model",
        ),
    ],
)
def test_wrong_input_is_told_before_anyone_is_dialled(
    tmp_path, monkeypatch, arguments, error, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("id,x\n1,2\n")
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, error), done.exception
    with pytest.raises(error, match=words):
        raise done.exception


def test_help_teaches_the_order():
    text = CliRunner().invoke(app, ["fl", "vertical", "--help"]).output
    assert text.index("rehearse") < text.index("keys") < text.index("predict")
