"""`training.optimizers`: tables stay in range whatever the optimizer does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from flax.traverse_util import flatten_dict

from quweit_jax import models
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.layers import groups
from quweit_jax.layers.weightless import WeightlessBlock
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.ops.wiring import marginal_inputs, strongest
from quweit_jax.training import state
from quweit_jax.training.optimizers import (
    OptimizerConfig,
    comparator_penalty,
    group_norms,
    groups_of,
    keep_tables_in_range,
    make_optimizer,
    spectral_penalty,
)
from tests.compiled import quick_jit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_are_what_clipping_makes_them(dtype):
    draw = np.random.default_rng(0)
    values = np.concatenate([draw.uniform(-1, 1, 4000), [-1, 1, 0, 1e-30, -1e-30, 0.3, -0.7]])
    p = jnp.asarray(values, dtype)
    u = jnp.asarray(draw.normal(size=p.shape) * 10 ** draw.uniform(-6, 1, p.shape), dtype)
    params, updates = ({"luts": {"tables": a}, "kernel": 3 * a} for a in (p, u))
    keep = keep_tables_in_range()

    @jax.jit
    def step(params, updates):
        updates, _ = keep.update(updates, keep.init(params), params)
        return optax.apply_updates(params, updates)

    moved = step(params, updates)
    tables = np.asarray(moved["luts"]["tables"], np.float32)
    clipped = np.asarray(jnp.clip(p + u, -1, 1), np.float32)
    assert np.abs(tables).max() == 1
    inside = np.abs(clipped) < 1
    np.testing.assert_array_equal(tables[inside], clipped[inside])
    np.testing.assert_allclose(tables, clipped, rtol=float(jnp.finfo(dtype).epsneg))
    np.testing.assert_array_equal(moved["kernel"], 3 * p + 3 * u)
    assert np.mean(np.abs(tables) == 1) > 0.1


def test_a_training_keeps_tables_in_range():
    params = {"tables": jnp.full((4, 4), 0.9), "bias": jnp.zeros(3)}
    optimizer = make_optimizer(OptimizerConfig(tables_learning_rate=0.5), 10)
    state = optimizer.init(params)
    for _ in range(5):
        grads = jax.tree.map(lambda p: -jnp.ones_like(p), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["tables"] == 1).all() and (params["bias"] > 0).all()


def test_mistakes_are_named():
    keep = keep_tables_in_range()
    with pytest.raises(InputError, match="found none"):
        keep.init({"kernel": jnp.zeros(3)})
    with pytest.raises(InputError, match="pass the parameters"):
        keep.update({"tables": jnp.zeros(3)}, optax.EmptyState())
    make_optimizer(OptimizerConfig(), 3).init({"kernel": jnp.zeros((3, 3))})
    with pytest.raises(InputError, match="Did you mean 'adamw'"):
        OptimizerConfig(name="adam")


class Classifier(nn.Module):
    """A block that takes the arguments a training step gives."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return WeightlessBlock(3, num_luts=12, lut_inputs=3, name="block")(x)


@pytest.mark.parametrize("mapping", ["learnable", "candidates", "random"])
def test_the_comparator_penalty_leaves_fewer_inputs_read(mapping):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(16, 30)).astype(np.float32), np.arange(16) % 3
    config = DWNConfig(3, (12,), lut_inputs=2, mapping=mapping, thermometer_bits=1)
    model, adam = DWN(config), optax.adam(0.03)

    def read(weight: float) -> tuple[float, int]:
        now = jax.jit(state.make_init(model, adam, 0, ema=False))(x)
        step = state.make_train_step(model, adam, comparator_penalty=weight)
        for _ in range(60):
            now, _ = step(now, {"inputs": x, "targets": y})
        if mapping == "random":
            return float(comparator_penalty(now.params, now.constants)), 0
        scores = now.params["luts_0"]["scores"]
        held = now.constants["wiring"].get("luts_0", {}).get("candidates")
        return 0.0, len(set(np.asarray(strongest(scores, held)).tolist()))

    (nothing, plain), (_, fewer) = read(0.0), read(1.0)
    assert not nothing and (fewer < plain or mapping == "random")


def test_the_comparator_penalty_adds_up_layers_that_are_scanned():
    scores = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
    choices = np.random.default_rng(1).integers(0, 6, scores.shape)
    stacked = comparator_penalty(
        {"blocks": {"scores": scores}}, {"wiring": {"blocks": {"candidates": choices}}}
    )
    each = [marginal_inputs(*layer) for layer in zip(scores, choices)]
    np.testing.assert_allclose(stacked, sum(each), rtol=1e-6)


