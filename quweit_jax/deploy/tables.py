"""Trained models in the form they are deployed in, their look-up tables in reach: to watch the
tables work, and to leave some out.

Dimensions: F input bits, L tables, n inputs a table, A = 2**n entries, T tokens, d features, z
thresholds a feature.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from quweit_jax.deploy import integer, packed
from quweit_jax.errors import InputError
from quweit_jax.layers.lookup import LUTLayer, wiring_of
from quweit_jax.models.dwn import DWN
from quweit_jax.ops import packed_lut, thermometer

Tree = dict[str, Any]
# Told a block's path and the bits (L, T) of one of its look-up layers, layer by layer.
Observe = Callable[[str, Array], None]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block's look-up layers.

    tables: of each layer, bool (L, A). wiring: of each, int (L, n). num_inputs: F of the first
    layer. thresholds: z.
    """

    tables: tuple[np.ndarray, ...]
    wiring: tuple[np.ndarray, ...]
    num_inputs: int
    thresholds: int


@dataclasses.dataclass(frozen=True)
class Fold:
    """What is left of a block when tables that always give the same bit are dropped.

    kept: of each layer, bool (L,). tables, wiring: of each layer, of the kept tables, wired to the
      kept tables below.
    last_bits: bool (L,), the bits that the dropped tables of the last layer always give (anything
    for the kept ones).
    """

    kept: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray, ...]
    wiring: tuple[np.ndarray, ...]
    last_bits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Deployed:
    """variables: as deployed. blocks: by path, in order. apply: (variables, inputs, observe or
    None) -> logits.

    drop: makes the model whose blocks are what `Fold`s leave of them, and whose sums are the same
    integers wherever the dropped tables give the bits they are said to give.
    """

    variables: Tree
    blocks: dict[str, Block]
    apply: Callable[[Tree, Any, Observe | None], Array]
    drop: Callable[[Mapping[str, Fold]], Deployed]


def deploy(model: Any, variables: Tree, input_shape: tuple[int, ...] = ()) -> Deployed | None:
    """A trained GPT, ViT (in floats or integers), MatMul-free model or DWN as deployed; None if it
    has no look-up tables.

    input_shape: of one input, for integer models and DWNs.

    Raises:
      InputError: an integer model whose activation ranges were never set.
    """
    if getattr(
        model.config, "remat", False
    ):  # what is observed could not leave a rematerialized block
        model = model.clone(config=dataclasses.replace(model.config, remat=False))
    variables = jax.device_get(variables)
    if isinstance(model, DWN):
        return _dwn(model, variables, math.prod(input_shape))
    if integer.is_integer(model):
        return _integer(model, integer.pack(model, variables, input_shape)["packed"])  # type: ignore[arg-type]
    try:
        tree = packed.pack(variables)
    except InputError:
        return None
    return _blocks(model, tree) if tree["blocks"] else None


def _block(tables: Sequence[Any], wiring: Sequence[Any], num_inputs: int, thresholds: int) -> Block:
    places = tuple(np.asarray(w, np.int64) for w in wiring)
    bits = (np.unpackbits(np.asarray(t), axis=1, bitorder="little") for t in tables)
    return Block(
        tuple(b[:, : 2 ** w.shape[1]].astype(bool) for b, w in zip(bits, places)),
        places,
        num_inputs,
        thresholds,
    )


def _pack(tables: np.ndarray) -> np.ndarray:
    return np.packbits(tables, axis=1, bitorder="little")


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
    return vectors[left.kept[-1]], (counted[:, None] * vectors.astype(np.int32)).sum(
        0, dtype=np.int32
    )


