"""What a run tells of itself: speed, memory and share of the peak, traces, trackers, its starts."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from quweit_jax.commands import cli
from quweit_jax.errors import InputError
from quweit_jax.training import chips, log, loop, meter, metrics, profiling, starts, tracking
from quweit_jax.training.setup import assemble

SMALL = {"model.layers": 1, "model.width": 16, "model.mlp": "dense", "steps": 6} | {
    "log_every": 1,
    "eval_every": 6,
    "checkpoint_every": 6,
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves on."""
    now = types.SimpleNamespace(time=100.0)
    for module in (meter, log):
        monkeypatch.setattr(module.time, "monotonic", lambda: now.time)

    def wait(seconds):
        now.time += seconds

    return wait


@pytest.fixture(scope="module")
def watched(tiny_config, tmp_path_factory):
    """A run that was started twice, traced, and told to a board: (its directory, what the board
    got).
    """
    workdir, seen = tmp_path_factory.mktemp("watched") / "run", []
    board = types.SimpleNamespace(add_scalar=lambda *given: seen.append(given), close=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        fake = types.SimpleNamespace(SummaryWriter=lambda folder: board)
        patch.setitem(sys.modules, "tensorboardX", fake)
        for steps in (2, 6):
            changes = {"steps": steps, "profile_steps": "4:5"}
            loop.fit(tiny_config(SMALL | changes), workdir, progress=False)
    return workdir, seen


def test_rows_have_the_speed_of_their_steps(watched):
    rows = metrics.read_rows(watched[0] / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    measured = [row["step"] for row in train if "step_seconds" in row]
    assert measured == [2, 4, 5, 6], "the steps in which a start compiles are not measured"
    for row in train:
        if "step_seconds" in row:
            assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(8 * 16)
            assert 0 <= row["data_wait_seconds"] <= row["step_seconds"] < train[-1]["seconds"]
        assert "mfu" not in row, "a CPU's peak is not known"
    assert not any("step_seconds" in row for row in rows if row["split"] == "validation")


def test_compiling_evaluating_and_saving_are_no_part_of_a_step(tiny_config, clock, monkeypatch):
    monkeypatch.setattr(meter, "peak_of", lambda kind: 1e6)
    setup = assemble(tiny_config(SMALL))
    gauge = meter.Meter(setup)
    step = gauge.compiles(lambda: clock(50))
    assert gauge.take() == {}
    for seconds in (0.5, 0.25):  # the first call compiles
        with gauge.waiting():
            clock(seconds)
        step()
    assert gauge.compiling == 50 and gauge.take_compiled() and not gauge.take_compiled()
    gauge.lap()
    assert gauge.take() == {}, "the first step is left out"
    for wait in (1.0, 2.0):
        with gauge.waiting():
            clock(wait)
        clock(3)
        gauge.lap()
        with gauge.pausing():
            clock(1000)
    found = gauge.take()
    share = meter.model_flops(setup) / 1e6 / 4.5
    assert found == pytest.approx(
        {"step_seconds": 4.5, "data_wait_seconds": 1.5, "mfu": share}
        | {"tokens_per_second": 8 * 16 / 4.5}
    )
    assert log.speed(found)[1:] == ["33% of it waiting for data", f"MFU {share:.0%}"]


def test_the_time_left_is_that_of_steps(tiny_config, clock, tmp_path):
    setup = assemble(tiny_config(SMALL))
    with contextlib.closing(log.Log(setup, tmp_path, 0, {}, False)) as told:
        told.meter.compiles(lambda: clock(600))()
        clock(8)
        assert told.left(2) == pytest.approx(8 / 2 * 4) and told.elapsed() == 608


def test_operations_are_those_of_the_matrices(tiny_config):
    """By hand: qkv and projection, the two matrices of the MLP, scores and mixing, the head."""
    setup = assemble(tiny_config(SMALL))
    tokens, width, context = 8 * 16, 16, 16
    products = width * (4 * width + 8 * width + setup.data.outputs) + 2 * context * width
    assert meter.model_flops(setup) == 3 * 2 * tokens * products


def test_peaks_are_those_of_the_longest_name():
    peak = {name: chip.peak for name, chip in chips.CHIPS.items()}
    assert chips.peak_of("TPU v5 lite") == peak["v5e"] and chips.peak_of("TPU v5") == peak["v5p"]
    assert chips.peak_of("NVIDIA H100 80GB HBM3") == peak["h100"]
    assert chips.peak_of("NVIDIA H100 PCIe") == peak["h100_pcie"]
    assert chips.peak_of("TPU v50") is None and chips.peak_of("cpu") is None


def test_memory_is_that_of_the_fullest_device():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    full = [device({"peak_bytes_in_use": 3}), device({"peak_bytes_in_use": 7}), device(None)]
    assert meter.memory_peak(full) == 7 and meter.memory_peak(jax.devices("cpu")) is None


def test_a_trace_has_the_steps_that_were_asked_for(watched):
    (trace,) = (watched[0] / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert steps == ["4", "5"]
    (whole,) = (watched[0] / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(whole)).planes
    assert any("CPU" in plane.name for plane in planes)


@pytest.mark.parametrize("steps", ["15:10", "0:3", "3", "a:b", "1:2:3"])
def test_steps_to_trace_are_two_numbers(steps):
    with pytest.raises(InputError, match="profile_steps: expected the first and the last step"):
        profiling.parse(steps)


def test_each_start_is_kept(watched):
    saved = json.loads((watched[0] / "environment.json").read_text())
    assert [start["step"] for start in saved["starts"]] == [0, 2]
    for start in saved["starts"]:
        assert start["command"] == sys.argv and start["time"].endswith("+00:00")
        assert start["commit"] == starts.git_commit()
        assert start["versions"] == saved["versions"]


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    """A repository that only happens to lie above an installed package is not told."""
    found = starts.git_commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40
    starts.subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(starts, "__file__", str(tmp_path / "starts.py"))
    assert starts.git_commit() is None


def test_programs_are_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cli.keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "" and not list(tmp_path.iterdir())
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli.keep_compiled()
    folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert folder.is_dir() and folder.parent == tmp_path / "cache" / "quweit_jax"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    cli.keep_compiled()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ, "nowhere to keep them is no error"


_PAGES = """
import resource
import numpy as np
from quweit_jax.commands import cli

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**18)  # 2 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

cli.keep_memory()
pages()
print(pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_unless_the_user_says_how_to_allocate():
    own = ("MALLOC_", "GLIBC_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(own)}

    def pages(**more: str) -> int:
        """Those that the system hands out while buffers of 10,000 pages in all come and go."""
        command = [sys.executable, "-c", _PAGES]
        run = subprocess.run(command, env=plain | more, check=True, capture_output=True, text=True)
        return int(run.stdout)

    assert pages() < 100
    assert pages(MALLOC_MMAP_THRESHOLD_="65536") > 9000, "glibc was told to give each back"


def test_a_tracker_that_is_not_there_is_told_before_anything_is_written(tiny_config, tmp_path):
    with pytest.raises(InputError, match="track: expected one of"):
        loop.fit(tiny_config(SMALL | {"track": "wand"}), tmp_path / "run", progress=False)
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(InputError, match=r"package wandb for --config.track=wandb.*\[wandb\]"):
            loop.fit(tiny_config(SMALL | {"track": "wandb"}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number(watched):
    rows = metrics.read_rows(watched[0] / "metrics.jsonl")
    expected = [(k, v, row["step"]) for row in rows for k, v in tracking.numbers(row).items()]
    assert watched[1] == expected
    assert any(name == "train/tokens_per_second" for name, _, _ in expected)


def test_wandb_reads_what_was_tracked_offline(tiny_config, tmp_path, monkeypatch):
    """Through wandb's own records, of the log that its writer makes; two starts are one run."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (3, 6):
        changes = {"steps": steps, "track": "wandb"}
        loop.fit(tiny_config(SMALL | changes), tmp_path / "run", progress=False)
    records, runs = [], set()
    for file in (tmp_path / "run" / "wandb").rglob("*.wandb"):
        for data in read_log(file.read_bytes()):
            records.append(Record.FromString(data))
    for record in records:
        if record.HasField("run"):
            runs.add(record.run.run_id)
    told = {}
    for record in records:
        row = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
        }
        told.setdefault(row.get("_step"), {}).update(row)
    rows = metrics.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert runs == {(tmp_path / "run" / "wandb" / "id.txt").read_text().strip()}
    for row in rows:
        for name, value in tracking.numbers(row).items():
            assert told[row["step"]][name] == value, name


def read_log(data: bytes) -> list[bytes]:
    """The records of a log in LevelDB's format, after wandb's header of 7 bytes."""
    found, part, at = [], b"", 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # blocks are filled up with zeros
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found
