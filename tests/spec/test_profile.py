"""Profiles: fits against another solver, what a cluster concludes of one, text and its errors."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from shardpar.errors import SpecError
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.profile import (
    COLLECTIVES,
    RING,
    CollectiveCurve,
    Fit,
    HardwareProfile,
    LayerFigures,
    LayerProfile,
    LayerTime,
    MatmulTime,
    MemoryTime,
    ModelProfile,
    Overlap,
    Timed,
    collective_curve,
    fit,
    layer_profile,
    measured_cluster,
    ring_link,
    ring_share,
)
from shardpar.spec.profile_text import (
    hardware_from_text,
    hardware_to_text,
    model_from_text,
    model_to_text,
)
from tests.spec.values import dtypes, names, rates, seconds

SIZES = [2**10 * 4**power for power in range(9)]


def exactly(value):
    return Timed(value, value)


# Fits.


def noisy(value, share, generator):
    """As on a busy machine: never faster, sometimes slower."""
    return value * (1 + share * generator.random())


@pytest.mark.parametrize("seed", range(5))
def test_a_fit_recovers_latency_and_bandwidth_from_noisy_timings(seed):
    generator = random.Random(seed)
    latency_s, bandwidth = 20e-6, 12e9
    times = [(n, exactly(noisy(latency_s + n / bandwidth, 0.05, generator))) for n in SIZES]
    curve = collective_curve("all-gather", 4, times)
    assert curve.latency_s == pytest.approx(latency_s, rel=0.06)
    assert curve.bandwidth == pytest.approx(bandwidth, rel=0.06)
    assert 0 < curve.residual < 0.05
    assert curve.seconds(10**6) == pytest.approx(latency_s + 10**6 / bandwidth, rel=0.06)


def test_small_messages_decide_the_latency_however_long_the_large_ones_take():
    # By absolute errors, one percent of the largest would be a hundred latencies.
    times = [(n, exactly(10e-6 + n / 1e9)) for n in SIZES]
    times[-1] = (SIZES[-1], exactly(1.01 * (10e-6 + SIZES[-1] / 1e9)))
    assert collective_curve("all-reduce", 2, times).latency_s == pytest.approx(10e-6, rel=0.02)


def test_the_residual_is_how_far_the_line_is_from_the_timings():
    line = fit([(1, 1.0), (2, 2.0), (3, 3.0)])
    assert (line.fixed_s, line.per_unit_s, line.residual) == (0, 1, 0)
    points = [(1.0, 1.1), (2.0, 1.8), (4.0, 4.5), (8.0, 7.5)]
    line = fit(points)
    errors = [(line.seconds(x) - s) / s for x, s in points]
    by_hand = math.sqrt(sum(e * e for e in errors) / len(errors))
    assert line.residual == pytest.approx(by_hand, rel=1e-2)


@given(
    st.lists(
        st.tuples(st.floats(1, 1e9), st.floats(1e-6, 1e2)),
        min_size=2, max_size=12, unique_by=lambda point: point[0],
    )
)  # fmt: skip
def test_a_fit_is_that_of_another_solver(points):
    line = fit(points)
    # Columns are scaled alike, or the other solver's tolerance hides one of them.
    largest = max(x for x, _ in points)
    matrix = np.array([[1 / s, x / largest / s] for x, s in points])
    scale = np.linalg.norm(matrix, axis=0)
    _, norm = nnls(matrix / scale, np.ones(len(points)))
    assert line.residual == pytest.approx(norm / math.sqrt(len(points)), rel=1e-2, abs=1e-3)


def test_a_line_needs_two_sizes():
    with pytest.raises(SpecError, match=r"two sizes or more; got \[\(2, 1.0\), \(2, 1.1\)\]"):
        fit([(2, 1.0), (2, 1.1)])


def test_a_bandwidth_that_noise_hides_is_that_of_the_largest_message():
    curve = collective_curve("all-reduce", 2, [(10, exactly(2.0)), (1000, exactly(1.0))])
    assert curve.bandwidth == 1000
    assert curve.latency_s > 0


@pytest.mark.parametrize("seed", range(5))
def test_one_link_explains_all_ring_collectives(seed):
    generator = random.Random(seed)
    hop_s, bandwidth = 4e-6, 50e9
    curves = []
    for kind in RING:
        for group in (2, 4, 8):
            # An all-reduce is a reduce-scatter and an all-gather of the same array.
            moved = (2 if kind == "all-reduce" else 1) * (group - 1) / group
            times = [
                (n, exactly(noisy((group - 1) * hop_s + moved * n / bandwidth, 0.04, generator)))
                for n in SIZES
            ]
            curves.append(collective_curve(kind, group, times))
    # What the planner does not price as a ring must not count.
    odd = CollectiveCurve("all-to-all", 8, ((1024, exactly(9.0)),), 9.0, 1.0, 0.0)
    found_bandwidth, found_s, residual = ring_link([*curves, odd])
    assert found_bandwidth == pytest.approx(bandwidth, rel=0.04)
    assert found_s == pytest.approx(hop_s, rel=0.04)
    assert residual < 0.04


def test_a_link_needs_a_ring_collective():
    with pytest.raises(SpecError, match="a link cannot be told without one"):
        ring_link([])


def test_a_ring_moves_what_its_steps_move():
    for group in (2, 3, 8):
        hops, share = ring_share("all-gather", group)
        # Each of the others' parts passes each device once.
        assert (hops, share) == (group - 1, pytest.approx(sum([1 / group] * (group - 1))))
        assert ring_share("all-reduce", group)[1] == 2 * share


# What was measured.


def test_the_flops_of_a_product_are_its_products_and_sums():
    size = 7
    count = 0
    for _ in range(size):
        for _ in range(size):
            for _ in range(size):
                count += 2  # one product, added to a sum
    assert MatmulTime("float32", size, exactly(0.5)).flops == count / 0.5


def test_an_add_moves_three_arrays_and_a_scale_two():
    assert MemoryTime("add", 10, Timed(2.0, 3.0)).bandwidth == 15
    assert MemoryTime("scale", 10, Timed(2.0, 3.0)).bandwidth == 10


@pytest.mark.parametrize(
    ("together_s", "slowdown", "hidden"),
    [(6.0, 1.5, 0.0), (4.0, 1.0, 1.0), (5.0, 1.25, 0.5), (9.0, 2.25, 0.0), (3.9, 0.975, 1.0)],
)
def test_overlap_is_what_the_shorter_one_did_not_add(together_s, slowdown, hidden):
    overlap = Overlap(2, 8, compute_s=4.0, collective_s=2.0, together_s=together_s)
    assert overlap.slowdown == pytest.approx(slowdown)
    assert overlap.hidden == pytest.approx(hidden)


def taking(size, flops):
    return exactly(2 * size**3 / flops)


def hardware(matmuls=None, **changed):
    fields = {
        "cluster": "here",
        "device": "NVIDIA H100 80GB HBM3",
        "platform": "gpu",
        "devices": 2,
        "command": "shardpar profile hardware",
        "jax": "0.10.2",
        "matmuls": matmuls
        or (
            MatmulTime("float32", 256, taking(256, 10e12)),
            MatmulTime("float32", 1024, taking(1024, 30e12)),
            MatmulTime("float32", 4096, taking(4096, 80e12)),
            MatmulTime("bfloat16", 1024, taking(1024, 400e12)),
            MatmulTime("bfloat16", 4096, taking(4096, 700e12)),
        ),
        "memory": (
            MemoryTime("scale", 10**6, exactly(1e-7)),  # in a cache
            MemoryTime("scale", 10**9, exactly(1e-3)),
            MemoryTime("add", 10**9, exactly(1e-3)),
        ),
    }
    return HardwareProfile(**{**fields, **changed})


H100 = DeviceKind(
    "h100", (("bfloat16", 989e12), ("float32", 67e12)), 80e9, 3.35e12, note="NVIDIA datasheet"
)
KNOWN = Cluster("h100x2", (H100,), (Hosts("h100", 2),), Link(450e9), Link(5e10))
UNKNOWN = Cluster(
    "cpux2",
    (DeviceKind("cpu", (("float32", 5e10),), 8e9, 1e10, source="assumed"),),
    (Hosts("cpu", 2),),
    Link(5e9, source="assumed"),
    Link(1e9),
)


def test_a_datasheets_peak_stays_and_efficiency_is_the_best_products_share_of_it():
    found = measured_cluster(KNOWN, hardware())
    (kind,) = found.kinds
    assert kind.matmul_flops == H100.matmul_flops
    assert kind.efficiency == pytest.approx(700 / 989, rel=1e-3)
    assert kind.memory_bandwidth == pytest.approx(3e12)
    assert (kind.memory_bytes, kind.source) == (80e9, "measured")
    for words in ("shardpar profile hardware", "bfloat16 700 TFLOP/s", "NVIDIA datasheet"):
        assert words in kind.note
    # No collective was timed: the datasheet's link stays, and says so.
    assert (found.intra_host, found.name) == (KNOWN.intra_host, "here")


def test_an_efficiency_is_never_above_one():
    fast = (MatmulTime("bfloat16", 64, taking(64, 2000e12)),)
    assert measured_cluster(KNOWN, hardware(fast)).kinds[0].efficiency == 1


def test_without_a_datasheet_the_best_rate_is_the_peak_and_the_usual_one_its_share():
    matmuls = tuple(
        MatmulTime(dtype, size, taking(size, rate * scale))
        for dtype, scale in (("float32", 1.0), ("bfloat16", 0.5))
        # The smallest is less than a quarter of the largest: too small to count as usual.
        for size, rate in ((64, 1e9), (256, 80e9), (512, 100e9), (1024, 60e9))
    )
    (kind,) = measured_cluster(UNKNOWN, hardware(matmuls)).kinds
    assert dict(kind.matmul_flops) == {"float32": 100e9, "bfloat16": 50e9}
    assert kind.efficiency == pytest.approx(0.8)
    assert kind.flops("float32") * kind.efficiency == pytest.approx(80e9)


def test_a_link_is_fitted_to_the_collectives():
    curve = collective_curve("all-gather", 2, [(n, exactly(1e-5 + n / 2 / 3e9)) for n in SIZES])
    link = measured_cluster(UNKNOWN, hardware(collectives=(curve,))).intra_host
    assert link.bandwidth == pytest.approx(3e9, rel=1e-3)
    assert link.latency_s == pytest.approx(1e-5, rel=1e-3)
    assert link.source == "measured"
    assert "over 2 devices; the fit is 0% off" in link.note


def test_lines_of_a_layer_go_through_its_full_lengths_only():
    times = [
        LayerTime(batch, length, exactly(length * batch * 1e-3), exactly(1e-3 + batch * 3e-3))
        for batch, length in ((1, 64), (2, 64), (4, 64), (2, 32))
    ]
    profile = layer_profile("Block", 4, FIGURES, times, length=64)
    assert profile.forward == Fit(0, 0.064, 0)
    assert profile.forward_backward == Fit(0.001, 0.003, 0)
    assert profile.times == tuple(times)
    alone = layer_profile("Block", 4, FIGURES, times[:1], length=64)
    assert (alone.forward, alone.forward_backward) == (None, None)


FIGURES = LayerFigures(
    1e9, 2e9, 1e6, 2e6, 4e6, 5e5, (("none", 3e6), ("selective", 2e6), ("full", 1e6))
)


# Text.

timings = st.tuples(st.floats(1e-9, 1e3), st.floats(1, 10)).map(lambda t: Timed(t[0], t[0] * t[1]))
counts = st.integers(1, 2**40)
figures = st.floats(0, 1e18)
curves = st.builds(
    CollectiveCurve,
    st.sampled_from(COLLECTIVES),
    st.integers(2, 512),
    st.lists(st.tuples(counts, timings), min_size=1, max_size=3).map(tuple),
    seconds,
    rates,
    seconds,
)
overlaps = st.builds(
    Overlap, counts, counts, *(st.floats(1e-9, 1e3) for _ in range(3))
)  # fmt: skip
profiles = st.builds(
    HardwareProfile,
    names,
    names,
    names,
    counts,
    names,
    names,
    st.lists(st.builds(MatmulTime, dtypes, counts, timings), min_size=1, max_size=3).map(tuple),
    st.lists(
        st.builds(MemoryTime, st.sampled_from(["scale", "add"]), counts, timings),
        min_size=1, max_size=3,
    ).map(tuple),
    st.lists(curves, max_size=2).map(tuple),
    st.none() | overlaps,
)  # fmt: skip
fits = st.none() | st.builds(Fit, seconds, seconds, seconds)
layers = st.builds(
    LayerProfile,
    names,
    counts,
    st.builds(
        LayerFigures,
        *(figures for _ in range(6)),
        st.tuples(figures, figures, figures).map(
            lambda saved: tuple(zip(("none", "selective", "full"), saved, strict=True))
        ),
    ),
    st.lists(st.builds(LayerTime, counts, counts, timings, timings), max_size=3).map(tuple),
    fits,
    fits,
)
models = st.builds(
    ModelProfile,
    names,
    counts,
    counts,
    dtypes,
    names,
    names,
    names,
    st.lists(layers, max_size=3, unique_by=lambda layer: layer.name).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(profiles)
def test_a_hardware_profile_read_back_is_equal(profile):
    text = hardware_to_text(profile)
    assert hardware_from_text(text) == profile
    assert hardware_to_text(hardware_from_text(text)) == text


@settings(deadline=None, max_examples=60)
@given(models)
def test_a_model_profile_read_back_is_equal(profile):
    text = model_to_text(profile)
    assert model_from_text(text) == profile
    assert model_to_text(model_from_text(text)) == text


CURVE = collective_curve("all-reduce", 2, [(n, Timed(1e-5 + n / 1e9, 1e-4 + n)) for n in SIZES])
HARDWARE = hardware_to_text(hardware(collectives=(CURVE,), overlap=Overlap(2, 1024, 4.0, 2.0, 5.0)))
ONCE = LayerTime(1, 64, Timed(1.0, 2.0), Timed(2.0, 2.5))
MODEL = model_to_text(
    ModelProfile(
        "GPT", 8, 64, "float32", "cpu", "shardpar profile model", "0.10.2",
        (layer_profile("Block", 4, FIGURES, [ONCE], 64),),
    )
)  # fmt: skip
READ = {"hardware": hardware_from_text, "model": model_from_text}
GOOD = {"hardware": HARDWARE, "model": MODEL}


def test_a_hardware_profile_says_that_it_was_measured():
    assert "\nsource: measured\n" in HARDWARE
    with pytest.raises(SpecError, match=r"p line 9: source: invalid enum value 'assumed'"):
        hardware_from_text(HARDWARE.replace("source: measured", "source: assumed"), "p")


def test_every_figure_of_a_model_profile_is_captured_or_measured():
    number = re.compile(r"\d")
    section = None
    head = {"model", "batch", "length", "compute_dtype", "device", "command", "jax", "layers"}
    for line in MODEL.splitlines():
        if line.startswith(("#", "format")):
            continue
        indent, key = len(line) - len(line.lstrip()), line.strip(" -").partition(":")[0]
        if key in ("captured", "measured"):
            section, depth = key, indent
        elif section and indent <= depth and not line.strip().startswith("-"):
            section = None
        if number.search(line.partition(":")[2]) and key not in head:
            assert section in ("captured", "measured"), line


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        (
            "hardware", "size: 256, best_s", "size: 0, best_s",
            "p line {line}: matmuls[0].size: expected `int` >= 1",
        ),
        (
            "hardware", "size: 256, best_s", "size: big, best_s",
            "p line {line}: matmuls[0].size: expected `int`, got `str`",
        ),
        (
            "hardware", "dtype: float32, size: 256", "dtype: fp32, size: 256",
            "p line {line}: matmuls[0]: there is no dtype fp32; write one of bool, int8",
        ),
        (
            "hardware", "op: add", "op: sub",
            "p line {line}: memory[2].op: invalid enum value 'sub'; write scale or add",
        ),
        (
            "hardware", "num_bytes: 1000000,", "num_bytes: -1,",
            "p line {line}: memory[0].num_bytes: expected `int` >= 1",
        ),
        (
            "hardware", "kind: all-reduce", "kind: allreduce",
            "p line {line}: collectives[0].kind: invalid enum value 'allreduce'; write all-reduce, "
            "all-gather, reduce-scatter, all-to-all or collective-permute",
        ),
        (
            "hardware", f"bandwidth: {CURVE.bandwidth}", "bandwidth: 0",
            "p line {line}: collectives[0].bandwidth: expected `float` > 0.0",
        ),
        (
            "hardware", f"bandwidth: {CURVE.bandwidth}", "bandwidth: .inf",
            "p line {line}: collectives[0]: all-reduce over 2: bandwidth is inf; write a positive "
            "number",
        ),
        (
            "hardware", f"bandwidth: {CURVE.bandwidth}", "bandwith: 1",
            'p line {line}: collectives[0]: unknown key "bandwith"; did you mean "bandwidth"?',
        ),
        (
            "hardware", "group_size: 2\n", "group_size: 1\n",
            "p line {line}: collectives[0].group_size: expected `int` >= 2",
        ),
        (
            "hardware", "compute_s: 4.0", "compute_s: -4.0",
            "p line {line}: overlap.compute_s: expected `float` > 0.0",
        ),
        (
            "hardware", "devices: 2\n", "",
            "p line 4: object missing required field `devices`",
        ),
        (
            "hardware", "shardpar-hardware-profile/1", "shardpar-cluster/1",
            "p: format is 'shardpar-cluster/1'; this version reads \"shardpar-hardware-profile/1\"",
        ),
        (
            "model", "median_s: 2.0", "median_s: 0.5",
            "p line {line}: classes[0].measured.times[0]: median_s is 0.5, less than best_s, which "
            "is 1.0; the least of several timings cannot be above their median",
        ),
        (
            "model", "forward_flops: 1000000000.0", "forward_flops: -1",
            "p line {line}: classes[0].captured.forward_flops: expected `float` >= 0.0",
        ),
        (
            "model", "selective: 2000000.0, ", "",
            "p line 21: classes[0].captured.saved_bytes: object missing required field `selective`",
        ),
        (
            "model", "compute_dtype: float32", "compute_dtype: fp32",
            "p line {line}: profile of GPT: compute_dtype is fp32; write one of bool, int8",
        ),
        (
            "model", "layers: 4", "layers: 0",
            "p line {line}: classes[0].layers: expected `int` >= 1",
        ),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_one_error_that_says_where(kind, old, new, message):
    assert old in GOOD[kind]
    line = GOOD[kind][: GOOD[kind].index(old)].count("\n") + 1
    with pytest.raises(SpecError) as error:
        READ[kind](GOOD[kind].replace(old, new, 1), "p")
    assert str(error.value).startswith(message.replace("{line}", str(line)))


scraps = st.sampled_from(
    [
        "",
        "0",
        "-1",
        ".nan",
        ".inf",
        "1e400",
        "null",
        "true",
        "[]",
        "{}",
        "{a: 1}",
        "'x'",
        "*a",
        "- ",
    ]
)


@pytest.mark.parametrize("kind", GOOD)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_profile_is_read_or_refused(kind, data):
    lines = GOOD[kind].splitlines()
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(3, len(lines) - 1))
        places = [m.span() for m in re.finditer(r"[\w.+/-]+", lines[at])] or [(0, 0)]
        start, end = data.draw(st.sampled_from(places))
        lines[at] = lines[at][:start] + data.draw(scraps) + lines[at][end:]
    message = "p: read"
    try:
        READ[kind]("\n".join(lines), "p")
    except SpecError as error:
        message = str(error)
    assert re.match(r"p( line \d+)?: \S", message)
