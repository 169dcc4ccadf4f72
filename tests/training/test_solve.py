"""LookupGLUs solved for from a teacher's MLPs answer as those do, before any step."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.commands import train
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.layers.lookup_glu import LookupGLU
from quweit_jax.layers.mlp import MLP
from quweit_jax.models.registry import build
from quweit_jax.training import distill, rundir, solve
from quweit_jax.training.setup import assemble
from quweit_jax.training.teacher import Teacher
from tests.compiled import quick_jit

WIDTH, UNITS, ROWS = 16, 64, 1500


def dense(bias: bool, gelu: str):
    """A block's parameters as after training, and what goes in and out of its mixer."""
    draw = np.random.default_rng(0)
    norm = {"scale": np.exp(0.4 * draw.normal(size=WIDTH))}
    mlp = {
        "up": {"kernel": 1.5 * draw.normal(size=(WIDTH, UNITS)) / WIDTH**0.5},
        "down": {"kernel": draw.normal(size=(UNITS, WIDTH)) / UNITS**0.5},
    }
    if bias:
        norm["bias"] = 0.5 * draw.normal(size=WIDTH)
        mlp["up"]["bias"] = draw.normal(size=UNITS)
        mlp["down"]["bias"] = draw.normal(size=WIDTH)
    block = jax.tree.map(jnp.float32, {"mlp_norm": norm, "mlp": mlp})
    reads = (3 * draw.normal(size=(ROWS, WIDTH)) @ draw.normal(size=(WIDTH, WIDTH)) + 1).astype(
        "f4"
    )
    mean = reads.mean(-1, keepdims=True)
    inputs = (reads - mean) / reads.std(-1, keepdims=True) * norm["scale"] + norm.get("bias", 0)
    layer = MLP(use_bias=bias, gelu=gelu)
    answers = quick_jit(layer.apply)({"params": block["mlp"]}, inputs.astype("f4"))
    model = types.SimpleNamespace(config=types.SimpleNamespace(gelu=gelu))
    return block, model, reads, np.asarray(answers)


def error(found, wanted) -> float:
    return float(np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum())


