"""Counts against the real models: trained numbers and stored bytes of every kind, and the matrix
products that JAX traces.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.costs import count as costs
from quweit_jax.deploy import pack
from quweit_jax.errors import InputError
from quweit_jax.layers.lookup import LUTLayer
from tests.compiled import CHEAP

GPT = {"name": "gpt", "context": 16, "layers": 2, "heads": 2, "width": 32}
VIT = {"name": "vit", "variant": "mu/8", "depth": 2}
MATMULFREE = {"name": "matmulfree", "width": 32, "layers": 2, "context": 16}
LLAMA = {"name": "transformer_pp", "width": 32, "layers": 2, "heads": 4, "context": 16}
SMALL = {"num_luts": 48, "lut_inputs": 4, "thermometer_bits": 3}
MODELS = {
    "gpt": GPT,
    "gpt_bias_untied": GPT | {"bias": True, "tie_embeddings": False, "mlp": "dense+none"},
    "gpt_weightless": GPT | {"mlp": "weightless", "weightless": SMALL},
    "gpt_two_layers_grouped": GPT
    | {
        "mlp": "weightless+dense",
        "weightless": SMALL | {"num_luts": (40, 64), "sum": "grouped", "lut_inputs": 2},
    },
    "gpt_candidates": GPT
    | {
        "bias": True,
        "mlp": "weightless",
        "weightless": SMALL | {"mapping": "candidates", "candidates": 4},
    },
    "gpt_learnable": GPT
    | {
        "mlp": "weightless",
        "weightless": SMALL | {"mapping": "learnable", "learn_thresholds": False},
    },
    "gpt_wide_wiring": GPT
    | {"mlp": "weightless", "weightless": SMALL | {"thermometer_bits": 9, "num_luts": 96}},
    "gpt_vector_tables": GPT
    | {"mlp": "weightless", "weightless": SMALL | {"sum": "vector", "num_luts": (40, 9)}},
    "gpt_lookup_glu": GPT | {"mlp": "lookup_glu+swiglu", "lookup_glu": {"hidden": 22}},
    "gpt_lookup_glu_trained": GPT
    | {"mlp": "lookup_glu+bitglu", "lookup_glu": {"train_tables": True, "table_groups": 0}},
    "gpt_lookup_glu_bits": GPT | {"mlp": "lookup_glu", "lookup_glu": {"sum": "int8"}},
    "gpt_lookup_glu_vectors": GPT
    | {"mlp": "lookup_glu+none", "lookup_glu": {"sum": "vector", "num_luts": 12}},
    "gpt_ternary_attention": GPT | {"linear": "ternary", "mlp": "lookup_glu+none"},
    "vit": VIT,
    "vit_ternary_attention": VIT | {"linear": "ternary"},
    "ivit_ternary_attention": VIT | {"linear": "ternary", "integer": True, "mlp": "lookup_glu"},
    "vit_mean": VIT | {"pool": "mean", "mlp": "weightless", "weightless": SMALL},
    "vit_narrow": VIT | {"mlp": "none+dense", "mlp_ratio": 3},
    "ivit": VIT | {"integer": True},
    "quweit_ivit": VIT | {"integer": True, "mlp": "weightless", "weightless": SMALL},
    "ivit_lookup_glu": VIT | {"integer": True, "pool": "mean", "mlp": "lookup_glu"},
    "quweit_ivit_grouped": VIT
    | {
        "integer": True,
        "mlp": "weightless+none",
        "weightless": SMALL | {"num_luts": (40, 64), "sum": "grouped", "lut_inputs": 5},
    },
    "matmulfree": MATMULFREE,
    "matmulfree_weightless": MATMULFREE
    | {"mlp": "weightless+dense", "hidden": 48, "weightless": SMALL},
    "matmulfree_lookup_glu": MATMULFREE | {"mlp": "lookup_glu+dense"},
    "matmulfree_none": MATMULFREE | {"mlp": "none"},
    "transformer_pp": LLAMA,
    "transformer_pp_shared_keys": LLAMA
    | {
        "kv_heads": 2,
        "head_width": 6,
        "hidden": 40,
        "mlp": "dense+weightless",
        "weightless": SMALL,
    },
    "transformer_pp_ternary": LLAMA
    | {"linear": "ternary", "sub_norms": True, "activation": "relu2", "tie_embeddings": True},
    "transformer_pp_biases": LLAMA | {"biases": "qkv", "rope": {"kind": "llama3", "factor": 2.0}},
    "transformer_pp_delta": LLAMA | {"mixer": "gated_delta+attention", "head_width": 6},
    "transformer_pp_ternary_delta": LLAMA | {"mixer": "gated_delta", "linear": "ternary"},
    "dwn": {"name": "dwn", "num_luts": (60, 55), "thermometer_bits": 3, "lut_inputs": 5},
    "dwn_random_shared": {
        "name": "dwn",
        "num_luts": 66,
        "mapping": "random",
        "per_feature": False,
        "thermometer_bits": 3,
    },
    "dwn_pyramid": {
        "name": "dwn",
        "num_luts": 66,
        "mapping": "candidates",
        "candidates": 4,
        "reduction": "learnable",
        "lut_inputs": 3,
    },
}
OUTPUTS, SIDE = 11, 16


def inputs_of(config):
    return {
        "vit": jnp.zeros((1, SIDE, SIDE, 3)),
        "dwn": jnp.linspace(0, 1, 8 * SIDE * SIDE).reshape(8, SIDE, SIDE),
    }.get(config["name"], jnp.zeros((1, 1), jnp.int32))


def count(config, **options):
    channels = 1 if config["name"] == "dwn" else 3
    return costs.count(config, OUTPUTS, image_size=SIDE, channels=channels, **options)


@pytest.fixture(scope="module")
def shapes():
    """name -> the real model's variables, as shapes."""
    return {
        name: jax.eval_shape(
            models.build(config, OUTPUTS).init, jax.random.key(0), inputs_of(config)
        )
        for name, config in MODELS.items()
    }


