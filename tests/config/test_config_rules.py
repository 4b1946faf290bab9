from __future__ import annotations

from dataclasses import replace

import pytest

from shardpar.config.rules import check
from shardpar.config.schema import ModelConfig, RunConfig, section_classes

SMALL = ModelConfig("gpt", (("vocab_size", 256), ("max_length", 128)))


def changed(**changes: object) -> RunConfig:
    """The default config with keys such as train__steps changed."""
    config = RunConfig(model=SMALL)
    for name, value in changes.items():
        section, key = name.split("__")
        if section == "model":
            options = tuple({**dict(config.model.options), key: value}.items())
            config = replace(config, model=replace(config.model, options=options))
        else:
            config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__source": "text", "data__path": "a.txt"},
        {"data__tokenizer": "bpe", "data__vocab_size": 1000, "model__vocab_size": 1000},
        {"data__vocab_size": 50_000},
        {"data__sequence_length": 128},
        {"train__steps": 5, "optimizer__warmup_steps": 4},
        {"train__steps": 5, "optimizer__warmup_steps": 9},
        {"train__steps": 5, "optimizer__warmup_steps": 9, "optimizer__decay_steps": 10},
        {"train__steps": 5, "optimizer__warmup_steps": 9, "optimizer__schedule": "constant"},
        {"train__global_batch": 24, "plan__microbatch": 3, "plan__data": 2, "plan__fsdp": 4},
        {"train__global_batch": 3, "plan__tensor": 2, "plan__sequence_parallel": True},
        {"plan__file": "plan.yaml", "plan__cluster": "cluster.yaml"},
        {"plan__file": "plan.yaml", "plan__epsilon": 0.05},
        {"plan__zero1": 2, "plan__stages": 2, "plan__fix": "head fsdp=1", "plan__epsilon": 0.05},
        {"train__eval_every": 10},
        {"data__eval_fraction": 0.0},
        {"buckets__lengths": (16, 128), "buckets__plans": (None, "p.yaml")},
        {"data__dispatch": True},
        {"data__dispatch": True, "dispatch__row_tokens": (128, 32)},
    ],
)
def test_what_can_be_meant_passes(changes):
    assert check(changed(**changes)) == ()


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"data__source": "jsonl"}, "data.source"),
        ({"data__path": "a.txt"}, "data.path"),
        ({"model__vocab_size": 255}, "model.vocab_size"),
        ({"data__tokenizer": "bpe", "data__vocab_size": 257}, "model.vocab_size"),
        ({"data__sequence_length": 129}, "data.sequence_length"),
        ({"optimizer__decay_steps": 5, "optimizer__warmup_steps": 6}, "optimizer.warmup_steps"),
        ({"train__global_batch": 8, "plan__microbatch": 3}, "train.global_batch"),
        ({"train__global_batch": 8, "plan__data": 4, "plan__fsdp": 4}, "train.global_batch"),
        ({"plan__file": "p.yaml", "plan__data": 1}, "plan.data"),
        ({"plan__file": "p.yaml", "plan__recompute": "none"}, "plan.recompute"),
        ({"plan__file": "p.yaml", "plan__zero1": 2}, "plan.zero1"),
        ({"plan__file": "p.yaml", "plan__stages": 2}, "plan.stages"),
        ({"plan__file": "p.yaml", "plan__pipelines": 1}, "plan.pipelines"),
        ({"plan__file": "p.yaml", "plan__fix": "head fsdp=1"}, "plan.fix"),
        ({"plan__tensor": 1, "plan__sequence_parallel": True}, "plan.sequence_parallel"),
        ({"train__eval_every": 10, "data__eval_fraction": 0.0}, "train.eval_every"),
        ({"buckets__lengths": (16, 64)}, "buckets.lengths"),
        ({"buckets__lengths": (128, 128)}, "buckets.lengths"),
        ({"buckets__lengths": (128,), "buckets__sequences": (2, 4)}, "buckets.sequences"),
        ({"buckets__plans": ("p.yaml",)}, "buckets.plans"),
        ({"buckets__lengths": (128,), "data__packing": True}, "data.packing"),
        ({"buckets__lengths": (128,), "data__dispatch": True}, "data.dispatch"),
        ({"data__dispatch": True, "data__packing": True}, "data.packing"),
        ({"dispatch__row_tokens": (128,)}, "dispatch.row_tokens"),
        ({"data__dispatch": True, "dispatch__row_tokens": (64, 32)}, "dispatch.row_tokens"),
    ],
)
def test_what_cannot_be_meant_names_the_likeliest_culprit(changes, culprit):
    (conflict,) = check(changed(**changes))
    assert conflict.keys[0] == culprit
    assert any(f"; {verb} " in conflict.text for verb in ("write", "keep", "leave"))


def test_options_that_a_model_does_not_have_are_passed_over():
    config = replace(RunConfig(), model=ModelConfig("own.py", (("width", 4),)))
    assert check(config) == ()


def test_every_key_that_a_rule_names_exists():
    known = {f"{n}.{key}" for n, cls in section_classes().items() for key in cls.__annotations__}
    known |= {"model.vocab_size", "model.max_length"}
    cases = test_what_cannot_be_meant_names_the_likeliest_culprit.pytestmark[0].args[1]
    named = {key for changes, _ in cases for c in check(changed(**changes)) for key in c.keys}
    assert named <= known
