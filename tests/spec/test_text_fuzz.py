"""Whatever is in a file, reading it gives a value or a SpecError, never anything else."""

from __future__ import annotations

import random
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
from tests.spec.text_fuzz import KINDS, case, cluster_is_planned_for, plan_is_checked
from tests.spec.text_fuzz import reads_or_refuses as reads_back_or_refuses
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


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_back_equal_and_used_or_refused(name):
    # The short form of `python -m benchmarks.text_fuzz`.
    for number in range(300):
        value = reads_back_or_refuses(name, case(name, random.Random(f"test {name} {number}")))
        if name == "plan" and value is not None:
            plan_is_checked(value)
        if name == "cluster" and value is not None and value.num_devices <= 4 and number % 9 == 0:
            cluster_is_planned_for(value)


# What the fuzzer found: other errors, waits without end, values unequal to themselves. And two
# things that mending these could have broken: merged keys, and the wrong one of many kinds.

PLAN = GOOD["plan"]
CLUSTER = GOOD["cluster"]
KIND = CLUSTER[CLUSTER.index("  x:") : CLUSTER.index("hosts:")]


def refused(kind, text):
    message = reads_or_refuses(kind, text)
    assert message != "file: read"
    assert message.isprintable()
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(
    "lines",
    [
        "x0: &x0 [a]\n" + "\n".join(f"x{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)),
        "x0: &x0 {a: 1}\n"
        + "\n".join(f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}" for i in range(1, 40)),
    ],
    ids=["lists", "merges"],
)
def test_a_few_aliases_that_stand_for_more_than_there_is_memory_are_refused(lines):
    message = refused("plan", PLAN + lines)
    assert re.fullmatch(
        r"file line \d+: not YAML: more than 40,000 entries, aliases written out", message
    )


def test_an_alias_inside_what_it_stands_for_is_refused():
    text = PLAN.replace("devices: [0", "devices: &a [*a, 0")
    assert refused("plan", text) == 'file line 9: not YAML: alias "a" stands inside itself'


def test_more_devices_than_any_cluster_has_are_refused_before_they_are_read():
    text = PLAN.replace("devices: [0", f"devices: [{', '.join(map(str, range(10**6)))}")
    assert re.fullmatch(
        r"file: [\d,]+ characters; a file may have 500,000: is it the right one\?",
        refused("plan", text),
    )
    text = PLAN.replace("devices: [0", "devices: [" + "0," * 200_000)
    assert "line 9: not YAML: more than 40,000 entries" in refused("plan", text)


def test_a_plan_for_the_largest_cluster_is_read():
    text = PLAN.replace("devices: [0", f"devices: [{', '.join(map(str, range(8, 2**15)))}, 0")
    text = text.replace("mesh: {a: 2, b: 2, c: 2}", "mesh: {a: 8192, b: 2, c: 2}")
    assert len(plan_from_text(text).devices) == 2**15


@pytest.mark.parametrize("old", ["global_batch: 8", "format: shardpar-plan/1", "c: 2"])
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "1" + "0" * 300, "1" + "_0" * 5000])
def test_a_number_too_long_to_be_printed_is_refused_with_its_line(old, number):
    assert old in PLAN
    line = PLAN[: PLAN.index(old)].count("\n") + 1
    message = refused("plan", PLAN.replace(old, f"{old.partition(':')[0]}: {number}"))
    assert message.startswith(f"file line {line}: not YAML: ")


def test_a_mesh_whose_size_is_too_long_to_be_printed_is_refused():
    axes = ", ".join(f"a{i}: {2**62}" for i in range(60))
    message = refused("plan", PLAN.replace("a: 2, b: 2, c: 2", f"a: 2, b: 2, c: 2, {axes}"))
    assert message.startswith("file line 9: pipelines[0].stages[0]: a stage has 8 devices but its")
    axes = ", ".join(f"a{i}: {2**62}" for i in range(6000))
    message = refused("plan", PLAN.replace("a: 2, b: 2, c: 2", f"a: 2, b: 2, c: 2, {axes}"))
    assert message == "file line 10: pipelines[0].stages[0].mesh: expected `object` of length <= 64"


def test_an_escape_of_no_character_is_refused():
    for escape in ("\\UFFFFFFFF", "\\U00110000"):
        text = PLAN.replace("cluster: hand", f'cluster: "{escape}"')
        assert refused("plan", text).startswith("file line 2: not YAML: ")


