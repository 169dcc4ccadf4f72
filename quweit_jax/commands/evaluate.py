"""python -m quweit_jax.evaluate --workdir=runs/x [--step=N] [--packed] [--tasks=...] [--json]
[--config.data.data_dir=...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quweit_jax.commands import cli


def main(argv: Sequence[str]) -> int:
    """Evaluates a run's best (or given) checkpoint on the whole validation split."""
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser(
        "evaluate",
        "Evaluates a trained run on the whole validation split: its best checkpoint, or a given "
        "step.",
    )
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument(
        "--step", type=int, help="a checkpoint's step (default: the one of lowest validation loss)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=0,
        help="only so many batches, spread over the split (0: all)",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="as deployed: 1-bit tables, int8 sums, 2-bit weights; integer models in integers alone",
    )
    parser.add_argument(
        "--tasks",
        default="",
        help="instead, zero-shot tasks of lm-evaluation-harness or folders of yours: piqa,tasks/mine",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="of the tasks, only so many examples each (0: all)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args(rest)
    cli.join_processes()
    from quweit_jax.data import pipeline
    from quweit_jax.deploy import score as scoring
    from quweit_jax.deploy.pack import describe, pack
    from quweit_jax.errors import InputError
    from quweit_jax.training import loop, run, state

    opened = run.open_run(Path(args.workdir), args.step, overrides)
    model, variables = opened.parts.model, opened.variables
    if args.tasks and opened.parts.tokenizer is None:
        raise InputError(f"--tasks: {args.workdir} is a run of a classifier; the tasks are texts.")
    facts: dict[str, Any] = {}
    if args.packed:
        variables = pack(model, variables, opened.parts.init_inputs)
        facts = describe(model, variables, opened.parts.init_inputs)
    if args.tasks:
        scorer = scoring.Scorer(model, variables, opened.parts.tokenizer)
        found = {"split": "test"} | scoring.evaluate_tasks(
            scorer, args.tasks.split(","), limit=args.limit
        )
    else:
        eval_step = state.make_eval_step(model.apply)
        found = {"split": "validation"} | loop.evaluate(
            eval_step, variables, opened.parts, args.batches
        )
    if bad := pipeline.left_out(opened.parts.dataset.validation):
        found["images_left_out"] = len(bad)
    cli.print_facts({"step": opened.step, **facts, **found}, as_json=args.json)
    return 0
