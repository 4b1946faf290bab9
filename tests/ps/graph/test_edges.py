"""Edge lists as people write them, damaged ones, and random bytes."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shardpar.errors import DataError
from shardpar.ps.graph.edges import EdgeOptions, read_edges


def read(folder: Path, content: str | bytes, **options):
    path = folder / "edges"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_edges(path, EdgeOptions(**options))


def named(graph):
    """The edges by the names of their nodes, with their weights."""
    weights = [None] * graph.num_edges if graph.weights is None else graph.weights.tolist()
    names = graph.names.tolist()
    ends = zip(graph.sources.tolist(), graph.targets.tolist(), weights, strict=True)
    return [(names[s], names[t], w) for s, t, w in ends]


@pytest.mark.parametrize(
    ("content", "edges"),
    [
        ("1 2\n3 1\n", [(1, 2, None), (3, 1, None)]),
        ("1\t2\r\n3\t\t1\r\n", [(1, 2, None), (3, 1, None)]),
        ("  1   2 \n\n3 1", [(1, 2, None), (3, 1, None)]),
        ("1,2,0.5\n3, 1 ,1e-3\n", [(1, 2, 0.5), (3, 1, 0.001)]),
        ("# Nodes: 3\n#\tFromNodeId\tToNodeId\n1\t2\n", [(1, 2, None)]),
        ("%%MatrixMarket\n1 2 .5\n", [(1, 2, 0.5)]),
        ("\ufeffsource,target,weight\n1,2,3\n2,3,4.\n", [(1, 2, 3.0), (2, 3, 4.0)]),
        ("who whom\n1 2\n2 3\n", [(1, 2, None), (2, 3, None)]),
        ("src,dst\nann,bob\nbob,cy d\n", [("ann", "bob", None), ("bob", "cy d", None)]),
        ("New York\tBonn\nBonn\tÜlm\n", [("New York", "Bonn", None), ("Bonn", "Ülm", None)]),
        ("0 1 {}\n1 2 {}\n", [(0, 1, None), (1, 2, None)]),
        ("-5 9223372036854775807\n-9223372036854775808 007\n",
         [(-5, 2**63 - 1, None), (-(2**63), 7, None)]),
        ("a 1 2.5\na a 0\n", [("a", "1", 2.5), ("a", "a", 0.0)]),
        ('"a" #b\n', [('"a"', "#b", None)]),
    ],
)  # fmt: skip
def test_files_are_read_as_they_are_meant(content, edges, tmp_path):
    for data in (content.encode(), gzip.compress(content.encode())):
        found = read(tmp_path, data)
        assert named(found.graph) == edges
        assert found.num_bad == 0
        assert found.graph.names.tolist() == sorted(found.graph.names.tolist())


def test_what_the_first_lines_say_can_be_overruled(tmp_path):
    content = "1 2 9\n2 3 8\n"
    assert named(read(tmp_path, content, weighted=False).graph)[0] == (1, 2, None)
    assert named(read(tmp_path, content, ids="string").graph)[0] == ("1", "2", 9.0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1", "it has 1 field, and other lines have 2"),
        ("1 2 3", "it has 3 fields, and other lines have 2"),
        ("1 x", "a node is not an integer, as those of other lines are"),
        ("1 0x1F", "a node is not an integer, as those of other lines are"),
        ("1 1.0", "a node is not an integer, as those of other lines are"),
        ("1 +2", "a node is not an integer, as those of other lines are"),
        ("1 9223372036854775808", "a node's number does not fit in 64 bits"),
        ("1 2\r", None),
        ("1 \r2", "it has a control character"),
        ("1 2,", "a node is not an integer, as those of other lines are"),
    ],
)
def test_a_bad_line_is_named_counted_and_left_out(line, reason, tmp_path):
    content = "# comment\n0 1\n\n" + "3 4\n" * 2000 + line + "\n" + "5 6\n" * 2000
    path = tmp_path / "edges"
    if reason is None:
        assert read(tmp_path, content).num_bad == 0
        return
    with pytest.raises(DataError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{path}:2004: {reason}: ")
    found = read(tmp_path, content, bad_share=0.001)
    assert (found.num_bad, found.graph.num_edges) == (1, 4001)
    assert [(b.line, b.reason) for b in found.bad] == [(2004, reason)]


def test_hexadecimal_numbers_are_no_integers_where_other_columns_are_left_out(tmp_path):
    with pytest.raises(DataError, match="edges:2: a node is not an integer"):
        read(tmp_path, "1 2 z\n0x1F 2 z\n3 4 z\n")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        ("nan", "its weight is not finite"),
        ("-inf", "its weight is not finite"),
        ("1e999", "its weight is not finite"),
        ("-1", "its weight is negative"),
        ("x", "its weight is not a number"),
        ("", "it has 2 fields, and other lines have 3"),
        ("1_0", "its weight is not a number"),
    ],
)
def test_weights_are_finite_and_not_negative(weight, reason, tmp_path):
    with pytest.raises(DataError, match=rf"edges:3: {reason}"):
        read(tmp_path, f"1 2 0.5\n2 3 1e2\n1 2 {weight}\n3 4 1\n")


def test_more_bad_lines_than_allowed_are_fatal_with_the_first_few_named(tmp_path):
    content = "".join(f"{i} {'x' if i % 10 == 0 else i + 1}\n" for i in range(1000))
    assert read(tmp_path, content, bad_share=0.1).num_bad == 100
    with pytest.raises(DataError) as caught:
        read(tmp_path, content, bad_share=0.09)
    lines = str(caught.value).splitlines()
    assert "100 of 1000 lines are no edges, and --bad-share 0.09 allows 90" in lines[0]
    assert [line.split(":")[1] for line in lines[1:]] == ["1", "11", "21", "31", "41"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no edges"),
        (b"\n\n# nothing\n", "it has no edges"),
        (gzip.compress(b"", mtime=0), "it has no edges"),
        (b"alone\n", "its first lines have 1 field; write source and target"),
        (b"BZh91AY", "this is bzip2; give text, or text in gzip"),
        (b"x" * (3 << 20), "edges:1: a line of more than 1048576 bytes"),
        (b"a \xff\n", "edges:1: a node's name is not UTF-8"),
    ],
)
def test_files_that_are_no_edge_lists_are_refused(content, message, tmp_path):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "edges"))) as caught:
        read(tmp_path, content, chunk_bytes=1 << 20)
    assert message in str(caught.value)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"No such file|Is a directory"):
            read_edges(missing)


def test_a_cut_or_damaged_gzip_file_says_how_far_it_could_be_read(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 10**6, (60000, 2))
    whole = gzip.compress("".join(f"{a} {b}\n" for a, b in numbers).encode(), 1)
    with pytest.raises(DataError, match="cut off: its gzip stream has no end mark") as caught:
        read(tmp_path, whole[: len(whole) // 2])
    line = int(re.search(r"up to line (\d+)", str(caught.value))[1])
    assert 0.8 * 30000 < line < 1.1 * 30000
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    with pytest.raises(DataError, match=r"damaged \(CRC check failed"):
        read(tmp_path, bytes(flipped))


def test_chunks_halves_and_single_lines_read_the_same(tmp_path):
    generator = np.random.default_rng(0)
    rows = [f"{a} {b} {w}" for a, b, w in generator.integers(-99, 99, (12000, 3)).tolist()]
    rows[::50] = ["bad"] * 240
    content = "\n".join(rows)
    options = {"bad_share": 1.0, "ids": "int", "weighted": True}
    wanted = read(tmp_path, content, **options)
    good = [
        tuple(map(int, row.split())) for row in rows if row != "bad" and row.split()[2][0] != "-"
    ]
    assert named(wanted.graph) == good
    assert wanted.num_bad == 12000 - len(good)
    for chunk_bytes in (16, 1000, 1 << 15):
        found = read(tmp_path, content, chunk_bytes=chunk_bytes, **options)
        assert named(found.graph) == good
        assert (found.num_bad, found.bad) == (wanted.num_bad, wanted.bad)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from(
                [b"1", b"2", b"-7", b"a", b"#", b"%", b" ", b" ", b"\t", b",", b"\n", b"\n",
                 b"\r\n", b"nan", b"0.5", b"1e5", b"9" * 20, b"\xff", b'"', b"\0", b"x",
                 b"\xef\xbb\xbf"]
            ),
            max_size=40,
        ).map(b"".join),
    ),
    st.sampled_from([None, "int", "string"]),
    st.sampled_from([None, False, True]),
    st.sampled_from([0.0, 1.0]),
    st.booleans(),
)  # fmt: skip
@example(b"\x1f\x8b\x08\x00 broken", None, None, 0.0, False)
@example(b"1 2\r3 4\n", None, None, 1.0, False)
def test_random_bytes_become_a_graph_or_an_error_that_names_the_file(
    tmp_path_factory, content, ids, weighted, bad_share, zipped
):
    folder = tmp_path_factory.getbasetemp()
    options = {"ids": ids, "weighted": weighted, "bad_share": bad_share}
    found, said = outcome(folder, gzip.compress(content) if zipped else content, options)
    if found is None:
        assert str(folder / "edges") in said
        if ", and other" in said or "not an integer" in said:
            assert re.search(r"edges:\d+: ", said)
        return
    graph = found.graph
    assert 0 < graph.num_edges <= content.count(b"\n") + 1 - found.num_bad
    assert graph.sources.min() >= 0
    assert max(graph.sources.max(), graph.targets.max()) < graph.num_nodes
    assert len(set(graph.names.tolist())) == graph.num_nodes
    # Among bad lines, and one by one, good ones say the same.
    (folder / "edges").write_bytes(content + b"\n\0 \0 \0 \0\n")
    again, said = outcome(folder, (folder / "edges").read_bytes(), {**options, "bad_share": 1.0})
    if again is None:
        # One line of two decides no longer what separates.
        assert "its first lines have 1 field" in said
    elif again.dialect == found.dialect:
        assert named(again.graph) == named(graph)
        assert again.num_bad == found.num_bad + 1


def outcome(folder, content, options):
    try:
        return read(folder, content, **options), ""
    except DataError as error:
        return None, str(error)
