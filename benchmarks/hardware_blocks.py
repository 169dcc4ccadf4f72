"""Blocks of a trained integer-only ViT as circuits: bit-exact on real activations, what they take,
and the energy of the same block by the rules of `costs`.

python benchmarks/hardware_blocks.py --workdir=RUN [--tokens=1000] [--tools=iverilog,verilator]
    [--parallel=1] [--blocks=0,1] [--out=FILE]

RUN is a run of experiments/configs/vit_cifar.py with integer=true and, say,
mlp=weightless+lookup_glu. Golden vectors are so many tokens of validation images, at random, and a
few of extreme words. If a tool finds a difference, or none is installed, the status is 1.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quweit_jax.costs.count import of_config
from quweit_jax.costs.energy import LUT_MODELS, Energy, estimate
from quweit_jax.costs.table import table
from quweit_jax.data.pipeline import eval_batches
from quweit_jax.deploy.hardware import tools
from quweit_jax.deploy.hardware.blocks import activations, description, folder, synthesis, verilog
from quweit_jax.deploy.pack import pack
from quweit_jax.ops.counts import Costs
from quweit_jax.training import rundir


def images_for(opened: Any, tokens: int) -> np.ndarray:
    """Validation images, as many as tokens, so that these come from many."""
    found: list[np.ndarray] = []
    for batch in eval_batches(opened.setup.data.validation, 250):
        found.append(batch["inputs"][batch["weights"] > 0])
        if sum(map(len, found)) >= tokens:
            break
    return np.concatenate(found)[:tokens]


def of_block(costs: Costs, number: int) -> Costs:
    """A block's channel mixer and its requantization alone."""
    paths = (f"block_{number}/mlp", f"block_{number}/quant_mlp")
    own = [
        layer
        for layer in costs.layers
        if any(f"{layer.name}/".startswith(f"{path}/") for path in paths)
    ]
    return dataclasses.replace(costs, layers=tuple(own))


def energies(config: Any, number: int, tokens: int, mlp: str | None = None) -> dict[str, float]:
    """Nanojoules a token of the block's operations, by how tables are made; as if with an MLP of
    another kind.
    """
    model = dict(config["model"]) | ({"mlp": mlp} if mlp else {})
    costs = of_block(of_config(config, model=model), number)
    found: dict[str, Energy] = {m: estimate(costs, "45nm", lut_model=m) for m in LUT_MODELS}
    return {name: e.arithmetic_pj / 1e3 / tokens for name, e in found.items()}


def simulated(place: Path, tool: str) -> dict[str, Any]:
    """What a simulator says of a folder, and how long that took beside the others."""
    start = time.perf_counter()
    (verdict,) = tools.verify(place, "verilog", [tool], verilog.NAME)
    took = time.perf_counter() - start
    print(f"{tool}: {verdict.text} ({took:.0f} s)", flush=True)
    return {"passed": verdict.passed, "said": verdict.text, "seconds": took}


def measure(opened: Any, packed: Any, number: int, args: Any) -> tuple[dict[str, Any], list[str]]:
    """Facts of one block, and lines for people."""
    model = opened.setup.model
    block = description.from_packed(model, packed, opened.setup.init_inputs, number)
    made = verilog.build(block, args.parallel, args.pipeline)
    images = images_for(opened, args.tokens)
    recorded = activations.record(model, packed, images, number)
    different = int(
        (description.evaluate(block, recorded.x, recorded.residual) != recorded.y).sum()
    )
    tokens = activations.with_extremes(block, recorded, args.tokens)
    export = folder.Export("verilog", made, tokens, number)
    schedule, kind = made.schedule, folder.kind(export)
    lines = [
        f"block {number}, {kind}, {block.features} features: {tokens.real:,} tokens of "
        f"{len(images):,} validation images and {len(tokens.x) - tokens.real} of extreme words; "
        f"the description differs from the packed model in {different} of {recorded.y.size:,} "
        "numbers"
    ]
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor() as beside:
        folder.write(export, Path(place))
        waiting = {
            tool: beside.submit(simulated, Path(place), tool) for tool in args.tools.split(",")
        }
        counted = beside.submit(synthesis.synthesize, made)
        verdicts = {tool: found.result() for tool, found in waiting.items()}
        report = counted.result()
    lines += [f"{tool}: {v['said']} ({v['seconds']:.0f} s)" for tool, v in verdicts.items()]
    per_image = len(recorded.x) // len(images)
    config = opened.setup.config
    energy = energies(config, number, per_image)
    dense = energies(config, number, per_image, "dense")
    lines += [
        f"first result {schedule.latency:,} cycles behind a token's last word, then one every "
        f"{schedule.every}; a token takes {schedule.interval:,} cycles; {made.memory_bits:,} bits "
        "of read-only memory",
        f"{report.tool}, synth_xilinx, each module by itself:",
        *table(*synthesis.rows(report)),
        f"operations at 45 nm by the rules of costs, nJ a token: {energy['multiplexer']:.1f}, with "
        f"an FPGA's tables {energy['fpga']:.1f}; the integer MLP in its place "
        f"{dense['multiplexer']:.1f}",
    ]
    facts = {
        "block": number,
        "kind": kind,
        "tokens": tokens.real,
        "description_differs": different,
        "tools": verdicts,
        "latency": schedule.latency,
        "cycles_a_token": schedule.interval,
        "parallel": schedule.parallel,
        "memory_bits": made.memory_bits,
        "synthesis": {
            "tool": report.tool,
            "modules": {name: dataclasses.asdict(m) for name, m in report.modules.items()},
            "total": report.total(),
        },
        "energy_nj_a_token": energy,
        "energy_of_integer_mlp_nj_a_token": dense,
    }
    return facts, lines


def main() -> int:
    parser = timing.parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--blocks", default="")
    parser.add_argument("--tools", default="iverilog,verilator")
    args = parser.parse_args()
    opened = rundir.open_run(args.workdir, None, {})
    setup = opened.setup
    packed = pack(setup.model, opened.variables, setup.init_inputs)
    numbers = description.choices(setup.model)
    if args.blocks:
        numbers = [int(number) for number in args.blocks.split(",")]
    lines, found = [timing.machine()], []
    for number in numbers:
        facts, said = measure(opened, packed, number, args)
        found.append(facts)
        lines += ["", *said]
        print("\n".join(said), flush=True)
        timing.write(args.out, lines)
        timing.write_json(args.out, {"machine": timing.machine(), "blocks": found})
    wrong = [
        tool for facts in found for tool, said in facts["tools"].items() if said["passed"] is False
    ]
    ran = all(any(said["passed"] for said in facts["tools"].values()) for facts in found)
    return int(bool(wrong) or not ran or any(facts["description_differs"] for facts in found))


if __name__ == "__main__":
    sys.exit(main())
