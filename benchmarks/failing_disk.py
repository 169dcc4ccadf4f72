"""Lets the file system fail, or the process end, at any call that a training run makes to it; then
goes on, and compares with a run that was left alone, bit for bit.

python benchmarks/failing_disk.py [--cases=40] [--seed=0] [--case=N]

A case draws one of the calls by which Python opens, makes, renames, removes or syncs what is in the
run directory, and what happens there: an error (disk full, device failed, folder read-only), once
or from then on; a file that takes nothing; or `kill -9`, at once or a moment later, while the files
of a checkpoint are written. The run may then end with a sentence (RunError, InputError), be killed,
or do without. The same run again must complete: state, data iterator and rows as undisturbed.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import REPOSITORY

SMALL = {"steps": 6, "checkpoint_every": 2, "eval_every": 4, "log_every": 1, "eval_batches": 1}
SMALL |= {"batch_size": 4, "eval_batch_size": 4, "sample_tokens": 0, "mesh.data": 1}
SMALL |= {"model.layers": 1, "model.heads": 1, "model.width": 16, "model.context": 16}
SMALL |= {"model.mlp": "none", "model.dropout": 0.1, "optimizer.ema": 0.9}
SMALL |= {"data.source": "text_file"}
CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "listdir", "scandir")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.ENOENT)
WAYS = (*ERRORS, "takes nothing", "killed", "killed soon")


@dataclasses.dataclass
class Faults:
    """Counts the calls on what is below a folder, and does at the one of number `at` what `way`
    says.
    """

    folder: Path
    at: int = 0
    way: int | str = errno.ENOSPC
    stays: bool = False
    delay: float = 0.0
    count: int = 0

    def install(self) -> None:
        """In this process, to its end."""
        for name in CALLS:
            setattr(os, name, self._failing(getattr(os, name), name))
        io.open = self._failing(io.open, "open")
        builtins.open = io.open

    def _failing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        lock = threading.Lock()

        def wrapped(*args: Any, **options: Any) -> Any:
            if not self._is_ours(args[0] if args else None, name):
                return call(*args, **options)
            with lock:
                self.count += 1
                now = self.count == self.at or (self.stays and 0 < self.at < self.count)
            if not now:
                return call(*args, **options)
            if self.way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.way == "killed soon":
                threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            if isinstance(self.way, int):
                raise OSError(self.way, os.strerror(self.way), str(args[0]))
            if self.way == "takes nothing" and name == "open" and "w" in str(args[1:2]):
                return call("/dev/full", *args[1:], **options)
            return call(*args, **options)

        return wrapped

    def _is_ours(self, what: object, name: str) -> bool:
        if isinstance(what, int):
            return name == "fsync"
        return isinstance(what, str | os.PathLike) and os.fspath(what).startswith(str(self.folder))


def train(workdir: Path, faults: Faults | None) -> dict[str, Any]:
    """What came of a run, in a process of its own: {'kind': 'done', ..., 'killed', or an error}."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.dup2(os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            answer = _train(workdir, faults)
        except BaseException as error:
            kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _SAID), "raw")
            traceback.print_exc()
            frames = traceback.extract_tb(error.__traceback__)
            where = " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-6:])
            answer = {
                "kind": kind,
                "text": f"{type(error).__name__}: {error}"[:400] + f" at {where}",
            }
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else {"kind": "killed"}


_SAID = ("RunError", "InputError")


def _train(workdir: Path, faults: Faults | None) -> dict[str, Any]:
    import jax
    import numpy as np

    from quweit_jax.config import load_file, set_value
    from quweit_jax.training import loop, metrics, rundir

    config = load_file(f"{REPOSITORY}/experiments/configs/gpt_char.py:quick")
    for path, value in (SMALL | {"data.path": workdir.parent / "text.txt"}).items():
        set_value(config, path, str(value))
    if faults is not None:
        faults.install()
    result = loop.fit(config, workdir, progress=False)
    state = hashlib.sha256()
    for leaf in jax.tree.leaves(result.state):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        state.update(np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes())
    rows = metrics.read_rows(workdir / "metrics.jsonl")
    return {
        "kind": "done",
        "calls": faults.count if faults else 0,
        "state": state.hexdigest(),
        "rows": [{k: v for k, v in row.items() if not metrics.is_speed(k)} for row in rows],
        "finished": rundir.is_finished(workdir, SMALL["steps"]),
    }


def run_case(seed: int, number: int, root: Path, alone: dict[str, Any]) -> tuple[str, str]:
    """(What came of the disturbed run, what is wrong with it or with going on, or '')."""
    draw = random.Random(f"{seed}/{number}")
    workdir = root / f"run{number}"
    way, at = draw.choice(WAYS), draw.randint(1, alone["calls"])
    stays = isinstance(way, int) and draw.random() < 0.5
    first = train(workdir, Faults(workdir, at, way, stays, draw.uniform(0, 0.05)))
    what = f"call {at} of {alone['calls']}, {way}{' from then on' * stays}"
    if first["kind"] == "raw":
        return "raw", f"{what}: {first['text']}"
    again = train(workdir, None)
    if again["kind"] != "done":
        return first["kind"], f"{what}: {first.get('text')}; then {again}"
    different = [name for name in ("state", "rows", "finished") if again[name] != alone[name]]
    return first["kind"], f"{what}: {', '.join(different)} differ" if different else ""


def main() -> int:
    """Tries so many cases."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    args = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Imported once, for all children; JAX begins no threads before it is asked for a device.
    import quweit_jax.training.loop  # noqa: F401

    seen, failures = Counter(), 0
    with tempfile.TemporaryDirectory(prefix="failing-disk-") as folder:
        root = Path(folder)
        draw = random.Random(0)
        (root / "text.txt").write_text("".join(draw.choices("abcdefgh ", k=4000)))
        alone = train(root / "alone", Faults(root / "alone"))
        if alone["kind"] != "done" or not alone["finished"]:
            sys.exit(f"the undisturbed run failed: {alone}")
        for number in range(args.cases) if args.case is None else [args.case]:
            came, wrong = run_case(args.seed, number, root, alone)
            seen[came] += 1
            if wrong:
                failures += 1
                print(f"--seed={args.seed} --case={number}  {wrong}", flush=True)
    told = ", ".join(f"{count} {came}" for came, count in seen.most_common())
    print(f"{seen.total()} cases, {failures} failures ({told}), seed {args.seed}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
