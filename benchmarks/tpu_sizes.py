"""What a chip needs and does for one training step of the published sizes, on TPUs that are not
there: python benchmarks/tpu_sizes.py [--only=WORD] [--again] [--limit=SECONDS]; pip install libtpu

Each size is compiled by a process of its own (`python -m quweit_jax compile_tpu`), the smallest
first, and kept at once: what is already in benchmarks/results/tpu_sizes.json is not compiled again
unless --again asks for it. A size that does not fit its chips is a row, too, with the values that
are too large. Beside the .json lies the table, tpu_sizes.md.

Estimates count cycles in which nothing waits for memory or other chips: compare them, don't quote
them. Compiling is timed by the processor's own seconds, which a busy machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timing

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "tpu_sizes.json"
CHAR = "gpt_char.py:nanogpt,mlp={}"
VIT = "vit_cifar.py:paper,mlp={}"
UNSCANNED = ("--config.model.scan_layers=false",)
# (config, topology, more arguments); 32,000 tokens wherever there is text.
Size = tuple[str, str, tuple[str, ...]]
SIZES: tuple[Size, ...] = (
    *((CHAR.format(mlp), "v5e:2x4", ()) for mlp in ("lookup_glu", "weightless")),
    *((VIT.format(mlp), "v5e:2x4", ()) for mlp in ("lookup_glu", "weightless")),
    ("matmulfree.py:370m", "v5e:4x4", ()),
    ("transformer_pp.py:370m", "v5e:4x4", ()),
    ("matmulfree.py:1.3b", "v5p:2x2x4", ()),
    ("transformer_pp.py:1.3b", "v5p:2x2x4", ()),
    ("matmulfree.py:2.7b", "v5p:2x4x4", ()),
    ("transformer_pp.py:2.7b", "v5p:2x4x4", ()),
    ("matmulfree.py:13b", "v5p:4x4x8", ()),
    ("transformer_pp.py:13b", "v5p:4x4x8", ()),
    ("transformer_pp.py:370m", "v5e:4x4", UNSCANNED),
    ("matmulfree.py:370m", "v5e:4x4", UNSCANNED),
    ("matmulfree.py:1.3b", "v5p:4x4x4", ()),
    ("transformer_pp.py:1.3b", "v5p:4x4x4", ()),
    ("matmulfree.py:2.7b", "v5p:4x4x4", ()),
    ("transformer_pp.py:2.7b", "v5p:4x4x4", ()),
    (CHAR.format("dense"), "v5e:2x4", ()),
    (VIT.format("dense"), "v5e:2x4", ()),
)
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "collective_permute", "all_to_all")


def name_of(size: Size) -> str:
    config, topology, more = size
    return " ".join((config, topology, *(part.removeprefix("--config.") for part in more)))


def compile_size(size: Size, limit: float | None) -> dict[str, Any]:
    """A row: what compile_tpu says, or why it fails; and the seconds of its process."""
    config, topology, more = size
    command = [sys.executable, "-m", "quweit_jax", "compile_tpu", "--json"]
    command += [f"--config=experiments/configs/{config}", f"--topology={topology}", *more]
    if not config.startswith("vit"):
        command.append("--outputs=32000")
    # A compiled program that was kept would take no time.
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    row: dict[str, Any] = {"config": config, "topology": topology, "more": list(more)}
    before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        row["unfinished"] = True
    else:
        row["fits"] = done.returncode == 0
        if done.returncode == 0:
            row |= json.loads(done.stdout.splitlines()[-1])
        elif done.returncode == 1 and "too little memory" in done.stderr:
            row["error"] = done.stderr[done.stderr.index("error: ") :].strip()
        else:
            raise SystemExit(f"{name_of(size)}:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row["process_cpu_seconds"] = round(
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )
    row["process_seconds"] = round(time.monotonic() - since)
    return row


def table(rows: dict[str, dict[str, Any]], machine: str) -> str:
    """The rows in the order of SIZES, as Markdown."""
    head = ["config", "topology", "fits", "arguments", "temporaries"]
    head += [kind.replace("_", "-") for kind in COLLECTIVES]
    head += ["TFLOP", "estimate, s", "share of peak", "compiling, CPU s"]
    lines = [
        "One training step at the config's batch, with 32,000 tokens where there is text, compiled "
        "for TPUs that were not there. GB and TFLOP are a chip's; collectives are what it receives "
        "in a step. TFLOP are those of matrix products, what remat repeats among them; estimates "
        "count cycles in which nothing waits for memory or other chips, without our own kernels, "
        "of which the compiler has none. Compiling is the processor time of the whole command, "
        "imports and tracing among it.",
        "",
        f"{machine}; `benchmarks/tpu_sizes.py`",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * 3 + "|---:" * (len(head) - 3) + "|",
    ]
    notes = []
    for size in SIZES:
        if (row := rows.get(name_of(size))) is None:
            continue
        fits = "unfinished" if row.get("unfinished") else "yes" if row["fits"] else "**no**"
        more = "".join(f", {part.removeprefix('--config.')}" for part in row["more"])
        cells = [f"`{row['config']}`{more}", row["topology"], fits]
        sizes = ("argument", "temporary", *COLLECTIVES)
        known = {"argument", "temporary"} if "collectives_and_estimate" in row else {*sizes}
        cells += [
            _giga(row.get(f"{kind}_bytes_per_chip"), row.get("fits") and kind in known)
            for kind in sizes
        ]
        cells += [f"{row['flops_per_chip'] / 1e12:,.2f}" if row.get("fits") else ""]
        estimate, share = row.get("estimated_seconds"), row.get("share_of_peak")
        cells += [f"{estimate:.3f}" if estimate else "", f"{100 * share:.1f} %" if share else ""]
        cells += [f"{row['process_cpu_seconds']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
        if reason := row.get("collectives_and_estimate"):
            notes += ["", f"`{name_of(size)}`: collectives and estimate are {reason}."]
        if row.get("error"):
            notes += ["", f"`{name_of(size)}`: {row['error'].removeprefix('error: ')}"]
    return "\n".join([*lines, *notes, "", *_ratios(rows)]).strip() + "\n"


def _giga(size: int | None, fits: bool | None) -> str:
    return f"{(size or 0) / 1e9:.3f}" if fits else ""


def _ratios(rows: dict[str, dict[str, Any]]) -> list[str]:
    """How long scanned layers compile beside unscanned ones, where both were compiled."""
    lines = []
    for size in SIZES:
        scanned, own = rows.get(name_of((*size[:2], ()))), rows.get(name_of(size))
        if size[2] != UNSCANNED or scanned is None or own is None:
            continue
        ratio = scanned["process_cpu_seconds"] / own["process_cpu_seconds"]
        bound = "less than " if own.get("unfinished") else ""
        lines.append(
            f"- `{size[0]}` on {size[1]}: scanned layers compile in {bound}{ratio:.2f} of the "
            "unscanned time."
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="sizes with this in their name")
    parser.add_argument("--again", action="store_true", help="those that have a row, too")
    parser.add_argument("--limit", type=float, help="seconds after which one is given up")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    machine = timing.machine(("jax", "jaxlib", "flax", "libtpu"))
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows: dict[str, dict[str, Any]] = kept.get("rows", {})
    for size in SIZES:
        name = name_of(size)
        if args.only not in name or (name in rows and not args.again):
            continue
        rows[name] = row = compile_size(size, args.limit)
        args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(rows, machine))
        print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
