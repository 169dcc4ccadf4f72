"""How the optimizer treats a parameter: its group, declared by the layer or model that has it.

A parameter that nobody declares is a matrix ('decay') or a vector or scalar ('no_decay').
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from quweit_jax.errors import InputError, check_choice

# 'tables', 'scores', 'thresholds' and 'vectors' are those of weightless layers.
GROUPS = ("tables", "scores", "thresholds", "vectors", "decay", "no_decay")

_DECLARED: dict[tuple[str, int | None], str] = {}
# How a leaf hangs in Flax's boxes (nn.Partitioned, nnx.Param).
_BOXES = ("value", "raw_value", "_value")


def declare(group: str, *names: str, rank: int | None = None) -> None:
    """Puts parameters of these names into a group; rank: only those of so many dimensions.

    A declaration with a rank goes before one without. Layers under `nn.scan` have one dimension
    more, so declare a rank only where two models use one name for different things.

    Raises:
      InputError: an unknown group, or a name that is declared for another group.
    """
    check_choice("declare: group", group, GROUPS)
    for name in names:
        known = _DECLARED.setdefault((name, rank), group)
        if known != group:
            raise InputError(
                f"declare: parameters named '{name}' are in the group '{known}' already, found "
                f"'{group}'; choose another name."
            )


# Of Flax's own layers.
declare("no_decay", "bias", "scale")


def name_of(path: tuple[Any, ...]) -> str:
    """A parameter's name: the end of its path in a tree, without lists and Flax's boxes; of flat
    dicts, with keys such as 'a/b', 'a.b' or ('a', 'b'), the end of the key.
    """
    for key in reversed(path):
        boxed = isinstance(key, GetAttrKey) and key.name in _BOXES
        if boxed or isinstance(key, SequenceKey | FlattenedIndexKey):
            continue
        name = key.key if isinstance(key, DictKey) else getattr(key, "name", key)
        parts = name if isinstance(name, tuple) else [name]
        for part in reversed(parts):
            if not isinstance(part, int):  # a place in one of NNX's lists
                return re.split(r"[/.]", str(part))[-1]
    return ""


def group_of(path: tuple[Any, ...], leaf: Any) -> str:
    """The group of a parameter at a path of `jax.tree_util`; leaf: an array or its shape."""
    name, rank = name_of(path), np.ndim(leaf)
    undeclared = "decay" if rank >= 2 else "no_decay"
    return _DECLARED.get((name, rank)) or _DECLARED.get((name, None)) or undeclared
