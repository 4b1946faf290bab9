"""`shardpar graph` as people run it, on the karate club."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys

import networkx as nx
import pytest
from pyarrow import csv, parquet
from typer.testing import CliRunner

from shardpar.cli.main import app
from shardpar.errors import UserError
from tests.cli.command import environment, shardpar

CLUB = nx.karate_club_graph()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("graphs")
    lines = "".join(f"{s} {t} {w}\n" for s, t, w in CLUB.edges(data="weight"))
    (made / "club.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (made / "bad.txt").write_text("1 2\n2 x\n3 1\n")
    (made / "pairs.txt").write_text("0 33\n33 32\n")
    return made


def columns(path):
    table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def graph(*arguments, folder, monkeypatch):
    """The command in this process, which is much faster to start."""
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, ["graph", *arguments])


def test_pagerank_writes_ranks_and_a_summary(folder):
    done = shardpar(
        "graph", "pagerank", "club.txt.gz", "--out", "ranks.parquet", "--undirected",
        "--tol", "1e-12", "--json", cwd=folder,
    )  # fmt: skip
    found = columns(folder / "ranks.parquet")
    wanted = nx.pagerank(CLUB, tol=1e-14, max_iter=1000)
    assert list(found) == ["node", "pagerank"]
    assert found["pagerank"] == pytest.approx([wanted[n] for n in found["node"]], abs=1e-12)
    summary = json.loads(done.stdout)
    assert (summary["nodes"], summary["edges"], summary["bad_lines"]) == (34, 78, 0)
    assert summary["backend"] == "scipy"
    assert summary["error_bound"] <= 1e-12
    assert "reading club.txt.gz" in done.stderr


def test_four_devices_write_the_same_ranks(folder):
    for name, more in (("host", ()), ("four", ("--devices", "4"))):
        done = shardpar(
            "graph", "pagerank", "club.txt.gz", "--out", f"{name}.csv", "--restart", "5",
            "--undirected", "--tol", "1e-12", *more, cwd=folder,
        )  # fmt: skip
    assert "pagerank by jax: 4 cpu devices were asked for" in done.stdout
    assert "highest ranks" in done.stdout
    four, host = columns(folder / "four.csv"), columns(folder / "host.csv")
    assert four["pagerank"] == pytest.approx(host["pagerank"], abs=1e-12)


@pytest.mark.parametrize(
    ("verb", "more", "names", "figure"),
    [
        ("components", (), ["node", "component"], ("components", 1)),
        ("kcore", ("--backend", "igraph"), ["node", "core"], ("highest_core", 4)),
        ("communities", (), ["node", "community"], ("communities", 4)),
        ("communities", ("--method", "label-propagation"), ["node", "community"], None),
        ("triangles", (), ["node", "triangles", "clustering"], ("triangles", 45)),
        ("common-neighbours", ("--top", "9"), ["source", "target", "common"], ("pairs", 9)),
    ],
)
def test_every_verb_writes_its_table(verb, more, names, figure, folder, monkeypatch):
    out = folder / "table.csv"
    done = graph(
        verb, "club.txt.gz", "--out", str(out), "--json", *more,
        folder=folder, monkeypatch=monkeypatch,
    )  # fmt: skip
    assert done.exit_code == 0
    found = columns(out)
    assert list(found) == names
    if names[0] == "node":
        assert found["node"] == sorted(CLUB)
    if figure:
        assert json.loads(done.stdout)[figure[0]] == figure[1]


def test_asked_pairs_are_counted(folder, monkeypatch):
    graph(
        "common-neighbours", "club.txt.gz", "--out", "common.csv", "--pairs", "pairs.txt",
        folder=folder, monkeypatch=monkeypatch,
    )  # fmt: skip
    found = columns(folder / "common.csv")
    assert found["source"] == [0, 33]
    assert found["common"] == [
        len(list(nx.common_neighbors(CLUB, s, t))) for s, t in ((0, 33), (33, 32))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pagerank", "bad.txt"), "bad.txt:2: a node is not an integer"),
        (("pagerank", "none.txt"), "none.txt: No such file or directory"),
        (("kcore", "club.txt.gz", "--out", "x.txt"), "has to end in .parquet, .csv or .tsv"),
        (("pagerank", "club.txt.gz", "--restart", "99"), "there is no node 99"),
        (("pagerank", "club.txt.gz", "--damping", "1"), "damping is 1.0"),
        (("kcore", "club.txt.gz", "--backend", "jax"), "kcore runs on scipy, igraph or networkit"),
        (("components", "club.txt.gz", "--strong", "--devices", "2"), "--strong runs on one host"),
        (("components", "club.txt.gz", "--backend", "scipy", "--devices", "2"),
         "--devices goes with --backend jax"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments, message, folder, monkeypatch):
    out = () if "--out" in arguments else ("--out", "refused.csv")
    done = graph(*arguments, *out, folder=folder, monkeypatch=monkeypatch)
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert not (folder / "refused.csv").exists()


def test_a_refusal_is_one_error_and_exit_code_2_and_the_input_is_never_overwritten(folder):
    (folder / "edges.csv").write_text("1,2\n")
    done = shardpar("graph", "kcore", "edges.csv", "--out", "./edges.csv", cwd=folder, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out ./edges.csv: this is the edge list itself")
    assert (folder / "edges.csv").read_text() == "1,2\n"


def test_bad_lines_are_left_out_and_named(folder, monkeypatch):
    done = graph(
        "pagerank", "bad.txt", "--out", "rest.csv", "--bad-share", "0.5", "--json",
        folder=folder, monkeypatch=monkeypatch,
    )  # fmt: skip
    assert "left out bad.txt:2: a node is not an integer" in done.stderr
    assert json.loads(done.stdout)["bad_lines"] == 1


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "edges.txt").write_text("1 2\n")
    # An import of a module that is None fails as if it were not installed.
    program = (
        "import sys; sys.modules['pyarrow'] = None; from shardpar.cli.main import run; "
        "sys.argv = ['shardpar', 'graph', 'pagerank', 'edges.txt', '--out', 'r.csv']; run()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install 'shardpar[graph]'" in done.stderr
    assert "Traceback" not in done.stderr
