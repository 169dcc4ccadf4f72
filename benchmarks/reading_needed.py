"""How many tokens a second a host of a TPU slice has to read for the published sizes, beside what
one core does read: python benchmarks/reading_needed.py [--out=FILE.txt]; pip install libtpu

No step can be faster than the chips' peak allows for its matrix products, those that remat repeats
left out ('at the peak'), nor than the compiler's estimate where benchmarks/results/tpu_sizes.json
has one ('at the estimate'); what a core reads is of benchmarks/results/reading.json, the seconds of
its own work ('cpu'), of text by a trained tokenizer. --out also writes FILE.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import timing

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SIZES = (
    ("matmulfree.py:370m", "v5e:4x4"),
    ("matmulfree.py:1.3b", "v5p:2x2x4"),
    ("transformer_pp.py:1.3b", "v5p:2x2x4"),
)


def needed(config_name: str, topology: str) -> dict[str, object]:
    """Hosts, and tokens a second that one of them reads at the peak and at the estimate."""
    from quweit_jax.commands import compile_tpu
    from quweit_jax.config import load_file
    from quweit_jax.training.chips import CHIPS
    from quweit_jax.training.meter import model_flops
    from quweit_jax.training.setup import assemble
    from quweit_jax.training.topologies import devices_of

    config = load_file(str(REPOSITORY / "experiments" / "configs" / config_name))
    devices = devices_of(topology)
    setup = assemble(config, data=compile_tpu._data(config, 32_000), devices=devices)
    hosts = len({device.process_index for device in devices})
    tokens = config.batch_size * config.model.context
    peak = CHIPS[topology.partition(":")[0]].peak * len(devices)
    found: dict[str, object] = {
        "config": config_name,
        "topology": topology,
        "hosts": hosts,
        "at_the_peak": tokens * peak / model_flops(setup) / hosts,
    }
    path = RESULTS / "tpu_sizes.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    if seconds := rows.get(f"{config_name} {topology}", {}).get("estimated_seconds"):
        found["at_the_estimate"] = tokens / seconds / hosts
    return found


def main() -> None:
    args = timing.parser(__doc__).parse_args()
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    measured = json.loads((RESULTS / "reading.json").read_text())["rows"]
    rates = [row["cpu"] for row in measured if row["tokenizer"] == "bpe"]
    low, high = min(rates), max(rates)
    lines = [
        "Tokens a second that a host has to read, and the cores that read twice as many.",
        f"One core reads {low:,.0f} to {high:,.0f} a second (reading.txt: cpu, bpe).",
        timing.machine(("jax", "jaxlib", "libtpu")),
        f"{'config':24}{'topology':12}{'hosts':>6}{'at the peak':>14}{'cores for 2 x':>15}"
        f"{'at the estimate':>18}{'cores for 2 x':>15}",
    ]
    found = []
    for size in SIZES:
        row = needed(*size)
        found.append(row)
        line = f"{row['config']:24}{row['topology']:12}{row['hosts']:>6}"
        for key, width in (("at_the_peak", 14), ("at_the_estimate", 18)):
            rate = row.get(key)
            if isinstance(rate, float):
                line += f"{rate:>{width},.0f}{f'{2 * rate / high:.2f} to {2 * rate / low:.2f}':>15}"
        lines.append(line)
        print(line, flush=True)
    timing.write(args.out, lines)
    timing.write_json(args.out, {"rows": found, "core_reads": [low, high]})


if __name__ == "__main__":
    main()
