"""Random circuits against the integer description, bit for bit.

python benchmarks/hardware.py [--configurations=200] [--blocks=60] [--tools=iverilog,verilator,gcc]
    [--out=FILE]

Each configuration is drawn by hypothesis: tables of 1 to 8 inputs, 1 to 3 layers of odd sizes,
words of 2 to 16 bits with and without sign, 2 to 100 classes, thresholds at and beyond the
extremes, constant tables, repeated wiring, registers after every 1 to 3 stages or nowhere. Its
golden vectors are random words and extreme ones. Likewise blocks of transformers: LookupGLUs and
weightless ones, dense and grouped, of odd sizes, some units or tables a cycle, registers after
every 1 to 3 levels or nowhere. With a configuration that fails the status is 1.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import timing
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quweit_jax.deploy.hardware import circuit, description, folder, tools
from quweit_jax.deploy.hardware.blocks import folder as block_folder
from quweit_jax.deploy.hardware.blocks import verilog
from tests.deploy.hardware import blocks
from tests.deploy.hardware.configurations import Configuration, configurations


def kind_of(tool: str) -> str:
    return next(kind for kind, checks in tools.CHECKS.items() if tool in checks)


def fails(configuration: Configuration, tool: str) -> str:
    """'' or what the tool said."""
    kind, classifier = kind_of(tool), configuration.classifier()
    words = configuration.words(classifier, 40)
    made = circuit.build(classifier, configuration.pipeline if kind == "verilog" else 0)
    fit = description.Fit(True, 0, 0)
    export = folder.Export(kind, made, fit, words, 0, (classifier.features,))
    with tempfile.TemporaryDirectory() as place:
        folder.write(export, Path(place))
        (verdict,) = tools.verify(Path(place), kind, [tool])
    return "" if verdict.passed else verdict.text


def block_fails(seed: int, tool: str) -> str:
    """The same of the block of a seed."""
    kind, made = kind_of(tool), blocks.block(seed)
    circuit_of = verilog.build(made, **blocks.options(made, seed))
    export = block_folder.Export(kind, circuit_of, blocks.tokens(made, seed=seed), 0)
    with tempfile.TemporaryDirectory() as place:
        block_folder.write(export, Path(place))
        (verdict,) = tools.verify(Path(place), kind, [tool], verilog.NAME)
    return "" if verdict.passed else verdict.text


def drawn(count: int) -> list[Configuration]:
    """So many different configurations, the same ones every time."""
    found: list[Configuration] = []
    for tables in (8, 40):

        @settings(
            max_examples=4 * count,
            database=None,
            derandomize=True,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(configurations(most_tables=tables))
        def collect(configuration: Configuration) -> None:
            if configuration not in found:
                found.append(configuration)

        collect()
    step = max(1, len(found) // count)
    return found[::step][:count]


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--configurations", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--tools", default="iverilog,verilator,gcc")
    args = parser.parse_args()
    chosen = [tool for tool in args.tools.split(",") if tools.installed(tool)]
    lines, wrong = [timing.machine(("numpy", "hypothesis"))], 0
    for what, cases, check in (
        ("classifiers", drawn(args.configurations) if args.configurations else [], fails),
        ("blocks", range(args.blocks), block_fails),
    ):
        for tool in chosen if cases else ():
            start, said = time.perf_counter(), Counter()
            for case in cases:
                text = check(case, tool)
                said["wrong" if text else "exact"] += 1
                if text:
                    print(case, text)
            wrong += said["wrong"]
            minutes = (time.perf_counter() - start) / 60
            lines.append(
                f"{tool}, {what}: {said['exact']} of {said.total()} bit-exact, "
                f"{minutes:.1f} minutes"
            )
            print(lines[-1], flush=True)
    timing.write(args.out, lines)
    return int(wrong > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main())
