"""Native code for training and for models of bits: values and every gradient of the reference, odd
and empty shapes, every level of instructions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from quweit_jax.errors import InputError
from quweit_jax.layers.lookup_glu import LookupGLU
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.ops import bit_models, packed_glu, packed_lut, packed_ternary, pair_table, ternary
from quweit_jax.ops.kernels.choice import divided
from quweit_jax.ops.kernels.native import calls, library
from quweit_jax.ops.ternary_glu import ternary_glu
from tests.compiled import quick_jit
from tests.ops import test_native
from tests.ops.gradients import value_and_vjp
from tests.ops.test_native import draw_int8, draw_ternary, needs_compiler

cache = test_native.cache
pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def one_device():
    """Tests see 8 devices, between which the compiler could not divide native code."""
    with divided(Mesh(np.asarray(jax.devices()[:1]), ("data",)), "data"):
        yield


def arguments(seed, tokens, inputs, units, outputs, groups, bits, dtype=jnp.float32, silu=None):
    rng = np.random.default_rng(seed)
    tables = rng.integers(-127, 128, (groups, 2**bits, 2**bits))
    if silu is not None:
        tables = pair_table._whole_gate(bits, silu)[0]
    return (
        jnp.asarray(rng.integers(-127, 128, (tokens, inputs)), jnp.float32),
        jnp.asarray(rng.normal(size=(inputs, 2 * units)), dtype),
        jnp.asarray(rng.integers(-60, 60, 2 * units), jnp.float32),
        jnp.asarray(tables, jnp.float32),
        jnp.asarray(rng.normal(size=(units, outputs)), dtype),
    ), jnp.asarray(rng.normal(size=(tokens, outputs)), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1, 1, 1), {}),
        ((5, 7, 6, 3, 1, 4), {}),
        ((33, 20, 18, 5, 6, 2), {}),
        ((1100, 17, 4, 3, 2, 3), {}),
        ((40, 250, 16, 33, 1, 4), {"silu": 0.25}),
        ((17, 33, 20, 40, 4, 6), {"dtype": jnp.bfloat16}),
    ],
)
@pytest.mark.parametrize("level", library.LEVELS)
def test_ternary_glu(shape, options, level):
    """A thousand tokens are more than are held at once, 250 inputs more than 16 bits add up."""
    inputs, gradient = arguments(0, *shape, **options)
    step, silu = 37, options.get("silu")

    def run(implementation):
        def sums(*inputs):
            return ternary_glu(*inputs, step=step, silu_step=silu, implementation=implementation)

        return value_and_vjp(sums, inputs, gradient)

    expected = run("xla")
    with library.using(level):
        found = run("native")
    np.testing.assert_array_equal(found[0], expected[0])
    for name, a, b in zip(("x", "mix", "shift", "tables", "total"), found[1:], expected[1:]):
        if name == "tables" and silu is not None:
            assert not np.asarray(a).any()
            continue
        assert a.dtype == b.dtype and a.shape == b.shape, name
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = (1e-5 if options.get("dtype") is None else 2**-7) * (np.abs(b).max() + 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=name)


def test_no_tokens_and_what_does_not_fit():
    inputs, _ = arguments(0, 0, 3, 2, 4, 1, 2)
    assert ternary_glu(*inputs, step=3).shape == (0, 4)
    inputs, _ = arguments(0, 2, 3, 2, 4, 1, 2)
    with pytest.raises(InputError, match="ternary_glu: expected x"):
        ternary_glu(inputs[0][:, :2], *inputs[1:], step=3)
    with pytest.raises(InputError, match="needs a step below"):
        ternary_glu(*inputs, step=2**15, implementation="native")


def test_several_devices():
    """The compiler divides XLA's; native code is used where the program divides itself."""
    inputs, _ = arguments(0, 6, 5, 4, 3, 1, 2)
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))

    def loss(weights, x, implementation):
        sums = ternary_glu(x, *weights, step=9, implementation=implementation)
        return sums.sum()

    with divided(mesh, "data"):
        with pytest.raises(InputError, match="cannot be divided"):
            loss(inputs[1:], inputs[0], "native")
        assert (
            "glu_forward"
            not in jax.jit(loss, static_argnums=2).lower(inputs[1:], inputs[0], None).as_text()
        )

    def of_part(weights, x):
        return jax.lax.psum(loss(weights, x, "native"), "data")

    sharded = jax.shard_map(
        of_part,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    found = jax.jit(jax.grad(sharded))(inputs[1:], inputs[0])
    expected = jax.grad(loss)(inputs[1:], inputs[0], "xla")
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_transformations():
    """jit, vmap, scan, remat."""
    inputs, _ = arguments(0, 6, 5, 4, 3, 1, 2)
    x, *weights = inputs

    def sums(x):
        return ternary_glu(x, *weights, step=9, implementation="native")

    same, expected = np.testing.assert_array_equal, sums(x)
    same(jax.vmap(sums)(x.reshape(2, 3, 5)).reshape(6, 3), expected)
    same(
        jax.lax.scan(lambda c, one: (c, sums(one)), 0, x.reshape(3, 2, 5))[1].reshape(6, 3),
        expected,
    )
    plain = jax.grad(lambda x: sums(x).sum())(x)
    again = jax.grad(lambda x: jax.checkpoint(sums)(x).sum())(x)
    same(plain, again)


def test_digits():
    """Those of `quantize_weights`, a half rounded to even; of both ways round."""
    weights = jnp.asarray([[0.5, -0.5, 1.5], [2.0, 0.6, -0.6], [0.0, -9.0, 0.49]], jnp.float32)
    whole = np.clip(np.round(weights), -1, 1) + 1
    digits, transposed = calls.ternary_digits(weights, jnp.float32(1))
    padded = np.ones((16, 3), np.int64)
    padded[:3] = whole
    expected = 64 * np.einsum("bjo,j->ob", padded.reshape(4, 4, 3), [1, 3, 9, 27])
    np.testing.assert_array_equal(digits[0], expected)
    padded[:3] = whole.T
    expected = 64 * np.einsum("bjo,j->ob", padded.reshape(4, 4, 3), [1, 3, 9, 27])
    np.testing.assert_array_equal(transposed[0], expected)


def test_a_layer_and_its_packed_form():
    """What is trained with native code is what is deployed."""
    layer, x = LookupGLU(8, hidden=16), jax.random.normal(jax.random.key(0), (40, 12))
    variables = quick_jit(layer.init)(jax.random.key(1), x)
    assert "quweit_glu_forward" in jax.jit(layer.apply).lower(variables, x).as_text()
    packed = layer.apply(variables, x, mutable=["packed"])[1]
    np.testing.assert_allclose(
        layer.apply(variables, x), layer.apply({**variables, **packed}, x), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("level", library.LEVELS)
@pytest.mark.parametrize("shape", [(24, 1, 1), (33, 250, 48), (70, 300, 1100), (1030, 5, 17)])
def test_products_of_many_tokens(shape, level):
    tokens, inputs, outputs = shape
    rng = np.random.default_rng(0)
    x, w = draw_int8(rng, tokens, inputs), draw_ternary(rng, inputs, outputs)
    x[0], w[:, 0] = -128, -1
    packed = jnp.asarray(packed_ternary.pack_ternary(w))
    with library.using(level):
        found = packed_ternary.packed_sums(
            jnp.asarray(x), packed, num_outputs=outputs, implementation="native"
        )
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w)


@pytest.mark.parametrize("level", library.LEVELS)
@pytest.mark.parametrize(
    "shape", [(24, 1, 16, 1, 1, 1), (50, 40, 48, 17, 4, 4), (65, 300, 32, 5, 1, 6)]
)
def test_packed_glu_of_many_tokens(shape, level):
    tokens, inputs, units, outputs, groups, bits = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(draw_int8(rng, tokens, inputs))
    held = test_native.glu_arguments(rng, inputs, units, outputs, groups, bits)
    options = {"step": 37, "num_outputs": outputs}
    expected = packed_glu.packed_glu(x, *held, **options, implementation="reference")
    with library.using(level):
        found = packed_glu.packed_glu(x, *held, **options, implementation="native")
    np.testing.assert_array_equal(found, expected)


def bit_arguments(seed, tokens, width, steps, layers, shared=False):
    """Layers: (tables, inputs) each. Thresholds are in no order, and some are no numbers."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (tokens, width)).astype(np.float32)
    thresholds = rng.integers(-3, 4, (1 if shared else width, steps)).astype(np.float32)
    x[rng.random(x.shape) < 0.02] = np.nan
    thresholds[rng.random(thresholds.shape) < 0.05] = np.nan
    bits, made = width * steps, []
    for tables, inputs in layers:
        wiring = jnp.asarray(rng.integers(0, bits, (tables, inputs)), jnp.uint16)
        made.append((wiring, packed_lut.pack_tables(rng.normal(size=(tables, 2**inputs)))))
        bits = tables
    return jnp.asarray(x), jnp.asarray(thresholds), made, rng, bits


BIT_SHAPES = [
    (1, 1, 1, [(1, 1)], False),
    (3, 5, 2, [], False),
    (257, 33, 3, [(7, 2), (12, 3)], True),
    (40, 20, 4, [(300, 4)], False),
    (300, 16, 5, [(60, 5), (24, 6)], False),
    (9, 40, 127, [(10, 7), (10, 8)], True),
]


@pytest.mark.parametrize("level", library.LEVELS)
@pytest.mark.parametrize("shape", BIT_SHAPES)
def test_bits(shape, level):
    x, thresholds, layers, rng, bits = bit_arguments(0, *shape)
    vectors = jnp.asarray(draw_int8(rng, bits, 35))
    classes = next(c for c in (10, 5, 4, 2, 1) if bits % c == 0)

    def run(implementation):
        return quick_jit(
            lambda x: (
                bit_models.bit_sums(x, thresholds, layers, vectors, implementation=implementation),
                bit_models.bit_counts(
                    x, thresholds, layers, classes, implementation=implementation
                ),
            )
        )(x)

    expected = run("reference")
    with library.using(level):
        found = run("native")
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


def test_bits_that_do_not_fit():
    x, thresholds, layers, _, bits = bit_arguments(0, 4, 6, 2, [(5, 3)])
    with pytest.raises(InputError, match="expected vectors"):
        bit_models.bit_sums(x, thresholds, layers, jnp.ones((bits + 1, 2), jnp.int8))
    with pytest.raises(InputError, match="cannot share"):
        bit_models.bit_counts(x, thresholds, layers, 2)
    with pytest.raises(InputError, match="needs floats"):
        bit_models.bit_counts(x.astype(jnp.int32), thresholds, layers, 5, implementation="native")
    with pytest.raises(InputError, match="expected x"):
        bit_models.bit_counts(x, thresholds[:3], layers, 5)
    empty = bit_models.bit_sums(x[:0], thresholds, layers, jnp.ones((bits, 2), jnp.int8))
    assert empty.shape == (0, 2)


def test_a_classifier():
    """The packed classifier, whose bits are counted by native code, and those that show them."""
    model = DWN(DWNConfig(4, (16, 24), lut_inputs=3, mapping="random"))
    x = jax.random.normal(jax.random.key(0), (50, 9))
    variables = quick_jit(model.init)(jax.random.key(1), x)
    packed = model.apply(variables, x, mutable=["packed"])[1]
    assert "quweit_bit_counts" in jax.jit(model.apply).lower(packed, x).as_text()
    found = model.apply(packed, x)
    shown, _ = model.apply(packed, x, mutable=["intermediates"])
    np.testing.assert_array_equal(found, shown)
    np.testing.assert_allclose(found, model.apply(variables, x), rtol=1e-6)


def test_scale_of_weights():
    weights = jax.random.normal(jax.random.key(0), (7, 5))
    np.testing.assert_allclose(
        1 / ternary.inverse_scale(weights), ternary.quantize_weights(weights)[1], rtol=1e-6
    )
