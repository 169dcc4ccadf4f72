"""Dense, weightless and no MLPs in the same GPT: same data, batches, steps and seeds. Makes the
table and curves in experiments/results/.

    python -m experiments.studies.weightless_vs_dense --data_dir=FOLDER [--seeds 0 1 2] [--kinds
    dense weightless none] [--out=experiments/results]

Runs go into runs/weightless_vs_dense/KIND-SEED; finished ones are read, not repeated, and
interrupted ones go on. The weightless models are evaluated as deployed (tables at 1 bit, sums in
int8 and int32), the dense ones in float32; every loss is over the whole validation text (nanoGPT's
last 10 %).
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import jax

from experiments.studies import common
from quweit_jax.commands import cli
from quweit_jax.deploy.pack import describe, pack
from quweit_jax.training import loop, metrics, rundir, state


def score(workdir: Path, kind: str) -> dict[str, Any]:
    """The last checkpoint's loss on the whole validation text, as deployed, and the bytes of its
    MLPs.
    """
    opened = rundir.open_run(workdir, step=rundir.read_config(workdir).steps)
    apply, variables, mlp_bytes = opened.setup.model.apply, jax.device_get(opened.variables), 0
    plain = loop.evaluate(state.make_eval_step(apply), variables, opened.setup, 0)["loss"]
    if kind == "weightless":
        inputs = opened.setup.init_inputs
        variables = pack(opened.setup.model, variables, inputs)
        mlp_bytes = describe(opened.setup.model, variables, inputs)["block_bytes"]
    elif kind == "dense":
        blocks = [v["mlp"] for k, v in variables["params"].items() if k.startswith("block_")]
        mlp_bytes = sum(
            leaf.size for leaf in jax.tree.leaves(blocks)
        )  # if every weight were one byte
    loss = loop.evaluate(state.make_eval_step(apply), variables, opened.setup, 0)["loss"]
    seconds = metrics.read_rows(workdir / "metrics.jsonl")[-1]["seconds"]
    return {"loss": loss, "loss_float": plain, "mlp_bytes": mlp_bytes, "seconds": seconds}


def row(kind: str, runs: list[dict[str, Any]]) -> list[str]:
    """A kind's row of the table."""
    form = {
        "dense": " (int8; 4x in float32)",
        "weightless": " (all of it: tables 1 bit, sums int8, wiring, thresholds)",
        "none": "",
    }
    losses = [r["loss"] for r in runs]
    return [
        kind,
        f"{statistics.mean(losses):.4f}",
        ", ".join(f"{x:.4f}" for x in losses),
        f"{runs[0]['mlp_bytes']:,}{form[kind]}",
    ]


def main() -> None:
    """Trains what is missing, then writes table and curves."""
    settings: dict[str, Any] = {
        "variant": "nanogpt_cpu",
        "runs": "weightless_vs_dense",
        "name": "nanogpt_cpu_tiny_shakespeare",
    }
    args = common.arguments(
        __doc__, kinds=["dense", "weightless", "none"], seeds=[0, 1, 2], **settings
    )
    results = common.conduct(args, lambda kind: f"gpt_char.py:{args.variant},mlp={kind}", score)
    common.write(
        args,
        results,
        ["MLP", "validation loss, mean", "each seed", "bytes of all MLPs at inference"],
        row,
        "validation loss",
    )


if __name__ == "__main__":
    cli.run(lambda _: main())