def sizes(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name, shapes):
    assert count(MODELS[name]).parameters == sizes(shapes[name]["params"])


@pytest.mark.parametrize("name", ["gpt", "gpt_bias_untied", "vit", "vit_narrow", "transformer_pp"])
def test_dense_float_models_store_their_parameters(name, shapes):
    assert count(MODELS[name]).bytes_stored == {"float32": 4 * sizes(shapes[name]["params"])}


def deployed(config, variables):
    """What inference reads of a model, as shapes: what its layers write for it, and the parameters
    of the layers that write nothing.
    """
    model = models.build(config, OUTPUTS)
    written = jax.eval_shape(lambda v: pack.constants(model, v, inputs_of(config)), variables)
    return [written, pack.without(variables["params"], written)]


def bytes_by_type(tree):
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        found[str(leaf.dtype)] = found.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
    return found


def by_type(stored):
    """Bytes by format as those of the arrays that hold them: tables and wiring in integers without
    a sign, as are ternary weights.
    """
    found: dict[str, int] = {}
    for key, count in stored.items():
        key = "uint8" if key in ("1-bit", "2-bit", "wiring") else key
        found[key] = found.get(key, 0) + count
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_packed_form_is_what_is_counted(name, shapes):
    """By the type of the arrays, of all models above."""
    held = bytes_by_type(deployed(MODELS[name], shapes[name]))
    held["uint8"] = sum(held.pop(kind, 0) for kind in ("uint8", "uint16", "uint32"))
    counted = by_type(count(MODELS[name]).bytes_stored)
    assert counted == {key: size for key, size in held.items() if size}


