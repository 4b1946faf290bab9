"""Whatever is in a file, reading it gives a value or a SpecError, never anything else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import PlanError, SpecError
from shardpar.spec.plan import Plan
from shardpar.spec.text import (
    cluster_from_text,
    cluster_to_text,
    graph_from_text,
    graph_to_text,
    plan_from_text,
    plan_to_text,
)
from tests.spec.values import cluster_of, gpt_like, uniform_plan

GOOD = {
    "plan": plan_to_text(uniform_plan(8, fsdp=("a",), tensor=("b", "c"), recompute="full")),
    "cluster": cluster_to_text(cluster_of()),
    "graph": graph_to_text(gpt_like(blocks=1)),
}
READ = {"plan": plan_from_text, "cluster": cluster_from_text, "graph": graph_from_text}
ERROR = {"plan": PlanError, "cluster": SpecError, "graph": SpecError}

scraps = st.sampled_from(
    [
        *"[]{}:,-?&*!|>'\"%@`#~\n\t ",
        *("!!int ''", "!!float x", "!!timestamp x", "!!bool x", "!!set {a}", "!!omap [a: b]"),
        *(
            "!!binary 'x'",
            "!!null x",
            "!!python/name:os.system",
            "&a [*a]",
            "*a",
            "<<: [1]",
            "<<: {}",
        ),
        *("? [a]\n: b", "1e400", ".inf", ".nan", "0x_", "-1", "2001-99-99", "9" * 400, "9" * 5000),
        *("null", "true", "{}", "[]", "{1: 2}", "[[[[", "\x00", "\ufeff", "\u2028", "é"),
    ]
)


def reads_or_refuses(kind, text):
    message = "file: read"
    try:
        READ[kind](text, "file")
    except ERROR[kind] as error:
        message = str(error)
    assert re.match(r"file( line \d+)?: \S", message)
    return message


@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.lists(scraps).map("".join))
def test_random_text_is_refused(kind, text):
    reads_or_refuses(kind, text)
    reads_or_refuses(kind, GOOD[kind].splitlines()[0] + "\n" + text)


@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(kind, data):
    text = GOOD[kind]
    for _ in range(data.draw(st.integers(1, 3))):
        words = [i for i, c in enumerate(text) if c in " :[{,\n"] or [0]
        start = data.draw(st.integers(0, len(text)) | st.sampled_from(words).map(lambda i: i + 1))
        end = start + data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(scraps | st.just("") | st.text(max_size=3)) + text[end:]
    reads_or_refuses(kind, text)


@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_value_of_another_type_is_read_or_refused(kind, data):
    lines = GOOD[kind].splitlines()
    line = data.draw(st.integers(1, len(lines) - 1))
    key, colon, _ = lines[line].partition(": ")
    lines[line] = key + (colon or ": ") + data.draw(scraps)
    reads_or_refuses(kind, "\n".join(lines))


def test_a_plan_made_of_aliases_and_merges_is_read():
    text = GOOD["plan"].replace("tensor: [b, c]", "tensor: &t [b, c]")
    assert isinstance(plan_from_text(text), Plan)
    merged = GOOD["plan"].replace("recompute: full", "<<: {recompute: full}")
    assert plan_from_text(merged) == plan_from_text(GOOD["plan"])


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "<<: {recompute: 7}",
            "recompute: expected `str`, got `int`; write none, selective or full",
        ),
        ("<<: {recmpute: full}", 'unknown key "recmpute"; did you mean "recompute"?'),
    ],
)
def test_a_fault_behind_a_merge_is_found_too(new, message):
    text = GOOD["plan"].replace("recompute: full", new)
    with pytest.raises(PlanError) as error:
        plan_from_text(text, "p")
    assert message in str(error.value)
    assert str(error.value).startswith("p line 12: ")
