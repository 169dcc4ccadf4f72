"""python -m quweit_jax export --to=verilog|c --workdir=RUN|--model=FOLDER: circuits and C of
classifiers of tables and of blocks of integer-only transformers (`commands.export_block`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quweit_jax.commands.opening import Opened, has_tokenizer, open_setup
from quweit_jax.errors import InputError

if TYPE_CHECKING:
    from quweit_jax.deploy.hardware.circuit import Circuit
    from quweit_jax.deploy.hardware.description import Classifier
    from quweit_jax.deploy.hardware.folder import Export
    from quweit_jax.training.setup import Setup

_BATCH = 256
# Options of the hardware form alone, and what they are when not given.
DEFAULTS = {
    "input_bits": None,
    "pipeline": 1,
    "examples": 200,
    "word": 64,
    "block": None,
    "parallel": 1,
    "verify": False,
    "synthesize": False,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of --to=verilog and --to=c."""
    group = parser.add_argument_group("of --to=verilog and --to=c")
    group.add_argument(
        "--input_bits",
        type=int,
        help="bits of an input word, 1 to 16 (default: the fewest that change no comparator on a "
        "training example or, where 16 do, no training decision)",
    )
    group.add_argument(
        "--pipeline",
        type=int,
        help="registers after every so many stages, of a block's sums after every so many levels; "
        "0 for none (default: 1; verilog)",
    )
    group.add_argument(
        "--examples",
        type=int,
        help="validation examples, or a block's tokens, among the golden vectors; 0 for all "
        "(default: 200)",
    )
    group.add_argument(
        "--word",
        type=int,
        help="examples at a time in C: 32 or 64, or 128, 256 or 512 by vectors of clang and gcc "
        "(default: 64)",
    )
    group.add_argument(
        "--block",
        type=int,
        help="of an integer-only transformer the block whose channel mixer is exported (default: "
        "the first that can be)",
    )
    group.add_argument(
        "--parallel",
        type=int,
        help="units of a LookupGLU, or vectors of a conditional sum, made or added a cycle "
        "(default: 1; verilog)",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="run the benches by whichever tools are installed (iverilog, verilator; gcc, clang)",
    )
    group.add_argument(
        "--synthesize", action="store_true", help="count LUTs and flip-flops by yosys (verilog)"
    )


def check_options(args: argparse.Namespace, kind: str) -> None:
    """Raises InputError for options that the other forms have, and for values none can have."""
    given = [name for name, value in DEFAULTS.items() if getattr(args, name) not in (None, False)]
    if kind in ("stablehlo", "gguf"):
        if given:
            raise InputError(f"--{given[0]}: expected --to=verilog or --to=c with it.")
        return
    others = [name for name in ("packed", "step_function", "platforms") if getattr(args, name)]
    others += ["word"] * (kind == "verilog" and args.word is not None)
    others += ["synthesize"] * (kind == "c" and args.synthesize)
    others += [
        name for name in ("pipeline", "parallel") if kind == "c" and getattr(args, name) is not None
    ]
    if others:
        raise InputError(f"--{others[0]}: does not go with --to={kind}; leave it out.")
    if args.examples is not None and args.examples < 0:
        raise InputError(f"--examples: expected 0 (all) or more, found {args.examples}.")