FLOATS = {"gpt": GPT, "transformer_pp": LLAMA, "matmulfree": MATMULFREE}
SHAPES = {
    **FLOATS,
    **{
        f"vit_{pool}{'_integer' if integer else ''}": VIT | {"pool": pool, "integer": integer}
        for pool in ("cls", "mean")
        for integer in (False, True)
    },
}
MIXERS = [
    {"mlp": "dense"},
    {"mlp": "none"},
    *(
        {
            "mlp": "weightless",
            "weightless": SMALL | {"num_luts": 64, "mapping": mapping, "sum": sum_},
        }
        for mapping in ("random", "arange", "learnable", "candidates")
        for sum_ in ("dense", "grouped")
    ),
]
EVERY = {
    "-".join([name, mixer["mlp"], *map(str, list(mixer.get("weightless", {}).values())[3:])]): base
    | {"layers" if name in FLOATS else "depth": 1}
    | mixer
    for name, base in SHAPES.items()
    for mixer in MIXERS
} | {
    f"dwn-{mapping}-{reduction}": {
        "name": "dwn",
        "num_luts": (60, 55),
        "mapping": mapping,
        "reduction": reduction,
        "lut_inputs": 3,
    }
    for mapping in ("random", "arange", "learnable", "candidates")
    for reduction in ("group_sum", "learnable")
}


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_model_stores_what_is_counted(name):
    config = EVERY[name]
    model = models.build(config, OUTPUTS)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), inputs_of(config)))
    counted = count(config)
    assert counted.parameters == sizes(variables["params"])
    assert sum(counted.bytes_stored.values()) == sum(
        bytes_by_type(deployed(config, variables)).values()
    )


def test_integer_vit_of_the_mean_has_no_class_token():
    """As it is packed: 26,352 bytes, of a model of 19,786 parameters."""
    config = {"name": "vit", "variant": "mu/8", "pool": "mean", "integer": True}
    counted = costs.count(config, 10, image_size=32)
    assert sum(counted.bytes_stored.values()) == 26_352 and counted.parameters == 19_786


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (x.shape[-1],))


class Ours(nn.Module):
    """A user's model, in the manner of Flax: layers from `setup`, one of them used twice."""

    mixer: bool = False

    def setup(self):
        self.first, self.twice = nn.Dense(8), nn.Dense(8, use_bias=False)
        self.luts, self.mix = LUTLayer(12, 4), Mixer()

    def __call__(self, x):
        x = self.twice(self.twice(nn.relu(self.first(x))))
        return self.luts((x > 0).astype(jnp.float32)) if not self.mixer else self.mix(x)


class Alike(nn.Module):
    """Three layers that are alike, the last of them perhaps called in another way, too."""

    again: bool = False

    @nn.compact
    def __call__(self, x):
        for name in "abc":
            layer = Counted(name=name)
            x = layer(x)
        return layer(x[:1]) if self.again else x


class Counted(nn.Module):
    traced: ClassVar[list[str | None]] = []

    @nn.compact
    def __call__(self, x):
        self.traced.append(self.name)
        return nn.Dense(4, use_bias=False, name="dense")(x)


@pytest.mark.parametrize("again", [False, True])
def test_layers_that_are_alike_are_traced_once(again):
    Counted.traced.clear()
    counted = costs.of_model(Alike(again), jax.ShapeDtypeStruct((2, 4), jnp.float32))
    assert Counted.traced == ["a"] + again * ["c", "a", "b", "c", "c"]
    assert counted.parameters == 3 * 16 and sum(counted.bytes_stored.values()) == 4 * 3 * 16
    assert counted.multiplications == {"float32": 3 * 2 * 16 + again * 16}
    assert [row.name for row in counted.layers[:3]] == ["a/dense", "b/dense", "c/dense"]


def test_a_model_of_ones_own():
    counted = costs.of_model(Ours(), jax.ShapeDtypeStruct((1, 5, 3), jnp.float32))
    assert counted.multiplications == {"float32": 5 * (3 * 8 + 2 * 8 * 8)}
    assert counted.lookups == {4: 5 * 12}
    assert counted.parameters == 3 * 8 + 8 + 8 * 8 + 12 * 16  # what is used twice is there once
    assert counted.unit == "image" and counted.context is None


def test_a_layer_without_a_rule_is_named():
    with pytest.raises(InputError, match=r"'mix' .* class Mixer .* costs\(self, call\)"):
        costs.of_model(Ours(mixer=True), jnp.zeros((1, 3)))


def test_what_a_scan_hides_is_found():
    """Layers in a scan are seen once."""

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return step(nn.Dense(4, name="dense"), x, None)[0]

    with pytest.raises(InputError, match=r"20 parameters .* 60"):
        costs.of_model(Scanned(), jnp.zeros((1, 4)))


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n]["name"] not in ("vit", "dwn")])
def test_state_is_the_cache(name):
    model = models.build(MODELS[name], OUTPUTS)
    cache = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), decode=True)
    )["cache"]
    floats = [
        leaf for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]  # not lengths and masks
    assert count(MODELS[name]).state_bytes == 4 * sizes(floats)


