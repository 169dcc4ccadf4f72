"""A run directory: config.json, environment.json, tokenizer.json, metrics.jsonl, checkpoints/,
plots/. Everything downstream (evaluate, generate, report) needs only that: `open_run`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import jax
from absl import logging
from jaxtyping import PyTree

from quweit_jax.config import Config, flat, from_dict, from_mapping, set_value, to_dict
from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError
from quweit_jax.models import stack
from quweit_jax.reading import check_readable, read_json
from quweit_jax.training import checksums, defaults, files, metrics, sharding, starts
from quweit_jax.training.checkpoints import Checkpoints, check_path
from quweit_jax.training.setup import Setup, assemble

# What may change when a run goes on; anything else makes it another run.
MAY_CHANGE = ("steps", "log_every", "eval_every", "eval_batches", "eval_batch_size") + (
    "checkpoint_every",
    "keep",
    "prefetch",
    "sample_tokens",
    "track",
    "profile_steps",
)
MAY_CHANGE_UNDER = ("mesh.", "data.data_dir", "data.path", "data.tokenizer_path") + (
    "data.download",
    "data.threads",
    "data.cache_megabytes",
)
FORMAT = 1
_VERSIONS_OF = (
    "quweit_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A trained run, read back: its setup, the variables of a checkpoint, and that one's step.

    damaged: a sentence for each checkpoint that may be better, but is damaged. data_changed: a
      sentence if the data are not those it was trained on.
    """

    setup: Setup
    variables: dict[str, PyTree]
    step: int
    damaged: tuple[str, ...] = ()
    data_changed: str = ""


def open_run(
    workdir: Path,
    step: int | None = None,
    overrides: Mapping[str, str] | None = None,
    *,
    data: bool = True,
) -> OpenRun:
    """Reads a run back: its best checkpoint, or that of `step`.

    Args:
      overrides: config paths (of the data, say) to text values. data: False leaves a language
        model's corpus unread.

    Raises:
      InputError: there is no run or no such checkpoint, or it is of another model.
      RunError: the checkpoint is damaged.
    """
    config, given = read_config(workdir), dict(overrides or {})
    for path, text in given.items():
        set_value(config, path, text)
    mesh = mesh_here(config, given)
    setup = assemble(config, read_tokenizer(workdir), read_data=data, training=False, mesh=mesh)
    with Checkpoints(workdir, read_only=True) as saved:
        wanted = saved.best_step() if step is None else step
        if wanted is None:
            raise InputError(
                f"--workdir: {workdir} has no checkpoint yet; let it train past checkpoint_every = "
                f"{config.checkpoint_every} steps."
            )
        restored = saved.restore(setup.abstract_state(), wanted)
        damaged = tuple(saved.damaged)
    assert restored is not None
    changed = _data_changed(workdir, setup)
    if changed:
        logging.warning("%s; what follows is of the data that are there now.", changed)
    variables = stack.unstacked(restored[0].variables())
    return OpenRun(setup.unscanned(), variables, wanted, damaged, changed)


def mesh_here(config: Config, overrides: Collection[str] = ()) -> sharding.MeshConfig:
    """A saved run's mesh, as far as these devices allow: how those that trained it were laid out
    belongs to them, not to the model.

    overrides: config paths that a person has set; those of the mesh stay as they are.
    """
    mesh = from_mapping(sharding.MeshConfig, config.mesh.to_dict(), "mesh")
    given = [key.removeprefix("mesh.") for key in overrides if key.startswith("mesh.")]
    return sharding.mesh_for_reading(mesh, given)


def _data_changed(workdir: Path, setup: Setup) -> str:
    """What differs between a run's data and those there are now, '' where nothing is known to."""
    for what, key, now in (
        ("data", "data_fingerprint", setup.data.fingerprint),
        ("validation data", "validation_fingerprint", setup.data.validation_fingerprint),
    ):
        before = _saved_fingerprint(workdir, key) if now else None
        if before and before != now:
            return f"the {what} has changed since this run began (fingerprint {before}, now {now})"
    return ""


def _check_teacher(workdir: Path, setup: Setup) -> None:
    """Raises InputError if a run goes on with another teacher than it began with."""
    before = _saved_fingerprint(workdir, "teacher_fingerprint")
    if setup.teacher is not None and before and before != setup.teacher.fingerprint:
        raise InputError(
            f"teacher: {setup.config.teacher} has changed since this run began (fingerprint "
            f"{before}, now {setup.teacher.fingerprint}); give it the same one, or a new --workdir."
        )


def _saved_fingerprint(workdir: Path, key: str) -> str | None:
    """The fingerprint of the data, say, that a run began with; None where that is not known."""
    path = workdir / "environment.json"
    if not os.path.lexists(path):
        return None
    try:
        found = read_json(path, "--workdir").get(key)
    except InputError as error:
        logging.warning("%s cannot be read (%s); its %s is not compared.", path, error, key)
        return None
    return found if isinstance(found, str) else None


