"""Damages files of runs, data and published checkpoints in every way it knows, and tries the
commands on what is left.

python benchmarks/torture.py [--minutes=10] [--seed=0] [--case=N] [--cases=N]

A tiny language model, a tiny classifier, their data and a published checkpoint are made once. A
case copies one of them, changes one file, or one value in it, and runs one command in a process
that lives on from case to case. What a command may do is succeed or say what is wrong (InputError,
RunError). Failures are any other exception; 30 seconds of work, or of waiting; more memory than 8
times the files and 1 GB; a reading command that changes what it reads; and a whole checkpoint that
training moves away. Each is printed with the line that repeats it; with any, the status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import REPOSITORY

LIMIT_SECONDS = 30.0
LIMIT_BYTES = 1 << 30
KILL_BYTES = 4 << 30
_OF = f"{REPOSITORY}/experiments/configs"
_SHORT = ["--config.steps=4", "--config.checkpoint_every=2", "--config.eval_every=2"]
_SHORT += ["--config.eval_batches=1", "--config.batch_size=4", "--config.eval_batch_size=4"]
_SHORT += ["--config.mesh.data=1", "--config.log_every=1", "--config.sample_tokens=0"]
_SHORT += ["--progress=off"]
_LM = ["--config.model.layers=1", "--config.model.heads=1", "--config.model.width=16"]
_LM += ["--config.model.context=16", "--config.model.weightless.num_luts=12"]
_LM += ["--config.data.source=document_folder", "--config.data.tokenizer=bpe"]
_LM += ["--config.data.bpe_vocab_size=280", "--config.data.validation_tokens=100"]
_VIT = ["--config.data.source=image_folder", "--config.data.normalize=half"]
_VIT += ["--config.data.image_size=8", "--config.model.depth=1", "--config.model.mlp=dense"]
_VIT += ["--config.model.width=16", "--config.model.heads=1", "--config.data.name="]

# What to change -> the commands to try on it. RUN, DATA and PUBLISHED are its folders, OUT is new.
_READ = {
    "evaluate": ["evaluate", "--workdir=RUN"],
    "report": ["report", "RUN", "--out=OUT", "--batches=1"],
    "export": ["export", "--workdir=RUN", "--out=OUT.stablehlo", "--platforms=cpu"],
}
_GENERATE = {"generate": ["generate", "--workdir=RUN", "--max_tokens=4"]}
_GO_ON = {"train-on": ["train", "--workdir=RUN", "--config.steps=6", "--progress=off"]}
_BEGIN = ["train", f"--config={_OF}/gpt_char.py:quick", "--workdir=OUT", *_SHORT, *_LM]
COMMANDS = {
    "lm/run": _READ | _GENERATE | _GO_ON,
    "vit/run": _READ | _GO_ON,
    "lm/data": {"evaluate": _READ["evaluate"], "report": _READ["report"], **_GO_ON},
    "vit/data": {"evaluate": _READ["evaluate"], **_GO_ON},
    "published": {"load": ["load", "transformer_pp", "PUBLISHED"]},  # it has no command of its own
}
# JSON values in the place of others; none of them asks for more work than there was.
_VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**30, float("inf"), float("nan"), "", "x", "\ud83d"]
_VALUES += [[], {}, [1, "2"], {"a": {"b": None}}, "$$"]
_VALUES += ["y" * 100_000, json.loads("[" * 200 + "]" * 200)]
_WHOLES = ["null", "[]", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 5000, "1" * 10_000, "\ufeff{}"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One change of one file, and a command to try."""

    number: int
    target: str
    file: str
    change: str
    command: str

    def __str__(self) -> str:
        return f"{self.command} on {self.target} with {self.file}: {self.change}"


def draw_case(seed: int, number: int, root: Path) -> tuple[Case, Callable[[Path], None]]:
    """Case `number`, and a function that makes the change in a copy of the target."""
    draw = random.Random(f"{seed}/{number}")
    target = draw.choice(list(COMMANDS))
    command = draw.choice(list(COMMANDS[target]))
    names = sorted(
        p.relative_to(root / target).as_posix() for p in (root / target).rglob("*") if p.is_file()
    )
    top = [name for name in names if "checkpoints/" not in name]
    name = draw.choice(top if draw.random() < 0.7 else names)
    is_json = name.endswith((".json", ".jsonl")) or "METADATA" in name
    change = draw.choice([*_CHANGES, *["value"] * 8 * is_json, *["whole"] * 3 * is_json])

    def apply(copy: Path) -> None:
        _OTHER.get(change, _CHANGES.get(change))(copy / name, draw)

    return Case(number, target, name, change, command), apply


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    _replace(path, data[: draw.randrange(len(data) + 1)])


def _scramble(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 4, 64))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    _replace(path, bytes(data))


