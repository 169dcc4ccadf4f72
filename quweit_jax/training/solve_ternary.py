"""Ternary projections that are computed from a teacher's dense ones by least squares, on a few
batches, where rounding would look at each weight by itself.

The student is worked through in the order in which it computes. A projection reads what the ternary
ones before it make of a text, and is fitted to what the teacher's answers to the same text, so that
each makes up for what those before it missed. Norms before a last projection that the teacher does
not have (`model.sub_norms`) begin at the root mean square of what the teacher's projection reads.

Dimensions: I inputs and O outputs of a projection.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.layers.ternary import BitLinear
from quweit_jax.models import stack
from quweit_jax.models.parts import PARTS
from quweit_jax.ops import ternary, ternary_fit

if TYPE_CHECKING:
    from quweit_jax.training.setup import Setup
    from quweit_jax.training.teacher import Teacher

_Path = tuple[str, ...]  # of a module
_LAST = ("proj", "down")  # the projections before which `sub_norm` stands


@dataclasses.dataclass(frozen=True)
class Part:
    """A ternary projection, which reads the same as others of its `group`, and the outputs of a
    teacher's dense projection that it is to have.
    """

    path: _Path
    group: int
    source: _Path
    outputs: slice


def _watched(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    inputs: Array | np.ndarray,
    see: Callable[[nn.Module, Any], None],
) -> None:
    """Applies the model and calls `see` with each module and its first argument."""

    def watch(
        call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], context: Any
    ) -> Any:
        if context.method_name == "__call__" and args:
            see(context.module, args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        stack.watchable(model).apply(variables, inputs, mutable=[])


def _projections(
    model: nn.Module, variables: Mapping[str, PyTree], inputs: Array | np.ndarray, kind: type
) -> list[tuple[_Path, int, tuple[int, int]]]:
    """Path, group and (I, O) of all projections of a kind, in the order they are called."""
    found: list[tuple[_Path, int, tuple[int, int]]] = []
    last: list[Any] = [None, -1]

    def see(module: nn.Module, x: Any) -> None:
        if isinstance(module, kind):
            if x is not last[0]:
                last[:] = x, last[1] + 1
            found.append((module.path, last[1], (x.shape[-1], module.features)))  # type: ignore[attr-defined]

    jax.eval_shape(lambda v: _watched(model, v, inputs, see), variables)
    return found


def parts(teacher: Teacher, setup: Setup) -> list[Part]:
    """The student's ternary projections whose teacher has dense ones, in the order they are called.

    Raises:
      InputError: there is none of its place and size in the teacher.
    """
    variables = setup.abstract_state().variables()
    ours = _projections(setup.model, variables, setup.init_inputs, BitLinear)
    of_teacher = functools.partial(
        _projections, teacher.model, teacher.variables, setup.init_inputs
    )
    kept = {path for path, *_ in of_teacher(BitLinear)}
    theirs = {path: sizes for path, _, sizes in of_teacher(nn.Dense)}
    sizes = {path: size for path, _, size in ours}
    new = [(path, group) for path, group, _ in ours if path not in kept]
    return [Part(path, group, *_source(path, sizes, theirs)) for path, group in new]


def _source(
    path: _Path, sizes: Mapping[_Path, tuple[int, int]], theirs: Mapping[_Path, tuple[int, int]]
) -> tuple[_Path, slice]:
    """Where in the teacher's projections, and which outputs there, a ternary one is."""
    inputs, outputs = sizes[path]
    if theirs.get(path) == (inputs, outputs):
        return path, slice(0, outputs)
    for whole, names in PARTS.items():
        source: _Path = (*path[:-1], whole)
        of_parts: list[_Path] = [(*path[:-1], name) for name in names]
        if path in of_parts and sizes.keys() >= set(of_parts):
            widths = [sizes[part][1] for part in of_parts]
            if theirs.get(source) == (inputs, sum(widths)):
                start = sum(widths[: of_parts.index(path)])
                return source, slice(start, start + outputs)
    found = f"[{theirs[path][0]}, {theirs[path][1]}]" if path in theirs else "none"
    raise InputError(
        f"distill.solve_batches: {'/'.join(path)}: expected a dense projection of [{inputs}, "
        f"{outputs}] at the same place in the teacher, found {found}; use a dense teacher of the "
        "same model (model.name), layers and sizes, or leave it at 0."
    )


