"""What a loop of equal layers keeps for its backward, counted by hand and by XLA's allocator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardpar.capture.chain import DEEP, SHALLOW, chain_of

B, W, H = 32, 16, 128
STREAM, HIDDEN = 4 * B * W, 4 * B * H
DIMS = {"up": ("embed", "mlp"), "down": ("mlp", "embed"), "scale": ("embed",)}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


UP, DOWN, X = shape(W, H), shape(H, W), shape(B, W)


def mlp(x, up, down):
    """sin keeps its cosine, a product its other factor: 2 hidden arrays, and the input."""
    return jnp.sin(x @ up) @ down


def chain(function, *inputs, names=(None, "up", "down"), dims=DIMS):
    return chain_of(jax.make_jaxpr(function)(*inputs), names, dims)


KEPT = {
    # The cosine for sin, and the sine for the second product; the input counts elsewhere.
    "none": (2 * HIDDEN, 0.0),
    "gathered": (2 * HIDDEN, 0.0),
    # The first product; sine and cosine are computed again.
    "selective": (HIDDEN, 0.0),
}


@pytest.mark.parametrize("recompute", KEPT)
def test_an_mlp_keeps_what_is_counted_by_hand(recompute):
    assert chain(mlp, X, UP, DOWN).kept_bytes(recompute) == KEPT[recompute]


@pytest.mark.parametrize("recompute", KEPT)
def test_without_split_weights_all_of_it_is_whole(recompute):
    dims = dict.fromkeys(DIMS, ("embed", "embed"))
    total, _ = KEPT[recompute]
    assert chain(mlp, X, UP, DOWN, dims=dims).kept_bytes(recompute) == (total, total)


def test_what_is_made_of_the_stream_is_whole_and_what_is_made_of_split_weights_is_not():
    def layer(x, scale, up, down):
        # The root mean square keeps: x, its inverse per row, the scaled stream for the product.
        y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))
        return x + mlp(y * scale, up, down)

    found = chain(layer, X, shape(W), UP, DOWN, names=(None, "scale", "up", "down"))
    total, whole = found.kept_bytes("none")
    rows = 4 * B
    # y for the scale's gradient, y * scale for up's; x and two figures a row for the norm's.
    assert whole == 2 * STREAM + 2 * rows
    assert total == whole + 2 * HIDDEN
    # Two products are kept: of up and of down, but nothing in the backward needs the latter.
    assert found.kept_bytes("selective") == (HIDDEN, 0.0)


def test_a_mask_is_kept_once_for_all_layers_and_weights_not_at_all():
    def layer(x, mask, up, down):
        return jnp.where(mask, mlp(x, up.T.T, down), 0.0)

    found = chain(
        layer, X, shape(B, W, dtype=jnp.bool_), UP, DOWN, names=(None, None, "up", "down")
    )
    assert found.kept_bytes("none") == (2 * HIDDEN, 0.0)
    assert [s.shape for s in found.shared] == [(B, W)]
    assert [(s.shape, dims) for s, dims in found.parameters] == [((W, H), {1}), ((H, W), {0})]


def test_a_value_and_its_reshaped_self_count_once():
    def layer(x, up, down):
        hidden = jnp.exp(x @ up)  # exp keeps itself, which is the product's factor too
        return hidden.reshape(B // 2, 2, H).reshape(B, H) @ down

    assert chain(layer, X, UP, DOWN).kept_bytes("none") == (HIDDEN, 0.0)


def test_weights_cast_before_use_are_not_kept_where_they_are_gathered():
    def layer(x, up, down):
        return mlp(x.astype(jnp.bfloat16), *(w.astype(jnp.bfloat16) for w in (up, down))).astype(
            jnp.float32
        )

    found = chain(layer, X, UP, DOWN)
    # Sine and cosine in two bytes each. Left to itself the loop keeps the cast input instead of
    # the input, which counts elsewhere; where casts are not kept, the input.
    assert found.kept_bytes("none") == (HIDDEN - STREAM / 2, 0.0)
    assert found.kept_bytes("gathered") == (HIDDEN, 0.0)


@pytest.mark.parametrize(
    ("function", "inputs", "names"),
    [
        # No output is like an input.
        (lambda x, up: x @ up, (X, UP), (None, "up")),
        (lambda x, up: (x @ up).astype(jnp.bfloat16), (X, shape(W, W)), (None, "up")),
        # A scalar is no stream, nor are whole numbers.
        (lambda x, up: x * up.sum(), (shape(), UP), (None, "up")),
        (lambda x, up: x + 1, (shape(B, dtype=jnp.int32), UP), (None, "up")),
        # A parameter that comes out is not the stream.
        (lambda x, up: up * 2, (X, UP), (None, "up")),
    ],
)
def test_a_layer_that_cannot_follow_itself_is_no_link(function, inputs, names):
    assert chain(function, *inputs, names=names) is None


def test_a_stream_of_random_keys_is_no_link():
    key = jax.eval_shape(lambda: jax.random.key(0))

    def layer(x, key, up, down):
        return mlp(x, up, down) * jax.random.bernoulli(key, 0.5, (B, W))

    names = (None, None, "up", "down")
    assert chain_of(jax.make_jaxpr(layer)(X, key, UP, DOWN), names, DIMS) is None


def test_a_layer_without_weights_is_a_link_or_none_but_no_error():
    found = chain_of(jax.make_jaxpr(jnp.sin)(X), (None,), {})
    if found is not None:
        # The cosine, as large as the input that counts elsewhere.
        assert found.kept_bytes("none") == (0.0, 0.0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_loop_twice_as_deep_is_allotted_what_two_depths_predict(recompute):
    found = chain(mlp, X, UP, DOWN)
    per_layer, once = found.compiled_bytes(recompute, None)
    deeper = found._temp_bytes(recompute, 2 * DEEP, None)
    assert deeper == pytest.approx(once + 2 * DEEP * per_layer, rel=0.02)
    assert found._temp_bytes(recompute, SHALLOW, None) == pytest.approx(
        once + SHALLOW * per_layer, rel=1e-6
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_xla_allots_per_layer_what_the_loop_keeps(recompute):
    found = chain(mlp, X, UP, DOWN)
    kept = 0.0 if recompute == "full" else found.kept_bytes(recompute)[0]
    per_layer, _ = found.compiled_bytes(recompute, None)
    # What is kept, the layer's input, and a little for alignment.
    assert per_layer == pytest.approx(kept + STREAM, rel=0.05)


def test_a_chain_computes_what_its_layer_does():
    found = chain(mlp, X, UP, DOWN)
    random = np.random.default_rng(0)
    x, up, down = (random.normal(size=s.shape).astype(np.float32) for s in (X, UP, DOWN))
    np.testing.assert_allclose(
        found.function(x, (up, down), ()), np.sin(x @ up) @ down, rtol=1e-4, atol=1e-4
    )
