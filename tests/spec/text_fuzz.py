"""Damaged plans, clusters and profiles, and what must hold of reading each.

A case starts from a file that people use, or from a value hypothesis built, and is damaged in its
structure, in its text, or both; a few are bombs, small files that stand for a great deal. Reading
one gives a value that reads back equal and that the rest of the program can be given, or an error
of ours in one paragraph that says where. All follows from a seed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings

from shardpar.errors import ShardparError, SpecError
from shardpar.planner.cost import plan_cost
from shardpar.planner.options import SearchOptions
from shardpar.planner.search import search
from shardpar.planner.setting import Workload
from shardpar.planner.simulate import simulate
from shardpar.spec.check import check
from shardpar.spec.profile_text import (
    hardware_from_text,
    hardware_to_text,
    model_from_text,
    model_to_text,
)
from shardpar.spec.text import (
    cluster_from_text,
    cluster_to_text,
    plan_from_text,
    plan_to_text,
)
from tests.planner.cases import ADAM, cluster_of, gpt
from tests.spec.test_profile import HARDWARE, MODEL, models, profiles
from tests.spec.values import clusters, gpt_like, plans

ROOT = Path(__file__).parents[2]
LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Kind:
    """A kind of file: how it is read and written, and good ones to start from."""

    read: Callable[[str, str], Any]
    write: Callable[[Any], str]
    files: tuple[str, ...]
    values: Any


def _texts(folder: str, pattern: str) -> tuple[str, ...]:
    return tuple(path.read_text() for path in sorted((ROOT / folder).glob(pattern)))


KINDS = {
    "plan": Kind(plan_from_text, plan_to_text, _texts("tests/golden", "*plan*.txt"), plans()),
    "cluster": Kind(
        cluster_from_text, cluster_to_text, _texts("configs/clusters", "*.yaml"), clusters()
    ),
    "hardware": Kind(hardware_from_text, hardware_to_text, (HARDWARE,), profiles),
    "model": Kind(model_from_text, model_to_text, (MODEL,), models),
}


@functools.cache
def built(name: str) -> tuple[str, ...]:
    """Texts of values that hypothesis builds, the same ones each time."""
    kind, texts = KINDS[name], []

    @settings(
        max_examples=150, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(kind.values)
    def collect(value: Any) -> None:
        texts.append(kind.write(value))

    collect()
    return tuple(sorted(set(texts)))


# Values that stand where others should.

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 8, 10**9, -(10**9), 2**31, 2**53, 2**63, -(2**63) - 1, 10**30, 10**400, 0.0,
    -0.0, 0.5, -1.5, 1e-300, 5e-324, 1e300, 1.7e308, float("inf"), float("-inf"), float("nan"),
    True,
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "a", "b", "no", "1e5", "1:30", "2001-99-99", "0x" + "f" * 5000, "9" * 5000, "é",
    "\u2028", "\ufeff", "\x85", "\x07", "\x00", "a\nb", "🚀", "*a", "&a", "!!int x", "<<", "=", "%",
    "@", "h100", "datasheet", "full", "none", "float32", "embed", "head", "outside",
    "embed..outside", "outside..embed", "blocks", "blocks[0]", "blocks[0:2]", "blocks[0:999999999]",
    "blocks[99999999999999]", "blocks[:]", "blocks[2:1]", "blocks[-1]", "..", "....", "[", "[[0]]",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, [], {}, [[]], {"a": {}}, [None], {"a": 10**9}, {"a": 2, "b": 4})
SCRAPS = (
    *"[]{}:,-?&*!|>'\"%@`#~\n\t ", "\x00", "\x07", "\ufeff", "\u2028", "é", "\ud7ff", "\r",
    "!!int ''", "!!float x", "!!timestamp x", "!!set {a}", "!!omap [a: b]", "!!binary 'x'",
    "!!pairs [a: b]", "!!python/name:os.system", "&a [*a]", "*a", "<<: [1]", "<<: *a", "&a ",
    "? [a]\n: b", "1e400", ".inf", "-.inf", ".nan", "0x_", "0b", "190:20:30", "9" * 400,
    '"\\ud800"', '"\\UFFFFFFFF"', '"\\0"', "---", "...", "- - - -", "\n\n", "  ", "'''",
)  # fmt: skip


def value(rng: random.Random) -> Any:
    """Something that does not belong where it is put."""
    choice = rng.random()
    if choice < 0.45:
        return rng.choice(NUMBERS)
    if choice < 0.75:
        return rng.choice(TEXTS)
    if choice < 0.9:
        return copy.deepcopy(rng.choice(OTHERS))
    if choice < 0.94:
        return rng.choice("ab é\n🚀") * rng.choice((100, 1000, 20_000))
    if choice < 0.97:
        return _nested(rng.choice((5, 30, 60, 120)), rng.random() < 0.5)
    return list(range(rng.choice((10, 100, 2000))))


def _nested(depth: int, as_list: bool) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner] if as_list else {"a": inner}
    return inner


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside a document."""
    found: list[tuple[Any, Any]] = []
    todo = [document]
    while todo:
        at = todo.pop()
        inside = list(at) if isinstance(at, dict) else range(len(at))
        for key in inside:
            found.append((at, key))
            if isinstance(at[key], dict | list):
                todo.append(at[key])
    return found


