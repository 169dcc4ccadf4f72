"""Whole runs in tests spend their time compiling, and none of them measures speed: the compiler may leave out its optimisations."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compile_quickly() -> Iterator[None]:
    """Here and in the processes started from here."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
