"""A trained dense run, converted to other channel mixers in a tenth of its steps, beside a model of
the new kind that trains from scratch for as many.

    python -m experiments.studies.convert --dense=runs/dense

The dense run is its own student's teacher and beginning (docs/howto/distill.md). Runs go into
RUNS/converted and RUNS/scratch; the same command goes on with what is there, and reads what is
finished.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from experiments.studies.common import EXPERIMENTS, finish
from quweit_jax.commands import cli
from quweit_jax.config import Config, set_value
from quweit_jax.errors import InputError
from quweit_jax.layers import mlp
from quweit_jax.training import metrics, rundir


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options, and `overrides`: --config.PATH=VALUE for both new runs."""
    rest, overrides = cli.split_overrides(argv)
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--dense", type=Path, required=True, help="the run directory to convert")
    made.add_argument("--mlp", default="lookup_glu", choices=list(mlp.BLOCKS))
    made.add_argument("--share", type=float, default=0.1, help="of the dense run's steps, at most")
    made.add_argument("--fit", type=float, default=0.5, help="the part of them that fits mixers")
    made.add_argument(
        "--solve",
        type=int,
        default=0,
        help="batches on which LookupGLUs are computed, each counted as a step",
    )
    made.add_argument("--runs", type=Path, default=Path("runs/convert"))
    made.add_argument("--out", type=Path, default=EXPERIMENTS / "results")
    made.add_argument("--name", default="convert", help="of the files that are written")
    args = made.parse_args(rest, argparse.Namespace(overrides=overrides))
    if not 0 < args.share <= 1 or not 0 <= args.fit <= 1:
        raise InputError(f"--share, --fit: expected parts of 1, found {args.share} and {args.fit}.")
    steps = rundir.read_config(args.dense).steps
    if not 0 <= args.solve < steps * args.share:
        raise InputError(
            f"--solve: expected 0 to {int(steps * args.share) - 1} batches, fewer than the steps "
            f"there are, found {args.solve}."
        )
    return args


def configs(args: argparse.Namespace) -> dict[str, Config]:
    """The configs of the two new runs, which differ in nothing but the teacher and the beginning."""
    made = {}
    for name in ("converted", "scratch"):
        config = rundir.read_config(args.dense)
        steps = max(1, int(config.steps * args.share))
        with config.unlocked():
            config.model.mlp, config.steps, config.sample_tokens = args.mlp, steps, 0
            config.optimizer.warmup = min(config.optimizer.warmup, steps // 10)
            config.eval_every = config.checkpoint_every = max(1, steps // 5)
            config.log_every = max(1, min(config.log_every, steps // 20))
            config.init_from = config.teacher = str(args.dense) if name == "converted" else ""
            config.distill.fit_steps = int(steps * args.fit) if name == "converted" else 0
            if args.solve and name == "converted":
                config.distill.solve_batches, config.distill.fit_steps = args.solve, 0
                config.steps = steps - args.solve
            config.model.lookup_glu.train_tables |= args.solve > 0
        for path, text in args.overrides.items():
            set_value(config, path, text)
        made[name] = config
    return made


def score(workdir: Path) -> dict[str, Any]:
    """Steps and batches solved on, and the validation loss of the best checkpoint and its
    accuracy.
    """
    rows = metrics.evaluations(workdir)
    if not rows:
        raise InputError(f"--dense: {workdir} was never evaluated; let it train to its end.")
    best = min(rows, key=lambda row: row["loss"])
    solved = rundir.read_config(workdir).distill.solve_batches
    return {"steps": rows[-1]["step"] + solved, "loss": best["loss"], "accuracy": best["accuracy"]}


def main(argv: list[str]) -> int:
    """Trains what is missing, and writes NAME.md and NAME.json."""
    args = arguments(argv)
    results = {"dense": score(args.dense)}
    for name, config in configs(args).items():
        results[name] = score(finish(config, args.runs / name))
    lines = ["| | steps | validation loss | above dense | accuracy |", "|---|---|---|---|---|"]
    for name, found in results.items():
        above = found["loss"] - results["dense"]["loss"]
        lines.append(
            f"| {name} | {found['steps']} | {found['loss']:.4f} | {above:+.4f} | "
            f"{found['accuracy']:.2%} |"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.md").write_text("\n".join(lines) + "\n")
    told = {name: getattr(args, name) for name in ("mlp", "share", "fit", "solve")}
    told["results"] = results
    told["environment"] = rundir.describe_environment()["versions"]
    (args.out / f"{args.name}.json").write_text(json.dumps(told, indent=1) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(lambda argv: main(list(argv)))
