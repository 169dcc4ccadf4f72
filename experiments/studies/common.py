"""What the studies share: several kinds of one model, trained on the same data with the same steps
and seeds, and how they compare.

Runs go into RUNS/KIND-SEED; finished ones are read, not repeated, and interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from quweit_jax.commands import cli, train
from quweit_jax.config import Config, load_file, set_value
from quweit_jax.deploy.pack import packed_or_trained, stored_bytes
from quweit_jax.errors import InputError
from quweit_jax.reading import read_json
from quweit_jax.training import files, looks, loop, metrics, rundir, state

EXPERIMENTS = Path(__file__).parents[1]
# {kind: {seed: what `score` found}}
Results = dict[str, dict[int, dict[str, Any]]]


def arguments(
    description: str | None,
    *,
    variant: str,
    kinds: Sequence[str],
    seeds: Sequence[int],
    runs: str,
    name: str,
    default_kinds: Sequence[str] | None = None,
    more: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> argparse.Namespace:
    """The options every study has, and `overrides`: --config.PATH=VALUE for all of its runs.

    variant: the default; '' for a study without variants. kinds: those there are. default_kinds:
    those of a study that names none; None: all. more: options of its own, for argparse.
    """
    rest, overrides = cli.split_overrides(sys.argv[1:])
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data_dir", help="where TFDS finds the data set")
    if variant:
        made.add_argument("--variant", default=variant, help="of the config file")
    for option, about in more:
        made.add_argument(option, **about)
    made.add_argument(
        "--kinds",
        nargs="+",
        default=list(default_kinds or kinds),
        choices=list(kinds),
        help="some of them (default: %(default)s)",
    )
    made.add_argument(
        "--seeds", nargs="+", type=int, default=list(seeds), help="(default: %(default)s)"
    )
    made.add_argument("--steps", type=int, default=0, help="0: the variant's")
    made.add_argument(
        "--runs", type=Path, default=Path("runs") / runs, help="of run directories (%(default)s)"
    )
    made.add_argument(
        "--out", type=Path, default=EXPERIMENTS / "results", help="of tables (experiments/results)"
    )
    made.add_argument("--name", default=name, help="of the files that are written (%(default)s)")
    made.add_argument(
        "--table", action="store_true", help="of what NAME.json or RUNS hold; trains nothing"
    )
    return made.parse_args(rest, argparse.Namespace(overrides=overrides))


def run_config(args: argparse.Namespace, argument: str, changes: Mapping[str, Any]) -> Config:
    """A run's config: the file's, `changes`, then what the command line says of every run.

    argument: 'FILE.py:VARIANT,key=value' of experiments/configs. changes: flat, by dotted names.
    """
    config = load_file(f"{EXPERIMENTS / 'configs' / argument}")
    with config.unlocked():
        config.data.data_dir, config.sample_tokens = args.data_dir, 0
        config.update_from_flattened_dict(dict(changes))
        if args.steps:
            config.steps = args.steps
    for path, text in args.overrides.items():
        set_value(config, path, text)
    return config


def finish(config: Config, workdir: Path) -> Path:
    """Trains a model, or goes on with it, or finds it finished."""
    if rundir.is_finished(workdir, config.steps):
        return workdir
    sources: dict[str, Any] = {
        "initial": train.initial(config.init_from, workdir),
        "teacher": train.teacher(config.teacher),
    }
    cli.keep_memory()
    if not loop.fit(config, workdir, **sources).complete:
        raise SystemExit("stopped; the same command goes on")
    return workdir


def score(workdir: Path) -> dict[str, Any]:
    """The last checkpoint on the whole validation split, as trained and as deployed: 'loss',
    'accuracy', both with '_deployed'; 'parameters', and 'bytes_deployed'.
    """
    opened = rundir.open_run(workdir, step=rundir.read_config(workdir).steps)
    parts, variables = opened.setup, jax.device_get(opened.variables)
    step = state.make_eval_step(parts.model.apply)
    trained = loop.evaluate(step, variables, parts, 0)
    packed = packed_or_trained(parts.model, variables, parts.init_inputs)
    deployed = loop.evaluate(step, packed, parts, 0)
    return {
        "loss": trained["loss"],
        "loss_deployed": deployed["loss"],
        "accuracy": trained["accuracy"],
        "accuracy_deployed": deployed["accuracy"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "bytes_deployed": stored_bytes(packed),
    }


def conduct(
    args: argparse.Namespace,
    argument: Callable[[str], str],
    score: Callable[[Path, str], dict[str, Any]],
) -> Results:
    """Every kind and seed, trained and scored; with --table those that NAME.json has.

    argument: kind -> 'FILE.py:VARIANT,key=value' of experiments/configs, without seed and steps.
    score: (run directory, kind) -> what is to be known of it.
    """
    if args.table:
        return known(args)
    results: Results = {kind: {} for kind in args.kinds}
    for seed in args.seeds:
        for kind in args.kinds:
            config = run_config(args, argument(kind), {"seed": seed})
            results[kind][seed] = score(finish(config, args.runs / f"{kind}-{seed}"), kind)
            print(f"{kind} seed {seed}: {json.dumps(results[kind][seed])[:400]}", flush=True)
    return results


def read(args: argparse.Namespace) -> dict[str, Any]:
    """NAME.json, as `write` left it.

    Raises:
      InputError: there is none.
    """
    path = args.out / f"{args.name}.json"
    if not path.is_file():
        raise InputError(f"--table: there is no {path} to read; leave --table out to make it.")
    return read_json(path, "study")


def known(args: argparse.Namespace) -> Results:
    """The results that NAME.json has, of the kinds and seeds that are asked for."""
    found = read(args)["results"]
    each = {kind: {s: of[str(s)] for s in args.seeds if str(s) in of} for kind, of in found.items()}
    return {kind: each[kind] for kind in args.kinds if each.get(kind)}


def note(args: argparse.Namespace, kind: str, seed: int, found: Mapping[str, Any]) -> None:
    """Keeps in NAME.json what was found of a run; another process may have added to the file."""
    path = args.out / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.exclusive(path.parent):
        results = read(args)["results"] if path.exists() else {}
        results.setdefault(kind, {})[str(seed)] = found
        versions = rundir.describe_environment()["versions"]
        files.replace_json(path, {"results": results, "environment": versions})


def mean_and_error(values: list[float]) -> str:
    """A mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def shares(values: Sequence[float], digits: int) -> str:
    """The mean of shares of one in percent, and each where there are several."""
    each = f" ({', '.join(f'{x:.{digits}%}' for x in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}%}{each}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Writes a study's table, and shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def write(
    args: argparse.Namespace,
    results: Results,
    header: Sequence[str],
    row: Callable[[str, list[dict[str, Any]]], Sequence[str]],
    title: str,
    measure: str = "loss",
) -> None:
    """NAME.md, a table with a row a kind; NAME.json, everything; NAME.png, validation losses, means
    over seeds in a band from the lowest to the highest, or what the kinds end at (`measure`) where
    NAME.json is read and has no curves.
    """
    rows = [row(kind, list(by_seed.values())) for kind, by_seed in results.items()]
    write_lines(args.out / f"{args.name}.md", markdown(header, rows))
    if args.table:  # what was found stays as it is
        told = read(args)
    else:
        told = {
            "results": results,
            "environment": rundir.describe_environment()["versions"],
            "curves": {kind: curve(args, kind, by_seed) for kind, by_seed in results.items()},
        }
        (args.out / f"{args.name}.json").write_text(json.dumps(told, indent=1) + "\n")
    path = args.out / f"{args.name}.png"
    if "curves" in told:
        curves = {kind: told["curves"][kind] for kind in results}
        metrics.plot_losses(curves, path, f"{title}, {len(args.seeds)} seed(s)", unit="nats")
    else:  # of a study that kept none
        each = {kind: [r[measure] for r in by_seed.values()] for kind, by_seed in results.items()}
        names = {kind: kind.replace("_", " ") for kind in each}
        label, highest = title.replace("loss", measure), measure == "accuracy"
        draw_ends(each, path, names, f"{label} at the end", highest_first=highest)


