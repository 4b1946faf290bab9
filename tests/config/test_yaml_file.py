from __future__ import annotations

import math

import pytest

from shardpar.config.bindings import Place
from shardpar.config.yaml_file import parse_value, parse_yaml
from shardpar.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1e3", 1000.0), ("1_000", 1000), ("-7", -7), ("+7", 7), (".5", 0.5),
        ("5.", 5.0), ("0x10", 16), ("true", True), ("False", False), ("null", None), ("~", None),
        ("yes", "yes"), ("off", "off"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("010", "010"), ("e3", "e3"), ("1_", "1_"), ("None", "None"), ("'5'", "5"),
        ("[1, [a, null]]", [1, ["a", None]]), ("{a: 1}", {"a": 1}), (".inf", math.inf),
    ],
)  # fmt: skip
def test_scalars_mean_what_they_look_like(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_every_binding_knows_its_line():
    document = parse_yaml("# comment\ntrain:\n  steps: 5\n\n  seed: 6\n", "run.yaml")
    assert [(b.name, b.place) for b in document.bindings] == [
        ("train.steps", Place("run.yaml", 3)),
        ("train.seed", Place("run.yaml", 5)),
    ]


def test_dotted_keys_are_the_same_keys():
    nested = parse_yaml("train: {steps: 5}", "run.yaml")
    dotted = parse_yaml("train.steps: 5", "run.yaml")
    assert nested == dotted


def test_dotted_and_nested_spelling_of_one_key_collide():
    document = parse_yaml("train: {steps: 5}\ntrain.steps: 6", "run.yaml")
    assert document.problems == (
        "run.yaml:2: train.steps is set a second time (first in line 1); keep one of the two",
    )


def test_an_empty_section_sets_nothing():
    assert parse_yaml("train:\ndata: {}", "run.yaml").bindings == ()


def test_an_anchor_may_repeat_a_scalar():
    document = parse_yaml("train: {steps: &n 5, seed: *n}", "run.yaml")
    assert [b.value for b in document.bindings] == [5, 5]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: {b: &x [1, 1], c: &y [*x, *x], d: &z [*y, *y], e: [*z, *z]}",
    ],
)
def test_an_anchor_may_not_repeat_a_container(text):
    problem = parse_yaml(text, "run.yaml").problems[0]
    assert problem.endswith("an alias may stand for a single value, not for a list or mapping")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: 'b",
        "a: b: c",
        "\tx: 1",
        "a: 1\n---\nb: 2",
        '"\\UFFFFFFFF": 1',
        "\x00",
        "- a",
    ],
)
def test_what_is_not_a_yaml_mapping_is_a_config_error(text):
    with pytest.raises(ConfigError, match=r"^run\.yaml"):
        parse_yaml(text, "run.yaml")
