"""Kills a training run, a sweep and a report again and again and compares what comes out with what
was left alone, bit for bit.

python benchmarks/crash_resume.py [--kills=20] [--seed=0] [--out=FILE]

Half of the kills are of a training run, a quarter of a sweep, the rest of a report. Of the run's,
half come at a random moment, half while a checkpoint is being written (its temporary folder is
there). Each is `kill -9`; the same command then goes on. At the end every array of the newest
checkpoint (parameters, wiring, optimizer, average, random key), the data iterator's place and every
loss of metrics.jsonl must be identical, as must the sweep's tables and the report's files.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import processes
import timing
from processes import finish

# Dropout and the average make the random key and the second copy of the parameters part of what
# must come back.
CONFIG = {
    "steps": 120,
    "log_every": 1,
    "eval_every": 40,
    "eval_batches": 2,
    "checkpoint_every": 10,
    "sample_tokens": 0,
    "data.limit_bytes": 100_000,
    "model.layers": 1,
    "model.heads": 2,
    "model.width": 64,
    "model.context": 32,
    "model.dropout": 0.1,
    "model.mlp": "weightless",
    "model.weightless.num_luts": 96,
    "optimizer.ema": 0.99,
    "mesh.data": 1,
}


def start(workdir: Path) -> subprocess.Popen[str]:
    experiment = processes.REPOSITORY / "experiments" / "configs" / "gpt_char.py"
    overrides = [f"--config.{path}={value}" for path, value in CONFIG.items()]
    given = f"--config={experiment}:quick", f"--workdir={workdir}", "--progress=off"
    return processes.start("train", *given, *overrides)


def rows(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def reached(workdir: Path) -> int:
    return max((row["step"] for row in rows(workdir)), default=0)


def wait(process: subprocess.Popen, happened) -> None:
    while not happened():
        if process.poll() is not None:
            sys.exit(
                f"the run ended (status {process.returncode}) before it could be killed: "
                f"{process.communicate()[0]}"
            )
        time.sleep(0.002)


def saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def kill_once(workdir: Path, draw: random.Random, while_saving: bool) -> tuple[int, bool]:
    """Starts or goes on, kills at a moment of the wanted kind; returns the step reached and whether
    a save was cut off.
    """
    before = reached(workdir)
    process = start(workdir)
    goal = before + draw.randint(2, 12)
    wait(process, lambda: reached(workdir) >= goal)
    if while_saving:
        wait(process, lambda: saving(workdir))
        time.sleep(draw.uniform(0, 0.06))
    else:
        time.sleep(draw.uniform(0, 1.0))
    process.kill()
    process.communicate()
    return reached(workdir), saving(workdir)


def newest(workdir: Path) -> dict:
    """Every array of the newest checkpoint by path, and the data iterator's place."""
    import jax
    from orbax.checkpoint import v1 as ocp

    folder = workdir / "checkpoints" / str(saved_steps(workdir)[-1])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = ocp.checkpointables_metadata(folder).metadata["state"]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        found,
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    saved = ocp.load_checkpointables(folder, {"state": abstract, "loop": None})
    leaves = {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(saved["state"])
    }
    return leaves | {"data": json.loads(saved["loop"]["json"].tobytes())["data"]}


def compare(interrupted: Path, uninterrupted: Path) -> dict[str, str]:
    """What was compared -> 'identical', or how it differs."""
    found, expected = newest(interrupted), newest(uninterrupted)
    arrays = [name for name, value in expected.items() if isinstance(value, np.ndarray)]
    if found.keys() != expected.keys():
        return {"arrays": f"other names: {sorted(found.keys() ^ expected.keys())[:5]}"}
    different = [name for name in arrays if found[name].tobytes() != expected[name].tobytes()]
    losses = [
        {(r["step"], r["split"]): r["loss"] for r in rows(workdir)}
        for workdir in (interrupted, uninterrupted)
    ]
    repeated = len(rows(interrupted)) - len(losses[0])

    def verdict(equal: bool, shown: object = "", word: str = "identical") -> str:
        return word if equal else f"DIFFERENT: {shown}"

    numbers = sum(expected[name].size for name in arrays)
    same_place = found["data"] == expected["data"]
    return {
        f"{len(arrays)} arrays, {numbers:,} numbers": verdict(not different, different[:5]),
        f"data iterator at {expected['data']}": verdict(same_place, found["data"]),
        f"{len(losses[1])} losses of metrics.jsonl": verdict(losses[0] == losses[1]),
        "rows of metrics.jsonl that repeat a step": verdict(not repeated, repeated, "none"),
    }


SWEEP = """
from experiments.configs import gpt_char

get_config = gpt_char.get_config


def sweep(add):
    for rate in (1e-3, 4e-3):
        add({**%r, "steps": 20, "checkpoint_every": 4, "eval_every": 10}, lr=rate)
"""


