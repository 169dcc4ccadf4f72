"""Counts against the real models: trained numbers and stored bytes of every kind, and the matrix
products that JAX traces.
"""

import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.costs import count as costs
from quweit_jax.deploy import packed
from quweit_jax.errors import InputError
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
    "vit": VIT,
    "vit_mean": VIT | {"pool": "mean", "mlp": "weightless", "weightless": SMALL},
    "vit_narrow": VIT | {"mlp": "none+dense", "mlp_ratio": 3},
    "ivit": VIT | {"integer": True},
    "quweit_ivit": VIT | {"integer": True, "mlp": "weightless", "weightless": SMALL},
    "quweit_ivit_grouped": VIT
    | {
        "integer": True,
        "mlp": "weightless+none",
        "weightless": SMALL | {"num_luts": (40, 64), "sum": "grouped", "lut_inputs": 5},
    },
    "matmulfree": MATMULFREE,
    "matmulfree_weightless": MATMULFREE
    | {"mlp": "weightless+dense", "hidden": 48, "weightless": SMALL},
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
    "dwn": {"name": "dwn", "num_luts": (60, 50), "thermometer_bits": 3, "lut_inputs": 5},
    "dwn_random_shared": {
        "name": "dwn",
        "num_luts": 60,
        "mapping": "random",
        "per_feature": False,
        "thermometer_bits": 3,
    },
    "dwn_pyramid": {
        "name": "dwn",
        "num_luts": 60,
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


def filled(tree):
    """Arrays of a tree's shapes: zeros, but wiring that reads the last input there is, whose number
    takes the most bytes.
    """
    if not isinstance(tree, dict):
        return np.zeros(tree.shape, tree.dtype)
    out = {key: filled(child) for key, child in tree.items()}
    if "mapping" in out:
        out["mapping"][...] = tree["inverse"].shape[0] - 1
    return out


@pytest.mark.parametrize(
    "name",
    [n for n in MODELS if not MODELS[n].get("integer") and ("weightless" in n or "gpt_" in n)],
)
def test_packed_floats_store_what_packing_makes(name, shapes):
    variables = filled({key: dict(tree) for key, tree in shapes[name].items()})
    if name == "gpt_bias_untied":
        with pytest.raises(InputError, match="nothing to pack"):
            packed.pack(variables)
        return
    assert sum(count(MODELS[name]).bytes_stored.values()) == packed.block_bytes(
        packed.pack(variables)
    )


@pytest.mark.parametrize("name", [n for n in MODELS if MODELS[n].get("integer")])
def test_packed_integers_store_what_packing_makes(name, shapes):
    """The shapes of what `inference.integer.pack` writes down."""
    model = models.build(MODELS[name], OUTPUTS)
    made = jax.eval_shape(
        lambda v, x: model.apply(v, x, mutable=["packed"])[1],
        dict(shapes[name]),
        inputs_of(MODELS[name]),
    )
    by_type: dict[str, int] = {}
    for leaf in jax.tree.leaves(made):
        by_type[str(leaf.dtype)] = by_type.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
    counted = dict(count(MODELS[name]).bytes_stored)
    assert sum(counted.values()) == sum(by_type.values())
    assert by_type.pop("uint8", 0) == counted.pop("1-bit", 0) + counted.pop("wiring", 0)
    assert by_type == counted


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
    monkeypatch.setattr(flax.linen, "gelu", lambda x, approximate: jnp.maximum(x, 0))
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
