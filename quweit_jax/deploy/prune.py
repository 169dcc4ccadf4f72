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
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quweit_jax.deploy.tables import Block, Deployed, Fold, Tree

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


def count_ones(deployed: Deployed, batches: Iterable[Batch]) -> dict[str, Counts]:
    """For each block, what its tables gave on the data."""

    def counts(
        variables: Tree, inputs: Array, weights: Array
    ) -> dict[str, tuple[list[Array], Array]]:
        found: dict[str, tuple[list[Array], Array]] = {}

        def observe(block: str, bits_LT: Array) -> None:
            counted_T = jnp.repeat(
                weights > 0, bits_LT.shape[1] // weights.shape[0]
            )  # tokens follow one another example by example
            layers, _ = found.setdefault(block, ([], counted_T.sum(dtype=jnp.int32)))
            layers.append((bits_LT.astype(bool) & counted_T).sum(1, dtype=jnp.int32))

        deployed.apply(variables, inputs, observe)
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
    return deployed.drop(folds), folds


def compare(one: Deployed, other: Deployed, batches: Iterable[Batch]) -> Comparison:
    """Evaluates two forms of a model on the same batches, each by itself, and counts the outputs
    that agree.
    """
    run_one, run_other = (
        jax.jit(lambda variables, inputs, form=form: form.apply(variables, inputs, None))
        for form in (one, other)
    )
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