def start_sweep(root: Path) -> subprocess.Popen[str]:
    experiment = root.parent / "points.py"
    experiment.write_text(SWEEP % CONFIG)
    return processes.start("sweep", f"--config={experiment}:quick", f"--workdir={root}")


def kill_sometime(start: Callable[[Path], subprocess.Popen[str]], at: Path, most: float) -> str:
    """Starts, and kills within so many seconds: 'killed', or 'ended' where it was faster."""
    process = start(at)
    try:
        process.wait(most)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return "ended" if process.returncode >= 0 else "killed"


def same_files(found: Path, expected: Path, pattern: str) -> str:
    """'identical', or the names of the files of a folder that are not those of another."""
    contents = [
        {p.name: p.read_bytes() for p in f.glob(pattern) if p.is_file()} for f in (found, expected)
    ]
    names = contents[0].keys() | contents[1].keys()
    different = sorted(n for n in names if contents[0].get(n) != contents[1].get(n))
    return "identical" if names and not different else f"DIFFERENT: {different}"


def kill_whole_commands(
    folder: Path, kills: tuple[int, int], draw: random.Random, say: Callable[[str], None]
) -> dict[str, str]:
    """Kills sweeps and reports at random moments of their usual time, and compares what is made at
    last.
    """
    run = folder / "uninterrupted"
    reports: dict[str, Callable[[Path], subprocess.Popen[str]]] = {
        "sweep": start_sweep,
        "report": lambda out: processes.start("report", str(run), f"--out={out}", "--batches=1"),
    }
    outcome = {}
    for (name, start), count in zip(reports.items(), kills):
        alone, killed = folder / f"{name}-alone", folder / f"{name}-killed"
        begun = time.monotonic()
        finish(start(alone))
        usual = time.monotonic() - begun
        came = [kill_sometime(start, killed, draw.uniform(0, 0.7 * usual)) for _ in range(count)]
        finish(start(killed))
        say(f"{name}: {came.count('killed')} kills, {came.count('ended')} ended before")
        outcome[f"files of the {name}"] = same_files(killed, alone, "*.*")
    return outcome


def kill_a_run(folder: Path, kills: int, draw: random.Random, say: Callable[[str], None]) -> Path:
    """Kills a run, finishes it and an uninterrupted one beside it; its folder."""
    say(f"{'kill':>4}  {'aimed at':<13}  {'step':>4}  {'whole checkpoints':<18}  cut off a save")
    interrupted, cut = folder / "interrupted", 0
    for i in range(kills):
        while_saving = i % 2 == 1
        step, cut_off = kill_once(interrupted, draw, while_saving)
        cut += cut_off
        whole = ", ".join(map(str, saved_steps(interrupted)))
        aim, yes = "a save" if while_saving else "any moment", "yes" if cut_off else "no"
        say(f"{i + 1:>4}  {aim:<13}  {step:>4}  {whole:<18}  {yes}")
    finish(start(interrupted))
    finish(start(folder / "uninterrupted"))
    say(f"\n{kills} kills of the run, {cut} of them during a save")
    return interrupted


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, lines = random.Random(args.seed), []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    say(f"{timing.machine(packages)}; {time.strftime('%Y-%m-%d')}")
    cached = ""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        cached = ", compiled programs kept between starts (JAX_COMPILATION_CACHE_DIR)"
    every = CONFIG["checkpoint_every"]
    # a kill costs the run a checkpoint's distance at most, now and then two
    CONFIG["steps"] = max(CONFIG["steps"], every * (args.kills // 2 + 8) * 2)
    say(f"{CONFIG['steps']} steps, a checkpoint every {every}, seed {args.seed}{cached}\n")
    of_run = args.kills - args.kills // 2
    of_sweep = args.kills // 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        interrupted = kill_a_run(folder, of_run, draw, say)
        outcome = compare(interrupted, folder / "uninterrupted")
        others = of_sweep, args.kills - of_run - of_sweep
        outcome |= kill_whole_commands(folder, others, draw, say)
        say("\nthen finished, and compared with what was left alone:")
        for what, result in outcome.items():
            say(f"  {what:<50} {result}")
        left = [p.name for p in (interrupted / "checkpoints").iterdir() if not p.name.isdigit()]
        left += [p.name for p in interrupted.glob("damaged/*")]
        say(f"  {'left over from cut-off saves':<50} {', '.join(left) or 'nothing'}")
    timing.write(args.out, lines)
    if any("DIFFERENT" in result or "other" in result for result in outcome.values()):
        sys.exit("what was killed is NOT what was left alone.")


if __name__ == "__main__":
    main()
