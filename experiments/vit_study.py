"""Five forms of the same ViT on CIFAR-10: dense, weightless and no MLPs in floats; dense and weightless MLPs in integers.

    python -m experiments.vit_study --data_dir=FOLDER [--variant=quick] [--seeds 0] [--kinds dense weightless ...] [--out=experiments/results]

Same data, batches, steps and seeds. Runs go into runs/vit_cifar/KIND-SEED; finished ones are read, not repeated, and interrupted ones
go on. Accuracy is that of the last checkpoint on all test images; integer models are also evaluated as deployed, in integers alone,
and every image on which the two forms decide differently is listed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quweit_jax import configs
from quweit_jax.data import pipeline
from quweit_jax.inference import integer, packed
from quweit_jax.training import loop, metrics, run

HERE = Path(__file__).parent
KINDS = {
    "dense": "mlp=dense",
    "weightless": "mlp=weightless",
    "none": "mlp=none",
    "integer": "mlp=dense,integer=True",
    "integer_weightless": "mlp=weightless,integer=True",
}


def train(kind: str, seed: int, variant: str, data_dir: str | None, root: Path, steps: int) -> Path:
    """Trains one model, or goes on with it, or finds it finished."""
    workdir = root / f"{kind}-{seed}"
    config = configs.load_file(f"{HERE / 'vit_cifar.py'}:{variant},{KINDS[kind]},seed={seed}" + (f",steps={steps}" if steps else ""))
    with config.unlocked():
        config.data.data_dir = data_dir
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    if not any(row["split"] == "validation" and row["step"] == config.steps for row in rows) and not loop.fit(config, workdir).complete:
        raise SystemExit("stopped; the same command goes on")
    return workdir


def all_logits(parts: run.Parts, variables: Any, batch_size: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, classes) and labels (N,) of the whole validation split, in order."""
    apply = jax.jit(parts.model.apply)
    logits, labels = [], []
    for batch in pipeline.eval_batches(parts.dataset.validation, batch_size):
        real = batch["weights"] > 0
        logits.append(np.asarray(apply(variables, batch["inputs"]))[real])
        labels.append(batch["targets"][real])
    return np.concatenate(logits), np.concatenate(labels)


def score(workdir: Path, kind: str) -> dict[str, Any]:
    """Accuracy of the last checkpoint on all test images, the bytes of its weights, and how the integer forms differ."""
    opened = run.open_run(workdir, step=run.read_config(workdir).steps)
    parts, variables = opened.parts, jax.device_get(opened.variables)
    logits, labels = all_logits(parts, variables)
    right = logits.argmax(-1) == labels
    result: dict[str, Any] = {
        "accuracy": float(right.mean()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "seconds": metrics.read_rows(workdir / "metrics.jsonl")[-1]["seconds"],
    }
    if "weightless" in kind and "integer" not in kind:
        result["mlp_bytes"] = sum(map(packed.block_bytes, packed.pack(variables)["blocks"].values()))
    if "integer" in kind:
        constants = integer.pack(parts.model, variables, parts.dataset.image_shape)  # type: ignore[arg-type]
        deployed, _ = all_logits(parts, constants)
        differ = np.flatnonzero(deployed.argmax(-1) != logits.argmax(-1))
        result |= {
            "accuracy_deployed": float((deployed.argmax(-1) == labels).mean()),
            "model_bytes_deployed": integer.packed_bytes(constants),
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


def write_results(results: dict[str, dict[int, dict[str, Any]]], root: Path, out: Path, name: str) -> None:
    """NAME.json, NAME.md and NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ["| model | test accuracy | as deployed, in integers | images decided differently | parameters |", "|---|---|---|---|---|"]
    curves = {}
    for kind, by_seed in results.items():
        runs = list(by_seed.values())
        mean = statistics.mean(r["accuracy"] for r in runs)
        each = " (" + ", ".join(f"{r['accuracy']:.2%}" for r in runs) + ")" if len(runs) > 1 else ""
        deployed = f"{statistics.mean(r['accuracy_deployed'] for r in runs):.2%}" if "accuracy_deployed" in runs[0] else "-"
        differ = ", ".join(str(len(r["images_decided_differently"])) for r in runs) if "accuracy_deployed" in runs[0] else "-"
        lines.append(f"| {kind.replace('_', ' + ')} | {mean:.2%}{each} | {deployed} | {differ} | {runs[0]['parameters']:,} |")
        rows = [[r for r in metrics.read_rows(root / f"{kind}-{s}" / "metrics.jsonl") if r["split"] == "validation"] for s in by_seed]
        curves[kind] = [{"step": r[0]["step"], "split": "validation", "loss": statistics.mean(x["loss"] for x in r)} for r in zip(*rows)]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (out / f"{name}.json").write_text(json.dumps({"results": results, "environment": run.describe_environment()["versions"]}, indent=1) + "\n")
    metrics.plot_losses(curves, out / f"{name}.png", f"CIFAR-10 validation loss, {len(next(iter(results.values())))} seed(s)", unit="nats")
    print("\n".join(lines))


def main() -> None:
    """Trains what is missing, then writes table and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="where TFDS finds cifar10")
    parser.add_argument("--variant", default="quick")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=0, help="0: the variant's")
    parser.add_argument("--runs", type=Path, default=Path("runs/vit_cifar"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", default="vit_quick_cifar10")
    args = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in args.kinds}
    for seed in args.seeds:
        for kind in args.kinds:
            results[kind][seed] = score(train(kind, seed, args.variant, args.data_dir, args.runs, args.steps), kind)
            print(f"{kind} seed {seed}: {json.dumps(results[kind][seed])[:400]}", flush=True)
    write_results({kind: results[kind] for kind in KINDS if kind in results}, args.runs, args.out, args.name)


if __name__ == "__main__":
    main()
