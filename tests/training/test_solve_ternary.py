"""Ternary projections solved for from a teacher's dense ones answer as those do, before steps."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from quweit_jax.commands import train
from quweit_jax.errors import InputError
from quweit_jax.models.registry import build, defaults
from quweit_jax.pretrained import transfer
from quweit_jax.training import loop, rundir, solve_ternary
from quweit_jax.training.setup import assemble
from quweit_jax.training.teacher import Teacher
from tests.compiled import quick_jit

SOLVED = {"distill.solve_batches": 3, "teacher": "somewhere", "init_from": "somewhere"}
KINDS = {
    "with norms": ("transformer_pp", {"linear": "ternary", "sub_norms": True}),
    "without": ("transformer_pp", {"linear": "ternary", "sub_norms": False, "kv_heads": 1}),
    "attention alone": ("gpt", {"linear": "ternary", "mlp": "dense", "remat": True}),
    "the first block's mixer": (
        "transformer_pp",
        {"linear": "ternary", "mlp": "swiglu+none", "sub_norms": False},
    ),
}


@pytest.fixture
def config_of(tiny_config):
    """(name, options of the model, other changes) -> a config."""

    def make(name, options, changes):
        config = tiny_config(changes)
        given = {"layers": 2, "heads": 2, "width": 32, "context": 16, "mlp": "dense", **options}
        with config.unlocked():
            config.model = defaults(name)
            config.model.update(given)
        return config

    return make


def teacher_of(setup, **options) -> Teacher:
    """A dense model whose matrices are about as large as trained ones."""
    given = setup.config.model.to_dict() | {"linear": "dense", **options}
    if "sub_norms" in given:
        given["sub_norms"] = False
    model = build(given, setup.data.outputs)
    variables = jax.jit(model.init)(jax.random.key(1), setup.init_inputs)
    wide = jax.tree.map(lambda x: np.asarray(6 * x if x.ndim > 1 else x), variables)
    return Teacher(model, wide, setup.tokenizer)


def distance(setup, variables, teacher) -> float:
    """Between the logits of student and teacher on texts that nothing was solved on, in the
    teacher's own squares.
    """
    inputs = np.stack(
        [setup.data.train[len(setup.data.train) - 1 - i]["inputs"] for i in range(16)]
    )
    ours, theirs = (
        np.asarray(quick_jit(model.apply)(values, inputs))
        for model, values in ((setup.model, variables), (teacher.model, teacher.variables))
    )
    return float(np.square(ours - theirs).sum() / np.square(theirs - theirs.mean()).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_begins_nearer_to_its_teacher_than_by_rounding(config_of, kind, capsys):
    setup = assemble(config_of(*KINDS[kind], SOLVED | {"distill.solve_batches": 8}))
    teacher = teacher_of(setup)

    def begin(fresh):
        return transfer.merge(jax.device_get(fresh), teacher.variables)[0]

    rounded = begin(setup.init_state().variables())
    made = setup.with_teacher(teacher).init_state(begin).variables()
    count = len(solve_ternary.parts(teacher, setup))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"solving {count} ternary projections on 8 batches"
    worst = float(told[-1].split()[-1].rstrip("%")) / 100
    assert told[-1].startswith("solved in ") and 0.01 < worst < 0.5
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, rounded)
    before, after = (distance(setup, values, teacher) for values in (rounded, made))
    assert after < 0.7 * before and after < 0.5, (before, after)


def test_each_projection_is_its_part_of_the_teachers(config_of):
    setup = assemble(config_of(*KINDS["without"], SOLVED))
    found = {p.path: p for p in solve_ternary.parts(teacher_of(setup), setup)}
    mixer = {path[-1]: part for path, part in found.items() if path[:2] == ("block_1", "mixer")}
    # one head of keys and values for two of queries
    assert {name: (p.source[-1], p.outputs) for name, p in mixer.items()} == {
        "query": ("qkv", slice(0, 32)),
        "key": ("qkv", slice(32, 48)),
        "value": ("qkv", slice(48, 64)),
        "proj": ("proj", slice(0, 32)),
    }
    assert mixer["query"].group == mixer["key"].group == mixer["value"].group
    assert mixer["query"].group < mixer["proj"].group < found["block_1", "mlp", "gate"].group
    gate, up = (found["block_0", "mlp", name] for name in ("gate", "up"))
    assert gate.source == up.source and gate.outputs.stop == up.outputs.start
    # what is ternary in the teacher stays as it is
    assert solve_ternary.parts(teacher_of(setup, linear="ternary"), setup) == []


@pytest.mark.parametrize("options", [{}, {"sub_norms": True}], ids=["plain", "norms"])
def test_a_run_begins_with_what_was_solved(config_of, tmp_path, options):
    base = {"steps": 1, "eval_every": 1, "checkpoint_every": 1}
    dense = tmp_path / "dense"
    loop.fit(config_of("transformer_pp", {}, base), dense)
    changes = SOLVED | base | {"teacher": str(dense), "init_from": str(dense)}
    changes |= {"optimizer.learning_rate": 1e-12}
    config = config_of("transformer_pp", {"linear": "ternary", **options}, changes)
    teacher, start = train.teacher(str(dense)), train.initial(str(dense), tmp_path / "none")
    assert teacher is not None
    loop.fit(config, tmp_path / "new", initial=start, teacher=teacher)
    found = rundir.open_run(tmp_path / "new").variables["params"]
    made = assemble(config).with_teacher(teacher).init_state(start)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made.params, found)
    norms = {
        float(np.ptp(found[f"block_{i}"][part]["sub_norm"]["scale"]))
        for i in range(2)
        for part in ("mixer", "mlp")
        if "sub_norm" in found[f"block_{i}"][part]
    }
    assert norms == ({0.0} if options else set())  # one number for all of its channels


@pytest.mark.parametrize(
    "kind, teacher, named",
    [
        ("without", {"hidden": 40}, r"block_0/mlp/gate: expected a dense projection of \[32"),
        ("attention alone", {"linear": "ternary"}, "no channel mixer and no ternary projection"),
        ("without", {"kv_heads": 2}, "block_0/mixer/query: .* found none"),
    ],
)
def test_what_cannot_be_solved_is_named_before_anything_is_read(config_of, kind, teacher, named):
    setup = assemble(config_of(*KINDS[kind], SOLVED))
    with pytest.raises(InputError, match=named):
        setup.with_teacher(teacher_of(setup, **teacher))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"init_from": ""}, "expected init_from"),
        ({"distill.solve_batches": 10**6}, r"expected at most [\d,]+, .* found 1,000,000"),
    ],
)
def test_it_needs_a_beginning_and_no_more_text_than_there_is(config_of, changes, named):
    setup = assemble(config_of(*KINDS["without"], SOLVED | changes))
    with pytest.raises(InputError, match=f"solve_batches: {named}"):
        setup.with_teacher(teacher_of(setup))
