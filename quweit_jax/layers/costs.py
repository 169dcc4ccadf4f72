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

from quweit_jax.errors import InputError
from quweit_jax.ops.counts import BYTES, FLOAT, Elementwise, LayerCosts, Types, merge

Rows = list[LayerCosts]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer, with `jax.ShapeDtypeStruct` in place of arrays.

    layer: unbound, to read its fields. path: its names from the model down. method: what was called.
    args, output: what went in and came out. params: its own, by name, without those of layers
      inside. again: an earlier call used them. inside: the calls that this one made, in their order.
    kind: of dense products, as an enclosing layer says it. precision, context: see `costs.count`.
    following: the call after this one in the same layer.
    """

    layer: nn.Module
    path: tuple[str, ...]
    method: str
    args: tuple[Any, ...]
    output: Any
    params: Mapping[str, jax.ShapeDtypeStruct]
    again: bool
    inside: tuple[Call, ...]
    kind: str = "projection"
    precision: str | None = None
    context: int | None = None
    following: Call | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first array that went in."""
        return jax.tree.leaves(self.args)[0].shape

    @property
    def rows(self) -> int:
        """Vectors that went in: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Of the vectors that went in."""
        return self.shape[-1]

    @property
    def types(self) -> Types:
        """Those of a layer of the output's type."""
        return self.types_of(str(jax.tree.leaves(self.output)[0].dtype))

    def types_of(self, dtype: str) -> Types:
        """Those of a layer of a type, with other operands where a precision is asked for."""
        operands = self.precision or dtype
        return Types(operands, dtype if operands == "int8" else operands)

    def at(self, *names: str) -> str:
        """The path of a part of the layer, or of the layer itself, as a row's name."""
        return "/".join((*self.path, *names))

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
          instead: rows to add behind those of a layer inside, or to put in their place, by its name.
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


def product(
    name: str, kind: str, rows: int, inputs: int, outputs: int, types: Types, *, bias: bool = False
) -> LayerCosts:
    """A dense layer (rows, inputs) -> (rows, outputs).

    With int8 operands each input is rounded (a multiplication, two comparisons) and each result
    rescaled (a multiplication) in float32.
    """
    count, rounds = rows * inputs * outputs, types.operands == "int8"
    stored = merge(types.matrix(inputs, outputs), {FLOAT: bias * outputs * BYTES[FLOAT]})
    rescaled = Elementwise({FLOAT: rows * (inputs + outputs)}, {FLOAT: bias * rows * outputs})
    moved = rows * (inputs * BYTES[types.operands] + outputs * BYTES[types.activations])
    return LayerCosts(
        name,
        kind,
        multiplications={types.operands: count},
        additions={types.accumulator: count},
        elementwise=rescaled if rounds else Elementwise(),
        comparisons=2 * rows * inputs if rounds else 0,
        bytes_moved={"weights": sum(stored.values()), "activations": moved},
        bytes_stored=stored,
        parameters=inputs * outputs + bias * outputs,
    )


def layer_norm(
    name: str, rows: int, width: int, activations: str, *, bias: bool, scale: bool = True
) -> LayerCosts:
    """Mean and mean square, a factor a feature (inverse deviation times scale), subtract, multiply,
    perhaps add; in float32.
    """
    multiplications = rows * ((2 + scale) * width + 1)
    additions = rows * ((3 + bias) * width + 2)
    counts = Elementwise(
        {FLOAT: multiplications}, {FLOAT: additions}, {FLOAT: 2 * rows}, {FLOAT: rows}
    )
    return _norm(name, rows, width, activations, scale + bias, counts)


def rms_norm(
    name: str, rows: int, width: int, activations: str, *, scale: bool = True
) -> LayerCosts:
    """Mean square, times inverse root, times scale; in float32."""
    counts = Elementwise(
        {FLOAT: rows * (2 + scale) * width},
        {FLOAT: rows * (width + 1)},
        {FLOAT: rows},
        {FLOAT: rows},
    )
    return _norm(name, rows, width, activations, int(scale), counts)


def _norm(
    name: str, rows: int, width: int, activations: str, vectors: int, counts: Elementwise
) -> LayerCosts:
    stored, moved = vectors * width * BYTES[FLOAT], 2 * rows * width * BYTES[activations]
    return LayerCosts(
        name,
        "norm",
        elementwise=counts,
        bytes_moved={"weights": stored, "activations": moved},
        bytes_stored={FLOAT: stored},
        parameters=vectors * width,
    )


def activation(name: str, values: int, function: str) -> LayerCosts:
    """GELU ('exact' or 'tanh'), or SiLU times another branch ('gated_silu'), in float32."""
    multiplications, additions = {"exact": (3, 0), "tanh": (6, 2), "gated_silu": (2, 0)}[function]
    counts = Elementwise(
        {FLOAT: multiplications * values}, {FLOAT: additions * values}, {}, {FLOAT: values}
    )
    return LayerCosts(name, "activation", elementwise=counts)


def residuals(call: Call, *branches: str) -> dict[str, Rows]:
    """For `Call.inner(after=)`: the results of some layers inside are added to the stream, which is
    read.
    """
    values, act = call.rows * call.width, call.types.activations
    return {
        branch: [
            LayerCosts(
                call.at(branch, "residual"),
                "residual",
                elementwise=Elementwise({}, {act: values}),
                bytes_moved={"activations": values * BYTES[act]},
            )
        ]
        for branch in branches
    }


def _dense(layer: Any, call: Call) -> Rows:
    features = layer.features
    return [
        product(
            call.at(), call.kind, call.rows, call.width, features, call.types, bias=layer.use_bias
        )
    ]


def _embed(layer: Any, call: Call) -> Rows:
    """A token's row of a table, or `attend`: the head of a model whose embedding is tied to it."""
    types, rows = call.types, math.prod(call.shape)
    if call.method == "attend":
        name = "/".join((*call.path[:-1], "head"))
        return [product(name, "head", call.rows, call.width, layer.num_embeddings, types)]
    moved = rows * layer.features
    return [
        LayerCosts(
            call.at(),
            "embedding",
            elementwise=Elementwise({FLOAT: moved} if types.operands == "int8" else {}),
            bytes_moved={
                "weights": moved * BYTES[types.operands],
                "activations": moved * BYTES[types.activations],
            },
            bytes_stored=types.matrix(layer.num_embeddings, layer.features),
            parameters=layer.num_embeddings * layer.features,
        )
    ]


def _layer_norm(layer: Any, call: Call) -> Rows:
    act, bias, scale = call.types.activations, layer.use_bias, layer.use_scale
    return [layer_norm(call.at(), call.rows, call.width, act, bias=bias, scale=scale)]


def _rms_norm(layer: Any, call: Call) -> Rows:
    act, scale = call.types.activations, layer.use_scale
    return [rms_norm(call.at(), call.rows, call.width, act, scale=scale)]


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
