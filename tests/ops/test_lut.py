"""`ops.lut` against the golden cases and the naive reference: values and every gradient, whatever
the shape, dtype and transform.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from quweit_jax.errors import InputError
from quweit_jax.ops import lut
from quweit_jax.ops.kernels import lut_xla
from quweit_jax.ops.wiring import invert_wiring
from tests.compiled import quick_jit
from tests.ops import naive
from tests.ops.gradients import value_and_vjp

DECAYS = ("exponential", "harmonic")


def case(tokens=7, inputs=11, luts=6, n=2, seed=0):
    """bits (T, F), an evenly used mapping (L, n), tables (L, 2**n) and an upstream
    gradient (T, L).
    """
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2, (tokens, inputs)).astype(np.float32)
    wiring = np.concatenate(
        [draw.permutation(inputs) for _ in range(-(-luts * n // inputs))] or [np.zeros(0)]
    )[: luts * n]
    tables = draw.uniform(-1, 1, (luts, 2**n)).astype(np.float32)
    return (
        bits,
        wiring.reshape(luts, n).astype(np.int32),
        tables,
        draw.normal(size=(tokens, luts)).astype(np.float32),
    )


@functools.partial(quick_jit, static_argnames=("decay", "alpha", "beta"))
def forward_and_backward(
    bits, wiring, tables, grad, inverse=None, decay="exponential", alpha=None, beta=None
):
    out, pullback = jax.vjp(
        lambda b, t: lut.lut_lookup(
            b, wiring, t, decay=decay, alpha=alpha, beta=beta, inverse=inverse
        ),
        bits,
        tables,
    )
    return out, *pullback(grad)


def check(bits, wiring, tables, grad, tolerance=1e-5, **options):
    out, grad_bits, grad_tables = forward_and_backward(bits, wiring, tables, grad, **options)
    options.pop("inverse", None)
    expected_bits, expected_tables = naive.lut_gradients(bits, wiring, tables, grad, **options)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), naive.lut_lookup(bits, wiring, tables).astype(np.float32)
    )
    close(np.asarray(grad_bits, np.float64), expected_bits)
    close(np.asarray(grad_tables, np.float64), expected_tables)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_golden(shared, n, decay):
    golden = np.load(shared / "golden" / "dwn.npz")
    bits, wiring, tables, grad = (
        golden[f"n{n}/{key}"] for key in ("bits", "mapping", "tables", "grad_out")
    )
    out, grad_bits, grad_tables = forward_and_backward(bits, wiring, tables, grad, decay=decay)
    np.testing.assert_allclose(out, golden[f"n{n}/out"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(grad_tables, golden[f"n{n}/grad_tables"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(grad_bits, golden[f"n{n}/grad_bits_{decay}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("n", "decay"),
    [(n, "exponential") for n in range(1, 9)] + [(n, "harmonic") for n in (1, 3, 5, 8)],
)
def test_every_number_of_inputs(n, decay):
    check(*case(tokens=5, inputs=13, luts=4, n=n, seed=n), decay=decay)


@pytest.mark.parametrize(
    ("shape", "indexed"),
    [
        ({"inputs": 1, "luts": 3}, False),
        ({"luts": 1}, False),
        ({"tokens": 1}, True),
        (
            {"inputs": 2, "luts": 3, "n": 3},
            False,
        ),  # fewer inputs than slots of one table: it reads an input several times
        ({"inputs": 2, "luts": 3, "n": 3}, True),
        ({"inputs": 6, "luts": 4, "n": 3}, True),  # every input exactly twice
        ({"inputs": 40, "luts": 4}, False),  # inputs that nobody reads
        ({"inputs": 40, "luts": 4}, True),
        ({"inputs": 5, "luts": 4, "n": 3}, True),  # some inputs twice, some three times
        ({"tokens": 0}, False),
        ({"tokens": 0}, True),
        ({"luts": 0}, False),
        ({"luts": 0}, True),
        ({"tokens": 1, "inputs": 1, "luts": 1, "n": 1}, False),
    ],
    ids=str,
)
def test_odd_shapes(shape, indexed):
    bits, wiring, tables, grad = case(**shape, seed=3)
    check(
        bits,
        wiring,
        tables,
        grad,
        **({"inverse": invert_wiring(wiring, bits.shape[1])} if indexed else {}),
    )


def test_uneven_wiring_with_repeated_inputs():
    bits, _, tables, grad = case(luts=4, n=3)
    wiring = np.asarray([[0, 0, 0], [2, 5, 2], [10, 0, 10], [0, 2, 5]], np.int32)
    for decay in DECAYS:
        check(bits, wiring, tables, grad, decay=decay)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5},
        {"beta": 0.0},
        {"alpha": 2.0, "beta": 0.75},
        {"decay": "harmonic", "alpha": 0.25},
    ],
    ids=str,
)
def test_explicit_weighting(options):
    check(*case(n=3), **options)


def test_default_weights_of_each_sign_sum_to_one_half():
    for n in range(1, 9):
        matrix = lut.efd_matrix(n, lut.efd_weighting(n))
        assert matrix.shape == (n, 2 ** (n - 1), 2**n)
        np.testing.assert_allclose(np.where(matrix > 0, matrix, 0).sum(-1), 0.5, rtol=1e-12)
        np.testing.assert_allclose(matrix.sum(-1), 0, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(lead):
    bits, wiring, tables, grad = case(tokens=int(np.prod(lead)), inputs=5, luts=3, n=2)
    out, grad_bits, grad_tables = forward_and_backward(
        bits.reshape(*lead, 5), wiring, tables, grad.reshape(*lead, 3)
    )
    assert out.shape == (*lead, 3) and grad_bits.shape == (*lead, 5)
    expected_bits, expected_tables = naive.lut_gradients(bits, wiring, tables, grad)
    np.testing.assert_array_equal(
        out.reshape(-1, 3), naive.lut_lookup(bits, wiring, tables).astype(np.float32)
    )
    np.testing.assert_allclose(grad_bits.reshape(-1, 5), expected_bits, atol=1e-5)
    np.testing.assert_allclose(grad_tables, expected_tables, atol=1e-5)


@pytest.mark.parametrize("tables_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits_dtype", ["float32", "bfloat16"])
def test_floating_dtypes(bits_dtype, tables_dtype):
    bits, wiring, tables, grad = case(n=3)
    bits, tables, grad = (
        jnp.asarray(bits, bits_dtype),
        jnp.asarray(tables, tables_dtype),
        jnp.asarray(grad, tables_dtype),
    )
    out, grad_bits, grad_tables = forward_and_backward(bits, wiring, tables, grad)
    assert (out.dtype, grad_bits.dtype, grad_tables.dtype) == (
        tables.dtype,
        bits.dtype,
        tables.dtype,
    )
    # The arithmetic is float32 in any case: what is left is one rounding of the result.
    check(
        bits,
        wiring,
        tables,
        grad,
        tolerance=1e-5 if "bfloat16" not in (bits_dtype, tables_dtype) else 2**-8,
    )


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8"])
def test_bits_that_are_not_floating_get_no_gradient(dtype):
    bits, wiring, tables, grad = case()
    whole = jnp.asarray(bits, dtype)
    out, grad_bits, grad_tables = forward_and_backward(whole, wiring, tables, grad)
    np.testing.assert_array_equal(out, naive.lut_lookup(bits, wiring, tables).astype(np.float32))
    assert grad_bits.dtype == jax.dtypes.float0
    np.testing.assert_allclose(
        grad_tables, naive.lut_gradients(bits, wiring, tables, grad)[1], atol=1e-5
    )


def test_feature_major_is_the_same_transposed():
    bits, wiring, tables, grad = case()
    out, grad_bits, grad_tables = value_and_vjp(
        lambda b, t: lut.lut_lookup_feature_major(b, wiring, t), (bits.T, tables), grad.T
    )
    expected = forward_and_backward(bits, wiring, tables, grad)
    np.testing.assert_array_equal(out.T, expected[0])
    np.testing.assert_array_equal(grad_bits.T, expected[1])
    np.testing.assert_array_equal(grad_tables, expected[2])


def loss(bits, tables, wiring, weights, inverse=None):
    return jnp.sum(lut.lut_lookup(bits, wiring, tables, inverse=inverse) * weights)


def test_eager_is_the_same_as_jit():
    bits, wiring, tables, grad = case(luts=3)
    eager = jax.value_and_grad(loss, (0, 1))(bits, tables, wiring, grad)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6),
        eager,
        quick_jit(jax.value_and_grad(loss, (0, 1)))(bits, tables, wiring, grad),
    )


@pytest.mark.parametrize("indexed", [False, True], ids=["scatter", "inverse"])
def test_vmap_over_bits_and_tables(indexed):
    bits, wiring, tables, grad = case(tokens=6)
    inverse = invert_wiring(wiring, bits.shape[1]) if indexed else None
    gradients = jax.grad(loss, (0, 1))
    several = np.stack([tables, -tables, 2 * tables])
    over_tables = quick_jit(jax.vmap(gradients, (None, 0, None, None, None)))(
        bits, several, wiring, grad, inverse
    )
    pieces, weights = bits.reshape(3, 2, -1), grad.reshape(3, 2, -1)
    over_bits = quick_jit(jax.vmap(gradients, (0, None, None, 0, None)))(
        pieces, tables, wiring, weights, inverse
    )
    over_both = quick_jit(jax.vmap(gradients, (0, 0, None, 0, None)))(
        pieces, several, wiring, weights, inverse
    )
    for i in range(3):
        expected = naive.lut_gradients(bits, wiring, several[i], grad)
        np.testing.assert_allclose(over_tables[0][i], expected[0], atol=1e-5)
        np.testing.assert_allclose(over_tables[1][i], expected[1], atol=1e-5)
        for found, used in ((over_bits, tables), (over_both, several[i])):
            expected = naive.lut_gradients(pieces[i], wiring, used, weights[i])
            np.testing.assert_allclose(found[0][i], expected[0], atol=1e-5)
            np.testing.assert_allclose(found[1][i], expected[1], atol=1e-5)


def test_vmap_over_mappings():
    bits, wiring, tables, _ = case()
    wirings = np.stack([wiring, (wiring + 1) % bits.shape[1]])
    out = jax.vmap(lambda w: lut.lut_lookup(bits, w, tables))(wirings)
    for i in range(2):
        np.testing.assert_array_equal(
            out[i], naive.lut_lookup(bits, wirings[i], tables).astype(np.float32)
        )


def test_checkpoint_and_grad_inside_scan():
    bits, wiring, tables, grad = case()
    remembered = quick_jit(jax.grad(jax.checkpoint(lambda b, t: loss(b, t, wiring, grad)), (0, 1)))(
        bits, tables
    )

    def step(total, row):
        grads = jax.grad(loss, (0, 1))(row[0], tables, wiring, row[1])
        return total + grads[1], grads[0]

    summed, rows = quick_jit(lambda: jax.lax.scan(step, jnp.zeros_like(tables), (bits, grad)))()
    expected_bits, expected_tables = naive.lut_gradients(bits, wiring, tables, grad)
    for found_bits, found_tables in (remembered, (rows, summed)):
        np.testing.assert_allclose(found_bits, expected_bits, atol=1e-5)
        np.testing.assert_allclose(found_tables, expected_tables, atol=1e-5)


@pytest.mark.parametrize("tables_spec", [P(), P("luts")], ids=["replicated", "tables-split"])
@pytest.mark.parametrize("indexed", [False, True], ids=["scatter", "inverse"])
def test_sharded_is_the_same_as_unsharded(indexed, tables_spec):
    assert len(jax.devices()) >= 8
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("tokens", "luts"))
    bits, wiring, tables, grad = case(tokens=16, inputs=8, luts=6, n=3)
    inverse = invert_wiring(wiring, bits.shape[1]) if indexed else None
    expected = forward_and_backward(bits, wiring, tables, grad, inverse=inverse)
    by_tokens, by_tables = NamedSharding(mesh, P("tokens")), NamedSharding(mesh, tables_spec)
    found = forward_and_backward(
        jax.device_put(bits, by_tokens),
        jax.device_put(wiring, by_tables),
        jax.device_put(tables, by_tables),
        jax.device_put(grad, by_tokens),
        inverse=None if inverse is None else jax.device_put(inverse, NamedSharding(mesh, P())),
    )
    assert len(found[0].sharding.device_set) == 8
    for one, other in zip(found, expected):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)


def test_both_table_gradients_agree():
    draw = np.random.default_rng(0)
    address = draw.integers(0, 8, (5, 33)).astype(np.int32)
    grad = draw.normal(size=(5, 33)).astype(np.float32)
    expected = np.zeros((5, 8))
    for j in range(5):
        for t in range(33):
            expected[j, address[j, t]] += grad[j, t]
    np.testing.assert_allclose(lut_xla._table_grad_scatter(address, grad, 8), expected, atol=1e-5)
    np.testing.assert_allclose(lut_xla._table_grad_product(address, grad, 8), expected, atol=1e-5)


def sizes_inside(jaxpr):
    """The number of elements of every intermediate value, those of inner computations too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield int(np.prod(variable.aval.shape))
        for inner in jaxprs_in_params(equation.params):
            yield from sizes_inside(inner)


