"""The deployed form of weightless blocks (tables at 1 bit an entry, int8 sums added in int32) and
of ternary layers (2 bits a weight).

Dimensions: T tokens, F input bits, L tables, n inputs a table, A = 2**n entries, d features, z
thermometer bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quweit_jax.errors import InputError
from quweit_jax.layers.lookup import wiring_of
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.ops import packed_lut, ternary
from quweit_jax.ops.sums import quantize_int8

Tree = dict[str, Any]


def pack_block(params: Tree, constants: Tree) -> Tree:
    """A trained WeightlessBlock's parameters and wiring -> what inference needs of them."""
    layers = sorted((k for k in params if k.startswith("luts_")), key=lambda k: int(k[5:]))
    vectors, scale = quantize_int8(jnp.asarray(params["vectors"]), axis=0)
    packed: Tree = {
        "tables": [np.asarray(packed_lut.pack_tables(params[k]["tables"])) for k in layers],
        "wiring": [
            _smallest(np.asarray(wiring_of(params[k], constants.get(k, {})))) for k in layers
        ],
        "thresholds": np.asarray(
            params["thresholds"] if "thresholds" in params else constants["thresholds"], np.float32
        ),
        "vectors": np.asarray(vectors),
        "scale": np.asarray(scale, np.float32).reshape(-1),
        "bias": np.asarray(params["bias"], np.float32),
    }
    if "norm" in params:
        packed["norm"] = {k: np.asarray(v, np.float32) for k, v in params["norm"].items()}
    return packed


def _smallest(places: np.ndarray) -> np.ndarray:
    return places.astype(np.min_scalar_type(max(1, int(places.max()))))


