from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shardpar.config import RunConfig, bundled_configs, load, to_gin, to_yaml
from shardpar.config.load import load_any
from shardpar.config.rules import check
from shardpar.config.schema import field_hints, section_classes
from shardpar.config.values import alternatives

WRITERS = {"saved.gin": to_gin, "saved.yaml": to_yaml}


@pytest.mark.parametrize("saved", WRITERS)
@pytest.mark.parametrize("name", bundled_configs())
def test_what_is_saved_loads_to_the_same_config(write, name, saved):
    config = load_any(name)
    assert load_any(write(saved, WRITERS[saved](config))) == config


@pytest.mark.parametrize("saved", WRITERS)
def test_what_is_saved_names_every_key(saved):
    config = load()
    text = WRITERS[saved](config)
    for section in fields(config):
        keys = (
            ["source", *dict(config.model.options)]
            if section.name == "model"
            else [field.name for field in fields(getattr(config, section.name))]
        )
        for key in keys:
            assert (f"{section.name}.{key} = " if saved.endswith("gin") else f"\n  {key}: ") in text


@pytest.mark.parametrize("saved", WRITERS)
def test_what_is_saved_says_how_to_train_from_it(saved):
    assert f"shardpar train FILE.{saved.split('.')[1]}" in WRITERS[saved](load())


@pytest.mark.parametrize("saved", WRITERS)
def test_a_saved_config_can_be_moved_and_changed(folder, write, saved):
    write("a.txt", "a")
    text = "model: {source: tiny.py, widths: [3]}\ndata: {source: text, path: '*.txt'}"
    config = load(write("run.yaml", text))
    moved = write(f"else/where/{saved}", WRITERS[saved](config))
    assert load(moved) == config
    assert config.model.source == str(folder / "tiny.py")
    assert load(moved, ["train.steps=3"]) == replace(config, train=replace(config.train, steps=3))


@pytest.mark.parametrize("saved", WRITERS)
def test_a_schedule_of_plans_is_found_from_anywhere(folder, write, saved):
    write("plans/one.yaml", "")
    write("plans/two.yaml", "")
    text = "train: {plan_schedule: [plans/one.yaml, plans/two.yaml], switch_every: 5}"
    config = load(write("run.yaml", text))
    assert config.train.plan_schedule == tuple(
        str(folder / "plans" / name) for name in ("one.yaml", "two.yaml")
    )
    assert load(write(f"else/where/{saved}", WRITERS[saved](config))) == config


def any_value(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a type hint allows."""
    if len(alternatives(hint)) > 1:
        return st.one_of(*(any_value(part) for part in alternatives(hint)))
    if get_origin(hint) is tuple:
        return st.lists(any_value(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) is Annotated:
        base, meta = hint.__origin__, hint.__metadata__[0]
        low = meta.ge if meta.ge is not None else meta.gt
        high = meta.le if meta.le is not None else meta.lt
        if base is int:
            return st.integers(low, high if high is not None else 2**63 - 1)
        return st.floats(
            low, high, exclude_min=meta.gt is not None, exclude_max=meta.lt is not None,
            allow_nan=False, allow_infinity=False,
        )  # fmt: skip
    text = st.text().filter(lambda text: text.lower() not in ("none", "null", "~"))
    return {bool: st.booleans(), str: text, type(None): st.none()}[hint]


HINTS = {
    (name, key): hint
    for name, cls in section_classes().items()
    for key, hint in field_hints(cls).items()
    if f"{name}.{key}" not in (
        "data.path", "plan.file", "plan.cluster", "train.plan_schedule", "buckets.plans",
    )
}  # fmt: skip
"""All but the paths, which must lead somewhere."""


@st.composite
def any_config(draw: st.DrawFn) -> RunConfig:
    """The demo with a few keys changed at random."""
    config = load()
    for name, key in draw(st.sets(st.sampled_from(sorted(HINTS)), max_size=5)):
        section = replace(getattr(config, name), **{key: draw(any_value(HINTS[name, key]))})
        config = replace(config, **{name: section})
    return config


@pytest.mark.parametrize("saved", WRITERS)
@given(config=any_config())
@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_possible_config_survives_being_saved(write, saved, config):
    assume(not check(config))
    assert load(write(saved, WRITERS[saved](config))) == config
