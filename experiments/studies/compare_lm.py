"""Language models of one size on the same text, tokens and steps; what they are and what is
matched is in experiments/configs/compare_lm.py.

    python -m experiments.studies.compare_lm --data_dir=FOLDER [--variant=cpu] [--kinds gpt quweit
    ...] [--seeds 0]

Runs go into runs/compare_lm/KIND-SEED; finished ones are read, not repeated, and interrupted ones
go on. Every loss is over the whole validation text, of the model as trained and as deployed; speeds
are of all kinds' training steps, taking turns in one process.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import jax

from experiments.configs.compare_lm import KINDS
from experiments.studies import common
from quweit_jax.commands import cli
from quweit_jax.data import pipeline
from quweit_jax.training import rundir, sharding
from quweit_jax.training.setup import assemble


def score(workdir: Path, kind: str) -> dict[str, Any]:
    """What `common.score` finds, 'loss' as deployed and 'loss_float' as trained."""
    found = common.score(workdir)
    return {
        "parameters": found["parameters"],
        "bytes_deployed": found["bytes_deployed"],
        "loss_float": found["loss"],
        "loss": found["loss_deployed"],
    }


def speeds(workdirs: dict[str, Path], rounds: int = 15) -> dict[str, float]:
    """Tokens a second of each kind's compiled training step: all kinds take turns in one process,
    and the medians count.
    """
    states, steps, batches, tokens = {}, {}, {}, {}
    for kind, workdir in workdirs.items():
        parts = assemble(rundir.read_config(workdir))
        states[kind] = parts.init_state()
        steps[kind] = parts.train_step(states[kind])
        batch = next(
            pipeline.train_batches(parts.data.train, parts.config.batch_size, 0, prefetch=0)
        )
        batches[kind] = sharding.put_batch(batch, sharding.batch_sharding(parts.mesh))
        tokens[kind] = parts.config.batch_size * parts.config.model.context
    seconds: dict[str, list[float]] = {kind: [] for kind in workdirs}
    for _ in range(2 + rounds):
        for kind in workdirs:
            begun = time.perf_counter()
            states[kind], values = steps[kind](states[kind], batches[kind])
            jax.block_until_ready((states[kind], values))
            seconds[kind].append(time.perf_counter() - begun)
    return {kind: tokens[kind] / statistics.median(each[2:]) for kind, each in seconds.items()}


def row(kind: str, runs: list[dict[str, Any]]) -> list[str]:
    """A kind's row of the table."""
    losses, plain = [r["loss"] for r in runs], [r["loss_float"] for r in runs]
    speed, relative = (
        runs[0]["training_tokens_per_second"],
        runs[0]["training_speed_of_the_first_kind"],
    )
    each = f" ({', '.join(f'{x:.4f}' for x in losses)})" if len(runs) > 1 else ""
    size = f"{runs[0]['bytes_deployed']:,}"
    return [
        kind.replace("_", " "),
        f"{runs[0]['parameters']:,}",
        size,
        f"{speed:,.0f} ({relative:.2f})",
        f"{statistics.mean(plain):.4f}",
        f"{statistics.mean(losses):.4f}{each}",
    ]


def main() -> None:
    """Trains what is missing, then writes table and curves."""
    args = common.arguments(
        __doc__,
        variant="cpu",
        kinds=list(KINDS),
        seeds=[0],
        runs="compare_lm",
        name="compare_lm_cpu",
    )
    results = common.conduct(args, lambda kind: f"compare_lm.py:{args.variant},kind={kind}", score)
    if not args.table:
        add_speeds(args, results)
    header = [
        "model",
        "parameters",
        "bytes at inference",
        "training tokens/s (of the first)",
        "validation loss",
        "as deployed",
    ]
    common.write(args, results, header, row, f"compare_lm, {args.variant}: validation loss")


def add_speeds(args: Any, results: common.Results) -> None:
    """What each kind trains a second, and against the first."""
    found = speeds({kind: args.runs / f"{kind}-{args.seeds[0]}" for kind in args.kinds})
    for kind in args.kinds:
        for result in results[kind].values():
            relative = found[kind] / found[args.kinds[0]]
            result |= {
                "training_tokens_per_second": found[kind],
                "training_speed_of_the_first_kind": relative,
            }


if __name__ == "__main__":
    cli.run(lambda _: main())