def _blocks(model: Any, tree: Tree) -> Deployed:
    """Models of floats with packed weightless blocks."""

    def apply(variables: Tree, inputs: Any, observe: Observe | None) -> Array:
        def each(module: nn.Module, layers: list[Array]) -> None:
            for bits in layers:
                observe("/".join(module.path), bits)  # type: ignore[misc]

        return packed.apply(model, variables, inputs, observe=None if observe is None else each)

    def drop(folds: Mapping[str, Fold]) -> Deployed:
        changed = dict(tree["blocks"])
        for name, left in folds.items():
            block = changed[name]
            vectors = _spread(np.asarray(block["vectors"]), len(block["bias"]))
            vectors, offset = _sums_without(vectors, left, model.config.weightless.signed)
            changed[name] = {
                **block,
                "tables": [*map(_pack, left.tables)],
                "wiring": [*left.wiring],
                "vectors": vectors,
                "offset": offset,
            }
        return _blocks(model, {**tree, "blocks": changed})

    found = {
        name: _block(b["tables"], b["wiring"], b["thresholds"].size, b["thresholds"].shape[1])
        for name, b in tree["blocks"].items()
    }
    return Deployed(
        tree, dict(sorted(found.items(), key=lambda item: _natural(item[0]))), apply, drop
    )


