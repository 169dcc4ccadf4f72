"""Five language models of one size on the same text, tokens and steps: GPT and QuWeiT GPT,
Transformer++, MatMul-free, MatMul-free + weightless.

    python -m experiments.compare_lm --data_dir=FOLDER [--variant=cpu] [--kinds gpt quweit ...]
    [--seeds 0]      the table and curves python -m quweit_jax.sweep
    --config=experiments/compare_lm.py:cpu --workdir=runs/compare_lm                    every kind
    at every rate

Variants: cpu (the default; Tiny Shakespeare by characters, 4 layers of width 128, 2,000 steps of 12
x 64 tokens), stdlib (the same models on 20 MB of the Python standard library in 4,096 byte pairs,
3,000 steps) and gpu (6 layers of width 384, context 256).

Parameters are matched: an MLP of 4 d and a gated one of 8 d / 3 both hold 8 d^2 weights; the
weightless blocks have the default number of tables for the width. Each kind has the learning rate
of RATES that was best for it at the cpu size (experiments/results/compare_lm_notes.md).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from quweit_jax import config as configs
from quweit_jax.errors import check_choice
from quweit_jax.models.registry import defaults
from quweit_jax.training.defaults import base_config

VARIANTS = ("cpu", "stdlib", "gpu")
# kind -> (model, its mlp, learning rate)
KINDS: dict[str, tuple[str, str, float]] = {
    "gpt": ("gpt", "dense", 4e-3),
    "quweit": ("gpt", "weightless", 4e-3),
    "transformer_pp": ("transformer_pp", "dense", 1e-3),
    "matmulfree": ("matmulfree", "dense", 1e-3),
    "matmulfree_weightless": ("matmulfree", "weightless", 4e-3),
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
ALIASES = {
    "data_dir": "data.data_dir",
    "lr": "optimizer.learning_rate",
    "width": "model.width",
    "layers": "model.layers",
}


def get_config(argument: str | None = None):
    """The config of a variant and `kind=...` (gpt if not given), with shortcuts applied."""
    variant, shortcuts = configs.parse_argument(argument, VARIANTS, default="cpu")
    kind = shortcuts.pop("kind", "gpt")
    check_choice("compare_lm: kind", kind, KINDS)
    model, mlp, rate = KINDS[kind]
    config = base_config()
    config.model = defaults(model)
    width, layers, context = (384, 6, 256) if variant == "gpu" else (128, 4, 64)
    config.model.update(width=width, layers=layers, context=context, mlp=mlp)
    if model != "matmulfree":
        config.model.heads = 6 if variant == "gpu" else 4
    if model != "gpt":
        config.model.hidden = 8 * width // 3
    config.model.weightless.num_luts = 7 * width
    config.optimizer.learning_rate = rate
    config.data.update(source="tfds", name="tiny_shakespeare", validation_split="validation+test")
    (
        config.steps,
        config.batch_size,
        config.eval_every,
        config.checkpoint_every,
        config.eval_batches,
    ) = 2000, 12, 250, 250, 10
    if variant == "stdlib":
        config.data.update(
            source="python_stdlib",
            name="",
            validation_split="",
            tokenizer="bpe",
            limit_bytes=20_000_000,
        )
        config.steps, config.eval_every = 3000, 500
    if variant == "gpu":
        config.steps, config.batch_size, config.eval_every, config.checkpoint_every = (
            5000,
            64,
            250,
            500,
        )
    return configs.apply_shortcuts(config, shortcuts, ALIASES)


def sweep(add):
    """Every kind at every learning rate."""
    for kind in KINDS:
        for rate in RATES:
            add(kind=kind, lr=rate)


def score(workdir: Path, kind: str) -> dict[str, Any]:
    """The last checkpoint's loss on the whole validation text, trained and deployed; parameters,
    bytes as deployed.
    """
    import jax

    from quweit_jax.deploy.pack import packed_or_trained, stored_bytes
    from quweit_jax.training import loop, rundir, state

    opened = rundir.open_run(workdir, step=rundir.read_config(workdir).steps)
    parts, variables = opened.setup, jax.device_get(opened.variables)
    result: dict[str, Any] = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    }
    result["loss_float"] = loop.evaluate(
        state.make_eval_step(parts.model.apply), variables, parts, 0
    )["loss"]
    variables = packed_or_trained(parts.model, variables, parts.init_inputs)
    result["bytes_deployed"] = stored_bytes(variables)
    result["loss"] = loop.evaluate(state.make_eval_step(parts.model.apply), variables, parts, 0)[
        "loss"
    ]
    return result


def speeds(workdirs: dict[str, Path], rounds: int = 15) -> dict[str, float]:
    """Tokens a second of each kind's compiled training step: all kinds take turns in one process,
    and the medians count.
    """
    import jax

    from quweit_jax.data import pipeline
    from quweit_jax.training import rundir, sharding
    from quweit_jax.training.setup import assemble

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
    from experiments import studies

    args = studies.arguments(
        __doc__,
        variant="cpu",
        kinds=list(KINDS),
        seeds=[0],
        runs="compare_lm",
        name="compare_lm_cpu",
    )
    results = studies.conduct(args, lambda kind: f"compare_lm.py:{args.variant},kind={kind}", score)
    found = speeds({kind: args.runs / f"{kind}-{args.seeds[0]}" for kind in args.kinds})
    for kind in args.kinds:
        for result in results[kind].values():
            relative = found[kind] / found[args.kinds[0]]
            result |= {
                "training_tokens_per_second": found[kind],
                "training_speed_of_the_first_kind": relative,
            }
    header = [
        "model",
        "parameters",
        "bytes at inference",
        "training tokens/s (of the first)",
        "validation loss",
        "as deployed",
    ]
    studies.write(args, results, header, row, f"compare_lm, {args.variant}: validation loss")


if __name__ == "__main__":
    main()