def _products(
    model: nn.Module,
    taught: nn.Module,
    some: Sequence[Part],
    variables: Mapping[str, PyTree],
    values: Mapping[str, PyTree],
    inputs: Array,
) -> dict[_Path, tuple[Array, Array, Array, Array]]:
    """Of some projections on a batch: the products of what each reads with itself (I, I) and with
    what it is to answer (I, O), and the mean squares of what the teacher's reads and answers, the
    second added over outputs; float32.
    """
    reads: dict[_Path, Array] = {}
    wanted: dict[_Path, tuple[Array, Array]] = {}
    paths, sources = {part.path for part in some}, {part.source for part in some}

    def see_ours(module: nn.Module, x: Any) -> None:
        if isinstance(module, BitLinear) and module.path in paths:
            if module.use_norm:
                scale = module.get_variable("params", "norm_scale")
                x = ternary.rms_norm(x, scale, eps=module.epsilon)
            whole, scale = ternary.quantize_activations(x.reshape(-1, x.shape[-1]))
            reads[module.path] = whole.astype(jnp.float32) * scale

    def see_theirs(module: nn.Module, x: Any) -> None:
        if isinstance(module, nn.Dense) and module.path in sources:
            x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            answer = jnp.matmul(x, module.get_variable("params", "kernel"), precision="highest")
            if module.use_bias:
                answer = answer + module.get_variable("params", "bias")
            wanted[module.path] = x, answer

    _watched(model, variables, inputs, see_ours)
    _watched(taught, values, inputs, see_theirs)
    found = {}
    for part in some:
        x, (read, answer) = reads[part.path], wanted[part.source]
        answer = answer[:, part.outputs]
        gram, cross = (jnp.matmul(x.T, y, precision="highest") / len(x) for y in (x, answer))
        squares = jnp.square(read).mean(), jnp.square(answer).sum() / len(x)
        found[part.path] = (gram, cross, *squares)
    return found


def solved(
    teacher: Teacher,
    setup: Setup,
    variables: Mapping[str, PyTree],
    found: Sequence[Part],
    batches: Sequence[np.ndarray],
) -> dict[str, PyTree]:
    """The variables with projections computed from the teacher's, on batches of inputs.

    found: of `parts`.
    """
    if not found:
        return dict(variables)
    print(f"solving {len(found)} ternary projections on {len(batches)} batches", flush=True)
    begun, missed = time.monotonic(), []
    params: dict[_Path, Any] = flatten_dict(jax.device_get(dict(variables["params"])))
    theirs: dict[_Path, Any] = flatten_dict(dict(teacher.variables["params"]))
    for block in dict.fromkeys(part.path[0] for part in found):
        mine = [part for part in found if part.path[0] == block]
        # compiled once a block, which takes longer than products that a group has no use for
        products = jax.jit(functools.partial(_products, setup.model, teacher.model, mine))
        for _, group in itertools.groupby(mine, lambda part: part.group):
            now = {**variables, "params": unflatten_dict(params)}
            sums = _mean(jax.device_get(products(now, teacher.variables, x)) for x in batches)
            missed += [_solve(part, params, theirs, *sums[part.path]) for part in group]
    print(
        f"solved in {time.monotonic() - begun:.0f} s; squared errors of the answers: "
        f"{min(missed):.1%} to {max(missed):.1%}",
        flush=True,
    )
    return {**variables, "params": unflatten_dict(params)}


def _solve(
    part: Part,
    params: dict[_Path, Any],
    theirs: Mapping[_Path, Any],
    gram: np.ndarray,
    cross: np.ndarray,
    read: np.ndarray,
    wanted: np.ndarray,
) -> float:
    """Puts a projection into `params`, and the scale of a new norm before it; returns the squared
    error of its answers in those of what was wanted. The last four: what `_products` gives.
    """
    norm, size = (*part.path[:-1], "sub_norm", "scale"), float(np.sqrt(read))
    if part.path[-1] in _LAST and norm in params and norm not in theirs and size:
        # rounding to int8 takes the scale of a token as it is
        params[norm] = np.full_like(params[norm], size)
        gram, cross = gram * size**2, cross * size
    weights, near, scale = ternary_fit.fit_ternary_and_scale(gram, cross)
    params[(*part.path, "kernel")] = ternary_fit.float_weights(weights, near, scale)
    return _missed(gram, cross, float(wanted), scale * weights)


def _missed(gram: np.ndarray, cross: np.ndarray, whole: float, kernel: np.ndarray) -> float:
    """The squared error of what a kernel answers, in what was wanted's own squares."""
    error = whole - 2 * float((kernel * cross).sum()) + float((kernel * (gram @ kernel)).sum())
    return max(error, 0.0) / whole if whole else 0.0


def _mean(each: Iterable[Mapping[_Path, Sequence[np.ndarray]]]) -> dict[_Path, list[np.ndarray]]:
    """The means over batches, float64."""
    all_of = list(each)
    return {
        path: [np.asarray([one[path][i] for one in all_of], np.float64).mean(0) for i in range(4)]
        for path in all_of[0]
    }
