"""Run directories as plain data for a report: found, and read as far as they can be.

A run that cannot be read is marked, and never stops the report.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from quweit_jax.config import flat, to_dict
from quweit_jax.costs import count, energy
from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError, check_choice, first_line, nearest
from quweit_jax.models import registry
from quweit_jax.reading import check_readable, is_whole, list_folder, read_json, shown
from quweit_jax.report.look import look, look_at
from quweit_jax.report.summary import Json, RunSummary
from quweit_jax.training import checksums, files, metrics, rundir
from quweit_jax.training.defaults import base_config

_RUN_FILES = ("config.json", "metrics.jsonl", "environment.json", "checkpoints")
_DEPTH = 4  # of folders between a given one and the runs in it
# What may be overridden for all runs: where data lie and how they are read, not what a model is.
_OVERRIDABLE = ("data.", "mesh.", "eval_batch_size")

Skipped = list[tuple[str, str]]  # paths that hold no run, with the reason
_BESIDE = "int8"  # of the dense model's products, unless another precision is asked for


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A model in a folder of its own, opened. about: what it says of itself, as `pack` writes."""

    name: str
    path: str
    opened: rundir.OpenRun
    about: Json
    inputs: np.ndarray  # of the model, a batch of one


@dataclasses.dataclass(frozen=True)
class _How:
    overrides: Mapping[str, str]
    batches: int
    technology: str
    precision: str | None


def collect(
    paths: Sequence[Path],
    overrides: Mapping[str, str],
    *,
    batches: int,
    technology: str = "45nm",
    precision: str | None = None,
    models: Sequence[NamedModel] = (),
    say: Callable[[RunSummary], None] = lambda _: None,
) -> tuple[list[RunSummary], Skipped]:
    """The runs at and below the given paths, and the paths that hold none, with the reason; behind
    them models in folders of their own.

    overrides: config paths to text values, of the data (data.data_dir, say), the mesh and
      eval_batch_size alone.
    batches: how much of the validation data the tables are watched on (0: all of it).
    precision: of dense products, as in `costs.count`, of the runs and of the dense models beside
      them; None: a run's own, and int8 beside it.
    say: told each run when it has been read.

    Raises:
      InputError: no run was found, or an override or a number makes no sense.
    """
    if batches < 0:
        raise InputError(
            f"--batches: expected 0 (the whole validation split) or more, found {batches}."
        )
    known = [key for key in flat(base_config()) if key.startswith(_OVERRIDABLE)]
    for key in overrides:
        if key not in known:
            raise InputError(
                f"--config.{key}: a report reads runs as they are; only data, mesh and "
                f"eval_batch_size may change.{nearest(key, known)}"
            )
    if precision is not None:
        check_choice("--precision", precision, count.PRECISIONS)
    how = _How(overrides, batches, technology, precision)
    found, skipped = find_runs(paths)
    if not found and not models:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped) or "no path was given"
        raise InputError(
            f"no run to report on: {reasons}. Give run directories of python -m quweit_jax.train, "
            "or a folder that holds some."
        )
    summaries = []
    for number, (path, name) in enumerate(zip(found, short_names(found)), 1):
        summary = RunSummary(number, name, str(path))
        _safely(summary, lambda summary=summary: _fill(summary, how))
        say(summary)
        summaries.append(summary)
    for number, model in enumerate(models, len(found) + 1):
        summary = RunSummary(number, model.name, model.path)
        _safely(summary, lambda summary=summary, model=model: _fill_model(summary, model, how))
        say(summary)
        summaries.append(summary)
    return summaries, skipped


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], Skipped]:
    """Run directories at or below the paths, each once, and the paths without any."""
    found: dict[str, Path] = {}
    skipped = []
    for path in paths:
        if not os.path.lexists(path):
            skipped.append((str(path), "there is nothing"))
        elif not os.path.isdir(path):
            skipped.append((str(path), "a file, not a folder"))
        elif runs := _runs_in(path.absolute(), _DEPTH, closed := []):
            skipped += closed
            for each in runs:
                found.setdefault(os.path.realpath(each), each)
        elif closed:
            skipped += closed
        else:
            skipped.append((str(path), "neither a run directory nor a folder that holds some"))
    return list(found.values()), skipped


