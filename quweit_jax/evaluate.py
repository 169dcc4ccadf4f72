"""python -m quweit_jax.evaluate --workdir=runs/x [--step=N] [--packed] [--tasks=...] [--json] [--config.data.data_dir=...]"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from quweit_jax import cli


def main(argv: Sequence[str]) -> int:
    """Evaluates a run's best (or given) checkpoint on the whole validation split."""
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser("evaluate", "Evaluates a trained run on the whole validation split: its best checkpoint, or a given step.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--step", type=int, help="a checkpoint's step (default: the one of lowest validation loss)")
    parser.add_argument("--batches", type=int, default=0, help="only so many batches, spread over the split (0: all)")
    parser.add_argument(
        "--packed",
        action="store_true",
        help="evaluate as deployed: weightless blocks on 1-bit tables and int8 sums; integer models in integers alone",
    )
    parser.add_argument(
        "--tasks", default="", help="zero-shot tasks of lm-evaluation-harness (or folders of your own) instead, joined by commas: arc_easy,piqa"
    )
    parser.add_argument("--limit", type=int, default=0, help="of the tasks, only so many examples each (0: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(rest)
    cli.join_processes()
    import jax

    from quweit_jax.data import pipeline
    from quweit_jax.errors import InputError
    from quweit_jax.inference import integer, packed, scoring
    from quweit_jax.training import loop, run, state

    opened = run.open_run(Path(args.workdir), args.step, overrides)
    model, variables = opened.parts.model, opened.variables
    if args.tasks and opened.parts.tokenizer is None:
        raise InputError(f"--tasks: {args.workdir} is a run of a classifier; the tasks are texts.")
    result: dict = {"step": opened.step, "split": "validation"}
    apply = model.apply
    if args.packed and integer.is_integer(model):
        variables = integer.pack(model, variables, opened.parts.dataset.image_shape)  # type: ignore[arg-type]
        result |= {"form": "integer", "model_bytes": integer.packed_bytes(variables)}
    elif args.packed:
        variables = packed.pack(jax.device_get(variables))
        if blocks := variables["blocks"].values():
            result |= {"block_bytes": sum(map(packed.block_bytes, blocks)), "dense_mlp_bytes_int8": sum(map(packed.dense_bytes, blocks))}
        result["model_bytes"] = packed.block_bytes(variables)
        apply = functools.partial(packed.apply, model)
    if args.tasks:
        result["split"] = "test"
        result |= scoring.evaluate_tasks(scoring.Scorer(model, variables, opened.parts.tokenizer), args.tasks.split(","), limit=args.limit)
    else:
        result |= loop.evaluate(state.make_eval_step(apply), variables, opened.parts, args.batches)
    if bad := pipeline.left_out(opened.parts.dataset.validation):
        result["images_left_out"] = len(bad)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:>20}: {value:.6g}" if isinstance(value, float) else f"{key:>20}: {value}")
    return 0


def console() -> None:
    """The installed command."""
    cli.run(main)


if __name__ == "__main__":
    console()
