"""The blocks of a model, one after another: as many modules, or modules that are scanned.

Unscanned, the blocks are called block_0, block_1, ... Scanned (`scan_layers`), each run of blocks
with the same kind of channel mixer is one module, called as its first block with an 's', whose
variables have a leading axis, a layer each: 'blocks_0/mlp/up/kernel' is (layers, d, 4 d). The
program is then as long as one block, whatever the depth. `stacked` and `unstacked` turn the
variables of one into those of the other; whatever reads a trained model reads the unscanned one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from quweit_jax.errors import check_choice
from quweit_jax.layers.placement import hand_over

# What a rematerialized block keeps for the backward pass, besides its input.
POLICIES = {
    "nothing": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_SCANNED = re.compile(r"blocks_(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth:
    """How a model of many blocks is compiled.

    remat: whether blocks are computed again in the backward pass instead of being kept.
    remat_policy: what is kept all the same: 'nothing', the results of all matrix products ('dots'),
      or of those with parameters ('dots_no_batch').
    scan_layers: whether equal blocks in a row are compiled once and scanned.
    """

    remat: bool = False
    remat_policy: str = "nothing"
    scan_layers: bool = False

    def check_depth(self) -> None:
        """Raises InputError for an unknown policy."""
        check_choice("model.remat_policy", self.remat_policy, POLICIES)


def run_blocks(
    make: Callable[[str, str], nn.Module],
    kinds: Sequence[str],
    x: Float[Array, "B T d"],
    shared: Sequence[object] = (),
    own: Sequence[Float[Array, "layers ..."]] = (),
    *,
    depth: Depth,
    decode: bool = False,
) -> Float[Array, "B T d"]:
    """What the blocks make of x (B, T, d), one after another.

    Args:
      make: (kind of block, as of `kinds_of_blocks`, name) -> a block, called as block(x, *own,
        *shared). kinds: of each block. shared: what all of them are given.
      own: arrays with a leading axis of blocks, of which each is given its part. decode: nothing is
        computed again.
    """

    def apply(block: nn.Module, x: Array, parts: Sequence[Array]) -> Array:
        return block(x, *parts, *shared)  # type: ignore[operator]

    if depth.remat and not decode:
        apply = nn.remat(
            apply, policy=POLICIES[depth.remat_policy], prevent_cse=not depth.scan_layers
        )
    x = hand_over(x)
    if not depth.scan_layers:
        for i, kind in enumerate(kinds):
            x = hand_over(apply(make(kind, f"block_{i}"), x, [values[i] for values in own]))
        return x
    for first, count, kind in groups(kinds):
        scanned = nn.scan(
            lambda block, x, parts: (hand_over(apply(block, x, parts)), None),
            variable_axes={True: 0},
            split_rngs={True: True},
            length=count,
        )
        parts = [values[first : first + count] for values in own]
        x = scanned(make(kind, f"blocks_{first}"), x, parts)[0]
    return x


def groups(kinds: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first block, number of blocks, kind) of each run of equal kinds."""
    for kind, members in itertools.groupby(range(len(kinds)), lambda i: kinds[i]):
        found = list(members)
        yield found[0], len(found), kind


def kinds_of_blocks(model: nn.Module) -> tuple[str, ...]:
    """What tells a model's blocks apart, block by block: their channel mixers and, where a model
    has several, their token mixers.
    """
    config = getattr(model, "config")  # noqa: B009 - of every model of blocks
    return config.blocks() if hasattr(config, "blocks") else config.mlps()


def is_scanned(model: nn.Module) -> bool:
    """Whether a model scans its blocks."""
    return getattr(getattr(model, "config", None), "scan_layers", False)


def unscanned(model: nn.Module) -> nn.Module:
    """The same model with a module a block."""
    return _without(model, "scan_layers")


def watchable(model: nn.Module) -> nn.Module:
    """The same model with a module a block, none computed again in a backward pass: what its layers
    read can be taken out while it is traced.
    """
    return _without(model, "scan_layers", "remat")


def _without(model: nn.Module, *options: str) -> nn.Module:
    """The same model with options of `Depth` off, those that it has."""
    config: Any = getattr(model, "config", None)
    off = {option: False for option in options if getattr(config, option, False)}
    return model.clone(config=dataclasses.replace(config, **off)) if off else model


def unstacked(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The variables {'params': ..., ...} of the unscanned model, from those of a scanned one; of
    another they are what they were.
    """
    return {name: _unstacked(tree) for name, tree in variables.items()}


def _unstacked(tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
    found: dict[str, PyTree] = {}
    for name, part in tree.items():
        match = _SCANNED.fullmatch(name)
        if match is None:
            found[name] = part
            continue
        leaves, structure = jax.tree.flatten(part)
        for i, layer in enumerate(zip(*leaves)):
            found[f"block_{int(match[1]) + i}"] = structure.unflatten(layer)
    return found


def stacked(variables: Mapping[str, PyTree], kinds: Sequence[str]) -> dict[str, PyTree]:
    """The variables of a scanned model, from those of the unscanned one.

    kinds: of the blocks, see `kinds_of_blocks`.
    """
    return {name: _stacked(tree, kinds) for name, tree in variables.items()}


def _stacked(tree: Mapping[str, PyTree], kinds: Sequence[str]) -> dict[str, PyTree]:
    found = {name: part for name, part in tree.items() if not re.fullmatch(r"block_\d+", name)}
    for first, count, _ in groups(kinds):
        members = [tree[f"block_{i}"] for i in range(first, first + count) if f"block_{i}" in tree]
        if members:
            found[f"blocks_{first}"] = jax.tree.map(lambda *leaves: _stack(leaves), *members)
    return found


def _stack(leaves: Sequence[Array]) -> Array | np.ndarray:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return (np if on_host else jnp).stack(leaves)
