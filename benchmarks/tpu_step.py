"""A whole training step on TPUs with a dense MLP and with look-up tables, by the compiler's
estimates and our kernels' schedules; no TPU is needed, but libtpu is: python benchmarks/tpu_step.py

Compiling takes minutes. Cycles wait for nothing, neither memory nor other chips; a gather or
scatter of XLA's has no estimate, so those that are left are listed.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import timing
import tpu_schedule


def compile_step(config: Any, topology: str) -> Any:
    """A config's training step, compiled with its batch divided over all chips of a topology."""
    from quweit_jax.commands import compile_tpu
    from quweit_jax.config import set_value
    from quweit_jax.ops.kernels.choice import compiling_for
    from quweit_jax.training import topologies
    from quweit_jax.training.setup import assemble

    devices = topologies.devices_of(topology)
    set_value(config, "mesh.data", str(len(devices)))
    setup = assemble(config, data=compile_tpu._data(config, 65), devices=devices)
    state = setup.abstract_state()
    with compiling_for("tpu", portable=True):
        return setup.train_step(state).trace(state, setup.abstract_batch()).lower().compile()


def left(text: str) -> list[str]:
    """The gathers and scatters of XLA's: what they make."""
    return [
        f"{kind} {shape}" for shape, kind in re.findall(r"= (\S+?)\{\S* (gather|scatter)\(", text)
    ]


def measure(config: Any, topology: str, chips: int, folder: Path) -> tuple[list[str], int]:
    """Lines about a step, and its cycles."""
    compiled = compile_step(config, topology)
    groups = -(-config.batch_size * config.model.context // (1024 * chips))
    inputs = config.model.width * config.model.weightless.thermometer_bits
    around = tpu_schedule.xla_cycles(compiled)
    kernels = tpu_schedule.kernel_cycles(folder, {inputs: groups, -(-inputs // 8): groups})
    lines = [f"{config.model.mlp}: {around:,} cycles of XLA's"]
    # Kernels that are alike are compiled once, and called by each block.
    calls, total = tpu_schedule.kernel_calls(compiled), around
    for name in dict(kernels):
        each = statistics.mean(cycles for other, cycles in kernels if other == name)
        lines.append(f"  {name}: {calls[name]} calls of {each:,.0f} cycles")
        total += round(calls[name] * each)
    return [*lines, f"  total {total:,}; XLA's {', '.join(left(compiled.as_text()))}"], total


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--chips", type=int, default=8, help="of the topology")
    parser.add_argument("--config", default="nanogpt", help="of experiments/configs/gpt_char.py")
    args = parser.parse_args()
    folder = tpu_schedule.dump_schedules()

    from quweit_jax.config import load_file

    experiment = Path(__file__).parents[1] / "experiments" / "configs" / "gpt_char.py"
    lines = [
        f"a training step of gpt_char.py:{args.config} on each chip of {args.topology}",
        timing.machine(("jax", "jaxlib", "libtpu")),
    ]
    cycles = []
    for mlp in ("dense", "weightless"):
        config = load_file(f"{experiment}:{args.config},mlp={mlp}")
        said, total = measure(config, args.topology, args.chips, folder)
        lines += said
        cycles.append(total)
        print("\n".join(said), flush=True)
    lines.append(f"weightless / dense: {cycles[1] / cycles[0]:.2f}")
    print(lines[-1])
    timing.write(args.out, lines)


if __name__ == "__main__":
    main()
