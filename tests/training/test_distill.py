"""A student learns from a teacher what it should, and nothing else is changed by it."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import tree_leaves_with_path

from quweit_jax.commands import train
from quweit_jax.config import set_value
from quweit_jax.errors import InputError
from quweit_jax.models.registry import build, defaults
from quweit_jax.training import distill, loop, metrics, rundir, state
from quweit_jax.training.setup import assemble
from quweit_jax.training.sharding import path_name
from quweit_jax.training.teacher import Teacher
from tests.conftest import assert_same_checkpoint, read_checkpoint

DENSE = {"model.mlp": "dense", "steps": 4, "eval_every": 4, "checkpoint_every": 4}
CONVERTED = {
    "model.mlp": "lookup_glu",
    "model.lookup_glu.hidden": 64,
    "distill.fit_steps": 6,
    "steps": 8,
    "log_every": 1,
    "eval_every": 8,
    "checkpoint_every": 4,
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
    return Teacher(model, model.init(jax.random.key(seed), setup.init_inputs), setup.tokenizer)


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
        model.apply(values, batch["inputs"], capture_intermediates=True)
        for model, values in ((setup.model, variables), (teacher.model, teacher.variables))
    )
    p, q = float64(theirs[0] / 2), float64(logits[0] / 2)
    kl = 4 * (np.exp(p) * (p - q)).sum(-1).mean()
    entropy = -np.take_along_axis(float64(logits[0]), np.asarray(batch["targets"])[..., None], -1)
    hidden = [
        [np.float64(seen["intermediates"][f"block_{i}"]["__call__"][0]) for i in range(2)]
        for seen in (logits[1], theirs[1])
    ]
    blocks = sum(np.square(a - b).mean() for a, b in zip(*hidden))
    assert blocks > 1e-3 and not moved
    np.testing.assert_allclose(found["loss"], entropy.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["distill/kl"], kl, rtol=1e-3)
    np.testing.assert_allclose(found["distill/blocks"], blocks, rtol=1e-4)
    np.testing.assert_allclose(loss, 0.7 * entropy.mean() + 0.3 * kl + 0.5 * blocks, rtol=1e-4)
