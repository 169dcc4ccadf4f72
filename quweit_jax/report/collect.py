"""Run directories as plain data for a report: found, read as far as they can be, and never a reason
to stop.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quweit_jax import config as configs
from quweit_jax import defaults
from quweit_jax.costs import count as costs
from quweit_jax.costs import energy
from quweit_jax.data import tokenizers
from quweit_jax.errors import InputError, nearest
from quweit_jax.report import look as inspection
from quweit_jax.report.summary import Record
from quweit_jax.training import files, metrics, run

_RUN_FILES = ("config.json", "metrics.jsonl", "environment.json", "checkpoints")
_DEPTH = 4  # of folders between a given one and the runs in it
# What may be overridden for all runs: where data lie and how they are read, not what a model is.
_OVERRIDABLE = ("data.", "mesh.", "eval_batch_size")


def gather(
    paths: Sequence[Path],
    overrides: Mapping[str, str],
    *,
    batches: int,
    technology: str = "45nm",
    say: Callable[[Record], None] = lambda _: None,
) -> tuple[list[Record], list[tuple[str, str]]]:
    """The runs at and below the given paths, and the paths that hold none, with the reason.

    overrides: config paths to text values, of the data (data.data_dir, say), the mesh and
    eval_batch_size alone. batches: how much of the validation data the tables are watched on (0:
    all of it). say: told each run when it has been read.

    Raises:
      InputError: no run is left, or an override or a number that makes no sense.
    """
    if batches < 0:
        raise InputError(
            f"--batches: expected 0 (the whole validation split) or more, found {batches}."
        )
    known = [key for key in configs.flat(defaults.base_config()) if key.startswith(_OVERRIDABLE)]
    for key in overrides:
        if key not in known:
            raise InputError(
                f"--config.{key}: a report reads runs as they are; only data, mesh and "
                f"eval_batch_size may change.{nearest(key, known)}"
            )
    found, skipped = find_runs(paths)
    if not found:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped) or "no path was given"
        raise InputError(
            f"no run to report on: {reasons}. Give run directories of python -m quweit_jax.train, "
            "or a folder that holds some."
        )
    records = []
    for number, (path, name) in enumerate(zip(found, short_names(found)), 1):
        records.append(read_run(Record(number, name, str(path)), overrides, batches, technology))
        say(records[-1])
    return records, skipped


def find_runs(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Run directories at or below the paths, each once, and the paths that are or hold none, with
    the reason.
    """
    found: list[Path] = []
    skipped = []
    for path in paths:
        if not path.exists():
            skipped.append((str(path), "there is nothing"))
        elif not path.is_dir():
            skipped.append((str(path), "a file, not a folder"))
        elif runs := _runs_in(path.absolute(), _DEPTH):
            found += runs
        else:
            skipped.append((str(path), "neither a run directory nor a folder that holds some"))
    unique = {Path(os.path.realpath(path)): path for path in reversed(found)}
    return [
        path for path in dict.fromkeys(found) if unique[Path(os.path.realpath(path))] == path
    ], skipped


