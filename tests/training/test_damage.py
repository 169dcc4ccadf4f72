"""Checkpoints and a run's other files, damaged in every way: what is whole is used, the rest is
told, and nothing begins again where there was something.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from quweit_jax.errors import InputError, RunError
from quweit_jax.training import checkpoints, checksums, loop, metrics, rundir
from quweit_jax.training.checkpoints import Checkpoints
from quweit_jax.training.setup import assemble

SMALL = {"model.layers": 1, "model.width": 16, "model.mlp": "none", "log_every": 1, "steps": 6} | {
    "eval_every": 4,
    "checkpoint_every": 2,
    "keep": 3,
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES = [cut, empty, scramble, flip, Path.unlink, replace_by_folder, replace_by_pipe]


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6, of which 4 and 6 were evaluated."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.fit(tiny_config(SMALL), workdir, progress=False)
    return workdir


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def abstract(tiny_config) -> Any:
    return assemble(tiny_config(SMALL)).abstract_state()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_file_of_a_checkpoint_damaged_in_any_way(whole, run, abstract, damage, monkeypatch):
    """The one before is taken, by a run that goes on and by a reader, whatever happened to which
    file. What follows a checkpoint's verification is Orbax's and the same for all, so it is left
    out here.
    """
    loaded = {"loop": {"json": np.frombuffer(b"{}", np.uint8)}, "state": None}
    monkeypatch.setattr(checkpoints.orbax, "load_checkpointables", lambda folder, _: loaded)
    for path in files_in(run / "checkpoints" / "6"):
        damage(path)
        with Checkpoints(run, read_only=True) as saved:
            assert saved.restore(abstract) == (None, {}, 4), path
        with Checkpoints(run, keep=3) as saved:
            assert saved.restore(abstract) == (None, {}, 4), path
            assert saved.steps() == [2, 4] and len(saved.damaged) == 1, path
        shutil.rmtree(run / "damaged")
        shutil.copytree(whole / "checkpoints" / "6", run / "checkpoints" / "6")
        shutil.copy(whole / "checksums" / "6.json", run / "checksums")


@pytest.mark.parametrize("step,held", [(4, "[]"), (6, "3"), (4, "null"), (6, '"x"')])
def test_a_description_that_is_no_object_leaves_the_run_usable(run, tiny_config, step, held):
    """What Orbax reads of every checkpoint as soon as it is opened."""
    (run / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text(held)
    assert rundir.open_run(run).step == 10 - step
    assert loop.fit(tiny_config(SMALL | {"steps": 8}), run, progress=False).complete
    assert checksums.is_whole(run, 8) and (run / "damaged" / str(step)).is_dir()


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("damage", [*DAMAGES[:1], *DAMAGES[2:], lead_nowhere])
def test_a_damaged_score_leaves_the_run_usable(run, tiny_config, damage, step):
    """The small file that Orbax reads of every checkpoint as soon as it looks at a folder; of the
    newest checkpoint or of an older one.
    """
    damage(run / "checkpoints" / str(step) / "metrics" / "metrics")
    opened = rundir.open_run(run)
    assert opened.step == 10 - step and len(opened.damaged) == 1
    result = loop.fit(tiny_config(SMALL | {"steps": 8}), run, progress=False)
    assert result.complete and checksums.is_whole(run, 8)
    assert (run / "damaged" / str(step)).is_dir()


def test_a_reader_takes_no_other_than_the_best_without_being_told(run):
    """Of several a damaged one is named, and those there are instead; where the score of one cannot
    be known, it may have been the best.
    """
    best = rundir.open_run(run).step
    other = 10 - best  # 4 or 6
    flip(run / "checkpoints" / str(best) / "state" / "_METADATA")
    with pytest.raises(RunError, match=f"step {best} is damaged .* {other}; choose one with"):
        rundir.open_run(run)
    (run / "checkpoints" / str(best) / "metrics" / "metrics").write_text('{"loss": 0.5}')
    opened = rundir.open_run(run)
    assert opened.step == other and len(opened.damaged) == 1
    assert not (run / "damaged").exists(), "reading moves nothing"


UNREADABLE = {
    "empty": b"",
    "cut": b'{"state/_METADATA": [12',
    "an object of nothing": b"{}",
    "another shape": b'{"state/_METADATA": 3}',
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_checksums_are_absent_ones(run, whole, tiny_config, content, caplog):
    """Of one checkpoint or of all of them: what they are of is whole, and the run goes on from it;
    afterwards they are there again.
    """
    for path in (run / "checksums").iterdir():
        path.write_bytes(content)
    assert not rundir.is_finished(run, 6)
    result = loop.fit(tiny_config(SMALL), run, progress=False)
    assert result.step == 6 and not (run / "damaged").exists()
    assert "6.json cannot be read" in caplog.text
    assert rundir.is_finished(run, 6)
    before, after = (metrics.read_rows(d / "metrics.jsonl") for d in (whole, run))
    assert before == after


def test_without_checksums_a_damaged_checkpoint_is_still_found_out(run, tiny_config):
    """Its tree may then look like that of another model."""
    shutil.rmtree(run / "checksums")
    cut(run / "checkpoints" / "6" / "state" / "_METADATA")
    with pytest.raises(RunError, match="step 6 is damaged"):
        rundir.open_run(run, 6)
    result = loop.fit(tiny_config(SMALL), run, progress=False)
    assert result.complete and (run / "damaged" / "6").is_dir()


def remove_all(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def damage_all(run: Path) -> None:
    for path in files_in(run / "checkpoints"):
        path.write_bytes(b"")


def damage_all_and_checksums(run: Path) -> None:
    damage_all(run)
    for path in (run / "checksums").iterdir():
        path.write_bytes(b"")


def all_set_aside(run: Path) -> None:
    (run / "checkpoints").rename(run / "damaged")
    shutil.rmtree(run / "checksums")


@pytest.mark.parametrize("loss", [remove_all, damage_all, damage_all_and_checksums, all_set_aside])
def test_nothing_begins_again_where_checkpoints_were(run, tiny_config, loss: Callable):
    loss(run)
    kept = {p: p.read_bytes() for p in (run / "config.json", run / "metrics.jsonl")}
    for _ in range(2):  # the second time as the first
        with pytest.raises(RunError, match="new --workdir"):
            loop.fit(tiny_config(SMALL | {"steps": 9}), run, progress=False)
        assert {p: p.read_bytes() for p in kept} == kept


def test_a_run_that_had_no_checkpoint_yet_begins_again(run, tiny_config):
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "checksums")
    assert loop.fit(tiny_config(SMALL | {"steps": 2}), run, progress=False).step == 2


@pytest.mark.parametrize("damage", [cut, empty, scramble])
@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl"])
def test_records_may_be_damaged(run, tiny_config, name, damage):
    damage(run / name)
    assert rundir.open_run(run).step in (4, 6)
    assert loop.fit(tiny_config(SMALL | {"steps": 7}), run, progress=False).complete


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_what_a_run_is_may_not_be_damaged(run, tiny_config, name, damage):
    """Where it is noticed, it is named; where it is gone, the run tells that it is none."""
    damage(run / name)
    if damage is flip or (name, damage) == ("tokenizer.json", Path.unlink):
        return  # another letter may be as good, and a tokenizer of letters is made again
    with pytest.raises(InputError, match=name):
        rundir.open_run(run)
    with pytest.raises(InputError):
        loop.fit(tiny_config(SMALL), run, progress=False)


def test_finished_means_the_last_checkpoint_whole(run):
    assert rundir.is_finished(run, 6) and not rundir.is_finished(run, 4 + 4)
    flip(max(files_in(run / "checkpoints" / "6"), key=lambda path: path.stat().st_size))
    assert not rundir.is_finished(run, 6)
    shutil.rmtree(run / "checkpoints" / "6")
    assert not rundir.is_finished(run, 6)
    assert rundir.is_finished(run, 4)


def lose_rows(run: Path) -> None:
    (run / "metrics.jsonl").unlink()


def lose_evaluations(run: Path) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(row for row in rows if '"train"' in row))


@pytest.mark.parametrize("loss", [lose_rows, lose_evaluations])
def test_a_run_whose_rows_were_lost_is_finished_by_going_on(run, whole, tiny_config, loss):
    """Its last evaluation is made again, and is what it was."""
    loss(run)
    assert not rundir.is_finished(run, 6)
    for _ in range(2):  # the second time there is nothing to do
        assert loop.fit(tiny_config(SMALL), run, progress=False).complete
        assert rundir.is_finished(run, 6)
        (row,), before = metrics.evaluations(run), metrics.evaluations(whole)[-1]
        assert (row["step"], row["loss"]) == (before["step"], before["loss"])


def test_a_run_that_was_stopped_at_what_becomes_its_last_step_is_finished(tiny_config, tmp_path):
    workdir = tmp_path / "run"

    def stop(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    assert loop.fit(tiny_config(SMALL), workdir, progress=False, on_step=stop).step == 3
    result = loop.fit(tiny_config(SMALL | {"steps": 3}), workdir, progress=False)
    assert result.complete and rundir.is_finished(workdir, 3)
    assert result.validation is not None
    assert result.validation["loss"] == metrics.evaluations(workdir)[-1]["loss"]


def test_what_cannot_be_found_again_is_not_called_saved(run, tiny_config, tmp_path, monkeypatch):
    """As where Orbax looks for its parts by a pattern and finds none: only a log line tells."""
    from orbax.checkpoint._src.serialization import ocdbt_utils

    async def nothing(*_, **__):
        pass

    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", nothing)
    with pytest.raises(RunError, match=r"the checkpoint of step 2 .*there is no whole checkpoint"):
        loop.fit(tiny_config(SMALL), tmp_path / "new", progress=False)


def test_a_whole_run_reads_alike(run, whole):
    first, second = rundir.open_run(run), rundir.open_run(whole)
    assert first.step == second.step and not first.damaged and not first.data_changed
    jax.tree.map(np.testing.assert_array_equal, first.variables, second.variables)
