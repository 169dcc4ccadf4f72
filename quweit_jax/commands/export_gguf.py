"""python -m quweit_jax export --to=gguf --workdir=runs/x|--model=FOLDER --out=model.gguf
[--form=f16|q8_0|tq2_0]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from quweit_jax.commands.opening import open_source
from quweit_jax.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --to=gguf."""
    parser.add_argument(
        "--form",
        help="of --to=gguf, the numbers of matrices: f16 (default), q8_0, or tq2_0 for ternary "
        "ones at two bits",
    )


def run(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Writes a language model as a GGUF file."""
    from quweit_jax.training import stores

    if not args.out:
        raise InputError("--out: expected the file to write, such as model.gguf; give it.")
    if args.packed or args.step_function or args.platforms:
        raise InputError(
            "--to=gguf: expected none of --packed, --step_function and --platforms, which are of "
            "stablehlo; --form says how weights are written."
        )
    with stores.written(args.out, beside=()) as out:
        return _write(args, overrides, out, args.form or "f16")


def _write(args: argparse.Namespace, overrides: Mapping[str, str], out: Path, form: str) -> int:
    from quweit_jax.deploy import gguf

    gguf.check_target(out, args.overwrite)
    opened, named = open_source(args, overrides), args.workdir or args.model
    if opened.tokenizer is None:
        raise InputError(f"--to=gguf: {named} is a classifier, not a model of texts.")
    size = gguf.save(
        out,
        opened.model,
        opened.variables,
        opened.tokenizer,
        form,
        name=Path(named).name or "quweit_jax",
        overwrite=args.overwrite,
    )
    of_step = "" if opened.step is None else f", of step {opened.step}"
    print(f"wrote {args.out}: {size:,} bytes, {form}{of_step}")
    print(f"use it: llama-cli -m {args.out} -p TEXT")
    return 0