@pytest.mark.parametrize(
    "options,bias,gelu",
    [
        ({}, False, "exact"),
        ({"table_groups": 4}, True, "tanh"),
        ({"code_bits": 5, "code_step": 0.125}, True, "exact"),
        ({"code_bits": 3, "code_step": 0.5, "table_groups": 0}, False, "exact"),
    ],
)
def test_it_answers_as_the_mlp_does_on_what_it_has_not_seen(options, bias, gelu):
    block, model, reads, answers = dense(bias, gelu)
    layer = LookupGLU(WIDTH, UNITS, train_tables=True, norm_bias=bias, **options)
    seen = slice(0, 1000)
    mlp = solve.DenseMLP.of(block, model)
    made = solve.solve(layer, mlp, reads[seen], answers[seen])
    norm = {k: np.float32(v * made.factor) for k, v in block["mlp_norm"].items()}
    params = {**made.params, "norm": norm}
    drawn = quick_jit(layer.init)(jax.random.key(0), reads[:1])["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, drawn)
    new = slice(1000, ROWS)
    found = quick_jit(layer.apply)({"params": params}, reads[new])
    # of this few units a ternary sum alone costs a tenth
    assert error(found, answers[new]) < 0.25
    plain = {**params, "sum": drawn["sum"]}
    assert error(quick_jit(layer.apply)({"params": plain}, reads[new]), answers[new]) > 0.8
    packed = quick_jit(layer.apply)(pack(layer, {"params": params}, reads[:1]), reads[new])
    np.testing.assert_array_equal(packed, found)


def test_two_ternary_sums_and_a_table_are_the_units():
    """The part without the last sum: entries against GELUs, in units of their own scale."""
    block, model, reads, answers = dense(True, "exact")
    layer = LookupGLU(WIDTH, UNITS, train_tables=True, norm_bias=True, table_groups=2)
    mlp = solve.DenseMLP.of(block, model)
    made = solve.solve(layer, mlp, reads, answers)
    norm = {k: np.float32(v * made.factor) for k, v in block["mlp_norm"].items()}
    # a sum that passes units on, one each, with the scale that they have in the tables
    wide = LookupGLU(UNITS, UNITS, train_tables=True, norm_bias=True, table_groups=2)
    params = {**made.params, "norm": norm, "sum": np.eye(UNITS, dtype=np.float32)}
    params["bias"] = np.zeros(UNITS, np.float32)
    read = np.asarray(quick_jit(wide.apply)({"params": params}, reads)) * UNITS
    inputs = (reads - reads.mean(-1, keepdims=True)) / reads.std(-1, keepdims=True)
    wanted = mlp.gelu((inputs * mlp.scale + mlp.bias) @ mlp.up + mlp.up_bias)
    order = [int(np.argmax([np.corrcoef(r, w)[0, 1] for w in wanted.T])) for r in read.T]
    assert sorted(order) == list(range(UNITS)), "each unit is one of the teacher's"
    matched = wanted[:, order]
    scale = (read * matched).sum() / np.square(read).sum()
    assert error(read * scale, matched) < 0.05


STUDENT = {
    "model.mlp": "lookup_glu",
    "model.lookup_glu.train_tables": True,
    "model.lookup_glu.hidden": 128,
    "distill.solve_batches": 2,
    "init_from": "somewhere",
}


def test_a_run_begins_with_what_was_solved(tiny_arguments, tmp_path, capsys):
    base = {
        "model.layers": 1,
        "model.width": 32,
        "steps": 2,
        "eval_every": 1,
        "checkpoint_every": 1,
    }
    begun, runs = {"model.mlp": "dense"} | base, tmp_path / "dense"
    assert train.main([*tiny_arguments(begun), f"--workdir={runs}"]) == 0
    changes = STUDENT | base | {"teacher": str(runs), "init_from": str(runs)}
    changes |= {"optimizer.learning_rate": 1e-9}
    assert train.main([*tiny_arguments(changes), f"--workdir={tmp_path / 'new'}"]) == 0
    setup = rundir.open_run(tmp_path / "new").setup
    teacher = train.teacher(str(runs))
    assert teacher is not None
    made = setup.with_teacher(teacher).init_state(train.initial(str(runs), tmp_path / "none"))
    found = rundir.open_run(tmp_path / "new", step=2).variables["params"]
    for ours, theirs in zip(jax.tree.leaves(made.params), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    examples = np.stack([setup.data.train[i]["inputs"] for i in range(8)])
    wanted = distill.branches(teacher.model, teacher.variables, examples)["block_0"]
    given = {"block_0": wanted[0]}
    answer = distill.branches(setup.model, {"params": found}, examples, given)["block_0"][1]
    assert error(np.asarray(answer), np.asarray(wanted[1])) < 0.3


@pytest.mark.parametrize(
    "changes,teacher,named",
    [
        ({}, {"mlp": "swiglu"}, "dense GELU MLP"),
        ({"model.lookup_glu.train_tables": False}, {}, "train_tables=true"),
        ({"model.lookup_glu.output_norm": 0.3}, {}, "output_norm=0"),
        ({"model.lookup_glu.hidden": 64}, {}, "hidden=128"),
        ({"model.mlp": "weightless"}, {}, "expected a lookup_glu"),
        ({"model.mlp": "dense"}, {}, "solve_batches: found no channel mixer"),
    ],
)
def test_what_cannot_be_solved_is_named_before_anything_is_read(
    tiny_config, changes, teacher, named
):
    config = tiny_config(STUDENT | {"model.width": 32, "teacher": "somewhere"} | changes)
    setup = assemble(config)
    model = build(config.model.to_dict() | {"mlp": "dense"} | teacher, setup.data.outputs)
    variables = jax.jit(model.init)(jax.random.key(0), setup.init_inputs)
    with pytest.raises(InputError, match=named):
        setup.with_teacher(Teacher(model, variables, setup.tokenizer))


def test_it_needs_a_teacher_and_a_number(tiny_config):
    with pytest.raises(InputError, match="expected a teacher"):
        assemble(tiny_config(STUDENT))
    with pytest.raises(InputError, match="expected 0"):
        distill.DistillConfig(solve_batches=-1)
