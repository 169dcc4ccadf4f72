"""python -m quweit_jax pack --workdir=runs/x|--model=FOLDER --out=FOLDER [--trained]
[--bits=N]"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quweit_jax.commands import cli
from quweit_jax.commands.opening import Opened, add_source, open_source
from quweit_jax.errors import InputError
from quweit_jax.reading import check_local

_MEASURES = ("loss", "accuracy")  # of the checkpoint, that are kept
_OF_INPUTS = ("labels", "pixels")
_NEW = ("form", "weight_bits", "input_shape", "versions", "format", "version")  # written anew


def main(argv: Sequence[str]) -> int:
    """Writes a run's model, or a published one, into one folder: its deployed form, with all that
    using it needs.
    """
    parser = cli.parser(
        "pack",
        "Writes a run's model, or a published checkpoint, into one folder: its deployed form, its "
        "options and its tokenizer, which generate --model, evaluate --model and others read.",
    )
    add_source(parser)
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--trained", action="store_true", help="as trained, not packed")
    parser.add_argument(
        "--bits",
        type=int,
        default=0,
        metavar="N",
        help="round matrices that have no packed form "
        "to N bits a weight, 2 to 8, each column with its scale (default: as they are)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    args, overrides = cli.parse(parser, argv)
    from quweit_jax.training import stores

    if not args.out:
        raise InputError("--out: expected the folder to write, found nothing; give it.")
    with stores.written(args.out) as out:
        return _write(args, overrides, out)


def _write(args: argparse.Namespace, overrides: Mapping[str, str], out: Path) -> int:
    from quweit_jax.deploy.pack import packed_or_trained
    from quweit_jax.models import registry
    from quweit_jax.pretrained import rounded, saved
    from quweit_jax.training import rundir

    check_local(out, "--out", "write it here, and copy it")
    saved.check_target(out, args.overwrite)
    if args.bits and args.bits not in rounded.BITS:
        raise InputError(f"--bits: expected 2 to 8, found {args.bits}.")
    opened = open_source(args, overrides)
    variables = opened.variables
    if args.trained and "packed" in variables:
        raise InputError(f"--trained: {args.model} has the packed form alone; leave that out.")
    if not args.trained and "packed" not in variables:
        variables = packed_or_trained(opened.model, variables, opened.init_inputs)
    _check_rounding(args.bits, variables)
    model, outputs = registry.described(opened.model)
    if "scan_layers" in model:  # layers are read and packed one by one
        model["scan_layers"] = False
    about = {
        "form": "packed" if "packed" in variables else "trained",
        **({"weight_bits": args.bits} if args.bits else {}),
        "input_shape": [1, *opened.init_inputs.shape[1:]],
        "versions": rundir.describe_environment()["versions"],
    }
    about |= _of_run(args.workdir, opened) if opened.setup is not None else _of_model(opened)
    size = saved.save_model(
        out,
        model,
        outputs,
        variables,
        tokenizer=opened.tokenizer,
        about=about,
        overwrite=args.overwrite,
        bits=args.bits,
    )
    print(f"wrote {args.out}: {size:,} bytes of arrays, {_form(args.bits, variables)}")
    had = opened.about.get("weight_bits")
    if had and had != args.bits:
        now = f"{args.bits} bits, rounded again" if args.bits else "floats of 32 bits"
        print(
            f"its matrices had {had} bits a weight, and have {now}: --bits={had} writes them as "
            "they were"
        )
    if opened.tokenizer is not None:
        print(f"use it: python -m quweit_jax generate --model={args.out}")
    return 0


def _check_rounding(bits: int, variables: Mapping[str, Any]) -> None:
    """Raises InputError for bits of matrices where there are none that are rounded."""
    if not bits:
        return
    from flax.traverse_util import flatten_dict

    from quweit_jax.pretrained import rounded

    arrays: dict[str, Any] = flatten_dict(dict(variables), sep="/")
    if not any(rounded.is_rounded(*item) for item in arrays.items()):
        raise InputError(
            f"--bits: expected matrices without a packed form, to be rounded to {bits} bits, found "
            "none in this model; leave it out."
        )


def _form(bits: int, variables: Mapping[str, Any]) -> str:
    """What became of a model's weights, in words."""
    if "packed" in variables:
        return f"packed, other matrices at {bits} bits a weight" if bits else "packed"
    return f"matrices at {bits} bits a weight" if bits else "as trained"


def _of_run(workdir: str, opened: Opened) -> dict[str, Any]:
    """What a run says of its model: how it was trained and how well, and on which data."""
    from quweit_jax.data.registry import DataConfig
    from quweit_jax.training import metrics, rundir, stores

    setup = opened.setup
    assert setup is not None
    losses = {row["step"]: row for row in metrics.evaluations(stores.fetched(workdir))}
    ours = DataConfig()
    data = {
        key: value
        for key, value in setup.config.data.items()
        if not isinstance(value, Mapping | type(setup.config))
        and value != getattr(ours, key)
        and f"data.{key}" not in rundir.MAY_CHANGE_UNDER
        and "tokenizer" not in key
    }
    kept = {key: value for key, value in opened.about_inputs().items() if key in _OF_INPUTS}
    return kept | {
        "training_step": opened.step,
        "validation": {k: v for k, v in losses.get(opened.step, {}).items() if k in _MEASURES},
        "data": setup.config.data.name or setup.config.data.source,
        "data_config": data,
        "seed": setup.config.seed,
    }


def _of_model(opened: Opened) -> dict[str, Any]:
    """What a model in a folder of its own says, and how it wants to be asked."""
    about = {key: value for key, value in opened.about.items() if key not in _NEW}
    return about | ({"prompting": opened.prompting.to_json()} if opened.prompting else {})
