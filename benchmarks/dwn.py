"""Classified images a second of packed classifiers of look-up tables, of the sizes published for
MNIST: taskset -c 0 python benchmarks/dwn.py

Float32 images (28 x 28), 3 thresholds a pixel, tables of 6 inputs wired at random, argmax included;
the weights are random, which changes no time. The forms give the same classes, which is checked
before anything is timed.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import roofline
import timing

from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.ops.kernels import choice
from quweit_jax.ops.kernels.native import library

SIZES = (690, 2050, 4080)  # of tables
IMAGES = 2048


def contenders(tables: int, images: jax.Array) -> dict[str, Any]:
    """Calls that classify all images to the end."""
    config = DWNConfig(
        10, (tables,), mapping="random", thermometer="uniform", thermometer_bits=3, tau=4.0
    )
    model = DWN(config)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    packed = jax.jit(lambda v: model.apply(v, images[:8], mutable=["packed"])[1])(variables)
    packed = jax.device_put(packed)

    def classes(packed: Any, images: jax.Array) -> jax.Array:
        return model.apply(packed, images).argmax(-1)

    def compiled() -> Any:
        run = jax.jit(classes).lower(packed, images).compile()
        return lambda: jax.block_until_ready(run(packed, images))

    made = {f"{tables} tables": compiled()}
    with choice.compiling_for("cpu", portable=True):  # without native code
        made[f"{tables} tables, XLA"] = compiled()
    first, second = (call() for call in made.values())
    np.testing.assert_array_equal(first, second)
    return made


def main() -> None:
    args = timing.parser(__doc__, rounds=15).parse_args()
    images = jax.random.uniform(jax.random.key(0), (IMAGES, 28, 28, 1))
    calls = roofline.contenders()
    for tables in SIZES:
        calls |= contenders(tables, images)
    with library.using(library.LEVELS[-1]) as level:
        found = timing.summary(timing.samples(calls, args.rounds))
    limits = roofline.rates({k: found.pop(k)["median_ms"] / 1e3 for k in roofline.LIMITS})
    rates = {name: IMAGES / of["median_ms"] / 1e3 for name, of in found.items()}
    lines = [
        f"{IMAGES} images at once, native: {level}",
        timing.machine(),
        timing.cores(),
        timing.spread_table(found, f"{SIZES[0]} tables, XLA"),
        "million images a second: " + ", ".join(f"{k} {v:.2f}" for k, v in rates.items()),
        "roofline: " + ", ".join(f"{k} {v:.1f}" for k, v in limits.items()),
    ]
    print("\n".join(lines))
    timing.write(args.out, lines)
    facts = {"machine": lines[1], "timed": lines[2], "native": level, "images": IMAGES}
    timing.write_json(
        args.out, facts | {"contenders": found, "million_a_second": rates, "roofline": limits}
    )


if __name__ == "__main__":
    main()
