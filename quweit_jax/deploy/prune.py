"""Look-up tables that a model could do without on given data: found, folded away, and checked by
evaluating what is left.

A table whose bit is the same for all of the data is dropped. In the last layer its vector then
joins the sums' constant, in integers, so that no sum changes; below it, the tables that read it are
cut down to the entries that can still be addressed. A table that no kept table reads is dropped
too.

What is compared is an *output*: the decision for an image or for a token of text, the class or next
token of the largest logit. The stricter number beside it counts the outputs of which every logit
has the same bits.

Dimensions: L tables, n inputs a table, A = 2**n entries, T tokens, B batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quweit_jax.deploy.pack import pack
from quweit_jax.deploy.tables import Block, Tree, at, find_blocks, pack_bits, watch
from quweit_jax.errors import InputError
from quweit_jax.models.dwn import DWN

# Inputs of a batch and the examples' weights (B,): 0 for those that only fill it up.
Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a block's tables gave on some data. ones: of each layer, int (L,), for how many tokens
    1. tokens: for how many they were asked.
    """

    ones: tuple[np.ndarray, ...]
    tokens: int

    def constant(self) -> list[np.ndarray]:
        """Of each layer, bool (L,): whether the bit was always the same."""
        return [(count == 0) | (count == self.tokens) for count in self.ones]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How two forms of a model compare: outputs, those of the same decision, and those of the same
    logits to the bit.
    """

    outputs: int
    same_decisions: int
    same_logits: int


@dataclasses.dataclass(frozen=True)
class Fold:
    """What is left of a block when tables that always give the same bit are dropped.

    kept: of each layer, bool (L,). tables, wiring: of each layer, of the kept tables, wired to the
    kept tables below. last_bits: bool (L,), the bits that the dropped tables of the last layer
    always give (anything for the kept ones).
    """

    kept: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]
    wiring: tuple[np.ndarray, ...]
    last_bits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A packed model, its variables for `model.apply`, and its blocks by path."""

    model: nn.Module
    variables: Tree
    blocks: dict[str, Block]


def deploy(model: nn.Module, variables: Tree, inputs: np.ndarray) -> Deployed | None:
    """A trained (or packed) model as deployed; None if it has no look-up tables.

    inputs: any that the model can be applied to; only their shape matters.

    Raises:
      InputError: an integer model whose activation ranges were never set.
    """
    try:
        packed = variables if "packed" in variables else pack(model, variables, inputs)
    except InputError:
        if "ranges" in variables:
            raise
        return None
    blocks = find_blocks(model, packed, inputs)
    return Deployed(model, packed, blocks) if blocks else None


