"""python -m quweit_jax pack --workdir=runs/x --out=FOLDER [--trained]"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from quweit_jax.commands import cli
from quweit_jax.errors import InputError
from quweit_jax.reading import check_local

_MEASURES = ("loss", "accuracy")  # of the checkpoint, that are kept


def main(argv: Sequence[str]) -> int:
    """Writes a run's model into one folder: its deployed form, with all that using it needs."""
    parser = cli.parser(
        "pack",
        "Writes a run's model into one folder: its deployed form, its options and its tokenizer. "
        "generate --model reads it.",
        *("workdir", "step"),
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--trained", action="store_true", help="as trained, not packed")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    args, overrides = cli.parse(parser, argv)
    from quweit_jax.training import stores

    with stores.written(args.out) as out:
        return _write(args, overrides, out)


def _write(args: argparse.Namespace, overrides: Mapping[str, str], out: Path) -> int:
    from quweit_jax.deploy import stablehlo
    from quweit_jax.deploy.pack import packed_or_trained, stored_bytes
    from quweit_jax.pretrained import saved
    from quweit_jax.training import metrics, rundir, stores

    check_local(out, "--out", "write it here, and copy it")
    if saved.is_saved(out) and not args.overwrite:
        raise InputError(f"--out: {args.out} holds a model already; name another, or --overwrite.")
    workdir = stores.fetched(args.workdir)
    run = rundir.open_run(workdir, args.step, overrides, data=False)
    setup, variables = run.setup, run.variables
    if not args.trained:
        variables = packed_or_trained(setup.model, variables, setup.init_inputs)
    model = setup.config.model.to_dict()
    if "scan_layers" in model:  # layers are read and packed one by one
        model["scan_layers"] = False
    losses = {row["step"]: row for row in metrics.evaluations(workdir)}
    about = {
        "form": "packed" if "packed" in variables else "trained",
        "input_shape": [1, *setup.init_inputs.shape[1:]],
        "training_step": run.step,
        "validation": {k: v for k, v in losses.get(run.step, {}).items() if k in _MEASURES},
        "data": setup.config.data.name or setup.config.data.source,
        "seed": setup.config.seed,
        "versions": rundir.describe_environment()["versions"],
    }
    if setup.tokenizer is None:
        about |= stablehlo.about_data(None, setup.data_config.normalize, setup.data)
    saved.save_model(
        out,
        model,
        setup.data.outputs,
        variables,
        tokenizer=setup.tokenizer,
        about=about,
        overwrite=args.overwrite,
    )
    print(f"wrote {args.out}: {stored_bytes(variables):,} bytes of arrays, {about['form']}")
    if setup.tokenizer is not None:
        print(f"use it: python -m quweit_jax generate --model={args.out}")
    return 0
