"""Errors that a person can act on. The ground floor: every room may import this one."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import math
from collections.abc import Iterable, Iterator
from types import ModuleType

# The extra of pyproject.toml that installs a package which the core does without, by the name that
# is imported.
EXTRAS = {
    **dict.fromkeys(("filelock", "flatbuffers", "grain", "matplotlib", "orbax", "tqdm"), "train"),
    **dict.fromkeys(
        ("array_record", "PIL", "pyarrow", "sklearn", "tensorflow_datasets", "tokenizers"), "data"
    ),
    **dict.fromkeys(("jinja2", "scipy"), "report"),
    **dict.fromkeys(("safetensors", "torch"), "pretrained"),
    "huggingface_hub": "hub",
    "tensorboardX": "tensorboard",
    "tensorflow": "prepare",
    "gcsfs": "gcs",
    "s3fs": "s3",
    "submitit": "slurm",
    "wandb": "wandb",
    "gguf": "gguf",
    "lm_eval": "harness",
    "libtpu": "tpu",
    "starlette": "serve",
    "uvicorn": "serve",
}


class InputError(ValueError):
    """Something the user gave is wrong; the message says what was expected, what was found and what
    to do.

    Command lines print the message alone, without a traceback, and exit with status 2.
    """


class RunError(RuntimeError):
    """A run cannot go on (disk full, non-finite loss); the message says what is still safe.

    Command lines print the message alone, without a traceback, and exit with status 1.
    """


class MissingPackageError(InputError, ModuleNotFoundError):
    """A package that not everybody has installed is missing; the message names the extra that
    installs it.
    """


def closest(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the known name closest to `name`, '' when none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The same, or the whole list when none is close."""
    known = sorted(known)
    return closest(name, known) or f" Known: {', '.join(known)}."


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise InputError(
            f"{what}: expected one of {choices}, found {value!r}.{closest(str(value), choices)}"
        )


def check_above_zero(what: str, value: float, zero: str = "") -> None:
    """Raises InputError unless `value` is positive and finite, or 0 where that stands for
    something, which `zero` names.
    """
    if not 0 < value < math.inf and not (zero and value == 0):
        meaning = f", or 0 for {zero}" if zero else ""
        raise InputError(f"{what}: expected a positive number{meaning}, found {value}.")


def first_line(error: BaseException, longest: int | None = 200) -> str:
    """The first line of an error's message, cut where others' errors get long (None: whole); the
    error's kind if it says nothing.
    """
    return str(error).strip().split("\n")[0][:longest] or type(error).__name__


def require(package: str, purpose: str, otherwise: str = "") -> ModuleType:
    """Imports a package that not everybody has installed.

    package: a key of `EXTRAS`, or a module inside of one. purpose: 'to read a.pth'. otherwise: what
    else helps.

    Raises:
      InputError: it is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        package = package.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there, but lacks something itself
        raise missing(package, purpose, otherwise) from None


@contextlib.contextmanager
def needed(purpose: str) -> Iterator[None]:
    """For imports, at the top of a module, of packages that not everybody has installed.

    purpose: 'for reports'.

    Raises:
      MissingPackageError: one is not installed; names the extra that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS or isinstance(error, MissingPackageError):
            raise
        raise missing(package, purpose) from None


def missing(package: str, purpose: str, otherwise: str = "") -> MissingPackageError:
    """The error of a package that isn't installed, naming the extra that installs it."""
    extra = EXTRAS.get(package)
    name = f"'quweit_jax[{extra}]'" if extra else package
    return MissingPackageError(
        f"expected the package {package} {purpose}, found none; pip install {name}"
        f"{', ' + otherwise if otherwise else ''}."
    )
