"""Compilers of machines that are not here: which they are, and what they say of a program.

Run as a script, it compiles the tiny GPT for one target and prints what came of it: libtpu can be
loaded by one process at a time, and XLA reads its flags once, so each compile has its own process.

python -m tests.lowering.test_target CLUSTER
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import optax
import pytest

from shardpar.errors import TargetError
from shardpar.lowering import target as module
from shardpar.lowering.gpu_descriptions import GPUS
from shardpar.lowering.program import Program
from shardpar.lowering.target import (
    Target,
    compile_for,
    prepare_environment,
    target_of,
    torus,
)
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.text import cluster_from_text

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "configs" / "clusters"
TAKEN = "libtpu multi-process lockfile"
TPU_FREE_WITHIN_S = 300


def cluster_named(name: str) -> Cluster:
    return cluster_from_text((CLUSTERS / f"{name}.yaml").read_text(), name)


def cluster(*kinds: str, devices: int = 8, hosts: int = 1) -> Cluster:
    return Cluster(
        "c",
        tuple(DeviceKind(kind, (("bfloat16", 1e14),), 1e10, 1e12) for kind in dict.fromkeys(kinds)),
        tuple(Hosts(kind, devices, hosts) for kind in kinds),
        Link(1e11),
        Link(1e10),
    )


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("tpu-v5e-8", "v5e:2x4"),
        ("tpu-v5e-16", "v5e:4x4"),
        ("tpu-v5p-64", "v5p:4x4x4"),
        ("tpu-v6e-8", "v6e:2x4"),
        ("h100x8", "h100:1x8"),
        ("h100x64", "h100:8x8"),
        ("l40sx8", "l40s:1x8"),
        ("rtx4090x8", "rtx4090:1x8"),
    ],
)
def test_a_cluster_that_comes_with_shardpar_stands_for_a_target(name, target):
    assert str(target_of(cluster_named(name))) == target


def test_every_bundled_cluster_of_one_kind_has_a_compiler():
    for file in sorted(CLUSTERS.glob("*.yaml")):
        found = cluster_from_text(file.read_text())
        if len(found.kinds) == 1 and found.kinds[0].name != "cpu":
            assert math.prod(target_of(found).shape) == found.num_devices


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            cluster("h100", "h20"),
            'cluster "c" has devices of kinds h100, h20; one program is compiled for one kind: '
            "verify a cluster file of each kind alone",
        ),
        (
            cluster("abacus"),
            'no compiler is known for devices of kind "abacus"; known are tpu-v5e, tpu-v5p, '
            f"tpu-v6e, {', '.join(GPUS)}: name the kind after one of them in the cluster file",
        ),
        (
            cluster("tpu-v5e", devices=6),
            "a TPU slice has a power of two of chips; the cluster has 6",
        ),
    ],
)
def test_a_cluster_without_a_compiler_is_refused(given, message):
    with pytest.raises(TargetError) as error:
        target_of(given)
    assert str(error.value) == message


def test_hosts_of_different_sizes_are_refused_for_gpus():
    kind = DeviceKind("h100", (("bfloat16", 1e14),), 1e10, 1e12)
    uneven = Cluster("c", (kind,), (Hosts("h100", 8), Hosts("h100", 4)), Link(1e11), Link(1e10))
    with pytest.raises(TargetError, match=r"hosts with \[4, 8\] devices"):
        target_of(uneven)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("power", range(11))
def test_a_torus_has_all_chips_and_sides_that_differ_by_a_factor_of_two(power, dims):
    sides = torus(2**power, dims)
    assert len(sides) == dims
    assert math.prod(sides) == 2**power
    assert max(sides) <= 2 * min(sides)
    assert sorted(sides) == list(sides)


@pytest.mark.parametrize(
    ("platform", "hint"),
    [
        ("tpu", "needs the wheel libtpu, which is not installed; run: pip install "
         "'shardpar[tpu-aot]'"),
        ("cuda", "needs the wheel jax_cuda12_plugin, which is not installed; run: pip install "
         "'shardpar[cuda-aot]'"),
    ],
)  # fmt: skip
def test_a_compiler_that_is_not_installed_is_named_with_its_extra(platform, hint, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError) as error:
        Target(platform, "v5e", (2, 4)).devices()
    assert hint in str(error.value)


class Refuses:
    """A lowered program whose compiler says no."""

    def __init__(self, message: str) -> None:
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.",
         int(20.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: Used 512.00MiB of 1M", 512 * 2**20),
        ("Out of memory while trying to allocate", 0),
    ],
)  # fmt: skip
def test_a_refusal_for_lack_of_memory_is_an_answer(message, needed):
    compiled = compile_for(Target("tpu", "v5e", (2, 4)), Refuses(message))
    assert (compiled.fits, compiled.needed_bytes) == (False, needed)


def test_another_refusal_is_an_error_of_one_line():
    with pytest.raises(TargetError) as error:
        compile_for(Target("tpu", "v5e", (2, 4)), Refuses("INTERNAL: no\nand much more"))
    assert str(error.value) == "v5e:2x4: the compiler failed: INTERNAL: no"


# With the compilers.

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="no libtpu; pip install 'shardpar[tpu-aot]'",
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="no jax_cuda12_plugin; pip install 'shardpar[cuda-aot]'",
)
one_at_a_time = pytest.mark.xdist_group("aot")
STRATEGY = {"fsdp": ("a",), "tensor": ("b", "c"), "sequence_parallel": True}


def program(devices=None) -> Program:
    """The tiny GPT, tensor parallel by 4 and fsdp by 2."""
    from tests.lowering.tiny import captured, uniform

    return Program(captured(), uniform(8, **STRATEGY), optax.adamw(1e-3), devices=devices)


def compiled_for(name: str) -> SimpleNamespace:
    """What a fresh process says of `program` compiled for a bundled cluster."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    tries_until = time.monotonic() + TPU_FREE_WITHIN_S
    while True:
        done = subprocess.run(
            [sys.executable, "-m", "tests.lowering.test_target", name],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        # Another session's compile holds libtpu's lock.
        if TAKEN not in done.stderr or time.monotonic() > tries_until:
            break
        time.sleep(5)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(**json.loads(done.stdout.splitlines()[-1]))


def is_the_program_of_this_machine(found: SimpleNamespace) -> None:
    """Asserts that the target holds the state that CPUs here would, and does the plan's moves."""
    memory = program().lower_step().compile().memory_analysis()
    # A TPU pads small arrays to whole tiles of 8 x 128.
    assert found.argument_bytes >= memory.argument_size_in_bytes
    assert found.argument_bytes <= memory.argument_size_in_bytes * (
        1 if found.platform == "cuda" else 8
    )
    assert found.temp_bytes > 0 or found.platform == "tpu"  # all of it may be in vector memory
    assert found.needed_bytes == found.argument_bytes + found.temp_bytes
    assert found.fits
    assert all(count > 0 and num_bytes > 0 for _, _, count, num_bytes in found.collectives)
    # Sums of scalars, the loss and the gradient's norm, may go over all devices at once.
    arrays = {(kind, size) for kind, size, _, num_bytes in found.collectives if num_bytes > 1024}
    # fsdp gathers weights over 2 devices, tensor parallelism activations over 4.
    assert {size for _, size in arrays} == {2, 4}
    assert {("all-gather", 2), ("all-gather", 4)} <= arrays
    assert {("reduce-scatter", 2), ("all-reduce", 2)} & arrays


@needs_tpu
@one_at_a_time
@pytest.mark.slow
def test_a_step_is_compiled_for_a_tpu_slice():
    found = compiled_for("tpu-v5e-8")
    assert found.target == "v5e:2x4"
    is_the_program_of_this_machine(found)


@needs_cuda
@one_at_a_time
@pytest.mark.slow
def test_a_step_is_compiled_for_gpus():
    found = compiled_for("h100x8")
    assert found.target == "h100:1x8"
    is_the_program_of_this_machine(found)


@needs_tpu
@one_at_a_time
@pytest.mark.manual
@pytest.mark.parametrize("name", ["tpu-v6e-8"])
def test_a_step_is_compiled_for_other_tpus(name):
    is_the_program_of_this_machine(compiled_for(name))


@needs_cuda
@one_at_a_time
@pytest.mark.manual
@pytest.mark.parametrize("name", ["a100x8", "h200x8", "h20x8", "l40sx8", "rtx4090x8"])
def test_a_step_is_compiled_for_other_gpus(name):
    is_the_program_of_this_machine(compiled_for(name))


def main() -> None:
    prepare_environment()
    found = target_of(cluster_named(sys.argv[1]))
    compiled = compile_for(found, program(found.devices()).lower_step())
    print(json.dumps({
        **dataclasses.asdict(compiled),
        "platform": found.platform,
        "collectives": [dataclasses.astuple(c) for c in compiled.collectives],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
