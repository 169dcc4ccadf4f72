"""Tokens a second of one prompt and of several together, as `generate` makes them.

    python -m benchmarks.generation --out=benchmarks/results/generation.txt

Each is continued in turn, a piece of some tokens at a time, in one process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from benchmarks import timing
from quweit_jax.deploy.generate import generate_batch
from quweit_jax.pretrained import folders

_ENOUGH = 10**9


def piece(variables: dict, found: folders.Found, prompts: int, tokens: int) -> Callable[[], None]:
    """A function that makes so many tokens more for each of so many prompts."""
    ids = [np.full(4 + i, i % 4, np.int32) for i in range(prompts)]
    rows = generate_batch(found.model, variables, ids, _ENOUGH)

    def make() -> None:
        for _ in range(tokens):
            next(rows)

    return make


def main() -> None:
    parser = timing.parser(__doc__, rounds=11)
    parser.add_argument("--model", default="shakespeare-lookup")
    parser.add_argument("--prompts", default="1,8")
    parser.add_argument("--tokens", type=int, default=20, help="of a piece")
    args = parser.parse_args()
    found = folders.find(args.model)
    variables = found.read()
    counts = [int(count) for count in args.prompts.split(",")]
    contenders = {str(n): piece(variables, found, n, args.tokens) for n in counts}
    seconds = timing.samples(contenders, args.rounds, warmup=2)
    speeds = {n: n * args.tokens / statistics.median(seconds[str(n)]) for n in counts}
    lines = [timing.machine(), timing.cores(), f"{args.model}, {args.tokens} tokens a piece", ""]
    lines += ["prompts  tokens a second  times one prompt's"]
    lines += [f"{n:>7}  {s:>15,.0f}  {s / speeds[counts[0]]:>18.2f}" for n, s in speeds.items()]
    print("\n".join(lines))
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
