"""The shapes and dtypes that signatures promise (jaxtyping), checked at run time on good inputs."""

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from quweit_jax.ops import lut, thermometer
from quweit_jax.ops import sums as reductions
from quweit_jax.ops import wiring as mapping


def checked(function):
    return jaxtyped(typechecker=beartype)(function)


KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 3, 5))
BITS = (X > 0).astype(jnp.float32)
WIRING = mapping.random_mapping(KEY, 5, 7, 2)
TABLES = jax.random.uniform(KEY, (7, 4), minval=-1.0)
CALLS = {
    "lut_lookup": (lut.lut_lookup, (BITS, WIRING, TABLES), {}),
    "lut_lookup inverse": (
        lut.lut_lookup,
        (BITS > 0, WIRING, TABLES.astype(jnp.bfloat16)),
        {"inverse": mapping.invert_mapping(WIRING, 5)},
    ),
    "lut_lookup_feature_major": (
        lut.lut_lookup_feature_major,
        (BITS.reshape(6, 5).T, WIRING, TABLES),
        {},
    ),
    "finite_differences": (lut.finite_differences, (TABLES, lut.efd_weighting(2)), {}),
    "random_mapping": (mapping.random_mapping, (KEY, 5, 7, 2), {}),
    "random_mapping old key": (mapping.random_mapping, (jax.random.PRNGKey(0), 5, 7, 2), {}),
    "arange_mapping": (mapping.arange_mapping, (5, 7, 2), {}),
    "invert_mapping": (mapping.invert_mapping, (WIRING, 5), {}),
    "random_candidates": (mapping.random_candidates, (KEY, 5, 14, 3), {}),
    "learnable_mapping": (mapping.learnable_mapping, (BITS, jax.random.uniform(KEY, (5, 14))), {}),
    "sparse": (
        mapping.sparse_learnable_mapping,
        (BITS, jax.random.uniform(KEY, (14, 3)), mapping.random_candidates(KEY, 5, 14, 3)),
        {},
    ),
    "uniform_thresholds": (thermometer.uniform_thresholds, (X[0], 4), {}),
    "gaussian_thresholds": (thermometer.gaussian_thresholds, (X[0], 4), {"per_feature": False}),
    "distributive_thresholds": (thermometer.distributive_thresholds, (X[0], 4), {}),
    "normal_quantiles": (thermometer.normal_quantiles, (4,), {}),
    "encode": (thermometer.encode, (X, jnp.zeros((5, 4))), {}),
    "encode_ste": (thermometer.encode_ste, (X, jnp.zeros(4)), {"window": 0.5}),
    "group_sum": (reductions.group_sum, (BITS, 2), {"tau": 3.0}),
    "conditional_sum": (reductions.conditional_sum, (BITS, jnp.ones((5, 6)), jnp.ones(6)), {}),
    "conditional_sum grouped": (
        reductions.conditional_sum,
        (X[..., :4], jnp.ones(4), jnp.ones(2)),
        {},
    ),
    "conditional_sum_feature_major": (
        reductions.conditional_sum_feature_major,
        (BITS.reshape(6, 5).T, jnp.ones((5, 6))),
        {},
    ),
    "walsh_hadamard": (reductions.walsh_hadamard, (TABLES,), {}),
    "spectral_penalty": (reductions.spectral_penalty, (TABLES, jnp.ones(3)), {}),
    "fake_quantize_int8": (reductions.fake_quantize_int8, (TABLES, 0), {}),
    "quantize_int8": (reductions.quantize_int8, (TABLES, 0), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_signature_holds(name):
    function, args, kwargs = CALLS[name]
    checked(function)(*args, **kwargs)


def test_a_wrong_shape_would_be_noticed():
    with pytest.raises(TypeCheckError):
        checked(lut.lut_lookup_feature_major)(BITS, WIRING, TABLES)
