"""Small graphs and clusters written by hand, and hypothesis strategies for the spec's values."""

from __future__ import annotations

from hypothesis import strategies as st

from shardpar.errors import SpecError
from shardpar.spec.cluster import Cluster, DeviceKind, Hosts, Link
from shardpar.spec.graph import DTYPE_BYTES, Activation, Layer, LayerClass, LayerGraph, Parameter
from shardpar.spec.mesh import Mesh
from shardpar.spec.plan import TENSOR_DIMS, LayerStrategy, Objective, Pipeline, Plan, Stage

BATCH, LENGTH, WIDTH, HIDDEN, VOCAB = 8, 16, 64, 256, 96

TOKENS = Activation((BATCH, LENGTH), "int32", 0, 1)
STREAM = Activation((BATCH, LENGTH, WIDTH), "float32", 0, 1)
LOGITS = Activation((BATCH, LENGTH, VOCAB), "float32", 0, 1)
LOSS = Activation((), "float32")

TABLE = Parameter("table", (VOCAB, WIDTH), "float32", ("vocab", "embed"))
UP = Parameter("up", (WIDTH, HIDDEN), "float32", ("embed", "mlp"))
DOWN = Parameter("down", (HIDDEN, WIDTH), "float32", ("mlp", "embed"))
SCALE = Parameter("norm.scale", (WIDTH,), "float32", ("embed",))


def layer_class(name, parameters=(), tied=(), inputs=(STREAM,), outputs=(STREAM,), **costs):
    given = {
        "forward_flops": 4e6,
        "backward_flops": 8e6,
        "forward_bytes": 1e6,
        "backward_bytes": 2e6,
        "saved_bytes": (("none", 3e5), ("selective", 1e5)),
        "temp_bytes": 2e5,
        "matmul_flops": 3e6,
        "attention_flops": 1e6,
    }
    return LayerClass(name, parameters, tied, inputs, outputs, **{**given, **costs})


def layered(*names: str) -> LayerGraph:
    """A graph whose layers have these names and nothing in them."""
    layers = tuple(Layer(name, name, "Block") for name in names)
    return LayerGraph("named", BATCH, 128, "float32", (layer_class("Block"),), layers)


def gpt_like(blocks: int = 4, length: int = LENGTH) -> LayerGraph:
    """embed, some blocks, a tied head and what lies outside them."""
    stream = Activation((BATCH, length, WIDTH), "float32", 0, 1)
    tied = Parameter("embed_table", TABLE.shape, TABLE.dtype, TABLE.dims)
    classes = (
        layer_class("Embed", (TABLE,), inputs=(TOKENS,), outputs=(stream,)),
        layer_class("Block", (DOWN, SCALE, UP), inputs=(stream,), outputs=(stream,)),
        layer_class("Head", (SCALE,), (tied,), inputs=(stream,), outputs=(LOGITS,)),
        layer_class("outside", inputs=(LOGITS, TOKENS), outputs=(LOSS,)),
    )
    layers = (
        Layer("embed", "embed", "Embed"),
        *(Layer(f"blocks[{i}]", f"blocks.{i}", "Block") for i in range(blocks)),
        Layer("head", "head", "Head", (("embed_table", "embed.table"),)),
        Layer("outside", "", "outside"),
    )
    return LayerGraph("GPTLike", BATCH, BATCH * length, "float32", classes, layers, causal=True)


def uniform_plan(
    devices: int = 8, *, batch: int = BATCH, microbatch: int | None = None, **strategy
) -> Plan:
    """One pipeline of one stage with one strategy for every layer of `gpt_like`."""
    chosen = LayerStrategy(strategy.pop("layers", "embed..outside"), **strategy)
    stage = Stage(tuple(range(devices)), Mesh.factored(devices), (chosen,))
    return Plan("hand", batch, (Pipeline(batch, microbatch or batch, (stage,)),))


def cluster_of(hosts: int = 1, devices: int = 8, **kind) -> Cluster:
    rates = {"matmul_flops": (("bfloat16", 4e14), ("float32", 1e14)), "memory_bytes": 16e9}
    sheet = DeviceKind("x", **{**rates, "memory_bandwidth": 1e12, **kind})
    return Cluster("x", (sheet,), (Hosts("x", devices, hosts),), Link(1e11), Link(1e10, 5e-5))


# Hypothesis strategies. Names are any text: YAML must quote what it would otherwise misread.

words = st.text(min_size=1, max_size=8)
misread = st.sampled_from(
    ["1e5", "no", "null", "~", "12", "2001-01-01", "a: b", "#", "", " x ", "="]
)
names = words | misread
axes = st.sampled_from(["a", "b", "c", "data", "y", "n", "no", "on", "null", "é", "true"])
rates = st.floats(1e-9, 1e30) | st.integers(1, 10**18).map(float)
seconds = st.floats(0, 1e6)
sources = st.sampled_from(["measured", "datasheet", "assumed"])
divisors = st.integers(1, 6)


@st.composite
def meshes(draw, most: int = 16):
    """Meshes of at most `most` devices."""
    sizes, rest = [], most
    while rest > 1 and draw(st.booleans()):
        sizes.append(draw(st.integers(1, rest)))
        rest //= sizes[-1]
    chosen = draw(st.lists(axes, min_size=len(sizes), max_size=len(sizes), unique=True))
    return Mesh(tuple(zip(chosen, sizes, strict=True)))


