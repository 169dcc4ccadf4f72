"""Dense, weightless and no MLPs in the same GPT: same data, batches, steps and seeds. Makes the table and curves in experiments/results/.

    python -m experiments.weightless_vs_dense --data_dir=FOLDER [--seeds 0 1 2] [--kinds dense weightless none] [--out=experiments/results]

Runs go into runs/weightless_vs_dense/KIND-SEED; finished ones are read, not repeated, and interrupted ones go on. The weightless
models are evaluated as deployed (tables at 1 bit, sums in int8 and int32), the dense ones in float32; every loss is over the whole
validation text (nanoGPT's last 10 %).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import jax

from quweit_jax import configs
from quweit_jax.inference import packed
from quweit_jax.training import loop, metrics, run, state

HERE = Path(__file__).parent


def train(kind: str, seed: int, variant: str, data_dir: str | None, root: Path, steps: int) -> Path:
    """Trains one model, or goes on with it, or finds it finished."""
    workdir = root / f"{kind}-{seed}"
    config = configs.load_file(f"{HERE / 'gpt_char.py'}:{variant},mlp={kind},seed={seed}" + (f",steps={steps}" if steps else ""))
    with config.unlocked():
        config.data.data_dir = data_dir
        config.sample_tokens = 0
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    if not any(row["split"] == "validation" and row["step"] == config.steps for row in rows) and not loop.fit(config, workdir).complete:
        raise SystemExit("stopped; the same command goes on")
    return workdir


def score(workdir: Path) -> dict[str, Any]:
    """The last checkpoint's loss on the whole validation text, as deployed, and the bytes of its MLPs."""
    opened = run.open_run(workdir, step=run.read_config(workdir).steps)
    apply, variables, mlp_bytes = opened.parts.model.apply, jax.device_get(opened.variables), 0
    plain = loop.evaluate(state.make_eval_step(apply), variables, opened.parts, 0)["loss"]
    if opened.parts.config.model.mlp == "weightless":
        variables = packed.pack(variables)
        mlp_bytes = sum(map(packed.block_bytes, variables["blocks"].values()))
        apply = functools.partial(packed.apply, opened.parts.model)
    elif opened.parts.config.model.mlp == "dense":
        blocks = [v["mlp"] for k, v in variables["params"].items() if k.startswith("block_")]
        mlp_bytes = sum(leaf.size for leaf in jax.tree.leaves(blocks))  # if every weight were one byte
    loss = loop.evaluate(state.make_eval_step(apply), variables, opened.parts, 0)["loss"]
    seconds = metrics.read_rows(workdir / "metrics.jsonl")[-1]["seconds"]
    return {"loss": loss, "loss_float": plain, "mlp_bytes": mlp_bytes, "seconds": seconds}


def write_results(results: dict[str, dict[int, dict[str, Any]]], root: Path, out: Path, name: str) -> None:
    """NAME.json, NAME.md and NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    lines = ["| MLP | validation loss, mean | each seed | bytes of all MLPs at inference |", "|---|---|---|---|"]
    form = {"dense": " (int8; 4x in float32)", "weightless": " (all of it: tables 1 bit, sums int8, wiring, thresholds)", "none": ""}
    for kind, by_seed in results.items():
        losses = [r["loss"] for r in by_seed.values()]
        size = next(iter(by_seed.values()))["mlp_bytes"]
        lines.append(f"| {kind} | {statistics.mean(losses):.4f} | {', '.join(f'{x:.4f}' for x in losses)} | {size:,}{form.get(kind, '')} |")
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    (out / f"{name}.json").write_text(json.dumps({"results": results, "environment": run.describe_environment()["versions"]}, indent=1) + "\n")
    curves = {}
    for kind, by_seed in results.items():
        all_rows = [[r for r in metrics.read_rows(root / f"{kind}-{s}" / "metrics.jsonl") if r["split"] == "validation"] for s in by_seed]
        curves[kind] = [{"step": rows[0]["step"], "split": "validation", "loss": statistics.mean(r["loss"] for r in rows)} for rows in zip(*all_rows)]
    metrics.plot_losses(curves, out / f"{name}.png", f"validation loss, mean of {len(next(iter(results.values())))} seeds")
    print("\n".join(lines))


def main() -> None:
    """Trains what is missing, then writes table and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="where TFDS finds tiny_shakespeare")
    parser.add_argument("--variant", default="nanogpt_cpu")
    parser.add_argument("--kinds", nargs="+", default=["dense", "weightless", "none"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0: the variant's")
    parser.add_argument("--runs", type=Path, default=Path("runs/weightless_vs_dense"))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", default="nanogpt_cpu_tiny_shakespeare")
    args = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in args.kinds}
    for seed in args.seeds:
        for kind in args.kinds:
            results[kind][seed] = score(train(kind, seed, args.variant, args.data_dir, args.runs, args.steps))
            print(f"{kind} seed {seed}: {results[kind][seed]}", flush=True)
    write_results(results, args.runs, args.out, args.name)


if __name__ == "__main__":
    main()
