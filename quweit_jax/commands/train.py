"""python -m quweit_jax.train --config=experiments/gpt_char.py:nanogpt_cpu,mlp=weightless
--workdir=runs/x [--config.a.b=v]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quweit_jax import config as configs
from quweit_jax.commands import cli
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Trains, or goes on with what is in the run directory."""
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser(
        "train", "Trains a model, or goes on with the run in --workdir where it ended."
    )
    parser.add_argument(
        "--config",
        help="FILE.py[:VARIANT,key=value,...]; leave it out to go on with an existing run",
    )
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument(
        "--progress",
        choices=["auto", "on", "off"],
        default="auto",
        help="the progress bar (auto: on a terminal)",
    )
    parser.epilog = (
        "--config.PATH=VALUE sets any key of the config, such as --config.steps=500 or "
        "--config.model.width=256."
    )
    args = parser.parse_args(rest)
    workdir = Path(args.workdir)
    from quweit_jax.commands import initial, summary
    from quweit_jax.training import loop, run

    if args.config is None and not (workdir / "config.json").exists():
        raise InputError(
            f"--config: expected an experiment file to begin a run in {workdir}, such as "
            "--config=experiments/gpt_char.py:quick."
        )
    config = configs.load_file(args.config) if args.config else run.read_config(workdir)
    for path, text in overrides.items():
        configs.set_value(config, path, text)
    cli.join_processes()
    begin = initial.reader(config.get("init_from") or "", workdir)
    summary.announce(config, workdir)
    result = loop.fit(
        config,
        workdir,
        progress={"auto": None, "on": True, "off": False}[args.progress],
        initial=begin,
    )
    summary.summarize(result, workdir)
    return 0
