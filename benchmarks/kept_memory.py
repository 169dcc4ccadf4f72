"""Training steps with and without the memory that the command keeps (`commands.cli.keep_memory`):
taskset -c 0 python benchmarks/kept_memory.py --out=benchmarks/results/kept_memory.txt

How a process allocates cannot be taken back, so each way has processes of its own, in turn: each
trains a few steps of a config on one batch and tells the median of its own CPU time, which counts
the system's work on faults, and how many pages it was handed a step.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import timing

from quweit_jax import models
from quweit_jax.commands import cli
from quweit_jax.config import load_file
from quweit_jax.training import optimizers, sharding, state

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"
STEPS = 25
# config, inputs of a batch, classes
CASES = {
    "GPT with dense MLPs": ("gpt_char.py:quick,mlp=dense", (12, 64), 96),
    "GPT with LookupGLU": ("gpt_char.py:quick,mlp=lookup_glu", (12, 64), 96),
    "classifier, 1,000 tables, learned wiring": (
        "dwn_mnist.py:692,luts=1000",
        (100, 28, 28, 1),
        10,
    ),
}


def training(name: str) -> Callable[[], object]:
    """A call that runs one step of a case to the end."""
    argument, shape, classes = CASES[name]
    config = load_file(f"{CONFIGS / argument}")
    rng = np.random.default_rng(0)
    if len(shape) == 2:
        batch = {key: rng.integers(0, classes, shape, np.int32) for key in ("inputs", "targets")}
    else:
        targets = rng.integers(0, classes, shape[:1], np.int32)
        batch = {"inputs": rng.random(shape, np.float32), "targets": targets}
    model = models.build(config.model.to_dict(), classes)
    optimizer = optimizers.make_optimizer(
        optimizers.OptimizerConfig(**config.optimizer.to_dict()), config.steps
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    init = state.make_init(model, optimizer, 0, ema=False)
    holder = [state.init_state(init, batch["inputs"][:1], mesh)]
    shardings = jax.tree.map(lambda x: x.sharding, holder[0])
    step = state.make_train_step(model, optimizer, state_shardings=shardings, mesh=mesh)
    placed = sharding.put_batch(batch, sharding.batch_sharding(mesh))

    def call() -> None:
        holder[0], metrics = step(holder[0], placed)
        jax.block_until_ready((holder[0], metrics))

    return call


def child(name: str, keep: bool) -> None:
    """Prints [median seconds of a step, pages a step] of this process."""
    if keep:
        cli.keep_memory()
    call = training(name)
    for _ in range(3):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = timing.samples({name: call}, STEPS, warmup=0)[name]
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(json.dumps([statistics.median(seconds), pages / STEPS]))


def measured(name: str, keep: bool) -> list[float]:
    """What a process of its own prints."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, __file__, "--case", name, "--keep", str(int(keep))]
    told = subprocess.run(command, env=plain, check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    """Each case both ways, in turn."""
    parser: argparse.ArgumentParser = timing.parser(__doc__, rounds=5)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        child(args.case, bool(args.keep))
        return
    lines = [
        f"CPU time of a training step, medians of {STEPS} steps, then of {args.rounds} processes",
        timing.machine(),
        f"on {len(os.sched_getaffinity(0))} core(s) of a machine that may be busy",
    ]
    for name in CASES:
        rounds = [[measured(name, keep) for keep in (False, True)] for _ in range(args.rounds)]
        times, pages = [
            [statistics.median(both[way][of] for both in rounds) for way in (0, 1)] for of in (0, 1)
        ]
        ratio = statistics.median(both[0][0] / both[1][0] for both in rounds)
        lines.append(
            f"{name}: {1e3 * times[0]:.1f} ms as glibc does by default, {1e3 * times[1]:.1f} ms "
            f"with memory kept, {ratio:.2f} times faster; {pages[0]:,.0f} and {pages[1]:,.0f} "
            "pages a step"
        )
        print(lines[-1], flush=True)
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