def change(document: Any, rng: random.Random) -> None:
    """Deletes, doubles, swaps, renames or replaces one thing in a document."""
    at, key = rng.choice(_places(document) or [({"a": 1}, "a")])
    match rng.randrange(8):
        case 0:
            del at[key]
        case 1 if isinstance(at, list):
            at.insert(rng.randrange(len(at) + 1), copy.deepcopy(at[key]))
        case 2:
            other, place = rng.choice(_places(document))
            at[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(at[key])
        case 3 if isinstance(at, dict):
            word = str(key)
            cut = rng.randrange(len(word) + 1)
            new = rng.choice((word[:cut] + word[cut + 1 :], word + "s", rng.choice(TEXTS), 1, None))
            at[new] = at.pop(key)
        case 4 if isinstance(at, dict):
            at[rng.choice((*TEXTS, 1, 1.5, True, None))] = value(rng)
        case 5 if isinstance(at[key], int | float) and not isinstance(at[key], bool):
            factor = rng.choice((0, -1, 2, 0.5, 3, 1e3, 1e-3, 10**9, 1e300))
            at[key] = at[key] * factor if abs(at[key]) < 1e300 else 0
        case 6:
            at[key] = [at[key]] if rng.random() < 0.5 else {"a": at[key]}
        case _:
            at[key] = value(rng)


def nudge(document: Any, rng: random.Random) -> None:
    """Puts something of the right type in the place of a number, a word or a list of words."""
    places = [(at, key) for at, key in _places(document) if not isinstance(at[key], dict)]
    at, key = rng.choice(places)
    old = at[key]
    if isinstance(old, bool) or old is None:
        at[key] = not old
    elif isinstance(old, int):
        at[key] = rng.choice((1, 2, 3, 4, old + 1, old * 2, old // 2))
    elif isinstance(old, float):
        at[key] = old * 10 ** rng.uniform(-12, 12)
    elif isinstance(old, str):
        words = [a[k] for a, k in places if isinstance(a[k], str)]
        at[key] = rng.choice((*words, *TEXTS[-18:]))
    else:
        rng.shuffle(old)
        del old[rng.randrange(len(old) + 1) :]


def damage(text: str, rng: random.Random) -> str:
    """Cuts, doubles, moves or overwrites a piece of text."""
    lines = text.split("\n")
    line = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            return text[: rng.randrange(len(text) + 1)]
        case 1:
            lines.insert(line, lines[line])
        case 2:
            del lines[line]
        case 3:
            other = rng.randrange(len(lines))
            lines[line], lines[other] = lines[other], lines[line]
        case 4:
            lines[line] = " " * rng.randrange(1, 5) + lines[line]
        case 5:
            lines[line] = lines[line].removeprefix(" ")
        case 6:
            head, colon, _ = lines[line].partition(": ")
            lines[line] = head + (colon or ": ") + rng.choice(SCRAPS)
        case _:
            start = rng.randrange(len(text) + 1)
            return text[:start] + rng.choice(SCRAPS) + text[start + rng.randrange(6) :]
    return "\n".join(lines)


def bomb(text: str, rng: random.Random) -> str:
    """A good file with something in it that stands for far more than it should."""
    count = int(10 ** rng.uniform(1, 5.5))
    steps = rng.randrange(2, 60)
    laughs = "\n".join(
        f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9) if i else 'lol'}]" for i in range(steps)
    )
    merges = "\n".join(
        f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" if i else "m0: &m0 {a: 1}"
        for i in range(steps)
    )
    long = rng.choice(("x", "é", "🚀", "x ", '\\"', "[0]", "..")) * count
    one = ", ".join(["0"] * count)
    more = rng.choice(
        (
            laughs,
            merges,
            "x: &x {y: *x}",
            "x: &x [*x, *x]",
            "x: " + "[" * count,
            "x: " + "{a: " * count,
            "x: " + "- " * min(count, 50_000),
            "\n".join(" " * i + "x:" for i in range(min(count, 700))),
            "{" + ", ".join(f"k{i}" for i in range(count)) + "}",
            "\n".join(f"k{i}: 1" for i in range(count)),
            f'x: "{long}"',
            f"{long}: 1",
            f"? {long}",
            "x: |\n  " + long,
            "x: !!int 0x" + "f" * count,
            "x: " + "1:" * count + "1",
            "x: " + "1_" * count + "1",
            f"x: [{one}]",
            "# " + long,
            "x: &" + "a" * count,
            "%TAG ! tag:" + "a" * count,
        )
    )
    place = rng.randrange(4)
    if place == 0:
        return text + "\n" + more
    if place == 1:
        return more + "\n" + text
    listed = re.sub(r"devices: \[.*?\]", lambda _: f"devices: [{one}]", text)
    numbered = re.sub(
        r"devices: \[.*?\]", lambda _: f"devices: [{', '.join(map(str, range(count)))}]", text
    )
    axes = re.sub(
        r"mesh: \{.*?\}",
        lambda _: "mesh: {" + ", ".join(f"a{i}: 2" for i in range(count)) + "}",
        text,
    )
    sized = re.sub(r"mesh: \{.*?\}", lambda _: f"mesh: {{a: {count}}}", numbered)
    used = re.sub(
        r"(layers: [^,}]*)\}",
        lambda m: f"{m[1]}, context: [{', '.join(f'c{i}' for i in range(count))}]}}",
        text,
    )
    hosts = re.sub(r"(devices|count): \d+", lambda m: f"{m[1]}: {10 ** rng.randrange(1, 19)}", text)
    kinds = text.replace(
        "hosts:",
        "\n".join(f"  k{i}: {rng.choice((1, '{}'))}" for i in range(min(count, 20_000)))
        + "\nhosts:",
    )
    value_long = re.sub(r": [\w.-]+$", lambda _: f': "{long}"', text, count=1, flags=re.MULTILINE)
    return rng.choice((listed, numbered, axes, sized, used, hosts, kinds, value_long))


