"""Which communications a change of layout takes, and how many bytes cross."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.spec.chain import is_same
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.layout import Layout
from shardpar.spec.layout_text import layout_from_text
from shardpar.spec.reshard import Reshard, Tensor, fuse, reshard
from tests.lowering.layouts import random_pair

GOLDEN = Path(__file__).parents[1] / "golden" / "reshards.txt"
seeds = st.integers(0, 10**6)


def told(resolved: Reshard) -> str:
    """The communications as golden text."""
    lines = []
    for c in resolved.communications:
        groups = " ".join("{" + ",".join(map(str, g)) + "}" for g in c.groups)
        sent = " ".join(f"{d}:{n}" for d, n in c.sent) or "nothing"
        received = " ".join(f"{d}:{n}" for d, n in c.received) or "nothing"
        lines.append(f"  {c.kind} ({c.tier}) {groups}, sent {sent}, received {received}")
    total, bound = resolved.total_bytes, resolved.lower_bound_bytes
    lines.append(f"  {total} bytes, lower bound {bound}")
    return "\n".join(lines) + "\n"


def cases() -> dict[str, tuple[str, str, tuple[int, ...], str]]:
    found = {}
    for part in GOLDEN.read_text().split("\n--- ")[1:]:
        title, pair, rest = part.split("\n", 2)
        src, dst, shape = re.split(r" -> | of ", pair)
        found[title] = (src, dst, tuple(map(int, shape.split(","))), rest)
    return found


@pytest.mark.parametrize("title", cases())
def test_the_communications_of_a_pair(title):
    src, dst, shape, expected = cases()[title]
    resolved = reshard(layout_from_text(src), layout_from_text(dst), shape, 4)
    assert told(resolved).strip() == expected.strip()


def pair(seed: int) -> tuple[Layout, Layout, tuple[int, ...]]:
    return random_pair(random.Random(seed))


@settings(deadline=None, max_examples=300)
@given(seeds)
def test_no_reshard_moves_less_than_the_bound_and_pure_moves_move_just_that(seed):
    src, dst, shape = pair(seed)
    resolved = reshard(src, dst, shape, 4)
    assert resolved.total_bytes >= resolved.lower_bound_bytes
    assert sum(resolved.bytes_sent.values()) == sum(resolved.bytes_received.values())
    if src.terms == dst.terms == 1:
        assert resolved.total_bytes == resolved.lower_bound_bytes


@settings(deadline=None, max_examples=200)
@given(seeds)
def test_a_layout_to_itself_is_an_identity_without_bytes(seed):
    layout, _, shape = pair(seed)
    resolved = reshard(layout, layout, shape, 4)
    assert [c.kind for c in resolved.communications] == ["identity"]
    assert resolved.total_bytes == 0


@settings(deadline=None, max_examples=100)
@given(seeds)
def test_the_steps_lead_from_source_to_destination(seed):
    src, dst, shape = pair(seed)
    (strides,) = reshard(src, dst, shape, 4).strides
    ends = [src, *(stride.step.after for stride in strides)]
    assert [stride.step.before for stride in strides] == ends[:-1]
    # The last step may end in a layout of another name in which all have what they shall have.
    assert ends[-1] == dst or is_same(ends[-1], dst, shape)


def test_a_group_of_addends_that_will_have_another_part_of_the_array_is_added_up_first():
    src = layout_from_text("[0,1]{partial:2} + [2]{} across split0(21,3)")
    dst = layout_from_text("[0,1]{split0:2} + [2]{} across split0(22,2)")
    resolved = reshard(src, dst, (24,), 4)
    assert resolved.communications[0].kind == "all-reduce"


@pytest.mark.parametrize("shape", [(1024, 1024), (1024,), (64, 6)])
def test_a_gradient_sync_gives_no_device_more_than_a_ring_would(shape):
    """Equal bytes are not enough: the work must be spread."""
    groups = [f"[{2 * i},{2 * i + 1}]" for i in range(4)]
    src = layout_from_text(" + ".join(g + "{partial:2}" for g in groups) + " across partial")
    dst = layout_from_text(" + ".join(g + "{dup:2}" for g in groups) + " across dup")
    resolved = reshard(src, dst, shape, 4)
    size = 4 * math.prod(shape)
    assert resolved.total_bytes == resolved.lower_bound_bytes == 14 * size
    assert max(resolved.bytes_received.values()) == 14 * size // 8


def test_sums_that_are_copies_are_not_taken_for_sums_that_are_addends():
    src = layout_from_text("[0,1]{partial:2} + [2,3]{partial:2} across dup")
    dst = layout_from_text("[0,1]{partial:2} + [2,3]{partial:2} across partial")
    assert not is_same(src, dst, (4,))
    assert "identity" not in [c.kind for c in reshard(src, dst, (4,), 4).communications]


def test_arrays_of_one_pytree_share_one_message_per_sender_and_receiver():
    a, b = layout_from_text("[0,1]{split0:2}"), layout_from_text("[2,3]{split1:2}")
    one = reshard(a, b, (8, 8), 4)
    many = fuse([Tensor(a, b, (8, 8), 4)] * 5 + [Tensor(b, a, (4, 4), 2)])
    assert set(many.messages()) == {(s, r) for s in (0, 1) for r in (2, 3)} | {
        (r, s) for s in (0, 1) for r in (2, 3)
    }
    assert many.messages()[0, 2] == 5 * one.messages()[0, 2]
    assert many.total_bytes == 5 * one.total_bytes + 4 * 4 * 2


def hosts(count: int, devices: int, inter: float = 1e9) -> Cluster:
    kind = DeviceKind("x", (("float32", 1e12),), 1e9, 1e11)
    return Cluster("c", (kind,), (Hosts("x", devices, count),), Link(1e10), Link(inter))


def test_a_neighbour_on_the_same_host_sends_rather_than_another_host():
    src = layout_from_text("[0,4]{dup:2}")
    dst = layout_from_text("[1,5]{dup:2}")
    sent = reshard(src, dst, (8, 8), 4, hosts(2, 4)).messages()
    assert sent == {(0, 1): 256, (4, 5): 256}


def test_copies_share_the_work_of_sending():
    src = layout_from_text("[0,1,2]{dup:3}")
    dst = layout_from_text("[3]{}")
    assert reshard(src, dst, (9, 4), 4).messages() == {(0, 3): 48, (1, 3): 48, (2, 3): 48}


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (
            "[0,1]{split2:2}",
            "[0]",
            "the source, [0,1]{split2:2}: group [0,1]{split2:2} splits dim 2",
        ),
        ("[0]", "[0,1,2]{split0:3}", "the destination, [0,1,2]{split0:3}: group [0,1,2]{split0:3}"),
        (
            "[0]",
            "[9]",
            'the destination, [9]{}, is on device 9, but cluster "c" has devices 0 to 7',
        ),
    ],
)
def test_a_pair_that_does_not_fit_says_which_side_and_why(src, dst, message):
    with pytest.raises(SpecError) as error:
        reshard(layout_from_text(src), layout_from_text(dst), (8, 8), 4, hosts(2, 4))
    assert str(error.value).startswith(message)


def test_many_devices_are_resolved_exactly():
    many = ",".join(map(str, range(256)))
    src = layout_from_text(f"[{many}]{{split0:256}}")
    dst = layout_from_text(f"[{many}]{{dup:32, split1:8}}")
    resolved = reshard(src, dst, (1024, 512), 2)
    assert resolved.total_bytes == resolved.lower_bound_bytes
    assert resolved.busiest_s <= 1.0001 * resolved.busiest_bound_s
