"""python -m quweit_jax evaluate --workdir=runs/x|--model=FOLDER [--packed] [--tasks=...]
[--json]
"""

from __future__ import annotations

from collections.abc import Sequence

from quweit_jax.commands import cli
from quweit_jax.commands.opening import add_source, open_setup
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Evaluates a run's best (or given) checkpoint, or a model, on the whole validation split."""
    parser = cli.parser(
        "evaluate",
        "Evaluates a trained run on the whole validation split: its best checkpoint, or a given "
        "step; or a model in a folder of its own, on its own data or on those that are said: "
        "--config.data.source=text_file --config.data.path=FILE.",
        *("packed", "json"),
    )
    add_source(parser)
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
    parser.add_argument(
        "--context",
        type=int,
        default=0,
        help="of a language model given by --model, the tokens of a text (default: all that it "
        "reads at a time, at most 1,024)",
    )
    args, overrides = cli.parse(parser, argv)
    cli.join_processes()
    from quweit_jax.data import pipeline
    from quweit_jax.deploy.pack import describe
    from quweit_jax.deploy.score import Scorer, evaluate_tasks
    from quweit_jax.training import loop, state

    given = args.workdir or args.model
    opened, setup = open_setup(args, overrides, data=not args.tasks, context=args.context)
    if args.tasks and opened.tokenizer is None:
        raise InputError(f"--tasks: {given} is a classifier; the tasks are texts.")
    variables = opened.packed(asked=args.packed)
    facts: dict[str, object] = {"model": given} if opened.step is None else {"step": opened.step}
    if "packed" in variables:
        facts |= describe(setup.model, variables, opened.init_inputs)
    if args.tasks:
        assert opened.tokenizer is not None
        start = opened.prompting.begin if opened.prompting is not None else None
        scorer = Scorer(setup.model, variables, opened.tokenizer, start)
        facts |= {"split": "test"}
        facts |= evaluate_tasks(scorer, args.tasks.split(","), limit=args.limit)
    else:
        facts |= {"split": "validation"}
        pieces = 1
        if opened.step is None and opened.tokenizer is not None:
            facts |= {"context": setup.config.model.context}
            pieces = setup.loss_pieces(setup.eval_batch_size)
        eval_step = state.make_eval_step(setup.model.apply, pieces=pieces)
        facts |= loop.evaluate(eval_step, variables, setup, args.batches)
    if bad := pipeline.left_out(setup.data.validation):
        facts["images_left_out"] = len(bad)
    cli.print_facts(facts, as_json=args.json)
    return 0
