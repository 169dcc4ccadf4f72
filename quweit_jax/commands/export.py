"""python -m quweit_jax export --workdir=runs/x|--model=FOLDER --out=model.stablehlo [--packed]
python -m quweit_jax export --to=gguf --workdir=runs/x|--model=FOLDER --out=model.gguf
    [--form=f16|q8_0|tq2_0]
python -m quweit_jax export --to=verilog|c --workdir=runs/x [--out=FOLDER] [--verify] [--synthesize]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from quweit_jax.commands import cli, export_gguf, export_hardware
from quweit_jax.commands.opening import add_source, open_source
from quweit_jax.errors import InputError, check_choice

FORMS = ("stablehlo", "gguf", "verilog", "c")


def main(argv: Sequence[str]) -> int:
    """Writes a trained run or a model as one StableHLO file that plain JAX runs without this
    project, or a classifier made of tables or a transformer's block as Verilog or C.
    """
    args, overrides = cli.parse(_parser(), argv)
    check_choice("--to", args.to, FORMS)
    export_hardware.check_options(args, args.to)
    if args.form is not None and args.to != "gguf":
        raise InputError("--form: expected --to=gguf with it.")
    if args.to == "gguf":
        return export_gguf.run(args, overrides)
    if args.to != "stablehlo":
        return export_hardware.run(args, overrides)
    if not args.out:
        raise InputError("--out: expected the file to write, such as model.stablehlo; give it.")
    return _stablehlo(args, overrides)


def _stablehlo(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    from quweit_jax.training import stores

    with stores.written(args.out, beside=(".json",)) as out:
        return _write(args, overrides, out)


def _write(args: argparse.Namespace, overrides: Mapping[str, str], out: Path) -> int:
    import jax

    from quweit_jax.deploy import stablehlo
    from quweit_jax.deploy.generate import context_of
    from quweit_jax.deploy.pack import stored_bytes
    from quweit_jax.training import rundir

    platforms = (args.platforms or "cpu,tpu,cuda").split(",")
    stablehlo.check_target(out, args.overwrite)
    stablehlo.check({}, platforms)
    opened = open_source(args, overrides)
    model, tokenizer = stablehlo.portable(opened.model), opened.tokenizer
    if args.step_function and tokenizer is None:
        named = args.workdir or args.model
        raise InputError(f"--step_function: {named} is a classifier, which decodes no tokens.")
    opened = dataclasses.replace(opened, model=model, variables=jax.device_get(opened.variables))
    variables = opened.packed(asked=args.packed)
    if tokenizer is None:
        given = stablehlo.examples_input(opened.init_inputs.shape[1:])
    else:
        size, context = tokenizer.vocab_size, context_of(model)
        given = stablehlo.tokens_input(size, context, one_step=args.step_function)
    if args.step_function:
        program = stablehlo.to_step_program(model, variables, platforms)
    else:
        program = stablehlo.to_program(model.apply, variables, given, platforms)
    about = opened.about_inputs() | {
        "form": "packed" if "packed" in variables else "trained",
        "weight_bytes": stored_bytes(variables),
        "versions": rundir.describe_environment()["versions"],
    }
    description = stablehlo.save(program, out, about, given, overwrite=args.overwrite)
    print(
        f"wrote {args.out}: {description['bytes']:,} bytes, of which weights "
        f"{about['weight_bytes']:,}; for {', '.join(platforms)}"
    )
    print("\n".join(description["load"]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "export",
        "Writes a trained run, or a model in a folder of its own, as one StableHLO file, weights "
        "inside, and a description beside it; "
        "or a classifier made of tables, or a block of an integer-only transformer, as a folder of "
        "Verilog or C.",
        "packed",
    )
    add_source(parser)
    parser.add_argument(
        "--out",
        help="the file to write, such as model.stablehlo; model.json beside it says how to use it. "
        "Of --to=verilog and --to=c the folder (default: verilog or c in the run directory)",
    )
    parser.add_argument(
        "--step_function",
        action="store_true",
        help="of a language model one step of decoding: token, state -> logits, state",
    )
    parser.add_argument(
        "--platforms", help="what it runs on, joined by commas (default: cpu,tpu,cuda; also rocm)"
    )
    parser.add_argument("--to", default="stablehlo", help="stablehlo (default), gguf, verilog or c")
    export_gguf.add_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    export_hardware.add_options(parser)
    return parser
