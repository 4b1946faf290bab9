from __future__ import annotations

import pytest

from shardpar.config import load
from shardpar.config.bindings import MacroUse, Place
from shardpar.config.gin_file import parse_gin
from shardpar.errors import ConfigError


def values(text: str) -> dict[str, object]:
    return {b.name: b.value for b in parse_gin(text, "run.gin").bindings}


def test_values_are_pythons_literals():
    text = "a.b = 1_000\na.c = -1e-3\na.d = 'x' \"y\"\na.e = [1, (2,)]\na.f = None\na.g = True"
    assert values(text) == {
        "a.b": 1000, "a.c": -1e-3, "a.d": "xy", "a.e": [1, (2,)], "a.f": None, "a.g": True
    }  # fmt: skip


def test_every_binding_knows_its_line():
    document = parse_gin("# comment\n\na.b = [1,\n  2]\na.c = 3  # more\n", "run.gin")
    assert [b.place for b in document.bindings] == [Place("run.gin", 3), Place("run.gin", 5)]


def test_a_block_sets_several_keys_of_a_section():
    document = parse_gin("train:\n  steps = 5\n  seed = 2\n", "run.gin")
    assert [(b.name, b.value, b.place.line) for b in document.bindings] == [
        ("train.steps", 5, 2),
        ("train.seed", 2, 3),
    ]


def test_macros_stay_symbols_until_all_files_are_read():
    document = parse_gin("N = 3\na.b = [%N]", "run.gin")
    assert document.bindings[0].value == [MacroUse("N")]
    assert [(m.key, m.value) for m in document.macros] == [("N", 3)]


def test_gins_global_registry_is_never_touched(write):
    import gin

    load(write("run.gin", "N = 3\ntrain.seed = %N"))
    assert gin.config_str() == ""


def test_macros_may_use_macros_and_stand_inside_lists(write):
    text = "N = %M\nM = 2\nmodel.source = 'tiny.py'\nmodel.widths = [%N, 1, %M]"
    assert load(write("run.gin", text)).model.get("widths") == (2, 1, 2)


def test_a_file_wins_over_what_it_includes(write):
    write("base/base.gin", "train.steps = 30\ntrain.seed = 1\ninclude_is = 1\nrun = %include_is")
    write("base/base.gin", "train.steps = 30\ntrain.seed = 1")
    config = load(write("run.gin", "include 'base/base.gin'\ntrain.seed = 2"))
    assert (config.train.steps, config.train.seed) == (30, 2)


def test_a_later_include_wins_over_an_earlier_one(write):
    write("a.gin", "train.steps = 30\ntrain.seed = 1")
    write("b.gin", "train.seed = 2")
    config = load(write("run.gin", "include 'a.gin'\ninclude 'b.gin'"))
    assert (config.train.steps, config.train.seed) == (30, 2)


def test_a_file_may_change_a_macro_of_what_it_includes(write):
    write("base.gin", "WIDTH = 64\nmodel.source = 'tiny.py'\nmodel.width = %WIDTH")
    assert load(write("run.gin", "include 'base.gin'\nWIDTH = 128")).model.get("width") == 128


def test_a_macro_counts_as_used_where_its_use_is_overridden(write):
    write("base.gin", "SEED = 3\ntrain.seed = %SEED")
    assert load(write("run.gin", "include 'base.gin'\ntrain.seed = 4")).train.seed == 4


def test_gin_may_include_yaml_and_yaml_gin(write):
    write("a.yaml", "include: b.gin\ntrain: {steps: 30}")
    write("b.gin", "train.seed = 9")
    config = load(write("run.gin", "include 'a.yaml'"))
    assert (config.train.steps, config.train.seed) == (30, 9)


def test_the_same_file_may_be_included_on_two_ways(write):
    write("base.gin", "train.seed = 9")
    write("a.gin", "include 'base.gin'\ntrain.steps = 30")
    write("b.gin", "include 'base.gin'\ntrain.log_every = 5")
    assert load(write("run.gin", "include 'a.gin'\ninclude 'b.gin'")).train.seed == 9


@pytest.mark.parametrize("text", ["train.steps = (", "train:", "a.b = [1,", "x = '''", "a.b = ["])
def test_a_file_that_ends_too_early_is_not_taken_for_its_beginning(text):
    with pytest.raises(ConfigError, match=r"run\.gin"):
        parse_gin("train.seed = 1\n" + text, "run.gin")