def _runs_in(folder: Path, depth: int, closed: Skipped) -> list[Path]:
    """The runs at and below a folder; into `closed` go folders that may not be read."""
    try:
        check_readable(folder, "report")
    except InputError as error:
        closed.append((str(folder), str(error)))
        return []
    if any(os.path.lexists(folder / name) for name in _RUN_FILES):
        return [folder]
    try:
        below = list_folder(folder, "report") if depth else []
    except InputError:
        return []
    folders = (Path(entry.path) for entry in below if os.path.isdir(entry.path))
    return [found for path in folders for found in _runs_in(path, depth - 1, closed)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Each path without the folders that all have in common; at least its own name is left."""
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [shown(path.relative_to(common)) for path in paths]


def _safely(summary: RunSummary, fill: Callable[[], None]) -> None:
    """Fills in what the run directory tells, and marks what cannot be read."""
    try:
        fill()
    except Exception as error:  # one run leaves the others
        summary.mark("damaged", f"it cannot be read ({type(error).__name__}: {first_line(error)})")


def _fill_model(summary: RunSummary, model: NamedModel, how: _How) -> None:
    """Fills in what a model without a run tells: no curves, but what it costs and what it does."""
    config, about = to_dict(model.opened.setup.config), model.about
    summary.config = {key: config[key] for key in ("model", "data")}
    summary.notes.append("a model in a folder of its own: without its run there are no curves")
    data, tokenizer = str(about.get("data") or "").replace("_", " "), model.opened.setup.tokenizer
    summary.language = tokenizer is not None
    if tokenizer is not None and data:
        data += f", {tokenizer.kind} tokens"
    summary.data = data or "models of unknown data"
    summary.fingerprint = str(about.get("data_fingerprint") or "")
    measured = about.get("validation")
    if isinstance(measured, dict) and {"loss", "accuracy"} <= measured.keys():
        step = about.get("training_step")
        row = {"step": step if is_whole(step) else 0, "split": "validation", **measured}
        summary.rows = [row]
    else:
        summary.notes.append("its loss is not known; `evaluate --model` measures it")
    _add_costs(summary, how, look_at(summary, model.opened, how.batches, "no data", model.inputs))


def _fill(summary: RunSummary, how: _How) -> None:
    path = Path(summary.path)
    try:
        summary.config = _config(path / "config.json")
    except InputError as error:
        return summary.mark("damaged", str(error))
    try:
        summary.environment = _object(path / "environment.json")
    except InputError as error:
        summary.mark("damaged", str(error))
    written = summary.environment.get("format")
    if summary.environment and written != rundir.FORMAT:
        summary.mark(
            "older version", f"written in format {written}, this version reads {rundir.FORMAT}"
        )
    summary.rows = _rows(path / "metrics.jsonl", summary)
    _describe_data(summary)
    _compare_keys(summary)
    steps, training = summary.config["steps"], files.in_use(path)
    if not any(row["split"] == "validation" and row["step"] >= steps for row in summary.rows):
        noted = f"at step {summary.step} of {steps}"
        if not summary.rows:
            noted = f"nothing noted yet of {steps} steps"
        summary.mark("unfinished", noted + ", being trained now" * training)
    elif not checksums.is_whole(path, steps):
        summary.mark("unfinished", f"no whole checkpoint of its last step, {steps}")
    _add_costs(summary, how, look(summary, how.overrides, how.batches, training))


def _object(path: Path) -> Json:
    if not os.path.lexists(path):
        raise InputError(f"{path.name}: there is none")
    try:
        return read_json(path, path.name)
    except InputError as error:
        raise InputError(f"{path.name}: not whole ({error})") from None


def _config(path: Path) -> Json:
    config = _object(path)
    model = config.get("model")
    for key, good in (
        ("model", isinstance(model, dict) and isinstance(model.get("name", ""), str)),
        ("data", isinstance(config.get("data"), dict)),
        ("steps", is_whole(config.get("steps"))),
    ):
        if not good:
            raise InputError(f"config.json: not the config of a run: no '{key}'")
    return config


def _rows(path: Path, summary: RunSummary) -> list[Json]:
    try:
        rows, bad = metrics.read_lines(path)
    except InputError as error:
        summary.mark("damaged", f"metrics.jsonl: {error}")
        return []
    if bad:
        lines = bad + len(rows)
        summary.mark("damaged", f"metrics.jsonl: {bad} of {lines} lines are no rows of metrics")
    return rows


def _describe_data(summary: RunSummary) -> None:
    data = summary.config["data"]
    source = str(data.get("source", "unknown data"))
    name = data.get("name") if source == "tfds" else Path(str(data.get("path") or "")).name
    summary.data = str(name or source).replace("_", " ")
    summary.fingerprint = str(summary.environment.get("data_fingerprint") or "")
    model = summary.config["model"].get("name")
    if model:  # one that this version does not know most likely reads text
        known = registry.MODELS.get(model)
        summary.language = known is None or known.task == "language"
    if summary.language:
        summary.data += f", {data.get('tokenizer', 'char')} tokens"


def _compare_keys(summary: RunSummary) -> None:
    """Marks a config with keys that this version does not know, and notes those it lacks."""
    expected = base_config()
    name = summary.config["model"].get("name")
    missing, unknown = set(), {"model.name"}
    if name in registry.MODELS:
        expected.model = registry.defaults(name)
        ours, theirs = flat(expected).keys(), flat(summary.config).keys()
        missing, unknown = ours - theirs, theirs - ours
    if unknown:
        summary.mark(
            "older version", f"its config has keys that this version doesn't know: {_some(unknown)}"
        )
    if missing:
        summary.notes.append(f"its config, of another version, lacks {_some(missing)}")


def _some(keys: set[str]) -> str:
    return ", ".join(sorted(keys)[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _add_costs(summary: RunSummary, how: _How, sizes: Json) -> None:
    """Adds costs and energy, and those of the dense model beside it; sizes: 'outputs', 'image_size'
    and 'channels' where the data told them.
    """
    try:
        given, saved = dict(sizes), Path(summary.path) / "tokenizer.json"
        if summary.language and "outputs" not in given and saved.exists():
            given["outputs"] = tokenizers.load(saved).vocab_size
        config, integer = summary.config, summary.config["model"].get("integer")
        own = None if integer else how.precision  # of integers alone there is one precision
        summary.costs = count.of_config(config, precision=own, **given)
        summary.energy = energy.estimate(summary.costs, how.technology)
        if (dense := count.baseline(config["model"])) is not None:
            beside = _BESIDE if integer else how.precision or _BESIDE
            summary.dense_precision = beside
            summary.dense = count.of_config(config, model=dense[0], precision=beside, **given)
            summary.dense_energy = energy.estimate(summary.dense, how.technology)
            summary.replaced = count.multiplications_replaced(summary.costs, summary.dense)
    except InputError as error:
        summary.notes.append(f"not counted: {error}")
    except Exception as error:
        summary.notes.append(f"not counted ({type(error).__name__}: {error})")