def count_ones(deployed: Deployed, batches: Iterable[Batch]) -> dict[str, Counts]:
    """For each block, what its tables gave on the data."""

    def counts(
        variables: Tree, inputs: Array, weights: Array
    ) -> dict[str, tuple[list[Array], Array]]:
        _, bits = watch(deployed.model, variables, inputs)
        found = {}
        for name, block in deployed.blocks.items():
            layers = [at(bits, "/".join(layer))["bits"][0] for layer in block.layers]
            # tokens follow one another example by example
            counted_T = jnp.repeat(weights > 0, layers[0].shape[1] // weights.shape[0])
            ones = [
                (bits_LT.astype(bool) & counted_T).sum(1, dtype=jnp.int32) for bits_LT in layers
            ]
            found[name] = (ones, counted_T.sum(dtype=jnp.int32))
        return found

    totals: dict[str, Counts] = {}
    step = jax.jit(counts)
    for inputs, weights in batches:
        for block, (layers, tokens) in jax.device_get(
            step(deployed.variables, inputs, weights)
        ).items():
            before = totals.get(block)
            ones = [
                np.asarray(layer, np.int64) + (before.ones[i] if before else 0)
                for i, layer in enumerate(layers)
            ]
            totals[block] = Counts(tuple(ones), int(tokens) + (before.tokens if before else 0))
    return totals


def fold(block: Block, constant: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> Fold:
    """Drops the tables that are constant (bool (L,) a layer; `values`: the bits they give), and
    those that no kept table reads.

    A layer keeps at least one table, so that the block stays one.
    """
    tables = [np.array(layer) for layer in block.tables]
    constant = [np.array(layer) for layer in constant]
    for layer in constant:
        if layer.all():
            layer[0] = False
    for i in range(1, len(tables)):
        _fix_inputs(tables[i], block.wiring[i], constant[i - 1], values[i - 1])
    kept = [~layer for layer in constant]
    for i in reversed(range(len(kept) - 1)):
        read = np.zeros(len(kept[i]), bool)
        read[block.wiring[i + 1][kept[i + 1]].ravel()] = True
        if (kept[i] & read).any():
            kept[i] &= read
    wiring = [block.wiring[0][kept[0]]]
    for i in range(1, len(tables)):
        # A slot that read a dropped table no longer matters, and may read any.
        places = np.where(kept[i - 1], np.cumsum(kept[i - 1]) - 1, 0)
        wiring.append(places[block.wiring[i]][kept[i]])
    return Fold(
        tuple(kept),
        tuple(t[k] for t, k in zip(tables, kept)),
        tuple(wiring),
        np.asarray(values[-1], bool),
    )


def _fix_inputs(
    tables: np.ndarray, wiring: np.ndarray, constant: np.ndarray, values: np.ndarray
) -> None:
    """Makes tables (L, A), in place, no longer depend on the slots that read a constant input."""
    entries = np.arange(tables.shape[1])
    for slot in range(wiring.shape[1]):
        bit = 1 << slot
        for j in np.flatnonzero(constant[wiring[:, slot]]):
            tables[j] = tables[j][(entries & ~bit) | (bit if values[wiring[j, slot]] else 0)]


def prune(deployed: Deployed, counts: dict[str, Counts]) -> tuple[Deployed, dict[str, Fold]]:
    """The model without the tables that were constant on the counted data, and what is left of each
    block.
    """
    folds = {
        name: fold(block, counts[name].constant(), [ones > 0 for ones in counts[name].ones])
        for name, block in deployed.blocks.items()
    }
    return drop(deployed, folds), folds


def drop(deployed: Deployed, folds: Mapping[str, Fold]) -> Deployed:
    """The model whose blocks are what `folds` leave of them. Its sums are the same integers
    wherever the dropped tables give the bits they are said to give.
    """
    variables = jax.tree.map(lambda leaf: leaf, deployed.variables)  # dicts of its own
    blocks = dict(deployed.blocks)
    for name, left in folds.items():
        block, whole = blocks[name], variables["packed"]
        for path, tables, wiring in zip(block.layers, left.tables, left.wiring):
            _node(whole, path).update(tables=pack_bits(tables), wiring=wiring)
        own = _node(whole, tuple(name.split("/")) if name else ())
        if isinstance(deployed.model, DWN):
            _drop_classes(deployed.model, own, left)
        else:
            _drop_vectors(own, left, deployed.model.config.weightless.signed)  # type: ignore[attr-defined]
        blocks[name] = dataclasses.replace(block, tables=left.tables, wiring=left.wiring)
    return dataclasses.replace(deployed, variables=variables, blocks=blocks)


def _drop_vectors(own: Tree, left: Fold, signed: bool) -> None:
    """Of a weightless block's constants, in place, those of the dropped tables."""
    vectors = _spread(np.asarray(own["vectors"]), len(own["bias"]))
    if "scale" in own:
        own["vectors"], own["offset"] = _sums_without(vectors, left, signed)
        return
    # In the integer form signed bits are 0 and 2: what makes them -1 and 1 is in the bias already.
    own["vectors"], constant = _sums_without(vectors, left, signed=False)
    own["bias"] = np.asarray(own["bias"]) + (constant << int(signed))


def _drop_classes(model: DWN, own: Tree, left: Fold) -> None:
    """The same of a classifier: of its group sum, or of the pyramid's top, whose entries are
    numbers.
    """
    if model.config.reduction == "group_sum":
        ones = _spread(np.ones(len(left.last_bits), np.int8), model.config.num_classes)
        vectors, offset = _sums_without(ones, left, signed=False)
        own["reduction"] = {"vectors": vectors, "offset": offset}
        return
    pyramid = own["reduction"]
    top = pyramid[f"luts_{len(pyramid) - 1}"]
    tables, wiring = np.array(top["tables"]), np.asarray(top["wiring"])
    kept = left.kept[-1]
    _fix_inputs(tables, wiring, ~kept, left.last_bits)
    top.update(tables=tables, wiring=np.where(kept, np.cumsum(kept) - 1, 0)[wiring])


def _node(tree: Tree, path: tuple[str, ...]) -> Tree:
    """The dict at a path, itself."""
    return functools.reduce(lambda node, key: node[key], path, tree)


def _spread(vectors: np.ndarray, outputs: int) -> np.ndarray:
    """Vectors of a grouped sum, (L,), as those (L, d) of the dense sum that is equal to it; dense
    ones as they are.
    """
    if vectors.ndim == 2:
        return vectors
    groups = np.arange(len(vectors)) // -(-len(vectors) // outputs)
    return vectors[:, None] * (groups[:, None] == np.arange(outputs)).astype(vectors.dtype)


def _sums_without(vectors: np.ndarray, left: Fold, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (L, d) of the kept tables, and what those of the dropped ones always add, int32 (d,);
    signed: bits count as -1 and 1.
    """
    counted = np.where(left.last_bits, 1, -1 if signed else 0) * ~left.kept[-1]
    constant = (counted[:, None] * vectors.astype(np.int32)).sum(0, dtype=np.int32)
    return vectors[left.kept[-1]], constant


def compare(one: Deployed, other: Deployed, batches: Iterable[Batch]) -> Comparison:
    """Evaluates two forms of a model on the same batches, each by itself, and counts the outputs
    that agree.
    """
    run_one, run_other = jax.jit(one.model.apply), jax.jit(other.model.apply)
    totals = np.zeros(3, np.int64)
    for inputs, weights in batches:
        totals += np.asarray(
            [
                int(n)
                for n in _agree(
                    run_one(one.variables, inputs), run_other(other.variables, inputs), weights
                )
            ]
        )
    return Comparison(*(int(n) for n in totals))


@jax.jit
def _agree(a: Array, b: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Logits (B, ..., V) float32: how many outputs, of the same decision, of the same bits."""
    counted = jnp.broadcast_to(weights.reshape(-1, *(1,) * (a.ndim - 2)) > 0, a.shape[:-1])
    same = jax.lax.bitcast_convert_type(a, jnp.uint32) == jax.lax.bitcast_convert_type(
        b, jnp.uint32
    )
    decided = jnp.argmax(a, -1) == jnp.argmax(b, -1)
    return counted.sum(), (counted & decided).sum(), (counted & same.all(-1)).sum()
