"""What a layer's costs are said with: the call that its rule sees, and formulas that rules share.

A layer says its costs in one method, `costs(call) -> list[LayerCosts]`, from its fields and the
shapes of one call. Flax's own layers, which have no such method, have their rules here. Floats, or
int8 products among floats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from quweit_jax.errors import InputError
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts, Types, merge

Rows = list[LayerCosts]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, with `jax.ShapeDtypeStruct` in place of arrays.

    layer: unbound, to read its fields. path: its names from the model down. method: its name.
    args, output: what went in and came out. params: its own, by name, without those of layers
      inside; all_params: how many numbers with those. again: an earlier call used them. inside: the
      calls that this one made, in their order.
    kind: of dense products, as an enclosing layer says it. precision, context: see `costs.count`.
    following: the call after this one in the same layer.
    """

    layer: nn.Module
    path: tuple[str, ...]
    method: str
    args: tuple[PyTree, ...]
    output: PyTree
    params: Mapping[str, jax.ShapeDtypeStruct]
    all_params: int
    again: bool
    inside: tuple[Call, ...]
    kind: str = "projection"
    precision: str | None = None
    context: int | None = None
    following: Call | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first array that went in."""
        return jax.tree.leaves(self.args)[0].shape

    @property
    def rows(self) -> int:
        """How many vectors went in: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """The length of the vectors that went in."""
        return self.shape[-1]

    @property
    def size(self) -> int:
        """How many numbers went in."""
        return math.prod(self.shape)

    @property
    def types(self) -> Types:
        """The number types of a layer whose results are of the output's type."""
        return self.types_of(str(jax.tree.leaves(self.output)[0].dtype))

    def types_of(self, dtype: str) -> Types:
        """The number types of a layer of type `dtype`, with other operands where a precision is
        asked for.
        """
        operands = self.precision or dtype
        return Types(operands, dtype if operands == "int8" else operands)

    def at(self, *names: str) -> str:
        """The path of a part of the layer, or of the layer itself, as a row's name."""
        return "/".join((*self.path, *names))

    def row(
        self,
        kind: str,
        *part: str,
        stored: Mapping[str, int] = {},
        weights: int | None = None,
        activations: int = 0,
        state: int = 0,
        **counts: Any,
    ) -> LayerCosts:
        """What the layer, or a part of it, costs.

        stored: bytes by format. weights, activations, state: bytes moved; weights: None for all
          that is stored. counts: other fields of `LayerCosts`.
        """
        read = sum(stored.values()) if weights is None else weights
        moved = merge({"weights": read, "activations": activations, "state": state})
        return LayerCosts(
            self.at(*part), kind, bytes_moved=moved, bytes_stored=merge(stored), **counts
        )

    def costs(self) -> Rows:
        """The rows of the layer and all that it called, by its rule.

        Raises:
          InputError: the layer has no rule and either has parameters or calls nothing that has one.
        """
        rule = _rule(self.layer)
        if rule is None and (self.params or not self.inside):
            name = type(self.layer).__name__
            raise InputError(
                f"costs: the layer '{self.at()}' does not say what it costs; give its class {name} "
                "a method costs(self, call) that returns a list of LayerCosts."
            )
        rows = self.inner() if rule is None else rule(self)
        if self.again:  # what it stores is counted where it was called first
            rows = [dataclasses.replace(row, bytes_stored={}, parameters=0) for row in rows]
        return rows

    def inner(
        self,
        kind: str | Mapping[str, str] = "",
        *,
        after: Mapping[str, Sequence[LayerCosts]] = {},
        instead: Mapping[str, Sequence[LayerCosts]] = {},
    ) -> Rows:
        """The rows of the layers inside, in the order of their calls.

        kind: of their dense products, of all or by name ('' or left out: as of this layer). after,
          instead: rows to add behind those of a layer inside, or to take their place, by its name.
        """
        rows: Rows = []
        for call, following in zip(self.inside, (*self.inside[1:], None)):
            name = call.path[-1]
            own = kind if isinstance(kind, str) else kind.get(name)
            call = dataclasses.replace(
                call,
                kind=own or self.kind,
                precision=self.precision,
                context=self.context,
                following=following,
            )
            rows += instead[name] if name in instead else call.costs()
            rows += () if call.again else after.get(name, ())
        return rows


def layer_norm(
    call: Call,
    activations: str,
    *part: str,
    bias: bool,
    scale: bool = True,
    shape: tuple[int, ...] = (),
) -> LayerCosts:
    """The costs of a LayerNorm in float32: mean and mean square, a factor a feature (inverse
    deviation times scale), subtract, multiply, perhaps add. shape: of other vectors than the
    call's.
    """
    shape = shape or call.shape
    rows, n = math.prod(shape[:-1]), math.prod(shape)
    counts = Elementwise.of(
        FLOAT, (2 + scale) * n + rows, (3 + bias) * n + 2 * rows, 2 * rows, rows
    )
    return _norm(call, part, counts, 2 * n * BYTES[activations], (scale + bias) * shape[-1])


