"""python -m quweit_jax.generate --workdir=runs/x --prompt="To be" [--temperature=0.8] [--top_k=0]
[--seed=0] [--max_tokens=300] [--packed]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quweit_jax.commands import cli
from quweit_jax.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Continues a prompt with a trained language model, streaming to the terminal."""
    rest, overrides = cli.split_overrides(argv)
    parser = cli.parser("generate", "Continues a prompt with a trained language model.")
    parser.add_argument("--workdir", required=True, help="the run directory")
    parser.add_argument("--prompt", default="\n", help="the text to continue (default: a new line)")
    parser.add_argument("--max_tokens", type=int, default=300, help="how many tokens to add")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest; 1: as trained"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="sample among the k likeliest tokens only (0: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument(
        "--step", type=int, help="a checkpoint's step (default: the one of lowest validation loss)"
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="as deployed: weightless blocks on 1-bit tables, ternary weights at 2 bits",
    )
    args = parser.parse_args(rest)
    from quweit_jax.deploy import generate as generation
    from quweit_jax.deploy.pack import pack
    from quweit_jax.training import run

    generation.check_sampling(args.temperature, args.top_k, args.max_tokens)
    opened = run.open_run(Path(args.workdir), args.step, overrides, data=False)
    tokenizer = opened.parts.tokenizer
    if tokenizer is None:
        raise InputError(
            f"--workdir: {args.workdir} is a run of a classifier, which generates no text."
        )
    prompt = tokenizer.encode(args.prompt)
    if not len(prompt):
        raise InputError("--prompt: expected at least one character, found none.")
    model, variables = opened.parts.model, opened.variables
    if args.packed:
        variables = pack(model, variables, opened.parts.init_inputs)
    sampling = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "seed": args.seed,
        "end_of_text": tokenizer.end_of_text,
    }
    tokens = generation.generate_tokens(model, variables, prompt, args.max_tokens, **sampling)
    sys.stdout.write(args.prompt)
    for piece in generation.stream_text(tokenizer, tokens, prompt):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return 0