def _natural(path: str) -> list[Any]:
    """A key that puts block_2 before block_10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path)]


def _observed(
    model: nn.Module,
    variables: Tree,
    inputs: Any,
    observe: Callable[[tuple[str, ...], Array], None],
) -> Array:
    """`model.apply`, telling the path and what comes out of every look-up layer."""

    def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_method(*args, **kwargs)
        if isinstance(context.module, LUTLayer) and context.method_name == "feature_major":
            observe(context.module.path, out)
        return out

    with nn.intercept_methods(intercept):
        return model.apply(variables, inputs)  # type: ignore[return-value]


def _is_lookup(path: tuple[str, ...]) -> bool:
    return bool(path) and bool(re.fullmatch(r"luts_\d+", path[-1]))


def _integer(model: Any, tree: Tree) -> Deployed | None:
    """Integer-only ViTs."""
    layers: dict[str, list[Tree]] = {}
    flat: dict[Any, Any] = flatten_dict(tree, is_leaf=lambda path, _: _is_lookup(path))
    for path in sorted(flat, key=lambda path: _natural("/".join(path))):
        if _is_lookup(path):
            layers.setdefault("/".join(path[:-1]), []).append(flat[path])
    if not layers:
        return None
    options = model.config.weightless

    def apply(variables: Tree, inputs: Any, observe: Observe | None) -> Array:
        def each(path: tuple[str, ...], bits: Array) -> None:
            if observe is not None:
                observe("/".join(path[:-1]), bits)

        return _observed(model, variables, inputs, each)

    def drop(folds: Mapping[str, Fold]) -> Deployed:
        changed = copy.deepcopy(tree)
        for name, left in folds.items():
            block = functools.reduce(lambda node, key: node[key], name.split("/"), changed)
            for i, (tables, wiring) in enumerate(zip(left.tables, left.wiring)):
                block[f"luts_{i}"] = {"tables": _pack(tables), "wiring": wiring}
            vectors = np.asarray(block["vectors"])
            vectors = _spread(
                vectors[:, 0] if options.sum == "grouped" else vectors, len(block["bias"])
            )
            # Here signed bits are 0 and 2: what makes them -1 and 1 is in the bias already.
            block["vectors"], constant = _sums_without(vectors, left, signed=False)
            block["bias"] = np.asarray(block["bias"]) + (constant << int(options.signed))
        dense = model.clone(
            config=dataclasses.replace(
                model.config, weightless=dataclasses.replace(options, sum="dense")
            )
        )
        found = _integer(dense, changed)
        assert found is not None
        return found

    found = {}
    for name, parts in layers.items():
        thresholds = np.asarray(flat[(*name.split("/"), "thresholds")])
        found[name] = _block(
            [p["tables"] for p in parts],
            [p["wiring"] for p in parts],
            thresholds.size,
            thresholds.shape[1],
        )
    return Deployed({"packed": tree}, found, apply, drop)


def _dwn(model: DWN, variables: Tree, features: int) -> Deployed:
    """Weightless classifiers; the last layer of a learnable reduction is not among the tables, as
    its entries are numbers.
    """
    params, constants, config = variables["params"], variables["wiring"], model.config
    count = len(config.num_luts)
    body = [(params[f"luts_{i}"], constants.get(f"luts_{i}", {})) for i in range(count)]
    pyramid: list[tuple[Tree, Tree]] = []
    if config.reduction == "learnable":
        pyramid = [
            (params["reduction"][f"luts_{i}"], constants["reduction"][f"luts_{i}"])
            for i in range(len(params["reduction"]))
        ]
    of_bits = [*body, *pyramid[:-1]]
    tables, wiring = (
        [packed_lut.pack_tables(p["tables"]) for p, _ in of_bits],
        [wiring_of(p, c) for p, c in of_bits],
    )
    layers = [{"tables": np.asarray(t), "wiring": np.asarray(w)} for t, w in zip(tables, wiring)]
    given: Tree = {f"luts_{i}": layers[i] for i in range(count)}
    if layers[count:]:
        given["reduction"] = {f"luts_{i}": layer for i, layer in enumerate(layers[count:])}
    thresholds = np.asarray(constants["thresholds"])
    block = _block(tables, wiring, features * thresholds.shape[-1], thresholds.shape[-1])
    top = ("reduction", f"luts_{len(pyramid) - 1}")

    def apply(variables: Tree, inputs: Any, observe: Observe | None) -> Array:
        def each(path: tuple[str, ...], bits: Array) -> None:
            if observe is not None and path != top:
                observe("", bits)

        return _observed(model, variables, inputs, each)

    def drop(folds: Mapping[str, Fold]) -> Deployed:
        left = folds[""]
        tree: Tree = {
            "thresholds": thresholds,
            "tables": [*map(_pack, left.tables)],
            "wiring": [*left.wiring],
        }
        if pyramid:
            last, places = np.asarray(pyramid[-1][0]["tables"]), np.asarray(wiring_of(*pyramid[-1]))
            tree |= dict(zip(("top", "top_wiring"), _top_without(last, places, left)))
        else:
            ones = _spread(np.ones(len(left.last_bits), np.int8), config.num_classes)
            tree["vectors"], tree["offset"] = _sums_without(ones, left, signed=False)
        return Deployed(
            tree,
            {"": dataclasses.replace(block, tables=left.tables, wiring=left.wiring)},
            functools.partial(_apply_pruned_dwn, config),
            drop,
        )

    return Deployed({**variables, "packed": given}, {"": block}, apply, drop)


def _top_without(
    tables: np.ndarray, wiring: np.ndarray, left: Fold
) -> tuple[np.ndarray, np.ndarray]:
    """The last layer of a learnable reduction, tables (C, A) of numbers, when the layer below is
    what `left` keeps of it.
    """
    kept, entries = left.kept[-1], np.arange(tables.shape[1])
    tables = tables.copy()
    for slot in range(wiring.shape[1]):
        for j in np.flatnonzero(~kept[wiring[:, slot]]):
            tables[j] = tables[j][
                (entries & ~(1 << slot)) | (int(left.last_bits[wiring[j, slot]]) << slot)
            ]
    return tables, np.where(kept, np.cumsum(kept) - 1, 0)[wiring]


def _apply_pruned_dwn(config: Any, variables: Tree, inputs: Any, observe: Observe | None) -> Array:
    """A DWN whose last layer no longer has equally many tables for each class."""
    features = jnp.asarray(inputs).reshape(len(inputs), -1)
    bits = thermometer.encode(features, variables["thresholds"]).reshape(len(inputs), -1).T
    for tables, wiring in zip(variables["tables"], variables["wiring"]):
        bits = packed_lut.look_up(bits, wiring, tables)
        if observe is not None:
            observe("", bits)
    if "top" in variables:
        wired = jnp.take(bits.astype(jnp.int32), variables["top_wiring"], axis=0)
        address = (wired << jnp.arange(wired.shape[1])[:, None]).sum(1)
        return jnp.take_along_axis(jnp.asarray(variables["top"]), address, axis=1).T / (
            1.0 / config.tau
        )
    sums = jax.lax.dot_general(
        bits.astype(jnp.int8),
        variables["vectors"],
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    return (sums + variables["offset"]).astype(jnp.float32) / jnp.float32(config.tau)
