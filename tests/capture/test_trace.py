"""The layer graph: classes, costs against hand arithmetic, dims found by tracing twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import shardpar
from models import gpt
from shardpar.capture.trace import trace
from shardpar.errors import CaptureError
from shardpar.spec.graph import Activation
from shardpar.spec.text import graph_from_text, graph_to_text
from tests.capture import nets
from tests.capture.nets import WIDTH, Dense, X, given_rngs, mse


def shapes_of(**arrays):
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in arrays.items()}


def layers(captured):
    return [(layer.name, layer.class_name) for layer in captured.graph.layers]


def class_named(captured, name):
    return class_named_in(captured.graph, name)


def class_named_in(graph, name):
    return next(cls for cls in graph.classes if cls.name == name)


@shardpar.layer
class Wide(nnx.Module):
    """A matrix product, a bias and a tanh, of any size."""

    def __init__(self, rngs, width, out):
        self.linear = nnx.Linear(width, out, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.linear(x))


def test_a_dense_layer_costs_what_it_does_on_paper():
    batch, width, out = 32, 64, 128
    captured = trace(
        mse, lambda rngs: Wide(rngs, width, out), shapes_of(x=(batch, width)), causal=True
    )
    cls = class_named(captured, "Wide")
    product = 2 * batch * width * out
    assert cls.matmul_flops == product
    assert cls.attention_flops == 0
    # XLA counts one operation per added bias and per tanh, or a few for its approximation.
    assert product < cls.forward_flops <= product + 40 * batch * out
    # Backward: one product for the input's gradient, one for the kernel's.
    assert 2 * product < cls.backward_flops <= 2 * product + 40 * batch * out
    item = 4
    once = item * (batch * width + width * out + out + batch * out)
    assert once <= cls.forward_bytes <= 5 * once
    assert cls.backward_bytes > cls.forward_bytes / 2
    assert cls.inputs == (Activation((batch, width), "float32", 0, None),)
    assert cls.outputs == (Activation((batch, out), "float32", 0, None),)
    # tanh keeps y and 1 - y for its backward; selective keeps the product it starts from.
    one = item * batch * out
    assert dict(cls.saved_bytes) == {"none": 2 * one, "selective": one}
    assert cls.saved("full") == cls.input_bytes == item * batch * width
    assert captured.graph.num_parameters == width * out + out
    assert captured.graph.tokens == captured.graph.batch == batch
    assert captured.graph.flops_per_token == 3 * product / batch


SIZES = {"vocab_size": 256, "layers": 4, "width": 256, "heads": 4, "max_length": 128}
B, T = 8, 128
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def small_gpt():
    tokens = {k: jax.ShapeDtypeStruct((B, T), jnp.int32) for k in ("inputs", "targets")}
    notes = []
    captured = trace(
        gpt.loss,
        lambda rngs: gpt.build(gpt.GPTOptions(**SIZES), rngs),
        tokens,
        causal=True,
        notify=notes.append,
    )
    return captured, notes


def test_a_gpt_is_a_graph_of_four_classes(small_gpt):
    captured, notes = small_gpt
    assert layers(captured) == [
        ("embed", "Embed"),
        ("blocks[0]", "Block"),
        ("blocks[1]", "Block"),
        ("blocks[2]", "Block"),
        ("blocks[3]", "Block"),
        ("head", "Head"),
        ("outside", "outside"),
    ]
    assert notes == ["Embed", "Block", "Head", "outside"]
    assert captured.warnings == ()
    graph = captured.graph
    assert (graph.model, graph.batch, graph.tokens, graph.causal) == ("GPT", B, B * T, True)
    assert graph_from_text(graph_to_text(graph)) == graph


def test_a_gpt_costs_what_it_does_on_paper(small_gpt):
    captured, _ = small_gpt
    d, n = SIZES["width"], B * T
    attention = 2 * (2 * B * T * T * d)
    block = class_named(captured, "Block")
    assert block.attention_flops == attention
    assert block.matmul_flops == 2 * n * 12 * d * d + attention
    head = class_named(captured, "Head")
    assert head.matmul_flops == 2 * n * d * SIZES["vocab_size"]
    assert head.attention_flops == class_named(captured, "Embed").matmul_flops == 0
    for cls in (block, head):
        assert cls.matmul_flops < cls.forward_flops < 1.5 * cls.matmul_flops
        assert 1.8 * cls.forward_flops < cls.backward_flops < 2.5 * cls.forward_flops
    per_token = 3 * (4 * (24 * d * d + attention / 2 / n) + 2 * d * SIZES["vocab_size"])
    assert captured.graph.flops_per_token == pytest.approx(per_token)


MEASURED = ("forward_flops", "backward_flops", "forward_bytes", "backward_bytes", "temp_bytes")


def test_the_graph_the_planner_is_tested_with_is_the_one_that_capture_gives(small_gpt):
    captured, _ = small_gpt
    golden = graph_from_text((GOLDEN / "gpt_graph.txt").read_text())
    for cls, known in zip(captured.graph.classes, golden.classes, strict=True):
        for cost in MEASURED:  # XLA's own figures may move with its version
            assert getattr(cls, cost) == pytest.approx(getattr(known, cost), rel=0.25), cls.name
    # The planner's tests are about batches; test_attention.py is about the products.
    blank = {**dict.fromkeys(MEASURED, 0.0), "products": None}
    without = [
        replace(graph, classes=tuple(replace(cls, **blank) for cls in graph.classes))
        for graph in (captured.graph, golden)
    ]
    assert without[0] == without[1]


def test_activations_know_which_of_their_dims_are_batch_and_sequence(small_gpt):
    captured, _ = small_gpt
    stream = Activation((B, T, SIZES["width"]), "float32", 0, 1)
    logits = Activation((B, T, SIZES["vocab_size"]), "float32", 0, 1)
    tokens = Activation((B, T), "int32", 0, 1)
    borders = {cls.name: (cls.inputs, cls.outputs) for cls in captured.graph.classes}
    assert borders == {
        "Embed": ((tokens,), (stream,)),
        "Block": ((stream,), (stream,)),
        "Head": ((stream,), (logits,)),
        "outside": ((logits, tokens), (Activation((), "float32"),)),
    }


def test_a_tied_head_reads_the_table_that_embed_owns(small_gpt):
    captured, _ = small_gpt
    head = captured.graph.layers[5]
    assert dict(head.tied) == {"embed_table": "embed.table"}
    cls = captured.graph.class_of(head)
    assert [(p.name, p.shape, p.dims) for p in cls.tied] == [
        ("embed_table", (256, 256), ("vocab", "embed"))
    ]
    assert [p.name for p in cls.parameters] == ["norm.bias", "norm.scale"]


def test_recompute_keeps_less_the_more_it_computes_again(small_gpt):
    captured, _ = small_gpt
    for cls in captured.graph.classes:
        assert cls.saved("full") <= cls.saved("selective") <= cls.saved("none")
    block = class_named(captured, "Block")
    assert block.saved("full") < block.saved("selective") < block.saved("none")


def test_a_block_keeps_what_is_counted_by_hand(small_gpt):
    captured, _ = small_gpt
    heads, d = SIZES["heads"], SIZES["width"]
    row, scores = 4 * B * T, 4 * B * heads * T * T
    stream, sums = d * row, heads * row
    # The centred, the normalised and the scaled stream; 1/s and its derivative per row.
    norm = 3 * stream + 2 * row
    # Queries, keys, values and what comes out; scores before and after their sum divides
    # them, that sum and its derivative.
    attention = 4 * stream + 2 * scores + 2 * sums
    # The tanh form of gelu keeps five figures of each hidden unit, and gives the sixth.
    hidden = 6 * 4 * stream
    # The block's input counts elsewhere: of what does not depend on heads, its size is taken off.
    whole = 2 * norm - stream
    block = class_named(captured, "Block")
    assert dict(block.saved_bytes) == {
        "none": whole + attention + hidden,
        "gathered": whole + attention + hidden,
        # The results of q, k, v, out and up; that of down nothing reads.
        "selective": 8 * stream,
    }
    assert dict(block.whole_bytes) == {"none": whole, "gathered": whole, "selective": stream}
    assert block.scratch_bytes == ()
    # The head's logits are as wide as the stream here, so it counts as a link, too.
    head = class_named(captured, "Head")
    assert dict(head.saved_bytes)["none"] == dict(head.whole_bytes)["none"] == norm - stream


def test_a_device_is_asked_for_scratch_and_keeps_no_more_than_the_loop():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = Wide(rngs, 16, 64)
            self.blocks = nnx.List([Wide(rngs, 64, 64) for _ in range(2)])

        def __call__(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return x

    plain, asked = (
        trace(mse, Net, shapes_of(x=(256, 16)), device=device).graph
        for device in (None, jax.devices()[0])
    )
    one = 4 * 256 * 64
    first, block = (class_named_in(asked, name) for name in ("Wide", "Wide#2"))
    # The first layer is no link: its input is narrower than its output.
    assert (first.whole_bytes, first.scratch_bytes) == ((), ())
    assert [recompute for recompute, _ in block.scratch_bytes] == ["none", "selective", "full"]
    for known, cls in zip(plain.classes, asked.classes, strict=True):
        assert known.scratch_bytes == ()
        for recompute in ("none", "selective", "full"):
            for gathers in (False, True):
                assert cls.saved(recompute, gathers) <= known.saved(recompute, gathers)
                assert cls.whole(recompute, gathers) <= known.whole(recompute, gathers)
    # Recomputed, the product and the tanh of one layer are alive while it goes back.
    assert one <= block.scratch("full") <= 4 * one


def test_layers_are_one_class_even_if_their_initialisers_are_made_anew():
    @shardpar.layer
    class Fresh(nnx.Module):
        def __init__(self, rngs, out_names):
            init = nnx.with_partitioning(nnx.initializers.normal(0.1), out_names)
            self.linear = nnx.Linear(WIDTH, WIDTH, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return nnx.gelu(self.linear(x))

    class Net(nnx.Module):
        def __init__(self, rngs):
            names = ("embed", "mlp")
            self.blocks = nnx.List([Fresh(rngs, names) for _ in range(3)])
            self.blocks.append(Fresh(rngs, ("mlp", "embed")))

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    captured = trace(mse, Net, X)
    # The last one has the same maths but other logical names, so it is split elsewhere.
    assert layers(captured) == [
        ("blocks[0]", "Fresh"),
        ("blocks[1]", "Fresh"),
        ("blocks[2]", "Fresh"),
        ("blocks[3]", "Fresh#2"),
        ("outside", "outside"),
    ]
    kernel = class_named(captured, "Fresh").parameters[1]
    assert (kernel.name, kernel.dims) == ("linear.kernel", ("embed", "mlp"))


def test_layers_of_other_shapes_or_options_are_other_classes():
    @shardpar.layer
    class Act(nnx.Module):
        def __init__(self, act):
            self.act = act

        def __call__(self, x):
            return self.act(x)

    class Net(nnx.Module):
        def __init__(self, rngs):
            sizes = [(4, 4), (4, 6), (6, 6), (6, 6), (6, 4), (4, 4)]
            self.blocks = nnx.List([Wide(rngs, *size) for size in sizes])
            self.acts = nnx.List([Act(nnx.relu), Act(nnx.silu), Act(nnx.relu)])

        def __call__(self, x):
            for block in (*self.blocks, *self.acts):
                x = block(x)
            return x

    assert layers(trace(mse, Net, X)) == [
        ("blocks[0]", "Wide"),
        ("blocks[1]", "Wide#2"),
        ("blocks[2]", "Wide#3"),
        ("blocks[3]", "Wide#3"),
        ("blocks[4]", "Wide#4"),
        ("blocks[5]", "Wide"),
        ("acts[0]", "Act"),
        ("acts[1]", "Act#2"),
        ("acts[2]", "Act"),
        ("outside", "outside"),
    ]


def test_a_layer_called_again_owns_nothing_and_reads_what_the_first_call_owns():
    captured = trace(mse, nets.Shared, X)
    assert layers(captured) == [
        ("first", "Dense"),
        ("middle", "Dense"),
        ("middle@2", "Dense#2"),
        ("middle@3", "Dense#2"),
        ("last", "Dense"),
        ("outside", "outside"),
    ]
    assert captured.graph.num_parameters == 3 * (WIDTH * WIDTH + WIDTH)
    again = captured.graph.layers[2]
    assert dict(again.tied) == {
        "middle_linear_bias": "middle.linear.bias",
        "middle_linear_kernel": "middle.linear.kernel",
    }
    assert len({name for name, _, _ in captured.graph.parameters}) == 6


def test_the_outer_of_nested_layers_is_the_unit():
    captured = trace(mse, nets.Nested, X)
    assert layers(captured) == [
        ("pairs[0]", "Pair"),
        ("pairs[1]", "Pair"),
        ("tail", "Dense"),
        ("outside", "outside"),
    ]
    assert [p.name for p in class_named(captured, "Pair").parameters] == [
        "a.linear.bias", "a.linear.kernel", "b.linear.bias", "b.linear.kernel",
    ]  # fmt: skip


def test_layers_that_are_handed_a_stream_of_keys_pass_it_on():
    captured = trace(mse, given_rngs(shardpar.layer), X)
    assert layers(captured) == [
        ("blocks[0]", "Noisy"),
        ("blocks[1]", "Noisy"),
        ("outside", "outside"),
    ]
    noisy = class_named(captured, "Noisy")
    count = Activation((), "uint32")
    assert sorted((*noisy.inputs, *noisy.outputs), key=str) == sorted(
        2 * [count, Activation((8, WIDTH), "float32", 0, None)], key=str
    )


def test_a_subclass_of_a_marked_class_is_cut_at_its_own_place():
    class Sub(Dense):
        pass

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Sub(rngs), Dense(rngs)])

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    assert layers(trace(mse, Net, X)) == [
        ("blocks[0]", "Dense"),
        ("blocks[1]", "Dense"),
        ("outside", "outside"),
    ]


def test_masks_and_scalars_are_not_split_over_the_batch():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Dense(rngs)
            self.mask = Mask()

        def __call__(self, x):
            return self.mask(self.block(x), jnp.arange(WIDTH) > 1, x.sum())

    @shardpar.layer
    class Mask(nnx.Module):
        def __call__(self, x, mask, total):
            return jnp.where(mask, x, total)

    inputs = class_named(trace(mse, Net, X), "Mask").inputs
    assert inputs == (
        Activation((8, WIDTH), "float32", 0, None),
        Activation((WIDTH,), "bool"),
        Activation((), "float32"),
    )


LOOP = (
    "layers of class Dense are inside a loop or remat (nnx.scan, jax.lax.scan, nnx.remat or "
    "similar) and cannot be cut apart; write the loop in Python and leave recompute to the plan, "
    "shardpar rolls it up again"
)


@pytest.mark.parametrize(
    ("init", "warning"),
    [
        (nets.Scanned, LOOP),
        (nets.Remat, LOOP),
        (
            nets.Unmarked,
            "no class is marked with @shardpar.layer: the whole model is one layer",
        ),
    ],
)
def test_a_model_that_stays_one_layer_is_warned_about(init, warning):
    captured = trace(mse, init, X)
    assert captured.warnings == (warning,)
    assert layers(captured) == [("outside", "outside")]
    outside = class_named(captured, "outside")
    assert {p.name for p in outside.parameters} == set(captured.model.params)


def test_a_loop_inside_a_layer_counts_as_often_as_it_runs():
    @shardpar.layer
    class Loop(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return jax.lax.scan(lambda x, _: (self.linear(x), None), x, None, length=5)[0]

    captured = trace(mse, Loop, X)
    assert class_named(captured, "Loop").matmul_flops == 5 * 2 * 8 * WIDTH * WIDTH


def test_a_loss_made_for_one_batch_size_is_captured_with_a_warning():
    def loss(model, batch):
        assert batch["x"].shape == (8, WIDTH)
        return mse(model, batch)

    captured = trace(loss, Dense, X)
    assert captured.warnings == (
        "the loss cannot be traced with another batch size; activations' batch dims are unknown "
        "and their layouts are left to XLA",
    )
    assert class_named(captured, "Dense").inputs == (Activation((8, WIDTH), "float32"),)


def test_a_batch_of_sequence_length_one_has_no_sequence_dim():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Dense(rngs)

        def __call__(self, x):
            return self.block(x)

    captured = trace(mse, Net, shapes_of(x=(8, 1, WIDTH)))
    assert class_named(captured, "Dense").inputs == (Activation((8, 1, WIDTH), "float32", 0),)


def test_a_flattened_activation_has_batch_and_sequence_in_one_dim():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.block = Dense(rngs)

        def __call__(self, x):
            return self.block(x.reshape(-1, WIDTH))

    captured = trace(mse, Net, shapes_of(x=(8, 6, WIDTH)))
    assert class_named(captured, "Dense").inputs == (Activation((48, WIDTH), "float32", 0, 0),)


def test_arrays_serve_as_shapes_and_a_bad_batch_is_refused():
    captured = trace(mse, Dense, {"x": jnp.ones((8, WIDTH))})
    assert captured.batch == X
    with pytest.raises(CaptureError, match="must share their first dim"):
        trace(mse, Dense, {"x": jnp.ones((8, WIDTH)), "y": jnp.ones(3)})