def test_half_of_a_surrogate_pair_is_refused():
    text = CLUSTER.replace("name: x", 'name: "\\ud800"')
    assert refused("cluster", text) == (
        "file line 2: not YAML: half of a surrogate pair, which is no character"
    )


@pytest.mark.parametrize("figure", [".nan", ".inf", "-1.0"])
def test_a_prediction_that_no_step_can_take_is_refused(figure):
    objective = f"objective: {{step_s: {figure}, lower_bound_s: 1, search_s: 1}}\n"
    text = PLAN.replace("global_batch", objective + "global_batch")
    assert refused("plan", text).startswith("file line 3: objective.step_s: expected `float` ")
    text = PLAN.replace("    layers:\n", f"    peak_bytes: {figure}\n    layers:\n")
    message = refused("plan", text)
    assert message.startswith("file line 11: pipelines[0].stages[0].peak_bytes: expected `float` ")


def test_a_device_of_two_stages_is_told_with_both():
    stage = PLAN[PLAN.index("  - devices") :]
    assert refused("plan", PLAN + stage) == (
        "file line 13: pipelines[0].stages[1].devices[0]: device 0 belongs to "
        "pipelines[0].stages[0] too; each device has one stage"
    )


def test_thousands_of_devices_in_two_stages_are_refused_without_comparing_each_with_each():
    stage = PLAN[PLAN.index("  - devices") :].replace("{a: 2, b: 2, c: 2}", "{a: 12000}")
    stage = stage.replace("fsdp: [a], tensor: [b, c]", "").replace("tensor: [b, c], fsdp: [a],", "")
    stage = re.sub(r"devices: \[.*?\]", f"devices: {list(range(12000))}", stage)
    text = PLAN[: PLAN.index("  - devices")] + stage + stage
    assert "device 0 belongs to pipelines[0].stages[0] too" in refused("plan", text)


def test_thousands_of_axes_of_a_layer_are_refused_without_comparing_each_with_each():
    axes = [f"x{i}" for i in range(10_000)]
    text = PLAN.replace("tensor: [b, c]", f"tensor: {axes}, context: {axes}".replace("'", ""))
    message = refused("plan", text)
    assert message.endswith("layers[0].tensor: expected `array` of length <= 64")


def test_the_wrong_one_of_thousands_of_kinds_is_found():
    kinds = "".join(KIND.replace("  x:", f"  x{i}:") for i in range(2000))
    wrong = KIND.replace("  x:", "  y:").replace("note: ''", "note: 7")
    message = refused("cluster", CLUSTER.replace("hosts:", kinds + wrong + "hosts:"))
    assert message.endswith("kinds.y.note: expected `str`, got `int`")


def test_a_key_of_a_merged_mapping_is_not_given_twice():
    # `late` is built after the mapping it is merged into, being deeper in the file.
    deep = "[[&late {<<: {recompute: none}, recompute: full}]]"
    text = PLAN.replace("recompute: full", "<<: *late").replace(
        "- sequences", f"- deep: {deep}\n  sequences"
    )
    message = refused("plan", text)
    assert message.startswith('file line 5: pipelines[0]: unknown key "deep"')


def test_a_long_text_with_breaks_makes_one_paragraph():
    name = "\\n" * 5000
    message = refused("cluster", CLUSTER.replace("kind: x", f'kind: "{name}"'))
    assert "hosts[0].kind is" in message
    assert " … " in message


@pytest.mark.parametrize("value", ["[" * 60, "{a: " * 60, "- " * 60])
def test_deep_nesting_is_refused_at_one_depth_wherever_it_is_read_from(value):
    text = f"format: shardpar-plan/1\nx:\n  {value}"
    assert refused("plan", text) == "file line 3: not YAML: nested more than 50 deep"


@pytest.mark.parametrize("rate", ["1e-300", "1e300"])
def test_a_rate_at_which_prices_overflow_is_refused(rate):
    text = re.sub("memory_bandwidth: .*", f"memory_bandwidth: {rate}", CLUSTER)
    assert "kinds.x.memory_bandwidth is" in refused("cluster", text)


def test_more_devices_than_memory_can_list_are_refused():
    text = CLUSTER.replace("devices: 8", "devices: 1000000000000")
    assert "hosts have 1,000,000,000,000 devices in all" in refused("cluster", text)
