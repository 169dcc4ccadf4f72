"""Five forms of the same ViT on CIFAR-10: dense, weightless and no MLPs in floats; dense and
weightless MLPs in integers.

    python -m experiments.studies.vit_study --data_dir=FOLDER [--variant=quick] [--seeds 0] [--kinds
    dense weightless ...] [--out=experiments/results]

Same data, batches, steps and seeds. Runs go into runs/vit_cifar/KIND-SEED; finished ones are read,
not repeated, and interrupted ones go on. Accuracy is that of the last checkpoint on all test
images; integer models are also evaluated as deployed, in integers alone, and every image on which
the two forms decide differently is listed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.studies import common
from quweit_jax.commands import cli
from quweit_jax.data import pipeline
from quweit_jax.deploy.pack import describe, pack, stored_bytes
from quweit_jax.training import metrics, rundir
from quweit_jax.training.setup import Setup

KINDS = {
    "dense": "mlp=dense",
    "weightless": "mlp=weightless",
    "none": "mlp=none",
    "integer": "mlp=dense,integer=True",
    "integer_weightless": "mlp=weightless,integer=True",
}


def all_logits(
    parts: Setup, variables: Any, batch_size: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) and labels (N,) of the whole validation split, in order."""
    apply = jax.jit(parts.model.apply)
    logits, labels = [], []
    for batch in pipeline.eval_batches(parts.data.validation, batch_size):
        real = batch["weights"] > 0
        logits.append(np.asarray(apply(variables, batch["inputs"]))[real])
        labels.append(batch["targets"][real])
    return np.concatenate(logits), np.concatenate(labels)


def score(workdir: Path, kind: str) -> dict[str, Any]:
    """Accuracy of the last checkpoint on all test images, the bytes of its weights, and how the
    integer forms differ.
    """
    opened = rundir.open_run(workdir, step=rundir.read_config(workdir).steps)
    parts, variables = opened.setup, jax.device_get(opened.variables)
    logits, labels = all_logits(parts, variables)
    right = logits.argmax(-1) == labels
    result: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "seconds": metrics.read_rows(workdir / "metrics.jsonl")[-1]["seconds"],
    }
    if "weightless" in kind and "integer" not in kind:
        packed = pack(parts.model, variables, parts.init_inputs)
        result["mlp_bytes"] = describe(parts.model, packed, parts.init_inputs)["block_bytes"]
    if "integer" in kind:
        constants = pack(parts.model, variables, parts.init_inputs)
        deployed, _ = all_logits(parts, constants)
        differ = np.flatnonzero(deployed.argmax(-1) != logits.argmax(-1))
        result |= {
            "accuracy_deployed": float((deployed.argmax(-1) == labels).mean()),
            "model_bytes_deployed": stored_bytes(constants),
            "largest_logit_difference": float(np.abs(deployed - logits).max()),
            "logit_range": float(np.ptp(logits)),
            "images_decided_differently": [
                {
                    "index": int(i),
                    "label": int(labels[i]),
                    "training": int(logits[i].argmax()),
                    "deployed": int(deployed[i].argmax()),
                    "margin": margin(logits[i]),
                }
                for i in differ
            ],
        }
    return result


def margin(logits: np.ndarray) -> float:
    """How far the largest logit is above the next."""
    first, second = np.sort(logits)[::-1][:2]
    return float(first - second)


def row(kind: str, runs: list[dict[str, Any]]) -> list[str]:
    """A kind's row of the table."""

    def mean(key: str) -> str:
        return common.shares([run[key] for run in runs], 2)

    deployed, differ = "-", "-"
    if "accuracy_deployed" in runs[0]:
        deployed, differ = (
            mean("accuracy_deployed"),
            ", ".join(str(len(r["images_decided_differently"])) for r in runs),
        )
    return [
        kind.replace("_", " + "),
        mean("accuracy"),
        deployed,
        differ,
        f"{runs[0]['parameters']:,}",
    ]


def main() -> None:
    """Trains what is missing, then writes table and curves."""
    args = common.arguments(
        __doc__,
        variant="quick",
        kinds=list(KINDS),
        seeds=[0],
        runs="vit_cifar",
        name="vit_quick_cifar10",
    )
    results = common.conduct(args, lambda kind: f"vit_cifar.py:{args.variant},{KINDS[kind]}", score)
    header = [
        "model",
        "test accuracy",
        "as deployed, in integers",
        "images decided differently",
        "parameters",
    ]
    common.write(args, results, header, row, "CIFAR-10 validation loss", "accuracy")


if __name__ == "__main__":
    cli.run(lambda _: main())
