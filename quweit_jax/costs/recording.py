"""The calls that a model and its layers make, from which their costs are counted.

Nothing is run: the model's initialization is traced, without its arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from quweit_jax.layers.costs import Call


def recorded(model: nn.Module, *inputs: PyTree, **options: Any) -> Call:
    """The calls of a model and of its layers as its initialization makes them, abstractly.

    Of layers that are alike and called alike, as a model's blocks are, the first is traced, and the
    others take what it called; all are traced where one of those is used in another way, too.
    """
    call, twice = _recorded(model, inputs, options, share=True)
    return _recorded(model, inputs, options, share=False)[0] if twice else call


def _recorded(
    model: nn.Module, inputs: PyTree, options: dict[str, Any], share: bool
) -> tuple[Call, bool]:
    """share: of layers that are alike the first stands for all. Also returns whether that counts
    parameters of another twice, as it was traced elsewhere.
    """
    stack: list[_Open] = [_Open(())]
    known: set[tuple[str, ...]] = set()
    alike: dict[Hashable, Call] = {}
    taken: list[tuple[str, ...]] = []

    def record(
        call: Callable[..., PyTree],
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        context: nn.module.InterceptorContext,
    ) -> PyTree:
        layer = context.module
        if layer.scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        if len(stack) > 1 and stack[-1].path == layer.path:  # a layer's call of its own method
            return call(*args, **kwargs)
        key = _key(layer, context.method_name, (args, kwargs))
        first = None if layer.path in known else alike.get(key)
        if first is not None:
            made = dataclasses.replace(_moved(first, layer.path), layer=layer.clone(parent=None))
            stack[-1].inside.append(made)
            stack[-1].untraced += made.all_params
            known.update(inner.path for inner in _all(made))
            taken.append(layer.path)
            return jax.tree.map(_zeros, made.output)
        stack.append(_Open(layer.path))
        output = call(*args, **kwargs)
        opened = stack.pop()
        given, made, params = (
            _shapes(tree)
            for tree in ((*args, *kwargs.values()), output, layer.variables.get("params", {}))
        )
        done = Call(
            layer.clone(parent=None),
            opened.path,
            context.method_name,
            given,
            made,
            {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)},
            sum(leaf.size for leaf in jax.tree.leaves(params)) + opened.untraced,
            opened.path in known,
            tuple(opened.inside),
        )
        stack[-1].inside.append(done)
        stack[-1].untraced += opened.untraced
        known.add(opened.path)
        if share and key is not None and not any(inner.again for inner in _all(done)):
            alike[key] = done
        return output

    with nn.intercept_methods(record):
        made = jax.eval_shape(
            lambda *given: model.init(jax.random.key(0), *given, **options), *inputs
        )
    params = made.get("params", {})
    return stack[0].inside[0], any(_below(params, path) for path in taken)


def _below(params: PyTree, path: tuple[str, ...]) -> PyTree:
    """What a tree of parameters has at a path."""
    return functools.reduce(lambda node, name: node.get(name, {}), path, params)


@dataclasses.dataclass
class _Open:
    """A layer that is being called. untraced: parameters of layers inside that were not traced."""

    path: tuple[str, ...]
    inside: list[Call] = dataclasses.field(default_factory=list)
    untraced: int = 0


def _key(layer: nn.Module, method: str, given: PyTree) -> Hashable:
    """What is equal for layers that are alike and called alike; None if that can't be told."""
    leaves, structure = jax.tree.flatten(_shapes(given))
    key = layer.clone(parent=None, name=None), method, structure, tuple(leaves)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _moved(call: Call, path: tuple[str, ...]) -> Call:
    """A call as that of the layer at another path."""
    inside = (_moved(inner, (*path, *inner.path[len(call.path) :])) for inner in call.inside)
    return dataclasses.replace(call, path=path, inside=tuple(inside))


def _all(call: Call) -> Iterator[Call]:
    """A call and all that it made."""
    yield call
    for inner in call.inside:
        yield from _all(inner)


def _zeros(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def _shapes(tree: PyTree) -> PyTree:
    """A tree with shapes in place of its arrays."""
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf
        ),
        tree,
    )