def test_the_spectral_penalty_moves_tables_alone():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(16, 5)).astype(np.float32), np.arange(16) % 3
    model, sgd = Classifier(), optax.sgd(1.0)
    start = jax.jit(state.make_init(model, sgd, 0, ema=False))(x)
    tables = np.asarray(start.params["block"]["luts_0"]["tables"])
    np.testing.assert_allclose(spectral_penalty(start.params), (tables**2).sum() / 8, rtol=1e-5)
    moved = [
        state.make_train_step(model, sgd, spectral_penalty=weight)(
            jax.tree.map(jnp.copy, start), {"inputs": x, "targets": y}
        )[0].params["block"]
        for weight in (0.0, 0.01)
    ]
    found = moved[0]["luts_0"]["tables"] - moved[1]["luts_0"]["tables"]
    np.testing.assert_allclose(found, 0.01 * 2 * tables / 8, atol=1e-6)
    np.testing.assert_array_equal(moved[0]["vectors"], moved[1]["vectors"])
    assert spectral_penalty({"kernel": jnp.ones(3)}) == 0


def groups_in(name, **sizes):
    """The groups of a small model's parameters by path."""
    model = models.build({"name": name, **sizes}, 10)
    image, tokens = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 4), jnp.int32)
    inputs = image if name == "vit" else tokens
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    found = jax.tree_util.tree_leaves_with_path(groups_of(params))
    return {"/".join(key.key for key in path): group for path, group in found}


@pytest.mark.parametrize("options", [{}, {"integer": True}, {"mlp": "weightless"}], ids=str)
def test_a_vits_class_token_and_positions_do_not_decay(options):
    found = groups_in("vit", variant="mu/8", **options)
    assert found["cls_token"] == found["position_embedding"] == "no_decay"
    assert found["patch_embed/kernel"] == found["head/kernel"] == "decay"
    assert found["final_norm/scale"] == found["head/bias"] == "no_decay"
    if "mlp" in options:
        assert found["block_0/mlp/luts_0/tables"] == "tables"
        assert found["block_0/mlp/vectors"] == "vectors"


def test_a_gpts_embeddings_decay_as_nanogpts_do():
    found = groups_in("gpt", width=16, layers=1, heads=2, context=8, bias=True)
    assert found["token_embedding/embedding"] == found["position_embedding"] == "decay"
    assert {g for name, g in found.items() if name.endswith(("bias", "scale"))} == {"no_decay"}
    assert {g for name, g in found.items() if name.endswith("kernel")} == {"decay"}


def test_of_matmulfree_models_matrices_alone_decay():
    found = groups_in("matmulfree", width=16, layers=2, context=8, hidden=16)
    decaying = {name.split("/")[-1] for name, group in found.items() if group == "decay"}
    assert decaying == {"kernel", "embedding"} and found["lower_bounds"] == "no_decay"


def test_a_layer_of_ones_own_declares_its_groups():
    groups.declare("no_decay", "a_matrix_that_stays")
    groups.declare("decay", "of_rank_three", rank=3)
    shapes = {"a_matrix_that_stays": (2, 2), "of_rank_three": (3,), "other": (2, 2)}
    found = groups_of({name: jnp.zeros(shape) for name, shape in shapes.items()})
    assert found == {
        "a_matrix_that_stays": "no_decay",
        "of_rank_three": "no_decay",
        "other": "decay",
    }
    assert groups_of({"of_rank_three": jnp.zeros((1, 1, 1))}) == {"of_rank_three": "decay"}
    for group, name in (("decay", "tables"), ("fast", "x")):
        with pytest.raises(InputError, match="declare"):
            groups.declare(group, name)


BLOCK = WeightlessBlock(3, num_luts=12, lut_inputs=3)
X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)