def run(args: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """Writes a trained classifier of tables, or a block of an integer-only transformer, as Verilog
    or C, checks and synthesizes it as asked.
    """
    from quweit_jax.training import stores

    target = args.out
    if target is None and args.workdir is not None:
        target = f"{args.workdir}/{args.to}"
    if not target:
        raise InputError("--out: expected the folder to write, found none; give it.")
    with stores.written(target) as out:
        return _write(args, overrides, out)


def _write(args: argparse.Namespace, overrides: Mapping[str, str], out: Path) -> int:
    from quweit_jax.commands import export_block
    from quweit_jax.deploy.hardware import folder
    from quweit_jax.deploy.hardware.blocks.verilog import NAME as BLOCK_NAME
    from quweit_jax.models.dwn import DWN

    options = {
        name: value if (found := getattr(args, name)) is None else found
        for name, value in DEFAULTS.items()
    }
    folder.check_target(out, args.overwrite)
    if has_tokenizer(args):  # said before data are read, or even downloaded
        raise InputError(
            "--to: expected a classifier made of tables (model dwn) or an integer-only ViT, found "
            f"{args.workdir or args.model}, a language model; export that as StableHLO."
        )
    opened, setup = open_setup(args, overrides)
    blocks = not isinstance(setup.model, DWN)
    export_block.check_options(vars(args), blocks)
    if blocks:
        export_block.chosen(setup.model, options["block"])  # says so before anything is packed
    packed, about = opened.packed(), _about(opened)
    if blocks:
        made = export_block.run(setup, packed, out, args.to, options, about, args.overwrite)
        if options["verify"]:
            _verify(out, args.to, BLOCK_NAME)
        if options["synthesize"]:
            export_block.synthesize(made)
        return 0
    export = exported(setup, packed, args.to, options, about)
    names = folder.write(export, out, overwrite=args.overwrite)
    print(f"wrote {out}: {', '.join(names)}")
    print("\n".join(_lines(export)))
    if options["verify"]:
        _verify(out, args.to, folder.NAME)
    if options["synthesize"]:
        _synthesize(export.circuit)
    return 0


def exported(
    setup: Setup,
    packed: dict[str, Any],
    kind: str,
    options: Mapping[str, Any] = DEFAULTS,
    about: Mapping[str, Any] | None = None,
) -> Export:
    """A packed classifier of tables as it is to be written, with golden vectors.

    Args:
      kind: 'verilog' or 'c'. options: as DEFAULTS. about: further facts for input_scaling.json,
        to which 'validation_examples' and 'validation_agree' are added: on how many of them it
        decides as the packed model.
    """
    from quweit_jax.deploy.hardware import circuit, description, folder

    classifier, fit = description.from_packed(
        setup.model, packed, _inputs(setup.data.train), options["input_bits"]
    )
    made = circuit.build(classifier, options["pipeline"] if kind == "verilog" else 0)
    words, real, agreed = _golden(setup, packed, classifier, options["examples"])
    shape = setup.init_inputs.shape[1:]
    about = {**(about or {}), **agreed}
    return folder.Export(kind, made, fit, words, real, shape, about, options["word"])


def _inputs(examples: Any) -> np.ndarray:
    """The inputs of a whole split as they are evaluated, (N, ...) float32."""
    from quweit_jax.data.pipeline import eval_batches

    batches = eval_batches(examples, _BATCH)
    return np.concatenate([batch["inputs"][batch["weights"] > 0] for batch in batches])


def _golden(
    setup: Setup, packed: dict[str, Any], classifier: Classifier, count: int
) -> tuple[np.ndarray, int, dict[str, int]]:
    """Golden words, how many of them are of real examples, and on how many of all validation
    examples the classifier says what the packed model does.
    """
    import jax

    from quweit_jax.deploy.hardware import description, vectors

    model, inputs = setup.model, _inputs(setup.data.validation)
    words = classifier.scaling.words(inputs.reshape(len(inputs), -1))
    found = description.evaluate(classifier, words)
    apply = jax.jit(model.apply)
    parts = [inputs[i : i + _BATCH] for i in range(0, len(inputs), _BATCH)]
    logits = np.concatenate([np.asarray(apply(packed, part)) for part in parts])
    same = int((logits.argmax(1) == found.decision).sum())
    golden, real = vectors.golden(classifier, words, count)
    return golden, real, {"validation_examples": len(words), "validation_agree": same}


def _about(opened: Opened) -> dict[str, Any]:
    from quweit_jax.training import rundir

    about = {key: value for key, value in opened.about_inputs().items() if key != "config"}
    if opened.step is None:
        about["training_step"] = opened.about.get("training_step")
    return about | {"versions": rundir.describe_environment()["versions"]}


def _lines(export: Export) -> Sequence[str]:
    made, fit, agreed = export.circuit, export.fit, export.about
    c = made.classifier
    latency = f"; latency {made.latency} clock edges, of {len(made.stages)} stages"
    kept = "no comparator changes" if fit.exact else f"{fit.changed} decisions change"
    return (
        f"words of {c.scaling.bits} bit{'s' * (c.scaling.bits > 1)}: {kept} on "
        f"{fit.examples:,} training examples; on {agreed['validation_agree']:,} of "
        f"{agreed['validation_examples']:,} validation examples the decision is the packed model's",
        f"{len(c.feature):,} comparators, {sum(len(l.tables) for l in c.layers):,} tables, "
        f"{c.classes} classes" + latency * bool(made.latency),
    )


def _verify(out: Path, kind: str, name: str) -> None:
    from quweit_jax.deploy.hardware import tools

    verdicts = tools.verify(out, kind, name=name)
    for verdict in verdicts:
        print(f"{verdict.tool}: {verdict.text}")
    tools.check(verdicts)


def _synthesize(made: Circuit) -> None:
    from quweit_jax.costs.table import table
    from quweit_jax.deploy.hardware import routing, synthesis, tools

    report = synthesis.synthesize(made)
    print(f"\nby {report.tool}, each module by itself:")
    print("\n".join(table(*synthesis.rows(report, made))))
    if any(tools.installed(part.tool) for part in routing.PARTS):
        print("\nplacing and routing, minutes for thousands of tables ...", flush=True)
    if routed := routing.route(made):
        print("\nplaced and routed, with a chain of registers that brings the words in:")
        print("\n".join(routing.lines(routed)))
    if missing := routing.missing():
        print(f"not placed and routed by what is not installed: {', '.join(missing)}")
