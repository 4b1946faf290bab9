"""Learns vectors of a graph's nodes from a config: the heavy half of `shardpar train` for them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from inspect import signature
from pathlib import Path
from typing import Any

import jax
import numpy as np

from shardpar.cli.planning import use_devices
from shardpar.cli.signals import asked_by_signal
from shardpar.cli.stored import earlier_run, require_same
from shardpar.cli.tables import console, print_json
from shardpar.config.model_source import build_options, find_model, load_model_source
from shardpar.config.save import to_gin, to_yaml
from shardpar.config.schema import NodesConfig
from shardpar.errors import ConfigError, DataError, RunError, UserError
from shardpar.ps.algorithms.keeping import Checkpointing, StoppedError
from shardpar.ps.algorithms.link_prediction import EdgeSplit, link_auc, split_edges
from shardpar.ps.graph.graph import Graph
from shardpar.ps.graph.options import NodeDataOptions
from shardpar.ps.graph.planted import planted
from shardpar.run.checkpoints import Checkpoints
from shardpar.run.directory import RunDirectory
from shardpar.run.environment import describe_environment
from shardpar.run.metrics import MetricsLog
from shardpar.run.progress import Figures, Progress, clock_time
from shardpar.run.report import write_report

_VECTORS = "vectors.txt"
_BUNDLED = ("karate_club", "les_miserables", "florentine_families", "davis_southern_women")


def train(
    config: NodesConfig, name: str, devices: int | None, *, json: bool, dry_run: bool
) -> None:
    """`shardpar train` of a model whose file says TRAINS = "nodes"."""
    use_devices(devices)
    started = time.monotonic()
    path = config.train.run_dir
    if path is not None and (Path(path) / _VECTORS).exists():
        raise ConfigError(
            f"{path} is finished: its vectors are in {path}/{_VECTORS}; write another "
            "train.run_dir, or remove them"
        )
    _require_same_run(config)
    module = load_model_source(find_model(config.model.source))
    options = build_options(module, config.model)
    with Progress() as progress, ExitStack() as stack:
        with progress.phase("reading the graph"):
            found = _read(config.data, progress)
            graph = found.graph
            split = _split(config, graph)
        progress.say(
            f"{graph.num_nodes} nodes; {len(split.sources)} edges to learn from, "
            f"{len(split.held)} held out"
        )
        if dry_run:
            return
        directory = RunDirectory(Path(path)) if path else RunDirectory.fresh(name, datetime.now())
        directory.make()
        config = replace(config, train=replace(config.train, run_dir=str(directory.path)))
        directory.write({"config.yaml": to_yaml(config), "config.gin": to_gin(config)})
        progress.say(f"run directory: {directory.path}")
        metrics = stack.enter_context(
            MetricsLog(
                directory.metrics,
                tensorboard=directory.tensorboard,
                stdout=sys.stdout if json else None,
            )
        )
        checkpoints = stack.enter_context(
            Checkpoints(directory.checkpoints, config.checkpoint, notify=progress.say)
        )
        keeper = Checkpointing(checkpoints, config.checkpoint, {"the graph": split.digest})
        kept: dict[str, Any] = {"keeper": keeper}
        if "keeper" in signature(module.fit).parameters:
            # Whoever cannot save is ended at once.
            keeper.should_stop = stack.enter_context(asked_by_signal()).should_stop
        else:
            kept = {}
            progress.say(f"{config.model.source} takes no `keeper`, so there are no checkpoints")
        metrics.truncate_after(keeper.step)
        if keeper.step:
            progress.say(f"going on from step {keeper.step}")
        seen = _Seen(progress, metrics, keeper.step)
        try:
            result = module.fit(
                options, graph.num_nodes, split.sources, split.targets, split.weights,
                seed=config.train.seed, progress=seen, **kept,
            )  # fmt: skip
        except StoppedError:
            console(stderr=True).print(
                f"stopped and saved; go on with: shardpar train --resume {directory.path}",
                highlight=False,
            )
            return
        if not np.isfinite(result.vectors).all():
            raise RunError(
                "the vectors are not finite; begin again with a lower model.learning_rate"
            )
        scores = _scores(config, result.vectors, split, found.groups)
        metrics.write(seen.step, scores)
        with progress.phase(f"writing {directory.path / _VECTORS}"):
            directory.write({_VECTORS: word2vec_text(graph.names, result.vectors)})
    took = clock_time(time.monotonic() - started)
    write_report(
        directory,
        title=name,
        status="finished",
        facts={"model": config.model.source, "this session": took},
        environment=describe_environment(jax.devices()),
    )
    words = [f"loss {result.losses[-1]:.4f}"]
    words += [f"{key} {value:.4f}" for key, value in scores.items()]
    screen = console(stderr=True)
    screen.print(f"done in {took}: {', '.join(words)}", highlight=False)
    if json:
        print_json({"step": seen.step, "vectors": str(directory.path / _VECTORS), **scores})
    screen.print(f"vectors: {directory.path / _VECTORS}", highlight=False)
    screen.print(f"report: {directory.report}", highlight=False)


def _require_same_run(config: NodesConfig) -> None:
    """Refuses to go on with another model or another graph than the run had.

    Raises:
      ConfigError: naming what differs.
    """
    earlier = earlier_run(config)
    if earlier is not None:
        directory, then = earlier
        require_same(directory, _fixed(then), _fixed(config))


def _fixed(config: NodesConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"model.source": config.model.source, "train.seed": config.train.seed}
    values["train.held_share"] = config.train.held_share
    values |= {f"model.{key}": value for key, value in config.model.options}
    # Files may have moved; the digest of the edges proves that they are the same.
    data = {f"data.{key}": value for key, value in vars(config.data).items() if key != "path"}
    return values | data


def word2vec_text(names: Iterable[Any], vectors: np.ndarray) -> str:
    """Vectors as word2vec's text: how many and how long, then a name and its numbers a line.

    Spaces in names, which separate in this format, become underscores.

    >>> print(word2vec_text(["a", "b c"], np.float32([[1, 0.1], [2, 0]])), end="")
    2 2
    a 1.0 0.1
    b_c 2.0 0.0
    """
    lines = [f"{len(vectors)} {vectors.shape[1]}"]
    for name, vector in zip(names, vectors, strict=True):
        word = "_".join(str(name).split()) or "_"
        lines.append(f"{word} {' '.join(map(str, vector))}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Read:
    graph: Graph
    groups: np.ndarray | None = None


class _Seen:
    """What is shown and written down while vectors are learned."""

    def __init__(self, progress: Progress, metrics: MetricsLog, step: int) -> None:
        self.step = self._first = step
        self._progress, self._metrics, self._started = progress, metrics, time.monotonic()

    def __call__(self, done: int, of: int, loss: float) -> None:
        """Steps done, of how many, and the loss of late."""
        if done <= self.step:
            return
        self.step = done
        known = loss if math.isfinite(loss) else None
        step_s = (time.monotonic() - self._started) / (done - self._first)
        self._progress.update(Figures(done, of, known, step_s=step_s))
        self._metrics.write(done, {"loss": loss})


def _read(data: NodeDataOptions, progress: Progress) -> _Read:
    if data.format == "planted":
        made = planted(data.nodes, data.groups, data.degree, data.across, data.seed)
        return _Read(made.graph, made.groups)
    assert data.path is not None
    if data.format == "networkx":
        return _Read(_bundled(data.path))
    try:
        from shardpar.ps.graph.edges import EdgeOptions, Spelling, read_edges
    except ModuleNotFoundError as error:
        if error.name != "pyarrow":
            raise
        raise UserError(
            "edges are read by pyarrow, which is not installed; run: pip install 'shardpar[graph]'"
        ) from None
    options = EdgeOptions(
        ids=None if data.ids == "auto" else data.ids,
        weighted=data.weighted,
        bad_share=data.bad_share,
        spelling=Spelling("data.ids=string", "data.weighted=false", "data.bad_share="),
    )
    read = read_edges(data.path, options)
    for bad in read.bad:
        progress.say(f"left out {data.path}:{bad.line}: {bad.reason}: {bad.text!r}")
    if read.num_bad > len(read.bad):
        progress.say(f"left out {read.num_bad} bad lines in all")
    return _Read(read.graph)


def _bundled(name: str) -> Graph:
    if name not in _BUNDLED:
        raise DataError(f"data.path is {name!r}; networkx carries {', '.join(_BUNDLED)}")
    try:
        import networkx
    except ModuleNotFoundError:
        raise UserError(
            f"the graph {name} comes with networkx, which is not installed; run: pip install "
            "'shardpar[demo]'"
        ) from None
    loaded = getattr(networkx, f"{name}_graph")()
    names = [str(node) for node in loaded.nodes]
    place = {node: i for i, node in enumerate(loaded.nodes)}
    ends = np.array([(place[a], place[b]) for a, b in loaded.edges], np.int32)
    weights = [float(weight) for _, _, weight in loaded.edges.data("weight", default=1.0)]
    return Graph(len(names), ends[:, 0], ends[:, 1], np.array(weights), np.array(names, object))


def _split(config: NodesConfig, graph: Graph) -> EdgeSplit:
    share = config.train.held_share
    if share:
        return split_edges(
            graph.num_nodes, graph.sources, graph.targets, graph.weights, share=share,
            seed=config.data.seed,
        )  # fmt: skip
    none = np.zeros((0, 2), np.int64)
    return EdgeSplit(graph.num_nodes, graph.sources, graph.targets, graph.weights, none, none)


def _scores(
    config: NodesConfig, vectors: np.ndarray, split: EdgeSplit, groups: np.ndarray | None
) -> dict[str, float]:
    if not len(split.held):
        return {}
    scores = {"auc": link_auc(vectors, split, config.train.score)}
    if groups is not None:
        # Who knows the groups and nothing else can do no better.
        known = np.eye(int(groups.max()) + 1, dtype=np.float32)[groups]
        scores["groups_auc"] = link_auc(known, split)
    return scores
