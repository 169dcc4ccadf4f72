"""A student learns from a teacher what it should, and nothing else is changed by it."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import tree_leaves_with_path

from quweit_jax.commands import train
from quweit_jax.models.registry import build, defaults
from quweit_jax.pretrained import merge
from quweit_jax.training import distill, loop, metrics, rundir, state
from quweit_jax.training.setup import assemble
from quweit_jax.training.sharding import path_name
from quweit_jax.training.teacher import Teacher
from tests.conftest import assert_same_checkpoint, read_checkpoint

DENSE = {
    "model.mlp": "dense",
    "model.layers": 1,
    "steps": 4,
    "eval_every": 4,
    "checkpoint_every": 4,
}
CONVERTED = {
    "model.mlp": "lookup_glu",
    "model.layers": 1,
    "model.lookup_glu.hidden": 64,
    "distill.fit_steps": 4,
    "steps": 6,
    "log_every": 1,
    "eval_every": 6,
    "checkpoint_every": 2,
    "keep": 9,
    "optimizer.learning_rate": 1e-2,
}


def leaves(tree) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(x) for path, x in tree_leaves_with_path(tree)}


def rows(workdir) -> list[dict]:
    return [r for r in metrics.read_rows(workdir / "metrics.jsonl") if r["split"] == "train"]


def teacher_of(setup, seed: int = 0, **changes) -> Teacher:
    """A freshly drawn teacher for a setup, the same model but for `changes`."""
    model = build(setup.config.model.to_dict() | changes, setup.data.outputs)
    variables = jax.jit(model.init)(jax.random.key(seed), setup.init_inputs)
    return Teacher(model, variables, setup.tokenizer)


def watched(model, variables, inputs):
    """Logits, and every module's output."""
    logits, seen = jax.jit(
        lambda v: model.apply(v, inputs, capture_intermediates=True, mutable=["intermediates"])
    )(variables)
    return logits, seen["intermediates"]


def batch_of(setup, size: int = 8) -> dict[str, jax.Array]:
    examples = [setup.data.train[i] for i in range(size)]
    return {key: jnp.stack([e[key] for e in examples]) for key in examples[0]}


@pytest.fixture(scope="module")
def dense(tiny_arguments, tmp_path_factory):
    """A trained dense run."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    assert train.main([*tiny_arguments(DENSE), f"--workdir={workdir}"]) == 0
    return workdir


# ------------------------------------------------------------------------------- what is learned


def float64(logits) -> np.ndarray:
    """Log-probabilities, in double precision."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 11), (1, 1)])