def _swap(path: Path, draw: random.Random) -> None:
    """Exchanges it with a file of the same name (of another checkpoint, say),
    else with any other.
    """
    folder = next((p.parent for p in path.parents if p.name == "checkpoints"), path.parent)
    others: list[Path] = []
    while not others:  # a file that is alone in its folder: the folder above
        others = [p for p in folder.rglob("*") if p.is_file() and p != path]
        folder = folder.parent
    alike = [p for p in others if p.name == path.name] or others
    other = draw.choice(sorted(alike))
    mine, its = path.read_bytes(), other.read_bytes()
    _replace(path, its)
    _replace(other, mine)


def _repeat_lines(path: Path, draw: random.Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    _replace(path, b"".join(line * draw.choice((1, 1, 2)) for line in lines))


def _become(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def change(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return change


def _swap_value(path: Path, draw: random.Random) -> None:
    """Another value at one place of a JSON file, or one line of many."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    chosen = draw.randrange(len(lines))
    value = json.loads(lines[chosen])
    node, key = {"": value}, ""
    while isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
        node = node[key]
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    if draw.random() < 0.2 and key != "":
        del node[key]
    else:
        node[key] = draw.choice(_VALUES)
    whole = node[""] if isinstance(node, dict) and "" in node else value
    lines[chosen] = json.dumps(whole)
    _replace(path, ("\n".join(lines) + "\n").encode())


_CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut short": _cut,
    "empty": lambda path, _: _replace(path, b""),
    "deleted": _become(lambda _: None),
    "scrambled": _scramble,
    "random bytes": lambda path, draw: _replace(path, draw.randbytes(300)),
    "exchanged": _swap,
    "lines twice": _repeat_lines,
    "longer by a hole": lambda path, _: os.truncate(path, path.stat().st_size + (20 << 20)),
    "other line ends": lambda path, _: _replace(path, path.read_bytes().replace(b"\n", b"\r\n")),
    "not UTF-8": lambda path, _: _replace(path, b"\xff\xfe\x00{\x00"),
    "a folder": _become(Path.mkdir),
    "a pipe": _become(os.mkfifo),
    "a device": _become(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _become(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _become(lambda path: path.symlink_to("nothing")),
}
_OTHER = {
    "value": _swap_value,
    "whole": lambda path, draw: _replace(path, draw.choice(_WHOLES).encode()),
}


def make_targets(root: Path, worker: Worker) -> None:
    """The folders that cases copy, made by the commands themselves."""
    draw = random.Random(0)
    texts = root / "lm/data"
    texts.mkdir(parents=True)
    words = ["".join(draw.choices("abcdefg", k=draw.randint(2, 6))) for _ in range(40)]
    said = [" ".join(draw.choices(words, k=60)) for _ in range(12)]
    for i in range(4):
        (texts / f"{i}.txt").write_text(said[i])
    (texts / "more.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in said[4:]))
    begin = [word.replace("OUT", f"{root}/lm/run") for word in _BEGIN]
    worker.do({"make": "images", "root": f"{root}/vit/data"})
    vit = ["train", f"--config={_OF}/vit_cifar.py:quick", f"--workdir={root}/vit/run"]
    for argv in (
        [*begin, f"--config.data.path={texts}"],
        [*vit, *_SHORT, *_VIT, f"--config.data.path={root}/vit/data"],
    ):
        if (answer := worker.do({"argv": argv}, 600.0))["kind"] != "done":
            sys.exit(f"cannot make what to damage: {answer}")
    worker.do({"make": "published", "root": f"{root}/published"})


class Worker:
    """A process that runs commands one after another; a new one where it died or hung."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def do(self, task: dict[str, Any], seconds: float = 300.0) -> dict[str, Any]:
        """The answer to a task, {'kind': 'done', 'InputError', ..., 'hang' or 'death'}."""
        if self.process is None:
            here = {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | here,
            )
            self._answer(300.0)  # that it has begun
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        # Busy for so long, or idle for so long: on a machine that others use, too, neither is the
        # time on the wall.
        begun = used = _seconds_used(self.process.pid)
        idle_since, ready, kind = time.monotonic(), [], "hang"
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not ready and used - begun < seconds and time.monotonic() - idle_since < seconds:
                ready = selector.select(0.2)
                if (now := _seconds_used(self.process.pid)) != used:
                    used, idle_since = now, time.monotonic()
                # RLIMIT_AS would be simpler, but makes XLA wait for threads it cannot begin.
                if _memory("VmRSS", self.process.pid) > KILL_BYTES:
                    kind = "memory"
                    break
        line = self.process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.close()
        return {"kind": "death" if ready else kind, "text": "", "peak": 0}

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run_case(
    case: Case, apply: Callable[[Path], None], root: Path, worker: Worker
) -> tuple[str, str]:
    """(What came of a case, what is wrong with that or '')."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        place = Path(folder)
        kind, _, part = case.target.rpartition("/")
        folders = {"RUN": f"{kind or 'lm'}/run", "DATA": f"{kind or 'lm'}/data"}
        folders["PUBLISHED"] = "published"
        changed = {"run": "RUN", "data": "DATA", "published": "PUBLISHED"}[part]
        for name, source in folders.items():
            shutil.copytree(root / source, place / name)
        before = contents(place / "RUN")
        apply(place / changed)
        argv = COMMANDS[case.target][case.command]
        for name in (*folders, "OUT"):
            argv = [word.replace(name, f"{place}/{name}") for word in argv]
        if case.command in ("evaluate", "report", "train-on"):
            argv = [*argv, f"--config.data.path={place}/DATA"]
        damaged = contents(place / "RUN")
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file() and not p.is_symlink())
        task = {"argv": argv}
        answer = worker.do(task, LIMIT_SECONDS)
        text = answer["text"]
        if answer["kind"] not in ("done", "InputError", "RunError", "SystemExit"):
            return answer["kind"], f"{answer['kind']}: {text}"
        if answer["peak"] > 8 * size + LIMIT_BYTES:
            return "memory", f"{answer['peak'] >> 20} MB of memory for files of {size >> 10} KB"
        after = contents(place / "RUN")
        if case.command == "train-on":
            steps = {n.split("/")[1] for n in before if n.startswith("checkpoints/")}
            touched = {n for n in before.keys() | damaged.keys() if before.get(n) != damaged.get(n)}
            whole = {s for s in steps if not any(_belongs(n, s) for n in touched | {case.file})}
            lost = [s for s in whole if any(n.startswith(f"damaged/{s}") for n in after)]
            if lost or not any(n.startswith("checkpoints/") for n in after):
                return "lost", f"the whole checkpoints of {lost} are set aside: {text}"
        elif after != damaged:
            changes = [n for n in after.keys() | damaged.keys() if after.get(n) != damaged.get(n)]
            return "changed", f"a command that reads has changed {changes[:3]}"
        return answer["kind"], ""


def _belongs(name: str, step: str) -> bool:
    """Whether a file of a run is part of the checkpoint of a step, or its checksums."""
    return name.startswith((f"checkpoints/{step}/", f"checksums/{step}."))


def contents(folder: Path) -> dict[str, bytes]:
    """The regular files below a folder by name, but for locks."""
    files = (p for p in folder.rglob("*") if p.name != ".lock")
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in files
        if not p.is_symlink() and p.is_file()
    }


def main() -> int:
    """Tries cases until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--cases", type=int, default=10**9, help="no more than so many")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work()
    worker, seen, failures = Worker(), Counter(), 0
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        root = Path(folder)
        make_targets(root, worker)
        numbers = range(args.cases) if args.case is None else [args.case]
        end = time.monotonic() + 60 * args.minutes
        for number in numbers:
            if time.monotonic() > end:
                break
            case, apply = draw_case(args.seed, number, root)
            came, wrong = run_case(case, apply, root, worker)
            seen[came] += 1
            if wrong:
                failures += 1
                print(f"--seed={args.seed} --case={number}  {case}\n    {wrong}", flush=True)
        worker.close()
    told = ", ".join(f"{count} {came}" for came, count in seen.most_common())
    print(f"{seen.total()} cases, {failures} failures ({told or 'none'}), seed {args.seed}")
    return 1 if failures else 0


def work() -> int:
    """Reads tasks from standard input and answers each with a line on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(kind: str, text: str = "", peak: int = 0) -> None:
        out.write(json.dumps({"kind": kind, "text": text, "peak": peak}) + "\n")
        out.flush()

    answer("begun")
    for line in sys.stdin:
        task = json.loads(line)
        if "make" in task:
            _MAKE[task["make"]](Path(task["root"]))
            answer("done")
            continue
        begin = _memory("VmRSS")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
        kind, text = _try(task["argv"])
        answer(kind, text, _memory("VmHWM") - begin)
    return 0


def _try(argv: list[str]) -> tuple[str, str]:
    import io
    import traceback

    from quweit_jax import pretrained
    from quweit_jax.__main__ import command
    from quweit_jax.errors import InputError, RunError

    try:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if argv[0] == "load":
                pretrained.load(argv[2], argv[1])
            else:
                command(argv)
        return "done", said.getvalue()[-300:]
    except (InputError, RunError, SystemExit) as error:
        kind = next(k for k in (InputError, RunError, SystemExit) if isinstance(error, k))
        return kind.__name__, f"{error}"[:500]
    except BaseException as error:
        where = [
            f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}"
            for f in traceback.extract_tb(error.__traceback__)
        ]
        return type(error).__name__, f"{error}"[:300].replace("\n", " ") + " at " + " ".join(
            where[-8:]
        )


def _memory(name: str, process: int | str = "self") -> int:
    """A line of /proc/PROCESS/status, in bytes; 0 on systems without, and of one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def _seconds_used(process: int) -> float:
    """Processor time of a process; 0 of one that has ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _make_images(root: Path) -> None:
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.{'jpg' if i % 2 else 'png'}")


def _make_published(root: Path) -> None:
    import jax
    import numpy as np

    from quweit_jax import models, pretrained

    sizes = {"layers": 1, "heads": 1, "width": 16, "context": 16}
    model = models.build({"name": "transformer_pp", "size": "tiny", **sizes}, 280)
    variables = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
    pretrained.save(model, variables, root, shard_bytes=20_000)


_MAKE = {"images": _make_images, "published": _make_published}

if __name__ == "__main__":
    sys.exit(main())
