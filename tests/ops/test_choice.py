"""Choosing between the implementations of a function."""

import logging

import jax
import jax.numpy as jnp
import pytest

from quweit_jax.errors import InputError
from quweit_jax.ops.kernels.choice import anywhere, choose, compiling_for, native, only_on

OFFERED = {
    "pallas": only_on("tpu", "gpu"),
    "native": native(anywhere),
    "xla": anywhere,
    "reference": anywhere,
}


def test_the_first_that_works_is_taken():
    assert choose("f", None, {"pallas": only_on("tpu"), "xla": anywhere}) == "xla"
    with compiling_for("cpu"):
        assert choose("f", None, OFFERED) == "native"
    with compiling_for("tpu"):
        assert choose("f", None, OFFERED) == "pallas"


def test_what_leaves_the_process_has_no_native_code():
    with compiling_for("cpu", portable=True):
        assert choose("f", None, OFFERED) == "xla"
        with pytest.raises(InputError, match="cannot be exported"):
            choose("f", "native", OFFERED)


@pytest.mark.parametrize("asked, why", [("pallas", "needs a tpu or gpu"), ("cuda", "not exist")])
def test_what_a_platform_lacks_is_refused_with_what_it_has(asked, why):
    with compiling_for("cpu"), pytest.raises(InputError, match=f"{why}.*native, xla, reference"):
        choose("f", asked, OFFERED)


def test_a_choice_is_told_once(caplog):
    with caplog.at_level(logging.INFO), compiling_for("cpu"):
        for _ in range(3):
            choose("told_once", None, {"xla": anywhere})
    assert [r.message for r in caplog.records] == ["told_once on cpu: xla"]


def test_a_compiled_function_is_traced_anew_for_another_platform():
    seen = []

    @jax.jit
    def f(x):
        seen.append(choose("f", None, OFFERED))
        return x

    for platform in ("cpu", "tpu", "cpu"):
        with compiling_for(platform):
            f(jnp.ones(()))
    assert seen == ["native", "pallas"]


def test_nothing_is_asked_that_need_not_be_known():
    """What hinders native code is known once it is compiled."""

    def asked(_):
        raise AssertionError("asked")

    assert choose("f", "xla", {"native": asked, "xla": anywhere}) == "xla"
    assert choose("f", None, {"xla": anywhere, "slow": asked}) == "xla"