def rms_norm(
    call: Call, activations: str, *part: str, scale: bool = True, shape: tuple[int, ...] = ()
) -> LayerCosts:
    """The costs of an RMSNorm in float32: mean square, times inverse root, times scale. shape: of
    other vectors than the call's.
    """
    shape = shape or call.shape
    rows, n = math.prod(shape[:-1]), math.prod(shape)
    counts = Elementwise.of(FLOAT, (2 + scale) * n, n + rows, rows, rows)
    return _norm(call, part, counts, 2 * n * BYTES[activations], scale * shape[-1])


def _norm(
    call: Call, part: tuple[str, ...], counts: Elementwise, moved: int, parameters: int
) -> LayerCosts:
    stored = {FLOAT: parameters * BYTES[FLOAT]}
    return call.row(
        "norm", *part, elementwise=counts, stored=stored, activations=moved, parameters=parameters
    )


def activation(call: Call, function: str, width: int) -> LayerCosts:
    """The costs of the activation of hidden vectors: GELU ('exact' or 'tanh'), or SiLU or a squared
    ReLU times another branch ('silu', 'relu2'), in float32.
    """
    formulas = {"exact": (3, 0), "tanh": (6, 2), "silu": (2, 0), "relu2": (2, 0)}
    (multiplications, additions), n = formulas[function], call.rows * width
    compared = n * (function == "relu2")
    counts = Elementwise.of(FLOAT, multiplications * n, additions * n, functions=n - compared)
    name = function if function in ("silu", "relu2") else "gelu"
    return call.row("activation", name, elementwise=counts, comparisons=compared)


def residuals(call: Call, *branches: str) -> dict[str, Rows]:
    """For `Call.inner(after=)`: the results of some layers inside are added to the stream, which is
    read.
    """
    act = call.types.activations
    counts, moved = Elementwise.of(act, additions=call.size), call.size * BYTES[act]
    return {
        name: [call.row("residual", name, "residual", elementwise=counts, activations=moved)]
        for name in branches
    }


def _dense(layer: nn.Dense, call: Call) -> Rows:
    return [_product(call, call.kind, call.at(), layer.features, layer.use_bias)]


def _product(call: Call, kind: str, name: str, outputs: int, bias: bool) -> LayerCosts:
    """With int8 operands each input is rounded (a multiplication, two comparisons) and each result
    rescaled (a multiplication) in float32.
    """
    types, rows, n = call.types, call.rows, call.size
    count, rounds = n * outputs, types.operands == "int8"
    row = call.row(
        kind,
        multiplications={types.operands: count},
        additions={types.accumulator: count},
        elementwise=Elementwise.of(
            FLOAT, rounds * (n + rows * outputs), rounds * bias * rows * outputs
        ),
        comparisons=2 * n * rounds,
        stored=merge(types.matrix(call.width, outputs), {FLOAT: bias * outputs * BYTES[FLOAT]}),
        activations=n * BYTES[types.operands] + rows * outputs * BYTES[types.activations],
        parameters=call.width * outputs + bias * outputs,
    )
    return dataclasses.replace(row, name=name)


def _embed(layer: nn.Embed, call: Call) -> Rows:
    """A token's row of a table, or `attend`: the head of a model whose embedding is tied to it."""
    if call.method == "attend":
        name = "/".join((*call.path[:-1], "head"))
        return [_product(call, "head", name, layer.num_embeddings, False)]
    types, moved = call.types, call.size * layer.features
    row = call.row(
        "embedding",
        elementwise=Elementwise.of(FLOAT, moved * (types.operands == "int8")),
        weights=moved * BYTES[types.operands],
        stored=types.matrix(layer.num_embeddings, layer.features),
        activations=moved * BYTES[types.activations],
        parameters=layer.num_embeddings * layer.features,
    )
    return [row]


def _layer_norm(layer: nn.LayerNorm, call: Call) -> Rows:
    act = call.types.activations
    return [layer_norm(call, act, bias=layer.use_bias, scale=layer.use_scale)]


def _rms_norm(layer: nn.RMSNorm, call: Call) -> Rows:
    return [rms_norm(call, call.types.activations, scale=layer.use_scale)]


_FLAX: dict[type[nn.Module], Callable[[Any, Call], Rows]] = {
    nn.Dense: _dense,
    nn.Embed: _embed,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Dropout: lambda layer, call: [],
}


def _rule(layer: nn.Module) -> Callable[[Call], Rows] | None:
    if hasattr(layer, "costs"):
        return layer.costs
    for base in type(layer).__mro__:
        if base in _FLAX:
            return lambda call: _FLAX[base](layer, call)
    return None
