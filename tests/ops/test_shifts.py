"""Numbers of one or two binary digits, against a search through all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.costs.count import count
from quweit_jax.errors import InputError
from quweit_jax.layers.ternary import MLGRU
from quweit_jax.ops.shifts import round_to_shifts
from tests.compiled import quick_jit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("digits", "mantissas"), [(1, [1.0]), (2, [1.0, 1.5])])
def test_the_nearest_of_all_such_numbers_is_taken(dtype, digits, mantissas):
    x = jnp.concatenate([jnp.linspace(-3, 3, 1001), 2.0 ** jnp.linspace(-13, 3, 200)]).astype(dtype)
    powers = 2.0 ** np.arange(-8 - (digits - 1), 6)
    there_are = np.concatenate([[0], *(m * sign * powers for m in mantissas for sign in (1, -1))])
    if digits == 2:  # the smallest one and a half would need one digit more
        there_are = there_are[np.abs(there_are) != 1.5 * powers[0]]
    exact = np.asarray(x, np.float64)
    distance = np.abs(exact[:, None] - there_are).min(axis=1)
    rounded = np.asarray(round_to_shifts(x, digits, -8), np.float64)
    np.testing.assert_array_equal(np.abs(exact - rounded), distance)
    assert np.isin(rounded, there_are).all()


def test_gradients_pass_and_what_is_no_number_stays():
    x = jnp.array([0.3, -5.0, 0.0, 1e-9])
    slope = jax.grad(lambda x: (round_to_shifts(x) * jnp.arange(1, 5)).sum())(x)
    np.testing.assert_array_equal(slope, [1, 2, 3, 4])
    odd = round_to_shifts(jnp.array([jnp.nan, jnp.inf, -jnp.inf]))
    assert np.isnan(odd[0]) and odd[1] == jnp.inf and odd[2] == -jnp.inf
    assert round_to_shifts(jnp.zeros((0, 3))).shape == (0, 3)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="digits"):
        round_to_shifts(jnp.ones(2), 3)
    with pytest.raises(InputError, match="smallest"):
        round_to_shifts(jnp.ones(2, jnp.float16), 1, -20)


def test_a_token_mixer_of_shifts_decodes_as_it_trains_and_multiplies_nothing():
    mixer = MLGRU(gates="shift", implementation="sequential")
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    bound = jnp.linspace(0, 0.9, 8)
    variables = quick_jit(mixer.init)(jax.random.key(1), x, bound)
    expected = quick_jit(mixer.apply)(variables, x, bound)
    published = quick_jit(MLGRU().apply)(variables, x, bound)
    assert not np.allclose(expected, published)
    begin = quick_jit(functools.partial(mixer.init, decode=True))
    step = quick_jit(functools.partial(mixer.apply, decode=True, mutable=["cache"]))
    cache = begin(jax.random.key(1), x[:, :1], bound)["cache"]
    for t in range(5):
        token, change = step({**variables, "cache": cache}, x[:, t : t + 1], bound)
        cache = change["cache"]
        np.testing.assert_allclose(token[:, 0], expected[:, t], atol=1e-5)

    def loss(variables):
        return jnp.square(jnp.asarray(mixer.apply(variables, x, bound))).sum()

    slopes = quick_jit(jax.grad(loss))(variables)
    assert all(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(slopes))
    sizes = {"name": "matmulfree", "width": 32, "layers": 1, "context": 8}
    exact, shift = (
        count({**sizes, "gates": gates}, 31).of_kind("recurrence") for gates in ("exact", "shift")
    )
    assert sum(exact.elementwise.multiplications.values()) > 0
    assert sum(shift.elementwise.multiplications.values()) == 0


def test_gates_that_there_are_not_are_refused():
    with pytest.raises(InputError, match="gates"):
        models.build({"name": "matmulfree", "size": "tiny", "gates": "shifts"}, 31)
