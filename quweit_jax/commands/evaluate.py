"""python -m quweit_jax evaluate --workdir=runs/x [--step=N] [--packed] [--tasks=...] [--json]"""

from __future__ import annotations

from collections.abc import Sequence

from quweit_jax.commands import cli
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Evaluates a run's best (or given) checkpoint on the whole validation split."""
    parser = cli.parser(
        "evaluate",
        "Evaluates a trained run on the whole validation split: its best checkpoint, or a given "
        "step.",
        *("workdir", "step", "packed", "json"),
    )
    parser.add_argument(
        "--batches", type=int, default=0, help="only so many, spread over the split (0: all)"
    )
    parser.add_argument(
        "--tasks",
        default="",
        help="instead, zero-shot tasks of lm-evaluation-harness or folders of your own: "
        "arc_easy,piqa,tasks/mine",
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="of the tasks, only so many examples each (0: all)"
    )
    args, overrides = cli.parse(parser, argv)
    cli.join_processes()
    from quweit_jax.data import pipeline
    from quweit_jax.deploy.pack import describe, pack
    from quweit_jax.deploy.score import Scorer, evaluate_tasks
    from quweit_jax.training import loop, rundir, state, stores

    opened = rundir.open_run(stores.fetched(args.workdir), args.step, overrides)
    setup, variables = opened.setup, opened.variables
    if args.tasks and setup.tokenizer is None:
        raise InputError(f"--tasks: {args.workdir} is a run of a classifier; the tasks are texts.")
    facts: dict[str, object] = {"step": opened.step}
    if args.packed:
        variables = pack(setup.model, variables, setup.init_inputs)
        facts |= describe(setup.model, variables, setup.init_inputs)
    if args.tasks:
        assert setup.tokenizer is not None
        scorer = Scorer(setup.model, variables, setup.tokenizer)
        facts |= {"split": "test"}
        facts |= evaluate_tasks(scorer, args.tasks.split(","), limit=args.limit)
    else:
        eval_step = state.make_eval_step(setup.model.apply)
        facts |= {"split": "validation"}
        facts |= loop.evaluate(eval_step, variables, setup, args.batches)
    if bad := pipeline.left_out(setup.data.validation):
        facts["images_left_out"] = len(bad)
    cli.print_facts(facts, as_json=args.json)
    return 0
