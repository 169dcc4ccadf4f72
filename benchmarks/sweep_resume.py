"""Kills a sweep of 8 points half-way, starts it again, and compares its tables with those of a
sweep left alone.

python benchmarks/sweep_resume.py [--workers=2] [--out=FILE]

The points are small MatMul-free and dense language models. The kill is `kill -9` of the sweep, once
4 points are finished and others are being trained. The same command then goes on; sweep.md and
sweep.csv must be the same bytes as those of the sweep that was left alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import processes
import timing
from processes import finish

EXPERIMENT = """
from experiments.configs import compare_lm

SMALL = {"steps": 60, "eval_every": 20, "checkpoint_every": 20, "eval_batches": 4, "mesh.data": 1,
         "model.width": 32, "model.layers": 2, "model.context": 32,
         "data.source": "python_stdlib", "data.name": "",
         "data.validation_split": "", "data.limit_bytes": 200_000}

get_config = compare_lm.get_config


def sweep(add):
    for kind in ("gpt", "matmulfree"):
        for rate in (1e-3, 2e-3, 4e-3, 8e-3):
            add(SMALL, kind=kind, lr=rate)
"""


def start(experiment: Path, root: Path, workers: int) -> subprocess.Popen[str]:
    arguments = f"--config={experiment}:cpu", f"--workdir={root}", f"--workers={workers}"
    return processes.start("sweep", *arguments)


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        experiment = Path(folder, "experiment.py")
        experiment.write_text(EXPERIMENT)
        finish(start(experiment, alone, args.workers))
        process, lines = start(experiment, killed, args.workers), []
        assert process.stdout is not None
        while sum(line.startswith("finished:") for line in lines) < 4:
            lines.append(process.stdout.readline())
            if not lines[-1]:
                sys.exit("the sweep ended before it could be killed:\n" + "".join(lines))
        time.sleep(1)
        process.kill()
        process.wait()
        said = finish(start(experiment, killed, args.workers))
        same = {
            name: (alone / name).read_bytes() == (killed / name).read_bytes()
            for name in ("sweep.md", "sweep.csv")
        }
        table = (killed / "sweep.md").read_text()
    lines = [timing.machine(), "", "before the kill -9:", *map(str.rstrip, lines), ""]
    lines += ["the same command again:", said.rstrip(), ""]
    for name, equal in same.items():
        verdict = "is the same, byte for byte, as" if equal else "DIFFERS from"
        lines.append(f"{name} {verdict} that of a sweep left alone")
    lines = [line.replace(folder, "FOLDER") for line in lines]
    print("\n".join(lines))
    timing.write(args.out, lines)
    sys.exit(not all(same.values()) or table.count("finished") != 8)


if __name__ == "__main__":
    main()
