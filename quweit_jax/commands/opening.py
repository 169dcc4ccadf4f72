"""What a command is given to work on: a run, or a model in a folder of its own."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quweit_jax.errors import InputError

if TYPE_CHECKING:  # JAX is imported when there is something to do
    import flax.linen as nn
    import numpy as np
    from jaxtyping import PyTree

    from quweit_jax.data.tokenizers import Tokenizer

_TOKENS = 8  # any number: of tokens that a model is packed with


@dataclasses.dataclass(frozen=True)
class Opened:
    """init_inputs: what the model is packed with. step: of a run."""

    model: nn.Module
    variables: dict[str, PyTree]
    tokenizer: Tokenizer | None
    init_inputs: np.ndarray
    step: int | None = None


def add_source(parser: argparse.ArgumentParser) -> None:
    """--workdir or --model, and --step of the former."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run directory")
    source.add_argument(
        "--model",
        help="a model's folder: one that `pack` wrote, or a published checkpoint in Hugging Face's "
        "layout with its tokenizer.json; or the name of a model that comes with the package",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="of a run, a checkpoint's step (default: that of lowest validation loss)",
    )


def open_source(args: argparse.Namespace, overrides: Mapping[str, str]) -> Opened:
    """What --workdir or --model names.

    Raises:
      InputError: there is none, or options that belong to the other.
    """
    if args.model is None:
        return _run(args, overrides)
    if args.step is not None or overrides:
        raise InputError("--model: expected no --step and no --config.KEY, which are of runs.")
    import numpy as np

    from quweit_jax import pretrained
    from quweit_jax.data.tokenizers import FileTokenizer
    from quweit_jax.pretrained import saved
    from quweit_jax.training import stores

    there = stores.is_address(args.model)
    folder = stores.fetched(args.model, "--model") if there else saved.find_model(args.model)
    if saved.is_saved(folder):
        found = saved.load_model(folder)
        shape = found.about.get("input_shape") or [1, _TOKENS]
        dtype = np.int32 if found.tokenizer is not None else np.float32
        return Opened(found.model, found.variables, found.tokenizer, np.zeros(shape, dtype))
    kind = pretrained.kind_of(folder)
    if kind in ("deit", "ivit"):
        raise InputError(
            f"--model: {args.model} is an image classifier ({kind}); begin a run from it, with "
            "train --config.init_from=FOLDER."
        )
    model, variables = pretrained.load(folder, kind)
    tokens = np.zeros((1, _TOKENS), np.int32)
    return Opened(model, variables, FileTokenizer.read(str(folder)), tokens)


def _run(args: argparse.Namespace, overrides: Mapping[str, str]) -> Opened:
    from quweit_jax.training import rundir, stores

    run = rundir.open_run(stores.fetched(args.workdir), args.step, overrides, data=False)
    setup = run.setup
    return Opened(setup.model, run.variables, setup.tokenizer, setup.init_inputs, run.step)