class Stacked(nn.Module):
    """Two blocks under `nn.scan`, their parameters one on the other."""

    @nn.compact
    def __call__(self, x):
        class One(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + WeightlessBlock(5, num_luts=6, lut_inputs=2, name="block")(x), None

        axes = {"params": 0, "wiring": 0, "packed": 0}
        scanned = nn.scan(One, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scanned(name="scan")(x, None)[0]


def boxed(variables):
    """Every array in a box of Flax's."""
    return jax.tree.map(lambda a: nn.Partitioned(a, (None,) * a.ndim), variables)


def trees():
    """Parameters with tables in every kind of tree."""
    plain = quick_jit(BLOCK.init)(jax.random.key(0), X)["params"]
    behind = nnx.bridge.ToNNX(BLOCK, rngs=nnx.Rngs(0)).lazy_init(X)
    stacked = quick_jit(Stacked().init)(jax.random.key(0), X)["params"]
    return {
        "dicts": plain,
        "boxes": boxed(plain),
        "nnx": nnx.state(behind, nnx.Param),
        "pure": nnx.to_pure_dict(nnx.state(behind, nnx.Param)),
        "flat": flatten_dict(plain),
        "flat, one string": flatten_dict(plain, sep="/"),
        "scanned": stacked,
        "boxes of scanned": boxed(stacked),
        "lists": {"tables": [jnp.full((2, 4), 0.5), jnp.full((2, 4), -0.5)], "bias": jnp.ones(3)},
    }


@pytest.mark.parametrize("kind", trees())
def test_tables_are_found_in_any_tree(kind):
    params = trees()[kind]
    assert set(jax.tree.leaves(groups_of(params))) >= {"tables", "no_decay"}
    assert "decay" not in jax.tree.leaves(groups_of(params))  # biases and norms, stacked or not
    alone = optax.chain(optax.sgd(1.0), keep_tables_in_range())
    for optimizer in (make_optimizer(OptimizerConfig(tables_learning_rate=9.0), 3), alone):
        moved, state = params, optimizer.init(params)
        for _ in range(2):
            grads = jax.tree.map(jnp.ones_like, moved)
            updates, state = optimizer.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
        leaves = jax.tree_util.tree_leaves_with_path(moved)
        tables = [leaf for path, leaf in leaves if groups.group_of(path, leaf) == "tables"]
        assert tables and all((leaf == -1).all() for leaf in tables)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in tables))
    np.testing.assert_allclose(group_norms(moved)["tables"], norm, rtol=1e-6)
    assert spectral_penalty(params) > 0


def test_nnx_trains_and_packs():
    behind = nnx.bridge.ToNNX(BLOCK, rngs=nnx.Rngs(0)).lazy_init(X)
    config = OptimizerConfig(tables_learning_rate=0.5, warmup=0)
    optimizer = nnx.Optimizer(behind, make_optimizer(config, 5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: (m(X) ** 2).sum())(model))

    for _ in range(3):
        step(behind, optimizer)
    tables = behind.luts_0["tables"][...]
    assert np.abs(tables).max() == 1
    expected = np.asarray(behind(X))
    for model in (BLOCK, behind):
        packed = pack(model, nnx.state(behind), X)
        np.testing.assert_allclose(BLOCK.apply(packed, X), expected, atol=1e-2)
    with pytest.raises(InputError, match=r"nnx\.Param"):
        make_optimizer(config, 5).init(nnx.state(behind))
    with pytest.raises(InputError, match="found Linear"):
        linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        pack(linear, nnx.state(linear), jnp.ones((1, 2)))


def test_tables_in_lists_of_nnx_are_found_and_flat_states_refused():
    class Net(nnx.Module):
        def __init__(self):
            self.tables = nnx.List([nnx.Param(jnp.full((2, 4), 0.5)) for _ in range(2)])

    state = nnx.state(Net(), nnx.Param)
    assert jax.tree.leaves(groups_of(state)) == ["tables"] * 2
    with pytest.raises(InputError, match="FlatState"):
        groups_of(nnx.to_flat_state(state))


def test_models_under_vmap_have_the_groups_of_one():
    model = models.build({"name": "vit", "variant": "mu/8"}, 10)
    many = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)))["params"])
    params = jax.eval_shape(many, jax.random.split(jax.random.key(0), 2))
    found = groups_of(params)
    assert {found["position_embedding"], found["cls_token"], found["head"]["bias"]} == {"no_decay"}
    assert found["head"]["kernel"] == "decay"


def test_packing_takes_variables_in_every_form():
    behind = nnx.bridge.ToNNX(BLOCK, rngs=nnx.Rngs(0)).lazy_init(X)
    state = nnx.state(behind)
    expected = pack(BLOCK, state, X)
    for given in (behind, nnx.split(behind), nnx.to_flat_state(state)):
        found = pack(behind, given, X)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
    pack(BLOCK, freeze(quick_jit(BLOCK.init)(jax.random.key(0), X)), X)


def test_packing_says_what_is_not_the_models():
    variables = quick_jit(BLOCK.init)(jax.random.key(0), X)
    behind = nnx.bridge.ToNNX(BLOCK, rngs=nnx.Rngs(0)).lazy_init(X)
    for given in (
        {},
        None,
        variables["params"],
        nnx.to_pure_dict(nnx.state(behind)),
        nnx.state(behind, nnx.Param),
        {"params": variables["params"]},
        pack(BLOCK, variables, X),
    ):
        with pytest.raises(InputError, match="pack: "):
            pack(BLOCK, given, X)
    for inputs in ((), (X[:, :4],)):
        with pytest.raises(InputError, match="pack: "):
            pack(BLOCK, variables, *inputs)


def test_boxed_and_stacked_variables_pack():
    for model in (BLOCK, Stacked()):
        variables = quick_jit(model.init)(jax.random.key(0), X)
        packed = pack(model, {**variables, "params": boxed(variables["params"])}, X)
        np.testing.assert_allclose(model.apply(packed, X), model.apply(variables, X), atol=1e-2)