def is_finished(workdir: Path, steps: int) -> bool:
    """Whether a run of so many steps was evaluated at its last one and has a whole checkpoint of
    it.
    """
    evaluated = any(row["step"] == steps for row in metrics.evaluations(workdir))
    return evaluated and checksums.is_whole(workdir, steps)


def check_folder(workdir: Path, config: Config) -> None:
    """Checks that a folder is new, empty, or the run directory of this config, and that a run's
    checkpoints can be saved there.

    Raises:
      InputError: it is another config's (names the keys), or not empty and no run directory, or
        its path has a character that Orbax cannot do with.
    """
    check_path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir: {workdir} is a file; give a folder.")
    if (workdir / "config.json").exists():
        check_same(read_config(workdir), config, workdir)
    elif workdir.exists() and not files.is_empty(workdir, ("checkpoints", "config.tmp")):
        raise InputError(
            f"--workdir: {workdir} holds files but no config.json, so it is no run directory; give "
            "a new or empty folder."
        )


@contextlib.contextmanager
def claimed(workdir: Path, setup: Setup) -> Iterator[None]:
    """Makes a run directory and keeps other trainers out of it; nothing in it is changed before
    that is sure, and before it is checked again (process 0 only).

    Raises:
      InputError: another process trains there, or see `check_folder`, or the data or the teacher
        are not what the run began with.
    """
    if jax.process_index():
        yield
        return
    files.make_workdir(workdir)
    with files.exclusive(workdir):
        check_folder(workdir, setup.config)
        if changed := _data_changed(workdir, setup):
            raise InputError(
                f"--workdir: {changed}; give it the same data (the same Python, for "
                "python_stdlib), or a new --workdir."
            )
        _check_teacher(workdir, setup)
        yield


def write_files(workdir: Path, setup: Setup, step: int = 0) -> None:
    """Writes config.json, tokenizer.json and environment.json, which keeps a line of each start, of
    a claimed folder (process 0 only).

    step: where the run goes on.
    """
    if jax.process_index():
        return
    # config.json first, and each file whole or not at all: whenever this is killed, the same
    # command goes on.
    files.replace_json(workdir / "config.json", to_dict(setup.config))
    if setup.tokenizer is not None and not (workdir / "tokenizer.json").exists():
        files.replace_json(workdir / "tokenizer.json", setup.tokenizer.to_json())
    described = describe_environment()
    environment = described | {"data_fingerprint": setup.data.fingerprint}
    if setup.data.validation_fingerprint:
        environment["validation_fingerprint"] = setup.data.validation_fingerprint
    if setup.teacher is not None:
        environment["teacher_fingerprint"] = setup.teacher.fingerprint
    path = workdir / "environment.json"
    environment["starts"] = [*starts.earlier(path), starts.entry(step, described)]
    files.replace_json(path, environment)


def describe_environment() -> dict[str, object]:
    """Versions and devices, for the record."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "source tree"

    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in _VERSIONS_OF},
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "command": sys.argv[1:],
    }


def read_config(workdir: Path) -> Config:
    """The config a run was started with."""
    path = workdir / "config.json"
    check_path(workdir, reading=True)
    check_readable(workdir, "--workdir")
    if not os.path.lexists(path):
        raise InputError(
            f"--workdir: no run in {workdir} (no config.json); start one with "
            "--config=experiments/configs/FILE.py."
        )
    values = read_json(path, "--workdir")
    try:
        return defaults.complete(from_dict(values))
    except InputError as error:
        raise InputError(f"--workdir: {path} is damaged, or no config of a run: {error}") from None


def read_tokenizer(workdir: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a run, None where it has none."""
    path = workdir / "tokenizer.json"
    return tokenizers.load(path) if os.path.lexists(path) else None


def has_checkpoints(workdir: Path) -> bool:
    """Whether a run has saved anything yet."""
    return bool(checksums.steps(workdir))


def check_same(saved: Config, config: Config, workdir: Path) -> None:
    """Raises InputError naming the keys in which a folder's config differs from the given."""
    before, now = flat(to_dict(saved)), flat(to_dict(config))
    missing = object()
    changed = [
        f"{key} (there {before.get(key, 'nothing')!r}, now {now.get(key, 'nothing')!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, missing) != now.get(key, missing)
        and key not in MAY_CHANGE
        and not (key == "teacher" and before.get(key) and now.get(key))  # its content is compared
        and not key.startswith(MAY_CHANGE_UNDER)
    ]
    if changed:
        raise InputError(
            f"--workdir: {workdir} belongs to another config: "
            f"{'; '.join(changed[:6])}{' ...' if len(changed) > 6 else ''}. "
            "Give a new --workdir, or leave --config out to go on with the run that is there."
        )