def test_divergence_is_that_of_the_definition(shape, temperature):
    ours, theirs = (np.random.default_rng(i).normal(0, 3, shape) for i in range(2))
    p, q = float64(theirs / temperature), float64(ours / temperature)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()
    found = distill.divergence(jnp.float32(ours), jnp.float32(theirs), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    # a great temperature compares logits themselves, which is what its square is for
    centred = [x - x.mean(-1, keepdims=True) for x in (ours, theirs)]
    warm = distill.divergence(jnp.float32(ours), jnp.float32(theirs), 1e3)
    squares = np.square(centred[0] - centred[1]).mean(-1).mean() / 2
    np.testing.assert_allclose(warm, squares, rtol=0.05, atol=1e-3)


def test_the_loss_is_that_of_the_definition(tiny_config):
    setup = assemble(tiny_config({"model.mlp": "dense"}))
    teacher, batch = teacher_of(setup, 1), batch_of(setup)
    current = setup.init_state()
    options = distill.DistillConfig(weight=0.3, temperature=2.0, blocks=0.5)
    objective = distill.distilled(setup.model, teacher.model, options)
    variables, key = current.variables(), jax.random.key(0)
    loss, found, moved = jax.jit(objective)(
        variables, batch["inputs"], batch["targets"], key, teacher.variables
    )
    logits, theirs = (
        watched(model, values, batch["inputs"])
        for model, values in ((setup.model, variables), (teacher.model, teacher.variables))
    )
    p, q = float64(theirs[0] / 2), float64(logits[0] / 2)
    kl = 4 * (np.exp(p) * (p - q)).sum(-1).mean()
    entropy = -np.take_along_axis(float64(logits[0]), np.asarray(batch["targets"])[..., None], -1)
    hidden = [
        [np.float64(seen[f"block_{i}"]["__call__"][0]) for i in range(2)]
        for seen in (logits[1], theirs[1])
    ]
    blocks = sum(np.square(a - b).mean() for a, b in zip(*hidden))
    assert blocks > 1e-3 and not moved
    np.testing.assert_allclose(found["loss"], entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["distill/kl"], kl, rtol=1e-3)
    np.testing.assert_allclose(found["distill/blocks"], blocks, rtol=1e-4)
    np.testing.assert_allclose(loss, 0.7 * entropy.mean() + 0.3 * kl + 0.5 * blocks, rtol=1e-4)


def test_its_own_teacher_leaves_the_cross_entropy_alone(tiny_config):
    setup = assemble(tiny_config({"model.mlp": "lookup_glu", "model.lookup_glu.hidden": 32}))
    variables, batch = setup.init_state().variables(), batch_of(setup)
    options = distill.DistillConfig(weight=0.25, temperature=2.0, blocks=1.0)

    def gradient(objective, *taught):
        def loss(params):
            given = batch["inputs"], batch["targets"], jax.random.key(0)
            return objective({**variables, "params": params}, *given, *taught)[:2]

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    distilled = distill.distilled(setup.model, setup.model, options)
    (_, found), ours = gradient(distilled, variables)
    assert abs(found["distill/kl"]) < 1e-6 and found["distill/blocks"] < 1e-12
    (_, plain), theirs = gradient(state.cross_entropy(setup.model))
    assert found["loss"] == plain["loss"] and found["accuracy"] == plain["accuracy"]
    for name, value in leaves(theirs).items():
        np.testing.assert_allclose(leaves(ours)[name], 0.75 * value, atol=1e-7, err_msg=name)


MIXED = {"model.mlp": "dense+lookup_glu+weightless", "model.layers": 3}


@pytest.mark.parametrize("remat", [False, True])
def test_mixers_are_fitted_to_the_teachers_on_its_own_inputs(tiny_config, remat):
    setup = assemble(tiny_config(MIXED | {"model.remat": remat, "model.lookup_glu.hidden": 32}))
    teacher, batch = teacher_of(setup, 1, mlp="dense"), batch_of(setup)
    variables = setup.init_state().variables()
    blocks = distill.new_mixers(variables["params"], teacher.variables["params"])
    assert blocks == ("block_1", "block_2"), "a mixer of the same shapes is not new"
    # the definition: what enters the norm, the mixer's answer to it, and ours to the same
    (_, seen), expected = watched(teacher.model, teacher.variables, batch["inputs"]), 0.0
    mixers = dict(jax.tree.map(lambda x: x, variables["params"]))
    for block, kind in (("block_1", "lookup_glu"), ("block_2", "weightless")):
        before = seen[f"block_{int(block[-1]) - 1}"]["__call__"][0]
        stream = before + seen[block]["attention"]["__call__"][0]
        wanted = np.float64(seen[block]["mlp"]["__call__"][0])
        layer = _mixer_of(setup.model.config, kind)
        own = {name: {"mlp": x[block]["mlp"]} for name, x in variables.items() if block in x}
        answer = jax.jit(layer.apply)({name: x["mlp"] for name, x in own.items()}, stream)
        expected += np.square(np.float64(answer) - wanted).sum() / np.square(wanted).sum()
    objective = jax.jit(distill.fitted(setup.model, teacher.model))
    key = jax.random.key(0)

    def told(params):
        given = {**variables, "params": params}
        return objective(given, batch["inputs"], batch["targets"], key, teacher.variables)

    loss, found, moved = told(mixers)
    np.testing.assert_allclose(loss, expected, rtol=2e-3)
    plain = state.cross_entropy(setup.model)
    _, usual, _ = jax.jit(plain)(variables, batch["inputs"], batch["targets"], key)
    assert not moved and found["loss"] == pytest.approx(float(usual["loss"]), rel=1e-5)
    gradient = jax.grad(lambda p: told(p)[0])(mixers)
    moves = distill.trains_in_fit(blocks)
    for path, value in tree_leaves_with_path(gradient):
        assert not np.any(value) or moves(path) or "mlp_norm" in path_name(path), path_name(path)
    assert np.any(leaves(gradient)["block_1/mlp/mix"])


def _mixer_of(config, kind):
    from quweit_jax.layers import mlp
    from quweit_jax.layers.norms import normal

    output = normal(0.02)
    made = mlp.make(kind, config.width, config, lambda: None, output_init=output)
    return made.clone(parent=None)


def test_a_step_is_the_same_in_parts_and_over_devices(tiny_config):
    """The teacher lies as the student does, and a batch may be divided."""
    base = {
        "model.mlp": "lookup_glu",
        "model.lookup_glu.hidden": 32,
        "model.layers": 1,
        "distill.blocks": 0.1,
        "distill.fit_steps": 1,
        "teacher": "given",
    }
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.fsdp_size_limit": 512}
    found = []
    for changes in ({}, {"grad_accum": 2}, mesh):
        setup = assemble(tiny_config(base | changes))
        teacher = jax.device_get(teacher_of(setup, 1, mlp="dense").variables)
        model = build(setup.config.model.to_dict() | {"mlp": "dense"}, setup.data.outputs)
        setup = setup.with_teacher(Teacher(model, teacher, setup.tokenizer))
        kernel = setup.teacher.variables["params"]["block_0"]["attention"]["qkv"]["kernel"]
        assert kernel.sharding.is_fully_replicated == ("mesh.fsdp" not in changes)
        for fitting in (True, False):
            current = setup.init_state()
            step = setup.train_step(current, fitting=fitting)
            _, values = step(current, batch_of(setup), setup.teacher.variables)
            found.append({k: float(v) for k, v in values.items()})
    for fit, usual in zip(found[2::2], found[3::2]):
        names = ("loss", "distill/kl", "distill/blocks", "grad_norm")
        assert {n: usual[n] for n in names} == pytest.approx({n: found[1][n] for n in names}, 1e-4)
        # the errors of the parts have units of their own
        assert fit["distill/fit"] == pytest.approx(found[0]["distill/fit"], 1e-2)
        assert fit["loss"] == pytest.approx(found[0]["loss"], 1e-5)


# --------------------------------------------------------------------------------- whole runs


def test_a_dense_run_becomes_another_and_goes_on_bit_for_bit(
    dense, tiny_arguments, tmp_path, capsys
):
    given = [f"--config.teacher={dense}", f"--config.init_from={dense}"]
    arguments = [*tiny_arguments(CONVERTED), *given]
    assert train.main([*arguments, f"--workdir={tmp_path / 'whole'}"]) == 0
    assert "mlp_norm" not in capsys.readouterr().out.split("unused:")[1].split("\n")[0]
    fits = [r["distill/fit"] for r in rows(tmp_path / "whole") if r["step"] <= 4]
    assert len(fits) == 4 and fits[-1] < 0.95 * fits[0]
    after = [r for r in rows(tmp_path / "whole") if r["step"] > 4]
    assert all("distill/fit" not in r and r["distill/kl"] > 0 for r in after) and len(after) == 2

    before, fitted = read_checkpoint(dense), read_checkpoint(tmp_path / "whole", 4)
    kept = [name for name in before if name.startswith("state/params/") and "/mlp" not in name]
    assert len(kept) == 2 + 3 + 1
    for name in kept:
        np.testing.assert_array_equal(fitted[name], before[name], err_msg=name)
    last = read_checkpoint(tmp_path / "whole")
    assert all(np.any(last[name] != before[name]) for name in kept), "all is trained afterwards"

    # stopped within the fit and after it; the teacher may have been moved meanwhile
    stopped, moved = tmp_path / "stopped", tmp_path / "moved"
    config = rundir.read_config(tmp_path / "whole")
    for at in (3, 5):
        with pytest.raises(_Stop):
            loop.fit(
                config,
                stopped,
                on_step=_stop_at(at),
                initial=train.initial(str(dense), stopped),
                teacher=train.teacher(str(dense)),
                progress=False,
            )
    shutil.copytree(dense, moved)
    again = [f"--workdir={stopped}", f"--config.teacher={moved}"]
    assert train.main(again) == 0
    assert_same_checkpoint(read_checkpoint(stopped), last)
    assert "teacher" not in {name.split("/")[1] for name in last if "/" in name}


class _Stop(Exception):
    pass


def _stop_at(step):
    def stop(now):
        if now == step:
            raise _Stop

    return stop


# ------------------------------------------------------------------------------------- vision


def vit(mlp: str, **changes):
    values = defaults("vit").to_dict() | {"variant": "mu/8", "depth": 2, "mlp": mlp}
    return build(values | {"lookup_glu": {"hidden": 64}} | changes, 5)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    inputs = jnp.asarray(draw.normal(size=(8, 16, 16, 3)), jnp.float32)
    return {"inputs": inputs, "targets": jnp.asarray(draw.integers(0, 5, 8))}


def test_a_dense_vit_is_converted(images):
    teacher, student = vit("dense"), vit("lookup_glu")
    taught, fresh = (
        jax.jit(model.init)(jax.random.key(i), images["inputs"])
        for i, model in enumerate((teacher, student))
    )
    merged, report = merge(fresh, taught)
    assert all("/mlp/" in name for name in (*report.fresh, *report.unused))
    blocks = distill.new_mixers(merged["params"], taught["params"])
    optimizer = optax.adamw(3e-3, weight_decay=0.5)
    step = state.make_train_step(
        student,
        optimizer,
        objective=distill.fitted(student, teacher),
        trains=distill.trains_in_fit(blocks),
    )
    zero, key = jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(0))
    params = jax.tree.map(jnp.copy, merged["params"])
    current = state.TrainState(zero, params, {}, optimizer.init(params), None, key)
    errors = []
    for _ in range(12):
        current, values = step(current, images, taught)
        errors.append(float(values["distill/fit"]))
    assert errors[-1] < 0.8 * errors[0]
    before, after = leaves(merged["params"]), leaves(current.params)
    for name, value in after.items():
        assert np.array_equal(value, before[name]) == ("/mlp/" not in name), name


def test_an_integer_student_learns_from_floats(images):
    teacher, student = vit("dense"), vit("lookup_glu", integer=True)
    taught, variables = (
        jax.jit(model.init)(jax.random.key(i), images["inputs"])
        for i, model in enumerate((teacher, student))
    )
    objective = distill.distilled(student, teacher, distill.DistillConfig(blocks=1.0))
    loss, found, moved = jax.jit(objective)(
        variables, images["inputs"], images["targets"], jax.random.key(0), taught
    )
    assert moved.keys() == {"ranges"} and found["distill/blocks"] > 0 and np.isfinite(loss)
