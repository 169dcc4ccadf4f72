"""The gated recurrence's methods side by side, forward and forward + backward, by length: python
benchmarks/recurrence.py [--out=FILE]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import timing

from quweit_jax.ops.recurrence import IMPLEMENTATIONS, gated_recurrence, pick_implementation


def contenders(steps: int, batch: int, features: int, backward: bool):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (batch, steps, features)
    gates, candidates = jax.random.uniform(keys[0], shape), jax.random.normal(keys[1], shape)

    def make(implementation: str):
        def states(gates, candidates):
            return gated_recurrence(gates, candidates, implementation=implementation)[0]

        gradient = jax.grad(lambda *args: jnp.square(states(*args)).sum(), argnums=(0, 1))
        compiled = jax.jit(gradient if backward else states)
        return lambda: jax.block_until_ready(compiled(gates, candidates))

    return {
        implementation: make(implementation)
        for implementation in IMPLEMENTATIONS
        if implementation not in ("auto", "pallas")
    }


def main() -> None:
    parser = timing.parser(__doc__, rounds=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 8, 64, 512, 2048])
    args = parser.parse_args()
    lines = [
        f"gated_recurrence, batch {args.batch}, {args.features} features, {jax.default_backend()}",
        timing.machine(),
    ]
    for backward in (False, True):
        for steps in args.lengths:
            compared = contenders(steps, args.batch, args.features, backward)
            medians = timing.side_by_side(compared, args.rounds)
            said = "forward + backward" if backward else "forward"
            lines += [
                f"{said}, T = {steps} (auto picks {pick_implementation(steps)})",
                timing.table(medians, "sequential"),
            ]
            print("\n".join(lines[-2:]), flush=True)
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