@st.composite
def dealt(draw, mesh: Mesh, hands: int):
    """The axes of a mesh, in some order, dealt to this many hands; some stay undealt."""
    out = [[] for _ in range(hands)]
    for axis in draw(st.permutations(mesh.names)):
        hand = draw(st.integers(0, hands))
        if hand < hands:
            out[hand].append(axis)
    return tuple(map(tuple, out))


@st.composite
def layer_strategies(draw, mesh: Mesh):
    tensor, fsdp, zero1 = draw(dealt(mesh, 3))
    data = draw(st.permutations(mesh.without(tensor)))
    return LayerStrategy(
        draw(names),
        tensor,
        fsdp,
        zero1,
        bool(tensor) and draw(st.booleans()),
        draw(st.sampled_from(["none", "selective", "full"])),
        tuple(data[: draw(st.integers(0, len(data)))]),
        draw(st.sampled_from(["gather", "heads"])),
    )


@st.composite
def plans(draw):
    pipelines, first = [], 0
    for _ in range(draw(st.integers(1, 3))):
        stages = []
        for _ in range(draw(st.integers(1, 3))):
            mesh = draw(meshes())
            devices = draw(st.permutations(range(first, first + mesh.num_devices)))
            first += mesh.num_devices
            strategies = draw(st.lists(layer_strategies(mesh), min_size=1, max_size=3))
            peak = draw(st.none() | rates)
            stages.append(Stage(tuple(devices), mesh, tuple(strategies), peak))
        microbatch = draw(divisors)
        pipelines.append(
            Pipeline(
                microbatch * draw(divisors),
                microbatch,
                tuple(stages),
                draw(st.sampled_from(["1f1b", "gpipe"])),
            )
        )
    dims = draw(st.just(TENSOR_DIMS) | st.lists(names, max_size=3).map(tuple))
    objective = draw(st.none() | st.builds(Objective, seconds, seconds, seconds))
    zero = draw(st.sampled_from(["none", "pipelines"])) if len(pipelines) > 1 else "none"
    batch = sum(p.sequences for p in pipelines)
    return Plan(draw(names), batch, tuple(pipelines), objective, dims, zero)


dtypes = st.sampled_from(sorted(DTYPE_BYTES))
links = st.builds(Link, rates, seconds, sources, names)
kinds = st.builds(
    DeviceKind,
    names,
    st.lists(st.tuples(dtypes, rates), min_size=1, max_size=3, unique_by=lambda p: p[0]).map(tuple),
    rates,
    rates,
    st.floats(0.01, 1.0),
    sources,
    names,
    st.just(0.0) | st.floats(0, 4),
)


@st.composite
def clusters(draw):
    listed = tuple(draw(st.lists(kinds, min_size=1, max_size=3, unique_by=lambda kind: kind.name)))
    hosts = st.builds(Hosts, st.sampled_from([kind.name for kind in listed]), divisors, divisors)
    chosen = tuple(draw(st.lists(hosts, min_size=1, max_size=3)))
    cluster = Cluster(draw(names), listed, chosen, draw(links), draw(links))
    slow = draw(
        st.dictionaries(
            st.integers(0, cluster.num_devices - 1),
            st.sampled_from([0.4, 1 / 3]) | st.floats(1e-6, 1),
            max_size=3,
        )
    )
    try:
        return cluster.slowed(slow)
    except SpecError:  # The rate of a slow kind, made slower, may be too small to be one.
        return cluster


shapes = st.lists(st.integers(0, 10**6), max_size=3).map(tuple)


@st.composite
def parameters(draw):
    shape = draw(shapes)
    dims = draw(st.lists(st.none() | names, min_size=len(shape), max_size=len(shape)))
    return Parameter(draw(names), shape, draw(dtypes), tuple(dims))


@st.composite
def activations(draw):
    shape = draw(shapes)
    dim = st.none() if not shape else st.none() | st.integers(0, len(shape) - 1)
    return Activation(shape, draw(dtypes), draw(dim), draw(dim))


def _by_recompute(*keys):
    """Bytes for these recompute choices, or nothing."""
    return st.just(()) | st.tuples(*(st.tuples(st.just(key), seconds) for key in keys))


def _tuples(strategy):
    return st.lists(strategy, max_size=2).map(tuple)


@st.composite
def graphs(draw):
    listed = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    classes = tuple(
        LayerClass(
            name,
            draw(_tuples(parameters())),
            draw(_tuples(parameters())),
            draw(_tuples(activations())),
            draw(_tuples(activations())),
            *(draw(seconds) for _ in range(4)),
            saved_bytes=(
                ("none", draw(seconds)),
                *draw(_by_recompute("gathered")),
                ("selective", draw(seconds)),
            ),
            temp_bytes=draw(seconds),
            matmul_flops=draw(seconds),
            attention_flops=draw(seconds),
            whole_bytes=draw(_by_recompute("none", "gathered", "selective")),
            scratch_bytes=draw(_by_recompute("none", "selective", "full")),
            fixed_bytes=draw(_by_recompute("none", "selective", "full")),
            views_bytes=draw(seconds),
        )
        for name in listed
    )
    tied = st.dictionaries(names, names, max_size=2).map(lambda d: tuple(sorted(d.items())))
    layers = tuple(
        Layer(name, draw(names), draw(st.sampled_from(listed)), draw(tied))
        for name in draw(st.lists(names, max_size=4, unique=True))
    )
    return LayerGraph(
        draw(names), draw(divisors), draw(divisors), draw(names), classes, layers,
        draw(st.booleans()),
    )  # fmt: skip
