"""`ops.ternary`: the fused BitLinear against its plain composition and NumPy, packing there and
back, the packed product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops import packed_ternary, ternary


def arrays(lead, inputs, outputs, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(*lead, inputs)), rng.normal(size=(inputs, outputs)) * 0.02
    return [
        jnp.asarray(a, dtype)
        for a in (x, w, rng.normal(1, 0.2, inputs), rng.normal(size=(*lead, outputs)))
    ]


def test_quantizers_follow_the_published_formulas():
    x, w, _, _ = arrays((3, 5), 17, 6)
    x = x.at[0, 0].set(0).at[0, 1, 0].set(1e-9)
    x_int, x_scale = ternary.quantize_activations(x)
    w_int, w_scale = ternary.quantize_weights(w)
    x, w = np.asarray(x, np.float32), np.asarray(w, np.float32)
    s = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    np.testing.assert_array_equal(x_int, np.clip(np.round(x * s), -128, 127))
    np.testing.assert_allclose(x_int * x_scale, np.round(x * s) / s, rtol=1e-6)
    s = 1 / np.abs(w).mean()
    np.testing.assert_array_equal(w_int, np.clip(np.round(w * s), -1, 1))
    np.testing.assert_allclose(w_scale, np.abs(w).mean(), rtol=1e-6)
    assert (
        x_int.dtype == w_int.dtype == jnp.int8
        and x_scale.shape == (3, 5, 1)
        and w_scale.shape == ()
    )
    assert set(np.unique(w_int)) == {-1, 0, 1} and not np.any(x_int[0, 0])


def test_a_matrix_of_zeros_and_ties():
    w_int, scale = ternary.quantize_weights(jnp.zeros((3, 4)))
    assert not np.any(w_int) and np.isfinite(scale)
    x_int, _ = ternary.quantize_activations(jnp.asarray([[127.0, 0.5, 1.5, -2.5, -127.0]]))
    np.testing.assert_array_equal(x_int, [[127, 0, 2, -2, -127]])


@pytest.mark.parametrize(
    "lead, inputs, outputs",
    [((2, 5), 33, 7), ((1,), 1, 1), ((), 8, 3), ((4, 0), 6, 5), ((3,), 256, 64)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fused_equals_plain(lead, inputs, outputs, dtype):
    """Values and every gradient; in half precision to its rounding."""
    x, w, scale, gradient = arrays(lead, inputs, outputs, dtype=dtype)
    w, scale = w.astype(jnp.float32), scale.astype(jnp.float32)
    results = []
    for function in (ternary.bit_linear, ternary.bit_linear_reference):
        out, pull = jax.vjp(jax.jit(function), x, w, scale)
        results.append((out, *pull(gradient)))
    limit = 1e-5 if dtype == jnp.float32 else 2e-2
    for fused, plain in zip(*results, strict=True):
        assert fused.dtype == plain.dtype and fused.shape == plain.shape
        fused, plain = np.asarray(fused, np.float32), np.asarray(plain, np.float32)
        np.testing.assert_allclose(
            fused, plain, atol=limit * max(np.abs(plain).max(initial=0), 1e-3), rtol=0
        )


@pytest.mark.parametrize("width", [1, 5, 32, 128, 1000, 13824])
def test_mean_square_does_not_depend_on_the_shape_around_it(width):
    """Equal bits for one row and many, and as good as a float sum."""
    rng = np.random.default_rng(width)
    x = (rng.normal(size=(2, 65, width)) * np.exp(rng.normal(size=(2, 65, 1)) * 5)).astype(
        np.float32
    )
    x[0, 0], x[0, 1, 0], x[0, 2] = 0, 1e10, 1e-20
    mean_square = jax.jit(ternary.mean_square)
    whole = mean_square(x)
    for size in (1, 3):
        np.testing.assert_array_equal(
            jnp.concatenate([mean_square(x[:, i : i + size]) for i in range(0, 65, size)], 1), whole
        )
    np.testing.assert_array_equal(
        jnp.stack([mean_square(row) for row in x.reshape(-1, width)]), whole.reshape(-1, 1)
    )
    expected = np.square(x.astype(np.float64)).mean(-1, keepdims=True)
    np.testing.assert_allclose(whole, expected, rtol=3e-7, atol=1e-30)
    assert np.isnan(jax.jit(ternary.rms_norm)(jnp.asarray([1.0, np.nan, 2.0]), jnp.ones(3))).any()


def test_norm_gradient_is_exact():
    """The straight-through gradient is that of the function with both quantizers left out and the
    quantized values put in.
    """
    x, w, scale, gradient = arrays((4,), 9, 5, seed=3)
    _, pull = jax.vjp(ternary.bit_linear, x, w, scale)
    w_int, w_scale = ternary.quantize_weights(w)
    _, pull_plain = jax.vjp(
        lambda x, scale: ternary.rms_norm(x, scale) @ (w_int * w_scale), x, scale
    )
    d_x, d_w, d_scale = pull(gradient)
    for found, expected in zip((d_x, d_scale), pull_plain(gradient)):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    y_int, y_scale = ternary.quantize_activations(ternary.rms_norm(x, scale))
    np.testing.assert_allclose(d_w, np.asarray(y_int * y_scale).T @ np.asarray(gradient), atol=1e-5)


def test_fused_keeps_only_the_input():
    """What lies between forward and backward pass: x, weight and scale, which were there, and one
    number a token.
    """
    x, w, scale, _ = arrays((4, 16), 64, 32)
    kept = jax.tree.leaves(jax.vjp(ternary.bit_linear, x, w, scale)[1])
    sizes = sorted(a.size for a in kept if hasattr(a, "size"))
    assert sum(sizes) <= x.size + w.size + scale.size + 4 * 16


@pytest.mark.parametrize("inputs", [0, 1, 3, 4, 5, 63, 130])
@pytest.mark.parametrize("outputs", [1, 3, 64, 130, 257])
def test_packing_there_and_back(inputs, outputs):
    w = np.random.default_rng(0).integers(-1, 2, (inputs, outputs)).astype(np.int8)
    packed = packed_ternary.pack_ternary(w)
    assert packed.dtype == np.uint32
    assert packed.shape == packed_ternary.packed_shape(inputs, outputs)
    assert packed.nbytes == packed_ternary.packed_bytes(inputs, outputs)
    np.testing.assert_array_equal(packed_ternary.unpack_ternary(packed, inputs, outputs), w)
    on_device = packed_ternary.pack_ternary(jnp.asarray(w))
    np.testing.assert_array_equal(on_device, packed)
    np.testing.assert_array_equal(packed_ternary.unpack_ternary(on_device, inputs, outputs), w)


def test_layout_of_a_word():
    w = np.asarray([[1], [-1], [0], [1], [-1]] + 12 * [[1]], np.int8)
    code = {i: int(w[i, 0]) + 1 for i in range(17)}
    first = sum(code[4 * j + b] << (8 * b + 2 * j) for j in range(4) for b in range(4))
    packed = packed_ternary.pack_ternary(w)
    assert packed.shape == (1, 2, 16)
    assert packed[0, 0, 0] == first and packed[0, 1, 0] == 0x55555555 + 1
    assert (packed[:, :, 1:] == 0x55555555).all()


def test_tiles_are_as_wide_as_their_outputs_need():
    shapes = {(16, 128): (1, 1, 128), (17, 129): (2, 2, 80), (1, 192): (2, 1, 96)}
    shapes |= {(5120, 13824): (108, 320, 128), (3, 1): (1, 1, 16), (4, 0): (0, 1, 0)}
    for size, shape in shapes.items():
        assert packed_ternary.packed_shape(*size) == shape


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (5,)])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 5), (64, 33), (33, 257)])
def test_packed_product_is_exact(lead, inputs, outputs):
    rng = np.random.default_rng(1)
    x, w = (
        rng.integers(-128, 128, (*lead, inputs)).astype(np.int8),
        rng.integers(-1, 2, (inputs, outputs)).astype(np.int8),
    )
    expected = x.astype(np.int64) @ w.astype(np.int64)
    for implementation in ("xla", "reference"):
        asked = {"num_outputs": outputs, "implementation": implementation}
        product = functools.partial(packed_ternary.packed_matmul, scale=0.5, **asked)
        found = jax.jit(product)(x, packed_ternary.pack_ternary(w))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected * 0.5)


def test_packed_product_makes_no_whole_matrix():
    """Compiled temporaries stay far below the unpacked matrix, for one token and for many."""
    packed = jax.ShapeDtypeStruct((32, 512, 128), jnp.uint32)  # 32 MiB unpacked to int8
    product = functools.partial(packed_ternary.packed_matmul, implementation="xla")
    for tokens in (1, 16):
        x = jax.ShapeDtypeStruct((tokens, 8192), jnp.int8)
        memory = jax.jit(product).lower(x, packed).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 8192 * 4096 / 4, (tokens, memory.temp_size_in_bytes)


def test_errors():
    with pytest.raises(
        InputError,
        match=r"bit_linear: expected .* found \[2, 3\], \[4, 3\] and \[3\]; published weights are",
    ):
        ternary.bit_linear(jnp.zeros((2, 3)), jnp.zeros((4, 3)), jnp.zeros(3))
    with pytest.raises(InputError, match=r"pack_ternary: expected a matrix"):
        packed_ternary.pack_ternary(np.zeros(3, np.int8))
    with pytest.raises(InputError, match=r"expected weights of -1, 0 and 1, found 0 to 2"):
        packed_ternary.pack_ternary(np.asarray([[0, 2]], np.int8))
    with pytest.raises(
        InputError, match=r"unpack_ternary: 33 inputs .* \[1, 3, 16\], found \[1, 2"
    ):
        packed_ternary.unpack_ternary(np.zeros((1, 2, 16), np.uint32), 33)
    words = jnp.zeros((1, 2, 16), jnp.uint32)
    with pytest.raises(InputError, match=r"packed_matmul: 9 inputs and 16 outputs are words of"):
        packed_ternary.packed_matmul(jnp.zeros((1, 9), jnp.int8), words)
    with pytest.raises(InputError, match=r"packed_matmul: 20 inputs and 17 outputs are words of"):
        packed_ternary.packed_matmul(jnp.zeros((1, 20), jnp.int8), words, num_outputs=17)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_without_a_norm(dtype):
    """Both quantized, exact products; gradients straight through, as those of the plain steps."""
    x, w, _, gradient = arrays((2, 5), 33, 7, dtype=dtype)
    w = w.astype(jnp.float32)

    def plain(x, w):
        x_int, x_scale = ternary.quantize_activations(x)
        w_int, w_scale = ternary.quantize_weights(w)
        wide = x.astype(jnp.float32)
        wide = wide + jax.lax.stop_gradient(x_int * x_scale - wide)
        return (wide @ (w + jax.lax.stop_gradient(w_int * w_scale - w))).astype(x.dtype)

    for found, expected in zip(
        *(
            (out, *pull(gradient))
            for out, pull in (jax.vjp(jax.jit(f), x, w) for f in (ternary.ternary_linear, plain))
        )
    ):
        assert found.dtype == expected.dtype
        rounding = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(
            np.asarray(found, np.float32),
            np.asarray(expected, np.float32),
            atol=rounding * float(jnp.abs(expected).max()),
        )
    with pytest.raises(InputError, match="expected x"):
        ternary.ternary_linear(x, w.T)