def _runs_in(folder: Path, depth: int) -> list[Path]:
    if any((folder / name).exists() for name in _RUN_FILES):
        return [folder]
    try:
        below = sorted(p for p in folder.iterdir() if p.is_dir()) if depth else []
    except OSError:
        return []
    return [run for path in below for run in _runs_in(path, depth - 1)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """What tells paths apart: each without the folders they have in common, and at least its own
    name.
    """
    parents = [str(path.parent) for path in paths]
    common = os.path.commonpath(parents) if parents else ""
    return [str(path.relative_to(common)) for path in paths]


def read_run(record: Record, overrides: Mapping[str, str], batches: int, technology: str) -> Record:
    """Fills in what the run directory at `record.path` tells; what cannot be read is said in the
    record, whatever it is.
    """
    path = Path(record.path)
    try:
        record.config = _object(path / "config.json")
        _check_config(record.config)
    except (OSError, ValueError) as error:
        return _mark(record, "damaged", f"config.json: {error}")
    try:
        record.environment = _object(path / "environment.json")
    except (OSError, ValueError) as error:
        _mark(record, "damaged", f"environment.json: {error}")
    if record.environment and record.environment.get("format") != run.FORMAT:
        _mark(
            record,
            "older version",
            f"written in format {record.environment.get('format')}, this version reads "
            f"{run.FORMAT}",
        )
    record.rows = _rows(path / "metrics.jsonl", record)
    _describe_data(record)
    missing, unknown = _differences(record.config)
    if unknown:
        _mark(
            record,
            "older version",
            f"its config has keys that this version doesn't know: {_some(unknown)}",
        )
    if missing:
        record.notes.append(f"its config, of another version, lacks {_some(missing)}")
    steps, training = record.config["steps"], _in_use(path)
    if not any(row["split"] == "validation" and row["step"] >= steps for row in record.rows):
        noted = (
            f"at step {record.step} of {steps}"
            if record.rows
            else f"nothing noted yet of {steps} steps"
        )
        _mark(record, "unfinished", noted + ", being trained now" * training)
    looked: dict[str, Any] = {}
    try:
        looked = inspection.look(record, overrides, batches)
    except Exception as error:  # a report of many runs does not stop for one
        state, reason = inspection.explain(error, record)
        if training and state == "damaged":  # its checkpoints come and go
            record.notes.append(
                f"the model was not opened while the run is being trained ({reason})"
            )
        else:
            _mark(record, state, reason)
    _account(record, technology, looked)
    return record


def _mark(record: Record, state: str, reason: str) -> Record:
    """Sets the state unless there is a graver one, and adds the reason."""
    order = ("finished", "unfinished", "older version", "damaged")
    if order.index(state) > order.index(record.state):
        record.state = state
    if reason:
        record.reason = f"{record.reason}; {reason}" if record.reason else reason
    return record


def _in_use(path: Path) -> bool:
    """Whether a process of this machine is training in the folder."""
    try:
        with files.sole_user(path, patience=0):
            return False
    except InputError:
        return True


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError("there is none")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not whole ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _check_config(config: dict[str, Any]) -> None:
    for key, kind in (("model", dict), ("data", dict), ("steps", int)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"not the config of a run: no '{key}'")


def _rows(path: Path, record: Record) -> list[dict[str, Any]]:
    try:
        rows = metrics.read_rows(path)
    except (OSError, ValueError) as error:
        _mark(record, "damaged", f"metrics.jsonl: {error}")
        return []

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    good = [
        r
        for r in rows
        if isinstance(r, dict)
        and isinstance(r.get("step"), int)
        and r.get("split") in ("train", "validation")
    ]
    good = [row for row in good if number(row.get("loss"))]
    if len(good) < len(rows):
        _mark(
            record,
            "damaged",
            f"metrics.jsonl: {len(rows) - len(good)} of {len(rows)} lines are no rows of metrics",
        )
    return good


def _describe_data(record: Record) -> None:
    data = record.config["data"]
    source = str(data.get("source", "unknown data"))
    name = (
        data.get("name")
        if source == "tfds"
        else Path(str(data["path"])).name
        if data.get("path")
        else ""
    )
    record.data = str(name or source).replace("_", " ")
    record.fingerprint = str(record.environment.get("data_fingerprint") or "")
    model = record.config["model"].get("name")
    record.language = model not in ("vit", "dwn") if model else None
    if record.language:
        record.data += f", {data.get('tokenizer', 'char')} tokens"


def _differences(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Config keys that this version has and the run has not, and the other way round."""
    expected = defaults.base_config()
    make = getattr(defaults, f"{config['model'].get('name')}_defaults", None)
    if make is None:
        return [], ["model.name"]
    expected.model = make()
    ours, theirs = configs.flat(expected).keys(), configs.flat(config).keys()
    return sorted(ours - theirs), sorted(theirs - ours)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _account(record: Record, technology: str, looked: Mapping[str, Any]) -> None:
    """Costs and energy, with outputs and image size as the run's data have them where those were
    read.
    """
    try:
        given = {key: looked[key] for key in ("outputs", "image_size") if looked.get(key)}
        saved = Path(record.path) / "tokenizer.json"
        if record.language and "outputs" not in given and saved.exists():
            given["outputs"] = tokenizers.load(saved).vocab_size
        record.costs = costs.of_config(record.config, **given)
        record.energy = energy.estimate(record.costs, technology)
        if (dense := costs.baseline(record.config["model"])) is not None:
            record.replaced = costs.multiplications_replaced(
                record.costs, costs.of_config(record.config, model=dense[0], **given)
            )
    except InputError as error:
        record.notes.append(f"not counted: {error}")
    except Exception as error:
        record.notes.append(f"not counted ({type(error).__name__}: {error})")
