"""python -m quweit_jax generate --workdir=runs/x --prompt="To be" [--temperature=0.8] [--packed]"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quweit_jax.commands import cli
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Continues a prompt with a trained language model, streaming to the terminal."""
    description = "Continues a prompt with a trained language model."
    parser = cli.parser("generate", description, "workdir", "step", "packed")
    add = parser.add_argument
    add("--prompt", default="\n", help="the text to continue (default: a new line)")
    add("--max_tokens", type=int, default=300, help="how many tokens to add")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest; 1: as trained")
    add("--top_k", type=int, default=0, help="sample among the k likeliest tokens only (0: all)")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    args, overrides = cli.parse(parser, argv)
    from quweit_jax.deploy.generate import check_sampling, generate_tokens, stream_text
    from quweit_jax.deploy.pack import pack
    from quweit_jax.reading import clean_text
    from quweit_jax.training import rundir, stores

    check_sampling(args.temperature, args.top_k, args.max_tokens)
    opened = rundir.open_run(stores.fetched(args.workdir), args.step, overrides, data=False)
    model, variables, tokenizer = opened.setup.model, opened.variables, opened.setup.tokenizer
    if tokenizer is None:
        raise InputError(
            f"--workdir: {args.workdir} is a run of a classifier, which generates no text."
        )
    text = clean_text(args.prompt)  # as the texts it was trained on
    prompt = tokenizer.encode(text)
    if not len(prompt):
        raise InputError("--prompt: expected at least one character, found none.")
    if args.packed:
        variables = pack(model, variables, opened.setup.init_inputs)
    tokens = generate_tokens(
        model,
        variables,
        prompt,
        args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        end_of_text=tokenizer.end_of_text,
    )
    sys.stdout.write(text)
    for piece in stream_text(tokenizer, tokens, prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0
