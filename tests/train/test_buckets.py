"""A step by buckets has the gradients of one whose sequences are all padded to the longest."""

from __future__ import annotations

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import gpt
from shardpar.capture.trace import trace
from shardpar.errors import DataError, PlanError
from shardpar.lowering.switch import Programs
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import LayerStrategy, Pipeline, Plan, Stage
from shardpar.train.buckets import Bucket, BucketedStep, buckets_of, padded

SHORT, LONG = 8, 32
OPTIONS = gpt.GPTOptions(vocab_size=32, layers=2, width=32, heads=4, max_length=LONG, mlp_ratio=2)


@cache
def captured(length, width=32, weighted=True):
    options = gpt.GPTOptions(**{**OPTIONS.__dict__, "width": width})
    tokens = jax.ShapeDtypeStruct((4, length), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens}
    if weighted:
        batch["weights"] = jax.ShapeDtypeStruct((4, length), jnp.float32)
    return trace(gpt.loss, lambda rngs: gpt.build(options, rngs), batch, causal=True)


def plan(batch, microbatch, devices, **choices):
    stage = Stage(
        tuple(range(devices)), Mesh.factored(devices), (LayerStrategy("embed..outside", **choices),)
    )
    return Plan("test", batch, (Pipeline(batch, microbatch, (stage,)),))


WIDE = plan(8, 8, 8, fsdp=("a", "b", "c"))
NARROW = plan(2, 1, 8, tensor=("b", "c"), context=("a",))


@given(st.lists(st.integers(1, 32), max_size=30))
def test_every_sequence_is_in_the_least_bucket_that_holds_it(lengths):
    bounds = (4, 8, 32)
    found = buckets_of(lengths, bounds)
    assert sorted(itertools.chain(*found.values())) == list(range(len(lengths)))
    for bound, numbers in found.items():
        assert all(min(b for b in bounds if b >= lengths[i]) == bound for i in numbers)
    assert list(found) == sorted(found)


def test_gradients_are_those_of_one_plan_with_everything_padded_to_the_longest():
    random = np.random.default_rng(0)
    lengths = (5, 9, 3, 33, 20, 8, 2, 6, 9, 4, 7, 5, 30)
    sequences = [random.integers(0, 32, n) for n in lengths]
    weights = [random.choice([0.0, 1.0, 0.5], n - 1) for n in lengths]

    programs = Programs(captured(LONG), optax.sgd(0.1))
    step = BucketedStep(
        programs, WIDE, [Bucket(captured(LONG), NARROW), Bucket(captured(SHORT), WIDE)]
    )
    assert list(step.buckets) == [SHORT, LONG]
    state = step.owner.init(0)
    got = step.gathered(state, sequences, weights)

    calm = programs.program(plan(13, 13, 1))
    expected = calm.accumulate(calm.init(0), padded(sequences, LONG, weights=weights))
    np.testing.assert_allclose(np.asarray(got.sums), np.asarray(expected.sums), rtol=1e-5)
    for name, value in expected.grads.items():
        np.testing.assert_allclose(
            np.asarray(got.grads[name]), np.asarray(value), rtol=2e-4, atol=2e-5, err_msg=name
        )
    # The owner computes no long sequence itself, and both lengths share what was lowered.
    assert programs.program(WIDE, captured(SHORT)) is not step.owner

    changed, metrics = step(state, sequences, weights)
    total, weight = np.asarray(expected.sums)
    np.testing.assert_allclose(float(metrics["loss"]), total / weight, rtol=1e-5)
    assert int(changed.step) == 1


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: buckets_of([3, 40], (8, 32)),
            DataError,
            "sequence 1 takes 40 tokens, and buckets hold 1 to 32; cut the sequence, or add a "
            "bound of 40",
        ),
        (
            lambda: buckets_of([3], (8, 8)),
            DataError,
            "bucket bounds [8, 8] must ascend from 1 or more; sort them",
        ),
        (
            lambda: padded([np.arange(3)] * 2, 4, rows=1),
            DataError,
            "2 sequences were given for 1 rows; give more rows",
        ),
        (
            lambda: BucketedStep(
                Programs(captured(LONG), optax.sgd(0.1)), WIDE, [Bucket(captured(LONG), WIDE)] * 2
            ),
            PlanError,
            "buckets of lengths [32, 32] were given; give one or more, each of another length",
        ),
        (
            lambda: BucketedStep(
                Programs(captured(LONG), optax.sgd(0.1)),
                WIDE,
                [Bucket(captured(LONG, weighted=False), WIDE)],
            ),
            PlanError,
            'the loss of the bucket of 32 tokens does not read batch["weights"], so padding would '
            "count; capture it with weights in the batch",
        ),
        (
            lambda: Programs(captured(LONG), optax.sgd(0.1)).program(WIDE, captured(LONG, 64)),
            PlanError,
            "the captured model's blocks.0.down is float32[128, 64], but these programs are of a "
            "model where it is float32[64, 32]; capture the same model, with nothing changed but "
            "the batch",
        ),
    ],
)
def test_what_cannot_be_bucketed_is_refused(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
