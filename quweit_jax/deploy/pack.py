"""The deployed form of a trained model: what its layers write into `packed`, and whatever else
inference needs.

`model.apply(pack(model, variables, inputs), inputs)` is the deployed model: look-up tables at one
bit an entry, sums of int8 vectors in int32, ternary weights at two bits, integer models without a
float between the image and the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.errors import FlaxError
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PyTree

from quweit_jax.deploy.tables import Tree, at, find_blocks
from quweit_jax.errors import InputError
from quweit_jax.ops.counts import stored_bytes
from quweit_jax.ops.packed_ternary import WEIGHTS_PER_WORD


def pack(model: Any, variables: Any, *inputs: Array | np.ndarray) -> Tree:
    """Makes the deployed form of trained variables, for `model.apply`.

    Args:
      model: a Linen module, or one behind `nnx.bridge.ToNNX`. variables: {'params': ..., ...} or
        the nnx.State of the latter, what `nnx.split` gives, or that module; boxes around arrays,
        such as `nn.Partitioned`, are taken off.
      inputs: any that `model` can be applied to, such as one token or one image; only their shapes
        and dtypes matter.

    Returns:
      {'packed': what the layers wrote, 'params': ..., ...}: a layer that wrote something is read
      from there alone, and what it trained is left out.

    Raises:
      InputError: no layer has a packed form, the activation ranges of an integer model were
        never set, the model is written in NNX itself, or the variables are packed already or not
        those of the model with such inputs.
    """
    packed = _packed_if_any(model, variables, *inputs)
    if packed is None:
        raise InputError(
            "pack: this model has no look-up tables, no ternary layer and no integer layer, so "
            "there is nothing to pack."
        )
    return packed


def _packed_if_any(model: Any, variables: Any, *inputs: Array | np.ndarray) -> Tree | None:
    """What `pack` returns, None of a model without a packed form."""
    model, variables = linen_form(model, variables)
    if "packed" in variables:
        raise InputError("pack: these variables are packed already; give them to model.apply.")
    ranges = flatten_dict(jax.device_get(variables.get("ranges", {})))
    unset = [p[:-1] for p in ranges if p[-1] == "min" and ranges[p] == ranges[(*p[:-1], "max")]]
    if unset:
        raise InputError(
            f"pack: {len(unset)} activation ranges were never set ({'/'.join(unset[0])}, ...); "
            "train a few steps, or calibrate the model with pretrained.calibrate(model, "
            "variables, batches)."
        )
    if not inputs:
        raise InputError("pack: give what the model is applied to as well, such as one image.")
    try:
        packed = jax.jit(lambda v: constants(model, v, *inputs))(variables)
    except FlaxError as error:
        shapes = ", ".join(str(list(np.shape(each))) for each in inputs)
        raise InputError(
            f"pack: these variables ({', '.join(variables)}) are not those of this "
            f"{type(model).__name__} with inputs {shapes}: {str(error).split(' (http')[0]}"
        ) from error
    return jax.device_get(_with_packed(variables, packed)) if packed else None


def linen_form(model: Any, variables: Any) -> tuple[nn.Module, Tree]:
    """A Linen module and its variables, out of Flax's NNX and of boxes around arrays.

    Raises:
      InputError: the model is no Linen module, nor one behind `nnx.bridge.ToNNX`, or the variables
        are no collections.
    """
    model = getattr(model, "to_nnx__module", model)
    if not isinstance(model, nn.Module):
        raise InputError(
            "pack: expected a Linen module, or one behind nnx.bridge.ToNNX, found "
            f"{type(model).__name__}; its layers have no packed form."
        )
    from flax import nnx  # not imported with flax.linen, and rarely needed

    if isinstance(variables, nnx.Module):
        variables = nnx.state(variables)
    elif isinstance(variables, tuple | list):  # of nnx.split
        states = [part for part in variables if isinstance(part, nnx.State)]
        variables = nnx.merge_state(*states) if states else variables
    if isinstance(variables, nnx.statelib.FlatState):
        variables = nnx.from_flat_state(variables)
    if isinstance(variables, nnx.State):
        variables = _collections(variables)
    if not isinstance(variables, Mapping) or not _are_collections(variables):
        found = ", ".join(map(str, variables)) if isinstance(variables, Mapping) else None
        raise InputError(
            "pack: expected variables {'params': ..., ...} or an nnx.State, found "
            f"{found or type(variables).__name__}; give all that model.init returned."
        )
    return model, nn.unbox(dict(variables))


def _are_collections(variables: Mapping[str, PyTree]) -> bool:
    """Whether these are collections of variables, and not what is in one of them."""
    inner = all(isinstance(tree, Mapping) for tree in variables.values())
    return inner and bool({"params", "packed"} & variables.keys())


def _collections(state: Any) -> Tree:
    """The nnx.State of a bridged module as {collection: {name: array}}."""
    from flax import nnx

    found: dict[tuple[Any, ...], Any] = {}
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.RngState):  # the bridge's, no variable of the model
            collection = nnx.variable_name_from_type(type(variable))
            found[(collection, *path)] = variable[...]
    return unflatten_dict(found)


def packed_or_trained(model: nn.Module, variables: Tree, *inputs: Array | np.ndarray) -> Tree:
    """The deployed form of a model that has one, the trained variables of another."""
    packed = _packed_if_any(model, variables, *inputs)
    return variables if packed is None else packed


def deployed_shapes(model: nn.Module, variables: Tree, *inputs: Array | np.ndarray) -> Tree:
    """Shapes and dtypes of what `packed_or_trained` gives, of variables that may be shapes, too:
    nothing is made.
    """
    packed = jax.eval_shape(lambda v: constants(model, v, *inputs), variables)
    return _with_packed(variables, packed) if packed else variables


def _with_packed(variables: Tree, packed: Tree) -> Tree:
    """Variables without those of the layers that have written `packed`, and that."""
    left = {name: without(tree, packed) for name, tree in variables.items() if name != "ranges"}
    return {name: tree for name, tree in left.items() if tree} | {"packed": packed}


def constants(model: nn.Module, variables: Tree, *inputs: Array | np.ndarray) -> Tree:
    """What the layers of a model write into `packed`; can be traced."""
    written: Any = model.apply(variables, *inputs, mutable=["packed"])[1]
    return dict(written.get("packed", {}))


def without(tree: Mapping[str, PyTree], packed: Mapping[str, PyTree]) -> Tree:
    """What is left of a collection when layers that wrote constants no longer need theirs."""
    wrote = any(not isinstance(value, Mapping) for value in packed.values())
    left: Tree = {}
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            left |= {} if wrote else {name: value}
        elif inner := without(value, packed.get(name, {})):
            left[name] = inner
    return left


def describe(model: nn.Module, packed: Tree, *inputs: Array | np.ndarray) -> dict[str, Any]:
    """Sizes of a packed model by name: its bytes and those of its weightless blocks and ternary
    layers, beside what they take the place of.
    """
    integer = "params" not in packed
    blocks = find_blocks(model, packed, *inputs)
    facts: dict[str, Any] = {"form": "integer" if integer else "packed"}
    if replaced := sum(block.replaced_weights for block in blocks.values()):
        held = [at(tree, name) for tree in packed.values() for name in blocks]
        facts |= {"block_bytes": stored_bytes(held), "dense_mlp_bytes_int8": replaced}
    above = tuple(f"{name}/" if name else "" for name in blocks)
    written: dict[str, Any] = flatten_dict(packed["packed"], sep="/")
    ternary = [leaf for path, leaf in written.items() if not path.startswith(above)]
    if ternary and not integer:
        weights = WEIGHTS_PER_WORD * sum(leaf.size for leaf in ternary if leaf.dtype == np.uint32)
        facts |= {"ternary_bytes": stored_bytes(ternary), "ternary_weights": weights}
    return facts | {"model_bytes": stored_bytes(packed)}


def describe_lines(facts: dict[str, Any]) -> list[str]:
    """`describe` in sentences, for people."""
    lines = []
    if "block_bytes" in facts:
        dense = facts["dense_mlp_bytes_int8"]
        lines.append(
            f"weightless blocks at inference: {facts['block_bytes']:,} bytes (1-bit tables, int8 "
            "sums, "
            f"wiring); the MLPs they replace: {dense:,} in int8, {4 * dense:,} in float32"
        )
    if "ternary_bytes" in facts:
        lines.append(
            f"ternary layers at inference: {facts['ternary_bytes']:,} bytes (2 bits a weight, with "
            "their norms, codes and tables); their weights in bfloat16: "
            f"{2 * facts['ternary_weights']:,}"
        )
    return lines