def case(name: str, rng: random.Random) -> str:
    """One damaged file of a kind."""
    kind = KINDS[name]
    source = rng.choice(kind.files if rng.random() < 0.7 else built(name))
    choice = rng.random()
    if choice < 0.004:
        return bomb(source, rng)
    if choice < 0.75:
        document = yaml.safe_load(source)
        if name == "cluster" and rng.random() < 0.5:
            for hosts in document["hosts"]:  # few enough devices to plan for
                hosts.update(devices=rng.randrange(1, 4), count=rng.randrange(1, 3))
        edit = nudge if choice > 0.4 else change
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            edit(document, rng)
        # Now and then with anchors and aliases, as pieces that were doubled are one object.
        style = {
            "allow_unicode": rng.random() < 0.5,
            "default_flow_style": rng.choice((None, True, False)),
        }
        with contextlib.suppress(RecursionError):  # PyYAML cannot write what is nested that deep
            source = yaml.safe_dump(document, sort_keys=False, **style)
        if choice > 0.1:
            return source
    for _ in range(rng.choice((1, 1, 2, 3))):
        source = damage(source, rng)
    return source


def reads_or_refuses(name: str, text: str) -> Any:
    """The value, having been written and read again; None where the text was refused."""
    kind = KINDS[name]
    try:
        found = kind.read(text, "file")
    except SpecError as error:
        message = str(error)
    else:
        message = ""
    if message:
        in_one_paragraph(message)
        # Where: a line, or the file as a whole.
        assert re.match(r"file( line \d+: |: (not YAML|format|expected keys|\d))", message), message
        return None
    again = kind.write(found)
    assert kind.read(again, "file") == found
    assert kind.write(kind.read(again, "file")) == again
    return found


def in_one_paragraph(message: str) -> None:
    """Asserts that a message can be printed and read."""
    assert message.isprintable(), message
    assert 10 < len(message) < LONGEST_MESSAGE, message


def plan_is_checked(plan: Any) -> bool:
    """Whether a plan that was read can run the demo GPT; if so it is priced and simulated."""
    cluster = cluster_of(8)
    try:
        check(plan, gpt(), cluster)
    except ShardparError:
        return False
    cost = plan_cost(plan, gpt(), cluster, ADAM)
    assert cost.step_s > 0
    if max(pipeline.num_microbatches for pipeline in plan.pipelines) <= 1000:
        assert simulate(plan, cost).step_s > 0
    return True


def cluster_is_planned_for(cluster: Any) -> bool:
    """Whether a small model can be planned for a cluster that was read."""
    options = SearchOptions(memory_fraction=1.0)
    graph = gpt_like(blocks=1)
    try:
        found = search(graph, cluster, Workload(8, "float32"), options)
    except ShardparError:
        return False
    check(found.plan, graph, cluster)
    assert plan_from_text(plan_to_text(found.plan)) == found.plan
    return True
