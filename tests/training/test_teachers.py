"""A teacher that does not fit its student is an error before the first step, and so is another
teacher than a run began with.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from quweit_jax.commands import pack, train
from quweit_jax.config import set_value
from quweit_jax.errors import InputError
from quweit_jax.models.registry import build, defaults
from quweit_jax.training import loop, rundir
from quweit_jax.training.setup import assemble
from quweit_jax.training.teacher import Teacher


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"distill.weight": 1.5}, "distill.weight"),
        ({"distill.weight": -0.1}, "distill.weight"),
        ({"distill.temperature": 0}, "distill.temperature"),
        ({"distill.blocks": -1}, "distill.blocks"),
        ({"distill.fit_steps": -1}, "distill.fit_steps"),
        ({"distill.fit_steps": 3}, "distill.fit_steps"),  # and no teacher
        ({"distill.blocks": 1}, "distill.blocks"),
    ],
)
def test_options_are_checked(tiny_config, changes, key):
    with pytest.raises(InputError, match=f"^{key}: expected"):
        assemble(tiny_config(changes))


GIVEN = {"teacher": "given", "model.layers": 1, "model.mlp": "dense"}


class _OtherTokenizer:
    def to_json(self):
        return {"type": "another"}


@pytest.mark.parametrize(
    ("run", "change", "key"),
    [
        ({}, {"outputs": 99}, "teacher: expected vocab_size"),
        ({}, {"context": 8}, "teacher: it cannot read"),
        ({}, {"tokenizer": _OtherTokenizer()}, "teacher: its tokenizer"),
        ({}, {"name": "vit", "outputs": 5}, "teacher: expected vocab_size"),
        ({"distill.blocks": 1}, {"width": 64}, "distill.blocks"),
        ({"distill.blocks": 1}, {"layers": 2}, "distill.blocks"),
        ({"distill.fit_steps": 1}, {}, "distill.fit_steps: found no channel mixer"),
        ({"distill.fit_steps": 1}, {"mlp": "none"}, "distill.fit_steps: found no channel mixer"),
        ({"distill.fit_steps": 1, "model.mlp": "swiglu"}, {"width": 64}, "distill.fit_steps"),
    ],
)
def test_a_teacher_that_does_not_fit(tiny_config, run, change, key):
    setup = assemble(tiny_config(GIVEN | run))
    values, change = setup.config.model.to_dict() | {"mlp": "dense"}, dict(change)
    tokenizer = change.pop("tokenizer", setup.tokenizer)
    outputs = change.pop("outputs", setup.data.outputs)
    if "name" in change:
        model, inputs = build(defaults(change["name"]).to_dict(), outputs), np.zeros((1, 16, 16, 3))
    else:
        model = build(values | change, outputs)
        inputs = setup.init_inputs[:, : model.config.context]
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    with pytest.raises(InputError, match=f"^{key}"):
        setup.with_teacher(Teacher(model, variables, tokenizer))


def test_a_longer_context_fits_and_every_teacher_has_its_fingerprint(tiny_config):
    setup = assemble(tiny_config(GIVEN))
    model = build(setup.config.model.to_dict() | {"context": 32}, setup.data.outputs)
    variables = jax.jit(model.init)(jax.random.key(0), setup.init_inputs)
    others = jax.tree.map(lambda x: x * 2, variables)
    prints = [
        setup.with_teacher(Teacher(model, jax.device_get(values))).teacher.fingerprint
        for values in (variables, variables, others)
    ]
    assert prints[0] and prints[0] == prints[1] != prints[2]


def test_a_teacher_is_needed_and_stays_the_same(tiny_config, tmp_path):
    dense = tmp_path / "dense"
    plain = {"model.layers": 1, "model.mlp": "dense", "steps": 1, "eval_every": 1}
    assert loop.fit(tiny_config(plain), dense, progress=False).complete
    config = tiny_config(GIVEN | {"teacher": str(dense), "steps": 1, "eval_every": 1})
    with pytest.raises(InputError, match=r"^teacher: "):
        loop.fit(config, tmp_path / "run")
    with pytest.raises(InputError, match=r"^teacher: "):
        assemble(config).train_step(assemble(config).abstract_state())
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"^teacher: no folder nowhere, .* shakespeare-lookup"):
        train.teacher("nowhere")
    assert train.teacher("") is None

    teacher = train.teacher(str(dense))
    assert loop.fit(config, tmp_path / "run", teacher=teacher, progress=False).step == 1
    set_value(config, "steps", "2")
    other = Teacher(teacher.model, jax.tree.map(lambda x: x + 1, teacher.variables))
    with pytest.raises(InputError, match=r"^teacher: .* has changed"):
        loop.fit(config, tmp_path / "run", teacher=other, progress=False)
    set_value(config, "teacher", "")
    with pytest.raises(InputError, match="teacher"):
        loop.fit(config, tmp_path / "run", progress=False)
    # what reads a run back needs none
    assert rundir.open_run(tmp_path / "run").step == 1
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["teacher"] == str(dense)


def test_what_pack_wrote_teaches(tiny_config, tmp_path):
    dense, folder = tmp_path / "dense", tmp_path / "packed"
    plain = {"model.layers": 1, "model.mlp": "weightless", "steps": 1, "eval_every": 1}
    assert loop.fit(tiny_config(plain), dense, progress=False).complete
    assert pack.main([f"--workdir={dense}", f"--out={folder}"]) == 0
    config = tiny_config(GIVEN | {"teacher": str(folder), "steps": 1, "eval_every": 1})
    teacher = train.teacher(str(folder))
    assert "packed" in teacher.variables and teacher.tokenizer is not None
    assert loop.fit(config, tmp_path / "run", teacher=teacher, progress=False).complete
    assert train.teacher("shakespeare-lookup").tokenizer.vocab_size == 65