def _blocks(params: Tree, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if "vectors" in params and any(k.startswith("luts_") for k in params):
        return [path]
    return [
        found
        for key, child in params.items()
        if isinstance(child, dict)
        for found in _blocks(child, (*path, key))
    ]


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
    for key in path:
        tree = tree.get(key, {})
    return tree


def _without(tree: Tree, paths: list[tuple[str, ...]]) -> Tree:
    if () in paths:  # the model itself is a block
        return {}
    heads = {p[0] for p in paths if len(p) == 1}
    return {
        key: _without(child, [p[1:] for p in paths if p[0] == key and len(p) > 1])
        if isinstance(child, dict)
        else child
        for key, child in tree.items()
        if key not in heads
    }


def pack_ternary_layer(params: Tree) -> Tree:
    """A trained BitLinear's parameters -> what inference needs: kernel uint8 (ceil(I / 4), O), its
    scale (), norm_scale (I,).
    """
    kernel, scale = ternary.quantize_weights(jnp.asarray(params["kernel"]))
    packed = {
        "kernel": ternary.pack_ternary(kernel),
        "scale": scale,
        "norm_scale": jnp.asarray(params["norm_scale"], jnp.float32),
    }
    return jax.device_get(packed)


def split_ternary(
    params: Tree, pack_layer: Callable[[Tree], Any], keep: Callable[[Any], Any]
) -> tuple[Tree, Tree]:
    """(`keep` of what is not in ternary layers, `pack_layer` of those), both as trees of the same
    paths; one layer at a time.
    """
    rest, packed = {}, {}
    for key, child in params.items():
        if not isinstance(child, dict):
            rest[key] = keep(child)
        elif child.keys() == {"kernel", "norm_scale"}:
            packed[key] = pack_layer(child)
        else:
            inner_rest, inner = split_ternary(child, pack_layer, keep)
            rest |= {key: inner_rest} if inner_rest else {}
            packed |= {key: inner} if inner else {}
    return rest, packed


def pack(variables: Tree) -> Tree:
    """The deployed form of a trained model's variables, for `apply`.

    Returns:
      'params': what stays as it is; 'blocks': {'path/of/block': packed weightless block}; 'packed':
      ternary layers, four weights a byte.

    Raises:
      InputError: the model has neither weightless blocks nor ternary layers.
    """
    params = variables["params"]
    constants = jax.device_get(variables.get("wiring", {}))
    paths = _blocks(params)
    dense, packed = split_ternary(_without(params, paths), pack_ternary_layer, jax.device_get)
    if not paths and not packed:
        raise InputError(
            "pack: this model has no weightless block and no ternary layer, so there is nothing to "
            "pack."
        )
    return {
        "params": dense,
        "blocks": {"/".join(p): pack_block(_at(params, p), _at(constants, p)) for p in paths},
        "packed": packed,
    }


def block_bits(packed: Tree, x_DT: Array) -> list[Array]:
    """The bits within a block for its normalized input x (d_in, T): the thermometer's (F, T), then
    each look-up layer's (L, T).
    """
    bits = [(x_DT[:, None, :] > packed["thresholds"][:, :, None]).reshape(-1, x_DT.shape[1])]
    for tables, wiring in zip(packed["tables"], packed["wiring"]):
        bits.append(packed_lut.look_up(bits[-1], wiring, tables))
    return bits


def apply_block(
    packed: Tree, x: Array, *, signed: bool, observe: Callable[[list[Array]], None] | None = None
) -> Array:
    """The block on packed values: x (..., d_in) -> (..., d). Bits, table reads and int32 sums;
    floats only around them.

    observe: called with the look-up layers' bits, each (L, T) bool, tokens in the order of x. A
    block may have an `offset`, int32 (d,), where its sums begin instead of 0.
    """
    if "norm" in packed:
        x = nn.LayerNorm(epsilon=1e-5, use_bias="bias" in packed["norm"]).apply(
            {"params": packed["norm"]}, x
        )  # type: ignore[assignment]
    lead, width = x.shape[:-1], x.shape[-1]
    layers = block_bits(packed, x.reshape(math.prod(lead), width).T)[1:]
    if observe is not None:
        observe(layers)
    bits = layers[-1]
    counted = 2 * bits.astype(jnp.int8) - 1 if signed else bits.astype(jnp.int8)
    vectors = jnp.asarray(packed["vectors"])
    if vectors.ndim == 2:
        total = jax.lax.dot_general(
            counted, vectors, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32
        )
    else:
        outputs = packed["bias"].shape[0]
        products = counted.astype(jnp.int32) * vectors.astype(jnp.int32)[:, None]
        total = products.reshape(outputs, -1, products.shape[1]).sum(1).T
    if "offset" in packed:
        total = total + packed["offset"]
    return (total * packed["scale"] + packed["bias"]).reshape(*lead, -1)


def apply(
    model: nn.Module,
    variables: Tree,
    *args: Any,
    observe: Callable[[WeightlessBlock, list[Array]], None] | None = None,
    **kwargs: Any,
) -> Any:
    """`model.apply` of variables that may be packed (other collections, such as a cache, may be
    beside them).

    observe: called within each packed weightless block with its module and its look-up layers'
    bits, as `apply_block` gives them.
    """
    if "blocks" not in variables:
        return model.apply(variables, *args, **kwargs)
    blocks = variables["blocks"]

    def intercept(next_method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, WeightlessBlock) and context.method_name == "__call__":
            watch = None if observe is None else functools.partial(observe, module)
            out = apply_block(
                blocks["/".join(module.path)],
                args[0].astype(jnp.float32),
                signed=module.signed,
                observe=watch,
            )
            return out.astype(module.dtype)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return model.apply(
            {name: tree for name, tree in variables.items() if name != "blocks"}, *args, **kwargs
        )


def block_bytes(block: Tree) -> int:
    """Bytes of a packed block, all of it: tables, wiring, thresholds, vectors, scales, bias, norm."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(block))


def dense_bytes(block: Tree, bytes_per_weight: int = 1) -> int:
    """Bytes of the MLP (hidden layer 4 times wider, no biases, no scales) that the block takes the
    place of.
    """
    return 8 * block["thresholds"].shape[0] * block["bias"].shape[0] * bytes_per_weight


def describe(variables: Tree) -> list[str]:
    """What weightless blocks and ternary layers take at inference beside what they replace; nothing
    if there are none.
    """
    try:
        packed = pack(variables)
    except InputError:
        return []
    lines, blocks = [], packed["blocks"].values()
    if blocks:
        ours, dense = sum(map(block_bytes, blocks)), sum(map(dense_bytes, blocks))
        lines.append(
            f"weightless blocks at inference: {ours:,} bytes (1-bit tables, int8 sums, wiring); "
            f"the MLPs they replace: {dense:,} in int8, {4 * dense:,} in float32"
        )
    if packed["packed"]:
        ours, kernels = (
            block_bytes(packed["packed"]),
            [leaf for leaf in jax.tree.leaves(packed["packed"]) if leaf.dtype == np.uint8],
        )
        weights = ternary.WEIGHTS_PER_BYTE * sum(leaf.size for leaf in kernels)
        lines.append(
            f"ternary layers at inference: {ours:,} bytes (2 bits a weight, norms); their weights "
            f"in bfloat16: {2 * weights:,}"
        )
    return lines
