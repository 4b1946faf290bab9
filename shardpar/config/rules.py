"""The rules between keys: values that are each possible but cannot be meant together.

A rule needs nothing but the config; what needs the model graph or the devices is checked by
the floors that have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from shardpar.config.federated_rules import federated_rules
from shardpar.config.schema import (
    AnyConfig,
    FederatedConfig,
    NodesConfig,
    RunConfig,
    SparseConfig,
)
from shardpar.errors import ConfigError
from shardpar.planner.options import PINS
from shardpar.ps.consistency import consistency_from_text

_BYTE_VOCABULARY = 256
CLICK_ROWS = 1 << 20
"""Ids of `ps.data.clicks`, whose import takes longer than reading a config."""
_SUFFIXES = {"text": "txt", "jsonl": "jsonl", "parquet": "parquet"}


@dataclass(frozen=True)
class Conflict:
    """Keys that contradict each other.

    Attributes:
      keys: their full names, the likeliest culprit first.
      text: what is wrong and what to write instead, in one line.
    """

    keys: tuple[str, ...]
    text: str


def check(config: AnyConfig) -> tuple[Conflict, ...]:
    """Every contradiction in a config whose values are each possible.

    Args:
      config: what to check; rules about options that the model does not have are passed over.

    Returns:
      The conflicts, none if the config can be meant.

    >>> from shardpar.config.schema import RunConfig
    >>> from shardpar.train.options import DataOptions
    >>> check(RunConfig())
    ()
    >>> check(RunConfig(data=DataOptions(source="text")))[0].text
    "data.source is 'text' but data.path is not set; write data.path=file.txt"
    """
    if isinstance(config, SparseConfig):
        return tuple(_table_rules(config))
    if isinstance(config, NodesConfig):
        return tuple(_node_rules(config))
    if isinstance(config, FederatedConfig):
        return tuple(Conflict(keys, text) for keys, text in federated_rules(config))
    rules = (
        _data_rules, _bucket_rules, _model_rules, _schedule_rules, _train_rules, _plan_rules,
    )  # fmt: skip
    return tuple(conflict for rule in rules for conflict in rule(config))


def _table_rules(config: SparseConfig) -> Iterator[Conflict]:
    data, rows = config.data, config.model.get("rows")
    if isinstance(rows, int) and data.rows is not None and data.rows > rows:
        yield Conflict(
            ("data.rows", "model.rows"),
            f"data.rows ({data.rows}) is more than model.rows ({rows}), so ids would be outside "
            f"the table; write model.rows={data.rows}, or leave data.rows out",
        )
    if config.table.ids == "mapped" and (data.hashed or data.rows is not None):
        yield Conflict(
            ("table.ids", "data.hashed", "data.rows"),
            "table.ids is 'mapped', which takes ids as they are; leave data.hashed and data.rows "
            "out, or write table.ids=rows",
        )
    if config.table.ids == "mapped" and not isinstance(rows, int):
        yield Conflict(
            ("table.ids", "model.source"),
            "table.ids is 'mapped', but the model has no option `rows` to say how many there are; "
            "write table.ids=rows",
        )
    yield from _server_rules(config)
    if data.path is None and data.format not in ("clicks", "sklearn"):
        yield Conflict(
            ("data.path", "data.format"),
            "data.path is not set; write data.path=FILE, or data.format=clicks for a generated "
            "click log",
        )
    if data.format == "clicks" and (data.hashed or data.rows is not None):
        which = "hashed" if data.hashed else "rows"
        yield Conflict(
            (f"data.{which}", "data.format"),
            f"data.{which} is for ids of files; data.format is 'clicks', which is generated with "
            f"ids below {CLICK_ROWS}; leave it out",
        )
    mapped = config.table.ids == "mapped"
    if data.format == "clicks" and isinstance(rows, int) and rows < CLICK_ROWS and not mapped:
        yield Conflict(
            ("model.rows", "data.format"),
            f"model.rows is {rows}, but the generated click log has ids below {CLICK_ROWS}; write "
            f"model.rows={CLICK_ROWS}, or table.ids=mapped",
        )
    if data.format == "clicks" and data.path is not None:
        yield Conflict(
            ("data.path", "data.format"),
            "data.path is set but data.format is 'clicks', which is generated; write "
            "data.format=auto, or the format of the file",
        )


def _server_rules(config: SparseConfig) -> Iterator[Conflict]:
    ps, table, batch = config.ps, config.table, config.train.global_batch
    if not ps.servers:
        told = [f.name for f in fields(ps) if getattr(ps, f.name) != f.default]
        if told:
            yield Conflict(
                (f"ps.{told[0]}", "ps.servers"),
                f"ps.{told[0]} is for servers and workers in processes of their own, but "
                "ps.servers is 0; write ps.servers=2",
            )
        return
    if batch % ps.workers:
        yield Conflict(
            ("train.global_batch", "ps.workers"),
            f"train.global_batch ({batch}) cannot be dealt evenly to ps.workers ({ps.workers}); "
            f"write train.global_batch={max(1, round(batch / ps.workers)) * ps.workers}",
        )
    if table.ids == "mapped":
        yield Conflict(
            ("table.ids", "ps.servers"),
            "table.ids is 'mapped', whose ids one process hands out, but ps.servers makes several; "
            "write data.hashed=true and table.ids=rows, or leave ps.servers out",
        )
    if table.placement in ("columns", "replicated"):
        yield Conflict(
            ("table.placement", "ps.servers"),
            f"table.placement is {table.placement!r}, but servers hold rows; leave it out",
        )
    for key in ("capacity", "ragged"):
        if getattr(table, key) is not None:
            yield Conflict(
                (f"table.{key}", "ps.servers"),
                f"table.{key} is for exchanges between devices, but ps.servers are processes; "
                "leave it out",
            )
    if ps.push_bound and table.optimizer not in ("sgd", "adagrad", "rowwise_adagrad"):
        yield Conflict(
            ("ps.push_bound", "table.optimizer"),
            f"ps.push_bound lets updates wait and adds them up later, which {table.optimizer!r} "
            "does not allow; write ps.push_bound=0, or table.optimizer=sgd, adagrad or "
            "rowwise_adagrad",
        )
    if ps.cache_rows == 0 and (ps.pull_bound or ps.push_bound):
        which = "pull_bound" if ps.pull_bound else "push_bound"
        yield Conflict(
            (f"ps.{which}", "ps.cache_rows"),
            f"ps.{which} bounds how old kept rows may be, but ps.cache_rows keeps none; write "
            "ps.cache_rows=100000, for example",
        )
    try:
        bound = consistency_from_text(ps.consistency)
    except ConfigError as error:
        yield Conflict(("ps.consistency",), f"ps.consistency: {error}")
        return
    if ps.push_bound and bound.lockstep:
        yield Conflict(
            ("ps.push_bound", "ps.consistency"),
            "ps.push_bound lets updates wait, and in 'bsp' those of a step are applied together; "
            "write ps.consistency='ssp(4)', or ps.push_bound=0",
        )
    if ps.delay_scaled and bound.lockstep:
        yield Conflict(
            ("ps.delay_scaled", "ps.consistency"),
            "ps.delay_scaled divides late updates, and in 'bsp' none is late; write "
            "ps.consistency='ssp(4)', or leave it out",
        )
    if ps.delay_scaled and ps.push_bound:
        yield Conflict(
            ("ps.delay_scaled", "ps.push_bound"),
            "ps.delay_scaled cannot divide updates that waited in a cache, whose copies have them "
            "in full; write ps.push_bound=0, or leave it out",
        )


def _node_rules(config: NodesConfig) -> Iterator[Conflict]:
    data = config.data
    keys = ("data.path", "data.format")
    if data.format == "planted" and data.path is not None:
        yield Conflict(
            keys,
            "data.path is set but data.format is 'planted', which is generated; write "
            "data.format=edges for a file of edges",
        )
    if data.format == "edges" and data.path is None:
        yield Conflict(
            keys, "data.format is 'edges' but data.path is not set; write data.path=FILE"
        )
    if data.format == "networkx" and data.path is None:
        yield Conflict(
            keys,
            "data.format is 'networkx' but data.path does not say which graph; write "
            "data.path=karate_club, for example",
        )
    if data.format == "planted" and data.nodes < 2 * data.groups:
        yield Conflict(
            ("data.groups", "data.nodes"),
            f"data.nodes ({data.nodes}) in data.groups ({data.groups}) leave less than two nodes "
            f"to a group; write data.nodes={2 * data.groups} or more",
        )


def _data_rules(config: RunConfig) -> Iterator[Conflict]:
    data = config.data
    if data.source != "pydoc" and data.path is None:
        yield Conflict(
            ("data.source", "data.path"),
            f"data.source is {data.source!r} but data.path is not set; "
            f"write data.path=file.{_SUFFIXES[data.source]}",
        )
    if data.source == "pydoc" and data.path is not None:
        yield Conflict(
            ("data.path", "data.source"),
            "data.path is set but data.source is 'pydoc', which reads no file; "
            "write data.source=text, jsonl or parquet",
        )
    if data.dispatch and data.packing:
        yield Conflict(
            ("data.packing", "data.dispatch"),
            "data.dispatch packs the documents of each step itself, so data.packing, which packs "
            "them beforehand, cannot be on as well; leave one of the two out",
        )
    longest = max(config.dispatch.row_tokens, default=data.sequence_length)
    if config.dispatch.row_tokens and not data.dispatch:
        yield Conflict(
            ("dispatch.row_tokens", "data.dispatch"),
            "dispatch.row_tokens is set and data.dispatch is false; write data.dispatch=true",
        )
    elif longest != data.sequence_length:
        yield Conflict(
            ("dispatch.row_tokens", "data.sequence_length"),
            f"the longest of dispatch.row_tokens is {longest}, and documents have up to "
            f"data.sequence_length={data.sequence_length} tokens; write "
            f"data.sequence_length={longest}, or rows of {data.sequence_length} for one pipeline",
        )


def _bucket_rules(config: RunConfig) -> Iterator[Conflict]:
    buckets, data = config.buckets, config.data
    lengths = list(buckets.lengths)
    for key in ("plans", "sequences"):
        given = getattr(buckets, key)
        if given and len(given) != len(lengths):
            yield Conflict(
                (f"buckets.{key}", "buckets.lengths"),
                f"buckets.{key} has {len(given)} items and buckets.lengths {len(lengths)}; "
                f"write one for each bucket, or leave buckets.{key} out",
            )
    if not lengths:
        return
    if sorted(set(lengths)) != lengths:
        yield Conflict(
            ("buckets.lengths",),
            f"buckets.lengths is {lengths}, and lengths must ascend; write {sorted(set(lengths))}",
        )
    elif lengths[-1] != data.sequence_length:
        yield Conflict(
            ("buckets.lengths", "data.sequence_length"),
            f"the last of buckets.lengths is {lengths[-1]}, and samples have up to "
            f"data.sequence_length={data.sequence_length} tokens; write "
            f"data.sequence_length={lengths[-1]}, or end buckets.lengths with "
            f"{data.sequence_length}",
        )
    clashes = (
        ("data.packing", data.packing, "packs documents into samples of one length"),
        ("data.dispatch", data.dispatch, "runs all lengths under one plan"),
        ("train.plan_schedule", config.train.plan_schedule, "changes the plan between steps"),
    )
    for key, value, does in clashes:
        if value:
            yield Conflict(
                (key, "buckets.lengths"),
                f"{key} {does}, and buckets.lengths gives each length a plan of its own within "
                "the step; leave one of the two out",
            )


def _model_rules(config: RunConfig) -> Iterator[Conflict]:
    data = config.data
    vocabulary, length = config.model.get("vocab_size"), config.model.get("max_length")
    byte = data.tokenizer == "byte"
    needed = _BYTE_VOCABULARY if byte else data.vocab_size
    if isinstance(vocabulary, int) and vocabulary < needed:
        reason = "the byte tokenizer has" if byte else "data.vocab_size asks for"
        keys = ("data.tokenizer",) if byte else ("data.vocab_size", "data.tokenizer")
        yield Conflict(
            ("model.vocab_size", *keys),
            f"model.vocab_size ({vocabulary}) is less than the {needed} tokens that {reason}; "
            f"write model.vocab_size={needed} or more",
        )
    if isinstance(length, int) and data.sequence_length > length:
        yield Conflict(
            ("data.sequence_length", "model.max_length"),
            f"data.sequence_length ({data.sequence_length}) is more than model.max_length "
            f"({length}); write model.max_length={data.sequence_length}",
        )


def _schedule_rules(config: RunConfig) -> Iterator[Conflict]:
    optimizer = config.optimizer
    if optimizer.schedule == "constant" or optimizer.decay_steps is None:
        return
    name, end = "optimizer.decay_steps", optimizer.decay_steps
    if optimizer.warmup_steps >= end:
        yield Conflict(
            ("optimizer.warmup_steps", name, "optimizer.schedule"),
            f"optimizer.warmup_steps ({optimizer.warmup_steps}) must be less than {name} ({end}), "
            f"where the {optimizer.schedule} schedule ends; write optimizer.warmup_steps=0 or "
            "optimizer.schedule=constant",
        )


def _train_rules(config: RunConfig) -> Iterator[Conflict]:
    train, plan = config.train, config.plan
    if train.eval_every and not config.data.eval_fraction:
        yield Conflict(
            ("train.eval_every", "data.eval_fraction"),
            f"train.eval_every is {train.eval_every} but data.eval_fraction is 0, so there is "
            "nothing to evaluate on; write train.eval_every=0 or data.eval_fraction=0.05",
        )
    pins = {
        f"plan.{name}": value
        for name in ("microbatch", "data", "fsdp")
        if (value := getattr(plan, name)) is not None
    }
    divisor = math.prod(pins.values())
    if plan.context is not None:
        # Data shards may split sequences rather than the batch.
        divisor = 1
    if pins and train.global_batch % divisor:
        product = " x ".join(f"{name} ({value})" for name, value in pins.items())
        upper = math.ceil(train.global_batch / divisor) * divisor
        lower = upper - divisor
        advice = f"{lower} or {upper}" if lower else f"{upper}"
        yield Conflict(
            ("train.global_batch", *pins),
            f"train.global_batch ({train.global_batch}) is not a multiple of {product}"
            f"{f' = {divisor}' if len(pins) > 1 else ''}; write train.global_batch={advice}",
        )


def _plan_rules(config: RunConfig) -> Iterator[Conflict]:
    plan = config.plan
    pinned = tuple(f"plan.{name}" for name in PINS if getattr(plan, name) is not None)
    if plan.file is not None and pinned:
        yield Conflict(
            (*pinned, "plan.file"),
            f"plan.file holds a whole plan, so {', '.join(pinned)} cannot be pinned as well; "
            "keep the file or the pins",
        )
    elif plan.sequence_parallel and plan.tensor == 1:
        yield Conflict(
            ("plan.sequence_parallel", "plan.tensor"),
            "plan.sequence_parallel is on but plan.tensor is 1, and it needs tensor parallelism; "
            "write plan.tensor=2 or more, or leave plan.sequence_parallel out",
        )
