"""Trained dense runs, converted to other channel mixers in a tenth of their steps, beside models of
the new kind that train from scratch for as many.

    python -m experiments.studies.convert --dense RUN [RUN ...] [--solve=16 --rate=1.2e-4]
    python -m experiments.studies.convert --dense RUN [RUN ...] --mlp=dense --solve=16 --rate=4e-4
    --continued --config.model.linear=ternary --config.distill.weight=0.5

The first gives them other mixers, the second makes every projection ternary. Each dense run, of one
config but for the seed, is its own student's teacher and beginning (docs/howto/distill.md);
--continued adds models that begin likewise and then have no teacher. Runs go into
RUNS/NAME-converted, RUNS/NAME-continued and RUNS/NAME-scratch, NAME being the dense run's folder;
the same command goes on with what is there, and reads what is finished. Every last checkpoint is
scored on the whole validation split, as deployed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from experiments.studies.common import (
    EXPERIMENTS,
    finish,
    markdown,
    mean_and_error,
    score,
    write_lines,
)
from quweit_jax.commands import cli
from quweit_jax.config import Config, set_value
from quweit_jax.errors import InputError
from quweit_jax.layers import mlp
from quweit_jax.training import rundir
from quweit_jax.training.distill import DistillConfig

# What a conversion that is solved for changes in the dense run's config (docs/howto/distill.md).
SOLVED = {
    "model.lookup_glu.table_groups": 4,
    "distill.weight": 0.9,
    "optimizer.warmup": 10,
    "optimizer.min_ratio": 0.0,
}


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options, and `overrides`: --config.PATH=VALUE for all new runs."""
    rest, overrides = cli.split_overrides(argv)
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--dense", type=Path, nargs="+", required=True, help="the run directories to convert"
    )
    made.add_argument(
        "--mlp", default="lookup_glu", choices=[k for k in mlp.kinds() if k != "none"]
    )
    made.add_argument("--continued", action="store_true", help="also without a teacher")
    made.add_argument("--share", type=float, default=0.1, help="of the dense run's steps, at most")
    made.add_argument("--fit", type=float, default=0.5, help="the part of them that fits mixers")
    made.add_argument(
        "--solve",
        type=int,
        default=0,
        help="batches on which LookupGLUs or ternary projections are computed, each a step",
    )
    made.add_argument(
        "--rate", type=float, default=0.0, help="of converted runs; 0: the dense run's"
    )
    made.add_argument("--runs", type=Path, default=Path("runs/convert"))
    made.add_argument("--out", type=Path, default=EXPERIMENTS / "results")
    made.add_argument("--name", default="convert", help="of the files that are written")
    args = made.parse_args(rest, argparse.Namespace(overrides=overrides))
    if not 0 < args.share <= 1 or not 0 <= args.fit <= 1:
        raise InputError(f"--share, --fit: expected parts of 1, found {args.share} and {args.fit}.")
    names = [dense.name for dense in args.dense]
    if len(set(names)) < len(names):
        raise InputError(f"--dense: expected folders of different names, found {names}.")
    steps = min(rundir.read_config(dense).steps for dense in args.dense)
    if not 0 <= args.solve < steps * args.share:
        raise InputError(
            f"--solve: expected 0 to {int(steps * args.share) - 1} batches, fewer than the steps "
            f"there are, found {args.solve}."
        )
    return args


def configs(args: argparse.Namespace, dense: Path) -> dict[str, Config]:
    """The configs of a dense run's new ones: 'scratch' trains as the dense run did, 'converted' has
    a teacher, a beginning and the schedule that suits them, 'continued' the same but no teacher.
    """
    made = {}
    for name in ("converted", *(["continued"] if args.continued else []), "scratch"):
        config = rundir.read_config(dense)
        steps = max(1, int(config.steps * args.share))
        with config.unlocked():
            config.model.mlp, config.steps, config.sample_tokens = args.mlp, steps, 0
            config.optimizer.warmup = min(config.optimizer.warmup, steps // 10)
            config.eval_every = config.checkpoint_every = max(1, steps // 5)
            config.log_every = max(1, min(config.log_every, steps // 20))
            if args.mlp == "lookup_glu":
                config.model.lookup_glu.train_tables |= args.solve > 0
        if name != "scratch":
            _begin_with(config, args, dense)
        for path, text in args.overrides.items():
            set_value(config, path, text)
        if name == "continued":
            with config.unlocked():
                if args.solve:  # which takes a teacher, who then says nothing more
                    config.distill.update(weight=0.0, blocks=0.0)
                else:
                    config.teacher = ""
                    config.distill.update(dataclasses.asdict(DistillConfig()))
        made[name] = config
    return made


def _begin_with(config: Config, args: argparse.Namespace, dense: Path) -> None:
    with config.unlocked():
        config.init_from = config.teacher = str(dense)
        config.distill.fit_steps = 0 if args.solve else int(config.steps * args.fit)
        config.distill.solve_batches = args.solve
        config.steps -= args.solve
        if args.solve:
            config.update_from_flattened_dict(SOLVED)
        if args.rate:
            config.optimizer.learning_rate = args.rate


def scored(workdir: Path) -> dict[str, Any]:
    """`common.score` of a run, with its steps, batches solved on among them."""
    config = rundir.read_config(workdir)
    if not rundir.is_finished(workdir, config.steps):
        raise InputError(f"--dense: {workdir} has not been trained to its end; let it go on.")
    return {"steps": config.steps + config.distill.solve_batches, **score(workdir)}


def main(argv: list[str]) -> int:
    """Trains what is missing, and writes NAME.md and NAME.json."""
    args = arguments(argv)
    results: dict[str, list[dict[str, Any]]] = {}
    for dense in args.dense:
        results.setdefault("dense", []).append(scored(dense))
        for name, config in configs(args, dense).items():
            results.setdefault(name, []).append(
                scored(finish(config, args.runs / f"{dense.name}-{name}"))
            )
    lines = markdown(
        ["", "steps", "validation loss as deployed", "above dense", "accuracy", "below dense"],
        [_row(name, found, results["dense"]) for name, found in results.items()],
    )
    write_lines(args.out / f"{args.name}.md", lines)
    told = {name: getattr(args, name) for name in ("mlp", "share", "fit", "solve", "rate")}
    told["results"] = results
    told["environment"] = rundir.describe_environment()["versions"]
    (args.out / f"{args.name}.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


def _row(name: str, found: list[dict[str, Any]], dense: list[dict[str, Any]]) -> list[str]:
    """Means over runs; differences are of each run from its own dense one."""
    losses, accuracies = ([run[f"{of}_deployed"] for run in found] for of in ("loss", "accuracy"))
    above = [run["loss_deployed"] - own["loss_deployed"] for run, own in zip(found, dense)]
    below = [own["accuracy_deployed"] - run["accuracy_deployed"] for run, own in zip(found, dense)]
    points = f"{100 * statistics.mean(below):.2f} points"
    return [
        name,
        f"{found[0]['steps']}",
        mean_and_error(losses),
        mean_and_error(above),
        f"{statistics.mean(accuracies):.2%}",
        points,
    ]


if __name__ == "__main__":
    cli.run(lambda argv: main(list(argv)))
