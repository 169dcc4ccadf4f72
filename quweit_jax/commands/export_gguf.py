"""python -m quweit_jax export --to=gguf --workdir=runs/x --out=model.gguf [--form=f16|q8_0|tq2_0]"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from quweit_jax.errors import InputError


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --to=gguf."""
    parser.add_argument(
        "--form",
        help="of --to=gguf, the numbers of matrices: f16 (default), q8_0, or tq2_0 for ternary ones "
        "at two bits",
    )


def run(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Writes a run's language model as a GGUF file."""
    from quweit_jax.deploy import gguf
    from quweit_jax.training import rundir, stores

    if args.out is None:
        raise InputError("--out: expected the file to write, such as model.gguf; give it.")
    if args.packed or args.step_function or args.platforms:
        raise InputError(
            "--to=gguf: expected none of --packed, --step_function and --platforms, which are of "
            "stablehlo; --form says how weights are written."
        )
    out, form = Path(args.out), args.form or "f16"
    gguf.check_target(out, args.overwrite)
    opened = rundir.open_run(stores.fetched(args.workdir), args.step, overrides, data=False)
    setup = opened.setup
    if setup.tokenizer is None:
        raise InputError(f"--to=gguf: {args.workdir} is a run of a classifier, not of texts.")
    size = gguf.save(
        out,
        setup.model,
        opened.variables,
        setup.tokenizer,
        form,
        name=Path(args.workdir).name or "quweit_jax",
        overwrite=args.overwrite,
    )
    print(f"wrote {out}: {size:,} bytes, {form}, of step {opened.step}")
    print(f"use it: llama-cli -m {out} -p TEXT")
    return 0