def traced_multiplications(function, *arguments):
    """Of all dot_general equations in a function as JAX traces it: the product of the result's size
    and the contracted one's.
    """

    def of(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += int(np.prod(equation.outvars[0].aval.shape)) * int(
                    np.prod([equation.invars[0].aval.shape[i] for i in contracted])
                )
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                        total += of(inner if hasattr(inner, "eqns") else inner.jaxpr)
        return total

    return of(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    "name",
    [
        "gpt",
        "gpt_bias_untied",
        "gpt_weightless",
        "transformer_pp",
        "matmulfree",
        "vit",
        "vit_narrow",
        "ivit",
    ],
)
def test_products_are_those_jax_traces(name, shapes):
    """Language models decode one token against a cache of the whole context, as it is counted.

    While it trains, a conditional sum is a product with bits, and a ternary layer is one (traced
    twice, for CPUs and for others); both are counted as additions alone. Integer models trace their
    real shadow too.
    """
    config = MODELS[name]
    model, counted = models.build(config, OUTPUTS), count(config)
    variables, inputs = dict(shapes[name]), inputs_of(config)
    expected = counted.total_multiplications * (2 if config.get("integer") else 1)
    expected += sum(counted.of_kind("conditional_sum").additions.values())
    if name == "matmulfree":
        assert not expected
        expected = 2 * sum(counted.additions.values())
    if config["name"] == "vit":
        assert traced_multiplications(model.apply, variables, inputs) == expected
        return
    cache = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), decode=True)
    )["cache"]

    def decode(variables, tokens):
        return model.apply(variables, tokens, decode=True, mutable=["cache"])

    assert traced_multiplications(decode, {**variables, "cache": cache}, inputs) == expected


@pytest.mark.parametrize("name", ["vit", "gpt", "transformer_pp"])
def test_flops_are_the_compilers(name, monkeypatch):
    """Two FLOPs a multiplication of the products and one an elementwise operation, against the
    compiled program's own analysis.

    A language model reads its whole context at once here, every token attending to all places
    (masked), so that it costs context times a token. The compiler writes erf and tanh out as
    polynomials of dozens of operations, so GELU is replaced by max(x, 0); it counts exp and the
    like apart from FLOPs, and there is no scan in these models whose trips it could miss.
    """
    monkeypatch.setattr(nn, "gelu", lambda x, approximate: jnp.maximum(x, 0))
    if name == "vit":
        config, inputs, tokens = (
            {"name": "vit", "variant": "Ti/16", "depth": 1},
            jnp.zeros((1, 64, 64, 3)),
            1,
        )
    else:
        config, inputs, tokens = (
            MODELS[name] | {"width": 128, "heads": 2, "layers": 1, "context": 64},
            jnp.zeros((1, 64), jnp.int32),
            64,
        )
    model = models.build(config, OUTPUTS)
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    flops = (
        jax.jit(model.apply)
        .lower(variables, inputs)
        .compile(compiler_options=CHEAP)
        .cost_analysis()["flops"]
    )
    counted = costs.count(config, OUTPUTS, image_size=64)
    parts = counted.elementwise
    elementwise = sum(
        sum(part.values()) for part in (parts.multiplications, parts.additions, parts.divisions)
    )
    assert flops == pytest.approx(
        tokens * (2 * counted.total_multiplications + elementwise), rel=0.01
    )
    assert flops == pytest.approx(
        tokens * 2 * counted.total_multiplications, rel=0.015
    )  # so it is mostly the products that are compared


def test_layer_names_are_unique_and_counts_are_whole_numbers():
    for config in MODELS.values():
        layers = count(config).layers
        assert len({layer.name for layer in layers}) == len(layers)
        for layer in layers:
            numbers = [
                v
                for f in dataclasses.fields(layer)
                if isinstance(field := getattr(layer, f.name), dict)
                for v in field.values()
            ]
            assert all(type(v) is int and v >= 0 for v in numbers), layer
