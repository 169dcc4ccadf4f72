"""Blocks that are scanned, computed again or divided over devices;
logits that never exist whole.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.costs.count import count
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.layers.placement import hand_over, placing
from quweit_jax.models import registry, stack
from quweit_jax.training import loop, metrics, rundir
from quweit_jax.training.optimizers import groups_of
from quweit_jax.training.setup import assemble
from tests.compiled import quick_jit

MIXED = "weightless+weightless+lookup_glu+dense+dense"
SMALL = {
    "model.mlp": MIXED,
    "model.layers": 5,
    "model.width": 16,
    "model.lookup_glu.hidden": 24,
    "model.weightless.num_luts": 24,
    "model.dropout": 0.0,
    "steps": 4,
    "eval_every": 4,
    "checkpoint_every": 2,
}
SCANNED = {"model.scan_layers": True}
ALL = SCANNED | {"model.remat": True, "model.remat_policy": "dots", "loss_pieces": 4}
MODELS = {
    "gpt": {"mlp": MIXED, "layers": 5, "heads": 2, "dropout": 0.1},
    "matmulfree": {"mlp": "dense+dense+none", "layers": 3, "hidden": 32},
    "transformer_pp": {"mlp": "dense+lookup_glu+lookup_glu", "layers": 3, "heads": 2, "hidden": 32},
}


def losses(workdir):
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def names(variables):
    return set(variables["params"])


@pytest.fixture(scope="module")
def plain(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("depth") / "plain"
    loop.fit(tiny_config(SMALL), workdir)
    return workdir


@pytest.fixture(scope="module")
def scanned(tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("depth") / "scanned"
    loop.fit(tiny_config(SMALL | ALL), workdir)
    return workdir


@pytest.mark.parametrize(
    "changes",
    [
        SCANNED,
        {"model.remat": True},
        {"loss_pieces": 2},
        ALL | {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.fsdp_size_limit": 64},
        ALL | {"mesh.fsdp": 4, "mesh.data": 1, "grad_accum": 1},
    ],
    ids=["scan", "remat", "pieces", "mesh", "fsdp"],
)
def test_a_run_is_the_same_however_it_is_compiled(changes, plain, tiny_config, tmp_path):
    loop.fit(tiny_config(SMALL | changes), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(plain), atol=1e-4)


def test_a_scanned_run_is_read_as_any_other(scanned, plain):
    one, other = rundir.open_run(scanned), rundir.open_run(plain)
    assert names(one.variables) == names(other.variables) >= {f"block_{i}" for i in range(5)}
    inputs = one.setup.init_inputs
    for opened in (one, other):
        packed = pack(opened.setup.model, opened.variables, inputs)
        apply = quick_jit(opened.setup.model.apply)
        deployed, trained = apply(packed, inputs), apply(opened.variables, inputs)
        np.testing.assert_allclose(deployed, trained, atol=1e-4)


@pytest.mark.parametrize("source, changes", [("plain", ALL), ("scanned", {})])
def test_either_begins_from_the_other(source, changes, request, tiny_config):
    from quweit_jax.commands.train import initial

    workdir = request.getfixturevalue(source)
    setup = assemble(tiny_config(SMALL | changes))
    begun = setup.init_state(initial(str(workdir), workdir / "none"))
    expected = rundir.open_run(workdir).variables["params"]
    found = stack.unstacked(begun.variables())["params"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("name", MODELS)
def test_a_scanned_model_computes_and_learns_the_same(name):
    options = {"name": name, "width": 16, "context": 8, **MODELS[name]}
    one = registry.build(options, 7)
    other = registry.build(options | {"scan_layers": True, "remat": True}, 7)
    tokens = jnp.arange(16).reshape(2, 8) % 7
    variables = quick_jit(one.init)(jax.random.key(0), tokens)
    layers = stack.stacked(variables, one.config.mlps())
    drawn = jax.eval_shape(other.init, jax.random.key(0), tokens)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, layers)
    again = stack.unstacked(layers)
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))

    def loss(model):
        def of(params, rest):
            return jnp.square(model.apply({**rest, "params": params}, tokens)).mean()

        return quick_jit(jax.value_and_grad(of))

    params, stacked = variables.pop("params"), layers.pop("params")
    value, gradient = loss(one)(params, variables)
    found, other_gradient = loss(other)(stacked, layers)
    np.testing.assert_allclose(found, value, rtol=5e-3)
    other_gradient = stack.unstacked({"params": other_gradient})["params"]
    # a rounding to int8 that falls the other way moves a sum by a step
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=1e-3)  # noqa: E731
    jax.tree.map(close, other_gradient, gradient)


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_are_stacked_stay_in_their_groups(name):
    options = {"name": name, "width": 16, "context": 8, **MODELS[name]}
    model = registry.build(options, 7)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    stacked = jax.eval_shape(lambda p: stack.stacked({"p": p}, model.config.mlps())["p"], params)
    kinds = stack.stacked({"p": jax.tree.map(np.asarray, groups_of(params))}, model.config.mlps())
    for found, expected in zip(
        jax.tree.leaves(groups_of(stacked)), jax.tree.leaves(kinds["p"]), strict=True
    ):
        assert set(np.ravel(expected)) == {found}


def test_logits_never_exist_whole(tiny_config):
    def program(pieces):
        setup = assemble(tiny_config(SMALL | {"model.layers": 1, "model.mlp": "dense"} | pieces))
        state = setup.abstract_state()
        lowered = setup.train_step(state).lower(state, setup.abstract_batch())
        size, context = setup.config.batch_size, setup.config.model.context
        return re.findall(rf"tensor<{size}x{context}x{setup.data.outputs}xf32>", lowered.as_text())

    assert program({}) and not program({"loss_pieces": 4})


def test_large_vocabularies_are_cut_by_themselves(tiny_config):
    setup = assemble(tiny_config({"model.context": 16}))
    assert setup.loss_pieces(4) == 1
    texts = 2**28 // (4 * setup.data.outputs * 4)  # a fourth of their tokens fills the limit
    assert setup.loss_pieces(texts) == 4


def test_pieces_that_do_not_divide_a_text_are_refused(tiny_config):
    with pytest.raises(InputError, match="loss_pieces: expected a number that divides"):
        assemble(tiny_config({"model.context": 16, "loss_pieces": 3}))


def test_an_unknown_policy_is_refused(tiny_config):
    with pytest.raises(InputError, match=r"model\.remat_policy.*dots_no_batch"):
        assemble(tiny_config({"model.remat_policy": "all"}))


def test_costs_do_not_depend_on_how_it_is_compiled(tiny_config):
    one, other = (count(tiny_config(SMALL | changes).model.to_dict(), 11) for changes in ({}, ALL))
    assert one == other


def test_activations_are_handed_over_where_they_are_placed():
    seen = []

    def place(x):
        seen.append(x.shape)
        return x + 1

    x = jnp.zeros((2, 3, 4))
    assert not hand_over(x).any()
    with placing(place):
        assert hand_over({"x": x, "scale": jnp.zeros(())})["x"].all()
    assert seen == [(2, 3, 4)] and not hand_over(x).any()
