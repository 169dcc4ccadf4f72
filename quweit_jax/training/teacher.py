"""The model that a student learns from: what must be alike, and where its variables lie."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError, first_line
from quweit_jax.training import distill, sharding, solve

if TYPE_CHECKING:
    from quweit_jax.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model and its variables, {'params': ...} and other collections; where they are known, its
    tokenizer and its classes' names.
    """

    model: nn.Module
    variables: Mapping[str, PyTree]
    tokenizer: Tokenizer | None = None
    labels: tuple[str, ...] = ()
    fingerprint: str = ""  # of the variables, once it is placed

    def placed(self, setup: Setup) -> Teacher:
        """The same with its variables on the student's mesh, laid out by the same rules.

        Raises:
          InputError: see `check`, or an array cannot be divided over the mesh.
        """
        check(self, setup)
        limit = setup.config.mesh.fsdp_size_limit
        where = sharding.shardings_for(self.variables, setup.mesh, limit)
        there = jax.tree.map(jax.device_put, dict(self.variables), where)
        return dataclasses.replace(self, variables=there, fingerprint=_digest(self.variables))


def check(teacher: Teacher, setup: Setup) -> None:
    """Checks that a teacher speaks of the same things as the student, before anything is trained.

    Raises:
      InputError: it has another vocabulary, tokenizer or classes, or cannot read the student's
        inputs; or hidden states or channel mixers are to be compared and do not correspond.
    """
    _check_outputs(teacher, setup)
    try:
        jax.eval_shape(teacher.model.apply, teacher.variables, setup.init_inputs)
    except Exception as error:
        shape = list(np.shape(setup.init_inputs))[1:]
        raise InputError(
            f"teacher: it cannot read this run's inputs of shape {shape} ({first_line(error)}); "
            "use a teacher of the same kind, and of at least this context."
        ) from None
    if setup.distill_config.blocks:
        _check_blocks(teacher, setup)
    if setup.distill_config.fit_steps or setup.distill_config.solve_batches:
        _check_mixers(teacher, setup)
    if setup.distill_config.solve_batches:
        solve.check(teacher, setup)


def _check_outputs(teacher: Teacher, setup: Setup) -> None:
    """Raises InputError unless logits mean the same."""
    name = "num_classes" if setup.tokenizer is None else "vocab_size"
    found, wanted = getattr(_config(teacher), name, None), setup.data.outputs
    if found != wanted:
        raise InputError(
            f"teacher: expected {name} {wanted}, as this run's data have, found {found}; use a "
            "teacher that was trained on the same data."
        )
    tokenizers = teacher.tokenizer, setup.tokenizer
    if None not in tokenizers and len({str(_json(t)) for t in tokenizers}) > 1:
        raise InputError(
            "teacher: its tokenizer is another one than this run's, so that equal numbers mean "
            "other texts; train on the same text, or with data.tokenizer=file and its "
            "tokenizer.json."
        )
    labels = teacher.labels, setup.data.labels
    if all(labels) and labels[0] != labels[1]:
        first = next((a, b) for a, b in zip(*labels) if a != b)
        raise InputError(
            f"teacher: its classes are named otherwise, such as '{first[0]}' for '{first[1]}'; use "
            "a teacher that was trained on the same data."
        )


def _json(tokenizer: Tokenizer | None) -> object:
    return tokenizer.to_json() if tokenizer is not None else None


def _config(teacher: Teacher) -> object:
    return getattr(teacher.model, "config", None)


def _check_blocks(teacher: Teacher, setup: Setup) -> None:
    """Raises InputError unless the hidden states of all blocks have the same shapes."""

    def shapes(model: nn.Module, variables: PyTree) -> dict[str, tuple[int, ...]]:
        _, seen = jax.eval_shape(
            lambda v: model.apply(
                v, setup.init_inputs, mutable=[], capture_intermediates=distill.watch_blocks
            ),
            variables,
        )
        return {n: x.shape for n, x in distill.hidden_states(seen["intermediates"]).items()}

    ours = shapes(setup.model, setup.abstract_state().variables())
    theirs = shapes(teacher.model, teacher.variables)
    if ours != theirs or not ours:
        raise InputError(
            "distill.blocks: expected as many blocks in student and teacher, whose hidden states "
            f"have one shape, found {_said(ours)} and {_said(theirs)}; use a teacher of the same "
            "width and depth, or leave it at 0."
        )


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    each = sorted({str(list(shape[1:])) for shape in shapes.values()})
    return f"{len(shapes)} of {' and '.join(each)}" if shapes else "none"


def _check_mixers(teacher: Teacher, setup: Setup) -> None:
    """Raises InputError unless there are new channel mixers to fit, of floats, and all of those
    correspond to the teacher's.
    """
    where = "distill." + ("fit_steps" if setup.distill_config.fit_steps else "solve_batches")
    for who, model in (("student", setup.model), ("teacher", teacher.model)):
        if getattr(getattr(model, "config", None), "integer", False):
            raise InputError(
                f"{where}: expected models of floats, found an integer-only {who}; "
                "convert in floats, and fine-tune from that run with init_from."
            )
    variables = setup.abstract_state().variables()
    blocks = distill.new_mixers(variables["params"], teacher.variables["params"])
    if not blocks and setup.distill_config.fit_steps:
        raise InputError(
            f"{where}: found no channel mixer that differs from the teacher's in the same "
            "block; set --config.model.mlp, or leave it at 0."
        )
    reads = [
        jax.eval_shape(lambda v, m=model: distill.branches(m, v, setup.init_inputs), values)
        for model, values in ((setup.model, variables), (teacher.model, teacher.variables))
    ]
    for block in blocks:
        ours, theirs = (jax.tree.map(lambda x: x.shape, found[block]) for found in reads)
        if ours != theirs:
            raise InputError(
                f"{where}: {block}: expected channel mixers of one width, found "
                f"{list(ours[0][1:])} and the teacher's {list(theirs[0][1:])}; use a teacher of "
                "the same width, or leave it at 0."
            )


def _digest(variables: Mapping[str, PyTree]) -> str:
    """Of every array's name and content."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(dict(variables)):
        digest.update(sharding.path_name(path).encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]
