"""Language models of one size on the same text, tokens and steps, each at the best of the same
learning rates, over several seeds; what they are and what is matched is in
experiments/configs/compare_lm.py.

    python -m experiments.studies.compare_lm --data_dir=FOLDER [--variant=cpu] [--kinds gpt quweit
    ...] [--rates 5e-4 1e-3 ...] [--seeds 0 1 2] [--speeds] [--table]

How rates and seeds are chosen, and where runs go, is in tuned.py. NAME.json keeps what was found as
it comes; --table writes table and plot from what is finished, and trains nothing. --speeds measures
the training steps of all kinds anew, which take turns in one process: on a quiet machine.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments.configs.compare_lm import KINDS, RATES
from experiments.studies import common
from experiments.studies.tuned import Study
from quweit_jax.commands import cli
from quweit_jax.config import Config
from quweit_jax.data import pipeline
from quweit_jax.training import sharding
from quweit_jax.training.setup import assemble


def title(kind: str) -> str:
    """What the table and the plot call a kind."""
    return kind.replace("_", " ")


def config_of(args: Any, kind: str, rate: str, seed: int) -> Config:
    """A run's config."""
    changes = {"seed": seed, "optimizer.learning_rate": float(rate)}
    return common.run_config(args, f"compare_lm.py:{args.variant},kind={kind}", changes)


def speeds(configs: Mapping[str, Config], rounds: int = 15) -> dict[str, float]:
    """Tokens a second of each kind's compiled training step: all kinds take turns in one process,
    and the medians count.
    """
    states, steps, batches, tokens = {}, {}, {}, {}
    for kind, config in configs.items():
        parts = assemble(config)
        states[kind] = parts.init_state()
        steps[kind] = parts.train_step(states[kind])
        batch = next(
            pipeline.train_batches(parts.data.train, parts.config.batch_size, 0, prefetch=0)
        )
        batches[kind] = sharding.put_batch(batch, sharding.batch_sharding(parts.mesh))
        tokens[kind] = parts.config.batch_size * parts.config.model.context
    seconds: dict[str, list[float]] = {kind: [] for kind in configs}
    for _ in range(2 + rounds):
        for kind in configs:
            begun = time.perf_counter()
            states[kind], values = steps[kind](states[kind], batches[kind])
            jax.block_until_ready((states[kind], values))
            seconds[kind].append(time.perf_counter() - begun)
    return {kind: tokens[kind] / statistics.median(each[2:]) for kind, each in seconds.items()}


def row(study: Study, kind: str) -> list[str] | None:
    """A kind's row of the table, None if nothing of it is finished at its best rate."""
    found = study.columns(kind, "loss")
    if found is None:
        return None
    first, measured = study.scores(kind)[0], study.found.get("speeds", {})
    speed = "-"
    if kind in measured:
        relative = measured[kind] / next(iter(measured.values()))
        speed = f"{measured[kind]:,.0f} ({relative:.2f})"
    return [title(kind), f"{first['parameters']:,}", f"{first['bytes_deployed']:,}", speed, *found]


def write(study: Study) -> None:
    """NAME.md and NAME.png, of what is finished."""
    args = study.args
    header = ["model", "parameters", "bytes at inference", "training tokens/s (of the first)"]
    rows = {kind: row(study, kind) for kind in args.kinds}
    finished = {kind: cells for kind, cells in rows.items() if cells}
    lines = common.markdown([*header, *study.header("loss")], list(finished.values()))
    common.write_lines(args.out / f"{args.name}.md", lines)
    common.draw_ends(
        {kind: [s["loss_deployed"] for s in study.scores(kind)] for kind in finished},
        args.out / f"{args.name}.png",
        {kind: title(kind) for kind in finished},
        f"compare_lm, {args.variant}: validation loss as deployed, nats",
        beside={k: f"{study.scores(k)[0]['bytes_deployed'] / 1e6:.1f} MB" for k in finished},
    )


def main() -> None:
    """Trains what is missing, a run at a time, then writes table and plot."""
    rates = [f"{rate:.0e}".replace("e-0", "e-") for rate in RATES]
    args = common.arguments(
        __doc__,
        variant="cpu",
        kinds=list(KINDS),
        seeds=[0, 1, 2],
        runs="compare_lm",
        name="compare_lm_cpu",
        more=[
            ("--rates", {"nargs": "+", "default": rates}),
            ("--speeds", {"action": "store_true", "help": "measures the training steps anew"}),
        ],
    )
    study = Study(args, functools.partial(config_of, args))
    if not args.table:
        study.train_all()
    if args.speeds:
        configs = {kind: config_of(args, kind, args.rates[0], 0) for kind in args.kinds}
        measured = speeds(configs)
        with study.changed() as found:
            found["speeds"] = measured
    write(study)


if __name__ == "__main__":
    cli.run(lambda _: main())
