"""Whole networks; `build` picks one. Importing this package alone imports no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quweit_jax.models.registry import build as build
    from quweit_jax.models.registry import defaults as defaults


def __getattr__(name: str) -> Any:
    if name in ("build", "defaults"):
        from quweit_jax.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