def curve(args: argparse.Namespace, kind: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """A kind's validation losses: means over its seeds, the lowest and the highest."""
    each = [metrics.evaluations(args.runs / f"{kind}-{seed}") for seed in seeds]
    return [
        {
            "step": rows[0]["step"],
            "split": "validation",
            "loss": statistics.mean(r["loss"] for r in rows),
            "low": min(r["loss"] for r in rows),
            "high": max(r["loss"] for r in rows),
        }
        for rows in zip(*each)
    ]


def draw_ends(
    found: Mapping[str, Sequence[float]],
    path: Path,
    names: Mapping[str, str],
    label: str,
    *,
    beside: Mapping[str, str] | None = None,
    highest_first: bool = False,
) -> None:
    """A PNG of each kind's seeds, the band between them and their mean, the best at the top, with
    a few letters `beside` it.
    """
    from matplotlib.figure import Figure

    order = sorted(found, key=lambda kind: statistics.mean(found[kind]), reverse=not highest_first)
    figure = Figure(figsize=(8, 0.42 * len(order) + 1.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(order):
        values, color = found[kind], looks.style(kind, 0)["color"]
        axes.plot([min(values), max(values)], [place] * 2, color=color, alpha=0.3, linewidth=6)
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.35, markersize=5)
        axes.plot([statistics.mean(values)], [place], "D", color=color, markersize=7)
        if beside:
            at = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
            axes.text(1.0, place, f"  {beside[kind]}", **at)
    axes.set_yticks(range(len(order)), [textwrap.fill(names[k], 34) for k in order], fontsize=9)
    axes.set_ylim(-0.6, len(order) - 0.4)
    figure.supxlabel(f"{label}; seeds pale, means dark", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
