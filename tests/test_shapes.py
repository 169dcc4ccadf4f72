"""The shapes and dtypes that signatures promise (jaxtyping): that they are there, and that good
inputs keep them at run time.
"""

import functools
import importlib
import inspect
import pkgutil
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from flax.linen.module import wrap_method_once
from jaxtyping import AbstractArray, Float, TypeCheckError, jaxtyped

from quweit_jax import layers, models, ops
from quweit_jax.layers import norms
from quweit_jax.ops import (
    bit_models,
    delta,
    fusion,
    int64,
    integer,
    integer_norm,
    lut,
    packed_glu,
    packed_lut,
    packed_ternary,
    pair_table,
    patches,
    recurrence,
    shifts,
    sums,
    ternary,
    ternary_fit,
    ternary_glu,
    thermometer,
    vector_lut,
    wiring,
)


def checked(function):
    return jaxtyped(typechecker=beartype)(inspect.unwrap(function))


def check_calls(monkeypatch, layer):
    """A layer's `__call__` checked inside what Flax makes of it."""
    monkeypatch.setattr(layer, "__call__", wrap_method_once(checked(layer.__call__)))


def modules(package):
    return [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]


def functions(module):
    """What a module defines for others, custom derivatives unwrapped: {name: function}."""
    found = {name: inspect.unwrap(f) for name, f in vars(module).items() if name[0] != "_"}
    return {
        name: f
        for name, f in found.items()
        if inspect.isfunction(f) and f.__module__ == module.__name__
    }


def parts(hint):
    """The types that a type hint is made of."""
    arguments = typing.get_args(hint)
    if isinstance(hint, typing.TypeVar):
        arguments = hint.__constraints__
    elif not arguments:
        return {hint}
    flat = [
        a for argument in arguments for a in (argument if type(argument) is list else [argument])
    ]
    return {part for argument in flat for part in parts(argument)}


def hints(function):
    """What a function says of each argument and of what it returns: {name: set of types}."""
    given = typing.get_type_hints(function)
    names = [*inspect.signature(function).parameters, "return"]
    return {name: parts(given.get(name, typing.Any)) for name in names if name != "self"}


def shapeless(function, vague=(jax.Array, np.ndarray, typing.Any)):
    """The arguments and results that may be arrays of which the signature says nothing more."""
    return [name for name, types in hints(function).items() if types.intersection(vague)]


def speaks_of_arrays(function):
    return any(
        isinstance(part, type) and issubclass(part, AbstractArray)
        for types in hints(function).values()
        for part in types
    )


KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 3, 5))
BITS = (X > 0).astype(jnp.float32)
WIRING = wiring.random_wiring(KEY, 5, 7, 2)
TABLES = jax.random.uniform(KEY, (7, 4), minval=-1.0)
PACKED = packed_lut.pack_tables(TABLES)
WEIGHT = jax.random.normal(KEY, (5, 4))
X4 = jax.random.normal(KEY, (2, 3, 4, 5))
ONES_INT8 = jnp.ones((2, 3, 5), jnp.int8)
WORDS_OF_5 = packed_ternary.pack_ternary(jnp.ones((5, 16), jnp.int8))
WHOLE = jnp.round(8 * X)
GRAM = np.eye(4)
INTS = jnp.abs(WHOLE).astype(jnp.int32)
WORDS = INTS.astype(jnp.uint32)
SCALE = jnp.float32(0.1)
CALLS = {
    "lut_lookup": (lut.lut_lookup, (BITS, WIRING, TABLES), {}),
    "lut_lookup inverse": (
        lut.lut_lookup,
        (BITS > 0, WIRING, TABLES.astype(jnp.bfloat16)),
        {"inverse": wiring.invert_wiring(WIRING, 5)},
    ),
    "lut_lookup_feature_major": (
        lut.lut_lookup_feature_major,
        (BITS.reshape(6, 5).T, WIRING, TABLES),
        {},
    ),
    "finite_differences": (lut.finite_differences, (TABLES, lut.efd_weighting(2)), {}),
    "random_wiring": (wiring.random_wiring, (KEY, 5, 7, 2), {}),
    "random_wiring old key": (wiring.random_wiring, (jax.random.PRNGKey(0), 5, 7, 2), {}),
    "arange_wiring": (wiring.arange_wiring, (5, 7, 2), {}),
    "invert_wiring": (wiring.invert_wiring, (WIRING, 5), {}),
    "random_candidates": (wiring.random_candidates, (KEY, 5, 14, 3), {}),
    "learnable_wiring": (wiring.learnable_wiring, (BITS, jax.random.uniform(KEY, (5, 14))), {}),
    "sparse": (
        wiring.sparse_learnable_wiring,
        (BITS, jax.random.uniform(KEY, (14, 3)), wiring.random_candidates(KEY, 5, 14, 3)),
        {},
    ),
    "uniform_thresholds": (thermometer.uniform_thresholds, (X[0], 4), {}),
    "gaussian_thresholds": (thermometer.gaussian_thresholds, (X[0], 4), {"per_feature": False}),
    "distributive_thresholds": (thermometer.distributive_thresholds, (X[0], 4), {}),
    "normal_quantiles": (thermometer.normal_quantiles, (4,), {}),
    "encode": (thermometer.encode, (X, jnp.zeros((5, 4))), {}),
    "encode_ste": (thermometer.encode_ste, (X, jnp.zeros(4)), {"window": 0.5}),
    "group_sum": (sums.group_sum, (BITS, 2), {"tau": 3.0}),
    "conditional_sum": (sums.conditional_sum, (BITS, jnp.ones((5, 6)), jnp.ones(6)), {}),
    "conditional_sum grouped": (sums.conditional_sum, (X[..., :4], jnp.ones(4), jnp.ones(2)), {}),
    "conditional_sum_feature_major": (
        sums.conditional_sum_feature_major,
        (BITS.reshape(6, 5).T, jnp.ones((5, 6))),
        {},
    ),
    "walsh_hadamard": (sums.walsh_hadamard, (TABLES,), {}),
    "spectral_penalty": (sums.spectral_penalty, (TABLES, jnp.ones(3)), {}),
    "fake_quantize_int8": (sums.fake_quantize_int8, (TABLES, 0), {}),
    "quantize_int8": (sums.quantize_int8, (TABLES, 0), {}),
    "efd_matrix": (lut.efd_matrix, (2, lut.efd_weighting(2)), {}),
    "check_lut_arguments": (
        lut.check_lut_arguments,
        (5, WIRING, TABLES, "exponential", None, None),
        {},
    ),
    "binarize": (lut.binarize, (X,), {}),
    "even_inverse": (wiring.even_inverse, (WIRING, 5), {}),
    "marginal_inputs": (wiring.marginal_inputs, (jax.random.uniform(KEY, (5, 14)),), {}),
    "strongest": (wiring.strongest, (jax.random.uniform(KEY, (5, 14)),), {}),
    "sparse_wiring_feature_major": (
        wiring.sparse_wiring_feature_major,
        (
            BITS.reshape(6, 5).T,
            jax.random.uniform(KEY, (14, 3)),
            wiring.random_candidates(KEY, 5, 14, 3),
        ),
        {},
    ),
    "step_ste": (thermometer.step_ste, (X[..., None], jnp.zeros((5, 4)), 1.0, "triangular"), {}),
    "encode_feature_major": (
        thermometer.encode_feature_major,
        (X.reshape(6, 5).T, jnp.zeros((5, 4))),
        {},
    ),
    "pack_tables": (packed_lut.pack_tables, (TABLES,), {}),
    "read_packed": (packed_lut.read_packed, (PACKED, jnp.zeros((7, 6), jnp.int32)), {}),
    "look_up": (packed_lut.look_up, (BITS.reshape(6, 5).T, WIRING, PACKED), {}),
    "pack_bits": (packed_lut.pack_bits, (BITS.reshape(6, 5).T,), {}),
    "pack_above": (packed_lut.pack_above, (X.reshape(6, 5).T, jnp.zeros((1, 4))), {}),
    "look_up_words": (
        packed_lut.look_up_words,
        (packed_lut.pack_bits(BITS.reshape(6, 5).T), WIRING, PACKED),
        {},
    ),
    "add_vectors packed": (
        packed_lut.add_vectors,
        (packed_lut.pack_bits(jnp.ones((7, 40), bool)), jnp.ones((7, 3), jnp.int8)),
        {"by_product": True},
    ),
    "add_vectors": (
        packed_lut.add_vectors,
        (jnp.ones((7, 6), bool), jnp.ones((7, 3), jnp.int8)),
        {},
    ),
    "no_fusion": (fusion.no_fusion, (jnp.add, X, X), {}),
    "cut_patches": (patches.cut_patches, (jnp.ones((2, 4, 6, 3)), 2), {}),
    "resample_positions": (patches.resample_positions, (jnp.ones((1, 5, 3)), (3, 2)), {}),
    "gated_recurrence": (recurrence.gated_recurrence, (X, X), {}),
    "gated_recurrence from a state": (recurrence.gated_recurrence, (X, X, X[:, 0]), {}),
    "gated_recurrence_step": (recurrence.gated_recurrence_step, (X[0], X[0], X[0]), {}),
    "quantize_activations": (ternary.quantize_activations, (X.astype(jnp.bfloat16),), {}),
    "quantize_weights": (ternary.quantize_weights, (WEIGHT,), {}),
    "to_bytes": (ternary.to_bytes, (jnp.ones((8, 4), jnp.int8),), {}),
    "from_bytes": (ternary.from_bytes, (jnp.ones((2, 4), jnp.uint8),), {}),
    "fit_ternary": (ternary_fit.fit_ternary, (GRAM, GRAM, np.ones(4), GRAM), {}),
    "fit_ternary_and_scale": (ternary_fit.fit_ternary_and_scale, (GRAM, GRAM), {}),
    "best_scale": (ternary_fit.best_scale, (GRAM, GRAM, GRAM), {}),
    "float_weights": (ternary_fit.float_weights, (GRAM, GRAM, 1.0), {}),
    "rms_norm": (ternary.rms_norm, (X.astype(jnp.bfloat16), jnp.ones(5)), {}),
    "mean_square": (ternary.mean_square, (X,), {}),
    "int_matmul": (ternary.int_matmul, (ONES_INT8, jnp.ones((5, 4), jnp.int8)), {}),
    "bit_linear": (ternary.bit_linear, (X, WEIGHT, jnp.ones(5)), {}),
    "bit_linear_reference": (ternary.bit_linear_reference, (X, WEIGHT, jnp.ones(5)), {}),
    "ternary_linear": (ternary.ternary_linear, (X.astype(jnp.bfloat16), WEIGHT), {}),
    "gated_delta": (delta.gated_delta, (X4, X4, X4[..., :2], X4[..., 0], X4[..., 0]), {}),
    "gated_delta in chunks, from a state": (
        delta.gated_delta,
        (X4, X4, X4[..., :2], X4[..., 0], X4[..., 0], jnp.ones((2, 4, 5, 2))),
        {"implementation": "chunked", "chunk": 2},
    ),
    "gated_delta_step": (
        delta.gated_delta_step,
        (*(X4[:, 0],) * 2, X4[:, 0, :, :2], *(X4[:, 0, :, 0],) * 2, jnp.ones((2, 4, 5, 2))),
        {},
    ),
    "check_shapes": (ternary.check_shapes, (X, WEIGHT, jnp.ones(5)), {}),
    "pack_ternary": (packed_ternary.pack_ternary, (jnp.ones((5, 4), jnp.int8),), {}),
    "pack_ternary on the host": (packed_ternary.pack_ternary, (np.ones((5, 4), np.int8),), {}),
    "unpack_ternary": (packed_ternary.unpack_ternary, (WORDS_OF_5, 5, 4), {}),
    "packed_shape": (packed_ternary.packed_shape, (5, 4), {}),
    "check_packed": (packed_ternary.check_packed, ("", WORDS_OF_5, 5, 4), {}),
    "packed_sums": (packed_ternary.packed_sums, (ONES_INT8, WORDS_OF_5), {"num_outputs": 4}),
    "packed_matmul": (packed_ternary.packed_matmul, (ONES_INT8, WORDS_OF_5), {}),
    "packed_glu": (
        packed_glu.packed_glu,
        (ONES_INT8, WORDS_OF_5, jnp.ones(6, jnp.int16), jnp.ones((1, 4, 4), jnp.int8), WORDS_OF_5),
        {"step": 3, "num_outputs": 7},
    ),
    "inverse_scale of weights": (ternary.inverse_scale, (WEIGHT,), {}),
    "ternary_glu": (
        ternary_glu.ternary_glu,
        (X, jnp.ones((5, 6)), jnp.zeros(6), jnp.ones((1, 4, 4)), jnp.ones((3, 7))),
        {"step": 3},
    ),
    "bit_sums": (
        bit_models.bit_sums,
        (X[0], jnp.zeros((1, 2)), [], jnp.ones((10, 3), jnp.int8)),
        {},
    ),
    "bit_counts": (bit_models.bit_counts, (X[0], jnp.zeros((5, 2)), [], 5), {}),
    "packed_matmul scaled": (packed_ternary.packed_matmul, (ONES_INT8, WORDS_OF_5, X[..., :1]), {}),
    "magnitude": (int64.magnitude, (INTS,), {}),
    "multiply": (int64.multiply, (WORDS, WORDS[0]), {}),
    "dyadic": (int64.dyadic, (SCALE, jnp.ones(5)), {}),
    "multiply_shift": (int64.multiply_shift, (INTS, INTS[0], INTS[0, 0, 0]), {}),
    "divide": (int64.divide, (WORDS, WORDS, WORDS + 1), {}),
    "add": (int64.add, ((WORDS, WORDS), (WORDS, WORDS[0])), {}),
    "straight_through": (integer.straight_through, (X, X), {}),
    "round_to_shifts": (shifts.round_to_shifts, (X,), {}),
    "is_integer": (integer.is_integer, (X,), {}),
    "symmetric_scale": (integer.symmetric_scale, (-SCALE, SCALE, 8), {}),
    "quantize": (integer.quantize, (X, jnp.ones(5), 8), {}),
    "quantize_weights of integers": (integer.quantize_weights, (WEIGHT,), {}),
    "quantize_bias": (integer.quantize_bias, (jnp.ones(5), jnp.ones(5)), {}),
    "saturate": (integer.saturate, (X,), {}),
    "matmul_units": (integer.matmul_units, (X, jnp.ones((5, 4), jnp.int8)), {}),
    "einsum_units": (integer.einsum_units, ("...i,i->...", INTS, jnp.ones(5, jnp.int8)), {}),
    "shift_exp": (integer.shift_exp, (INTS, jnp.int32(9), 15), {}),
    "shift_exp of floats": (integer.shift_exp, (WHOLE, jnp.int32(9), jnp.int32(15)), {}),
    "inverse_scale": (integer.inverse_scale, (SCALE,), {}),
    "power_of_two": (integer.power_of_two, (INTS,), {}),
    "published_grid": (integer.published_grid, (INTS, jnp.float32(0.5)), {}),
    "shiftmax_units": (integer.shiftmax_units, (INTS, jnp.int32(9)), {"bits": 8}),
    "shift_gelu_units": (integer.shift_gelu_units, (WHOLE, jnp.int32(9)), {}),
    "gelu_shadow": (integer.gelu_shadow, (X,), {}),
    "layer_norm_constants": (integer_norm.layer_norm_constants, (jnp.ones(5), jnp.ones(5)), {}),
    "layer_norm_units": (integer_norm.layer_norm_units, (INTS, INTS[0, 0], INTS[0, 0]), {}),
    "layer_norm_shadow": (integer_norm.layer_norm_shadow, (X, jnp.ones(5), jnp.ones(5)), {}),
    "requantize_units": (
        integer.requantize_units,
        ([(WHOLE, jnp.ones(5)), (WHOLE[:1], SCALE)], SCALE, 8),
        {},
    ),
    "requantize_int": (integer.requantize_int, ([(INTS, INTS[0, 0], INTS[0, 0])], 8), {}),
    "clamp": (integer.clamp, (INTS, 8), {}),
    "clip_shadow": (integer.clip_shadow, (X, jnp.ones(5), 8), {}),
    "ternary_weights": (ternary.ternary_weights, (WEIGHT,), {}),
    "ternary_product": (ternary.ternary_product, (X, WEIGHT), {}),
    "codes": (pair_table.codes, (WHOLE, 3, 4), {}),
    "silu_gate": (pair_table.silu_gate, (4, 0.25), {}),
    "entry_scale": (pair_table.entry_scale, (pair_table.silu_gate(4, 0.25),), {}),
    "round_entries": (pair_table.round_entries, (TABLES,), {}),
    "pair_lookup": (pair_table.pair_lookup, (BITS, BITS, jnp.ones((1, 4, 4))), {}),
    "gated": (pair_table.gated, (BITS, BITS, 4, 0.25), {}),
    "read_pairs": (pair_table.read_pairs, (jnp.repeat(BITS, 2, -1), jnp.ones((1, 4, 4))), {}),
    "count_codes": (pair_table.count_codes, (INTS, jnp.arange(3)), {}),
    "halfway_points": (pair_table.halfway_points, (jnp.int32(5), 4), {}),
    "vector_lookup": (vector_lut.vector_lookup, (jnp.ones((7, 2, 6)), jnp.ones((7, 4, 3))), {}),
    "addresses": (vector_lut.addresses, (jnp.ones((7, 2, 6)),), {}),
    "packed_vector_lookup": (
        vector_lut.packed_vector_lookup,
        (jnp.ones((7, 2, 6)), jnp.ones((7, 4, 3), jnp.int8)),
        {},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_signature_holds(name):
    function, args, kwargs = CALLS[name]
    checked(function)(*args, **kwargs)


def test_a_wrong_shape_would_be_noticed():
    with pytest.raises(TypeCheckError):
        checked(lut.lut_lookup_feature_major)(BITS, WIRING, TABLES)


@pytest.mark.parametrize("module", modules(ops), ids=lambda module: module.__name__)
def test_every_public_operation_has_shapes_and_is_called_here(module):
    called = {inspect.unwrap(function) for function, _, _ in CALLS.values()}
    for name, function in functions(module).items():
        assert not shapeless(function), name
        assert function in called or not speaks_of_arrays(function), name


def layers_of(module):
    """The layers and models that a module defines: {name: class}."""
    return {
        name: found
        for name, found in vars(module).items()
        if isinstance(found, type)
        and issubclass(found, nn.Module)
        and found.__module__ == module.__name__
        and "__call__" in vars(found)
    }


LAYERS = modules(layers) + modules(models)


@pytest.mark.parametrize("module", LAYERS, ids=lambda module: module.__name__)
def test_every_layer_has_shapes(module):
    for name, layer in layers_of(module).items():
        assert not shapeless(inspect.unwrap(layer.__call__)), name
    for name, function in functions(module).items():
        assert not shapeless(function, vague=(jax.Array, np.ndarray)), name


LANGUAGE = {"vocab_size": 7, "mlp": "dense+weightless", "layers": 2, "width": 8, "context": 4}
VIT = {"name": "vit", "num_classes": 5, "variant": "mu/4", "width": 16, "depth": 2, "heads": 2}
NETWORKS = {
    "gpt": {"name": "gpt", **LANGUAGE, "heads": 2},
    "gpt lookups": {"name": "gpt", **LANGUAGE, "heads": 2, "mlp": "lookup_glu+swiglu"},
    "gpt vectors": {
        "name": "gpt",
        **LANGUAGE,
        "heads": 2,
        "mlp": "lookup_glu+weightless",
        "lookup_glu": {"sum": "vector"},
        "weightless": {"sum": "vector"},
    },
    "matmulfree": {"name": "matmulfree", **LANGUAGE},
    "transformer_pp": {"name": "transformer_pp", **LANGUAGE, "heads": 2, "hidden": 8},
    "ternary hybrid": {
        "name": "transformer_pp",
        **LANGUAGE,
        "heads": 2,
        "hidden": 8,
        "linear": "ternary",
        "sub_norms": True,
        "activation": "relu2",
        "mixer": "gated_delta+attention",
        "rope": {"kind": "yarn", "factor": 2.0},
    },
    "vit": {**VIT, "mlp": "dense+weightless", "dtype": "bfloat16", "drop_path": 0.1},
    "integer vit": {**VIT, "mlp": "dense+weightless", "integer": True, "drop_path": 0.1},
    "integer vit lookups": {**VIT, "mlp": "lookup_glu", "integer": True},
    "dwn": {"name": "dwn", "num_classes": 5, "num_luts": (20,)},
    "dwn learnable": {"name": "dwn", "num_classes": 5, "num_luts": (20,), "reduction": "learnable"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_keep_their_shapes(name, monkeypatch):
    for module in LAYERS:
        for layer in layers_of(module).values():
            check_calls(monkeypatch, layer)
    model = models.build(NETWORKS[name])
    reads = "vocab_size" in NETWORKS[name]
    inputs = jnp.ones((2, 4), jnp.int32) if reads else jax.random.normal(KEY, (2, 8, 8, 3))
    variables = jax.eval_shape(model.init, KEY, inputs)
    collections = ["packed", "ranges", "cache"]

    def apply(variables, inputs, **options):
        return model.apply(variables, inputs, **options, mutable=collections, rngs={"dropout": KEY})

    _, written = jax.eval_shape(functools.partial(apply, train=True), variables, inputs)
    if reads:
        valid = jnp.ones((2, 4), bool)
        jax.eval_shape(functools.partial(apply, valid=valid, decode=True), variables, inputs)
    if "packed" in written:
        jax.eval_shape(functools.partial(model.apply), {**variables, **written}, inputs)


def test_a_wrong_layer_would_be_noticed(monkeypatch):
    check_calls(monkeypatch, norms.RMSNorm)
    with pytest.raises(TypeCheckError):
        norms.RMSNorm().init(KEY, INTS)


def test_a_signature_without_shapes_would_be_noticed():
    def named(x: Float[jax.Array, "T d"], y: jax.Array | None, z: list[np.ndarray], w=0) -> int: ...

    assert shapeless(named) == ["y", "z", "w"]