def test_no_value_has_an_element_for_every_token_and_entry():
    # Tables whose addresses are split in two have factors of 8 rows and columns each.
    bits, wiring, tables, grad = case(tokens=64, inputs=24, luts=24, n=6)
    traced = jax.make_jaxpr(jax.grad(loss, (0, 1)))(bits, tables, wiring, grad)
    assert max(sizes_inside(traced.jaxpr)) < 64 * 24 * 64


def test_binarize_passes_the_gradient_straight_through():
    values = jnp.asarray([-2.0, -0.0, 0.0, 1e-8, 3.0])
    out, pullback = jax.vjp(lut.binarize, values)
    np.testing.assert_array_equal(out, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(pullback(jnp.arange(5.0))[0], np.arange(5.0))
    assert lut.binarize(values.astype(jnp.bfloat16)).dtype == jnp.bfloat16


BITS, WIRING, TABLES = (
    np.zeros((2, 5), np.float32),
    np.zeros((3, 2), np.int32),
    np.zeros((3, 4), np.float32),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mapping": WIRING + 5},
            r"mapping refers to input 5 but bits has 5 inputs \(valid: 0\.\.4\)",
        ),
        ({"mapping": WIRING - 1}, r"mapping refers to input -1 but bits has 5 inputs"),
        ({"bits": np.zeros((2, 0), np.float32)}, r"bits has 0 inputs \(none is valid\)"),
        ({"bits": np.float32(1)}, r"bits has no dimensions"),
        (
            {"mapping": np.zeros((3, 9), np.int32), "tables": np.zeros((3, 512), np.float32)},
            r"1 to 8 inputs.*asks for 9",
        ),
        (
            {"mapping": np.zeros((3, 0), np.int32), "tables": np.zeros((3, 1), np.float32)},
            r"1 to 8 inputs.*asks for 0",
        ),
        ({"mapping": WIRING.astype(np.float32)}, r"mapping must be an integer array"),
        ({"mapping": WIRING[0]}, r"mapping must be an integer array \(L, n\)"),
        ({"tables": np.zeros((3, 5), np.float32)}, r"must have shape \[3, 4\].*found \[3, 5\]"),
        ({"tables": np.zeros((2, 4), np.float32)}, r"must have shape \[3, 4\].*found \[2, 4\]"),
        ({"tables": np.zeros((3, 4), np.int32)}, r"tables must be floating, found int32"),
        ({"decay": "exponentail"}, r"Did you mean 'exponential'\?"),
        ({"decay": "harmonic", "beta": 0.5}, r"beta belongs to decay='exponential'"),
    ],
)
def test_errors(changes, message):
    arguments = {"bits": BITS, "mapping": WIRING, "tables": TABLES} | changes
    with pytest.raises(
        InputError, match=f"lut_lookup: .*{message}" if "Did you" not in message else message
    ):
        lut.lut_lookup(**arguments)
    if "bits" not in changes:
        with pytest.raises(InputError, match=message):
            lut.lut_lookup_feature_major(
                jnp.asarray(BITS.T), **{k: v for k, v in arguments.items() if k != "bits"}
            )
