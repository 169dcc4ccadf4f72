"""Run directories: who may write to them and when, which paths can be used, when a run is finished,
and what of it belongs to the machine that trained it.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.studies import common
from quweit_jax.commands import cli, evaluate, export, generate, pack, report, sweep, train
from quweit_jax.errors import InputError, RunError
from quweit_jax.models.registry import defaults
from quweit_jax.pretrained import saved
from quweit_jax.report import owned_folder
from quweit_jax.report.collect import collect
from quweit_jax.training import checksums, files, loop, rundir, setup, sharding
from quweit_jax.training.sharding import MeshConfig
from tests.conftest import write_text

SMALL = {"model.layers": 1, "model.width": 16, "model.mlp": "none", "steps": 4} | {
    "eval_every": 4,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.fit(tiny_config(SMALL), workdir, progress=False)
    return workdir


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != files.LOCK
    }


# ------------------------------------------------------------------------------- who writes, when


def test_a_trainer_that_finds_another_at_work_changes_nothing(run, tiny_config, monkeypatch):
    soon = functools.partial(files.exclusive, patience=0.1)
    monkeypatch.setattr(rundir.files, "exclusive", soon)
    before = content(run)
    with files.exclusive(run), pytest.raises(InputError, match="another process"):
        loop.fit(tiny_config(SMALL | {"steps": 8, "log_every": 3}), run, progress=False)
    assert content(run) == before


@pytest.mark.parametrize(
    "changes", [{"steps": 3}, {"steps": 9, "model.heads": 1}, {"steps": 9, "data.path": "other"}]
)
def test_a_trainer_that_is_refused_changes_nothing(run, tiny_config, tmp_path, changes):
    if "data.path" in changes:
        changes = changes | {"data.path": write_text(tmp_path / "other.txt", seed=5)}
    before = content(run)
    with pytest.raises(InputError):
        loop.fit(tiny_config(SMALL | changes), run, progress=False)
    assert content(run) == before


def test_of_two_that_start_together_one_is_refused(tiny_config, tmp_path, monkeypatch):
    """The second looked at the folder when it was still empty."""
    workdir, assemble = tmp_path / "run", loop.assemble
    first, second = tiny_config(SMALL), tiny_config(SMALL | {"model.width": 32})

    def slowly(config, *arguments, **options):
        made = assemble(config, *arguments, **options)
        if config is second:
            loop.fit(first, workdir, progress=False)
        return made

    monkeypatch.setattr(loop, "assemble", slowly)
    with pytest.raises(InputError, match=r"model\.width"):
        loop.fit(second, workdir, progress=False)
    assert rundir.read_config(workdir).model.width == 16
    assert rundir.open_run(workdir).step == 4


@pytest.mark.parametrize("name", [".DS_Store", "lost+found", ".ipynb_checkpoints", "Thumbs.db"])
def test_what_desktops_leave_in_a_folder_does_not_fill_it(tiny_config, tmp_path, name):
    (tmp_path / name).mkdir()
    rundir.check_folder(tmp_path, tiny_config(SMALL))
    assert owned_folder.check(tmp_path) == []
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"config\.json"):
        rundir.check_folder(tmp_path, tiny_config(SMALL))
    with pytest.raises(InputError, match=r"report\.json"):
        owned_folder.check(tmp_path)


def test_what_is_kept_is_said_only_of_what_is_there(run, tiny_config, monkeypatch):
    assert checksums.describe_kept(run) == "the checkpoint of step 4 is whole"
    assert "no whole checkpoint" in checksums.describe_kept(run.parent / "new")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.files, "replace_json", full)
    with pytest.raises(RunError, match="there is no whole checkpoint yet"):
        loop.fit(tiny_config(SMALL), run.parent / "new", progress=False)


# ---------------------------------------------------------------------------------- which paths

BAD_NAMES = [
    "lr=[0.001]",
    "[2026] project",
    "back\\slash",
    "a*b",
    "why?",
    "no\udcffutf",
    "x" * 300,
] + ["gs:", "s3:"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_path_in_which_nothing_could_be_saved_is_refused(tiny_config, tmp_path, name, experiment):
    for workdir in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(InputError, match="--workdir"):
            loop.fit(tiny_config(SMALL), workdir, progress=False)
        with pytest.raises(InputError, match="--workdir"):
            sweep.main([f"--config={experiment}", f"--workdir={workdir}"])
    assert not [p for p in tmp_path.iterdir() if p.name != experiment.name]


def test_addresses_of_stores_are_refused_before_any_work(tiny_arguments, run, tmp_path):
    new = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'new'}"]
    with pytest.raises(InputError, match=r"^data.data_dir: expected a .*folder"):
        train.main([*new, "--config.data.data_dir=gs://bucket/there"])
    for key in (
        "data.path",
        "data.tokenizer_path",
        "init_from",
        "teacher",
    ):  # read from a store that its package serves
        with pytest.raises(InputError, match=rf"{key}=gs://bucket/there"):
            train.main([*new, f"--config.{key}=gs://bucket/there"])
    for to in ("stablehlo", "c"):
        with pytest.raises(InputError, match=r"--out=s3://bucket/model"):
            export.main([f"--workdir={run}", f"--to={to}", "--out=s3://bucket/model.stablehlo"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_was_moved_is_read_wherever_that_can_be(run, tmp_path, capsys):
    """From a folder of any name but one with a backslash, which is named."""
    moved = tmp_path / "lr=[0.1] * ?" / "run"
    shutil.copytree(run, moved)
    assert rundir.open_run(moved).step == 4
    assert train.initial(str(moved), tmp_path / "new") is not None
    out = moved.parent / "a[1]"
    assert report.main([str(moved), f"--out={out}", "--batches=1"]) == 0
    assert (out / "index.html").is_file() and ": finished" in capsys.readouterr().out
    exported = moved.parent / "model[1].stablehlo"
    assert export.main([f"--workdir={moved}", f"--out={exported}", "--platforms=cpu"]) == 0
    assert exported.stat().st_size > 1000
    shutil.copytree(run, tmp_path / "back\\slash")
    with pytest.raises(InputError, match="--workdir"):
        rundir.open_run(tmp_path / "back\\slash")


def test_the_commands_it_gives_are_quoted_for_a_shell(tiny_arguments, tmp_path, capsys):
    workdir = tmp_path / "it's my $HOME run; true"
    assert train.main([*tiny_arguments(SMALL), f"--workdir={workdir}"]) == 0
    said = re.search("longer training: (.*)", capsys.readouterr().out)
    assert said is not None
    assert shlex.split(said[1])[3:] == [f"--workdir={workdir}", "--config.steps=8"]


# ------------------------------------------------------------------------------- when it is done


@pytest.fixture
def experiment(tmp_path) -> Path:
    """A file with a sweep whose points' settings are longer than a file's name may be."""
    path = tmp_path / "experiment.py"
    path.write_text(
        "from experiments.configs import dwn_digits\n"
        "get_config = dwn_digits.get_config\n"
        "def sweep(add):\n"
        "    for seed in (0, 1):\n"
        "        add({f'optimizer.{k}learning_rate': 0.0123456789 for k in ('', 'tables_',\n"
        "            'vectors_', 'scores_', 'thresholds_')} | {'optimizer.weight_decay': 0.05,\n"
        "            'optimizer.beta2': 0.95, 'model.thermometer_bits': 4, 'seed': seed})\n"
    )
    return path


def test_long_settings_make_short_names_that_differ(experiment, tmp_path):
    points = sweep.enumerate_points(f"{experiment}:default", tmp_path / "sweep", {})
    assert all(len(point.name.encode()) <= 251 for point in points)
    assert len({point.name for point in points}) == len(points) == 2
    assert [p.settings["seed"] for p in points] == [0, 1]
    again = sweep.enumerate_points(f"{experiment}:default", tmp_path / "sweep", {})
    assert [p.name for p in again] == [p.name for p in points], "a sweep that goes on finds them"


def lose_last(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "4")


def cut_last(run: Path) -> None:
    path = max((run / "checkpoints" / "4").rglob("*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [lose_last, cut_last])
def test_without_a_whole_last_checkpoint_nothing_calls_it_finished(run, tiny_config, damage):
    """Though its last evaluation is noted; and going on finishes it."""
    config = tiny_config(SMALL)
    point = sweep.Point("point", {}, config, run, ())

    def states() -> list[str]:
        (summary,), _ = collect([run], {}, batches=1)
        return [sweep.result_of(point)["state"], summary.state]

    assert states() == ["finished", "finished"]
    damage(run)
    # where the best of the checkpoints is damaged, a report says so
    assert states() in (["unfinished", "unfinished"], ["unfinished", "damaged"])
    common.finish(config, run)
    assert states() == ["finished", "finished"]
    before = content(run)
    common.finish(config, run)
    assert content(run) == before, "what is finished is left alone"


# --------------------------------------------------------------------- what belongs to a machine


def test_a_run_of_many_devices_is_read_on_few(run, whole, tiny_arguments, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    config["mesh"] |= {"data": 16, "fsdp": 4, "tensor": 2}
    (run / "config.json").write_text(json.dumps(config))
    (run / "elsewhere.txt").write_text(Path(config["data"]["path"]).read_text())

    found = []
    for workdir in (whole, run):
        assert evaluate.main([f"--workdir={workdir}", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert generate.main([f"--workdir={run}", "--max_tokens=2"]) == 0
    out = tmp_path / "model.stablehlo"
    assert export.main([f"--workdir={run}", f"--out={out}", "--platforms=cpu"]) == 0
    (summary,), _ = collect([run], {}, batches=1)
    assert summary.state == "finished" and summary.text is not None
    new = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'new'}", f"--config.init_from={run}"]
    assert train.main(new) == 0


def test_a_run_can_be_begun_from_without_the_text_it_learned(run, tiny_arguments, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))
    new = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'new'}", f"--config.init_from={run}"]
    assert train.main(new) == 0


def test_what_pack_wrote_is_begun_from_as_trained(run, tiny_arguments, tmp_path, capsys):
    folder = tmp_path / "folder"
    assert pack.main([f"--workdir={run}", f"--out={folder}", "--trained"]) == 0
    new = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'new'}", f"--config.init_from={folder}"]
    assert train.main(new) == 0
    told = re.search(r"init_from: (\d+) of (\d+) arrays taken", capsys.readouterr().out)
    assert told and told[1] == told[2]


def test_a_source_that_cannot_be_read_is_told_by_its_key(run, tiny_arguments, tmp_path):
    (run / "config.json").unlink()
    (tmp_path / "empty").mkdir()
    box = saved.BOX / "shakespeare-lookup"
    for key, source, said in (
        ("init_from", run, "no run in"),
        ("teacher", run, "no run in"),
        ("init_from", tmp_path / "empty", "expected model.safetensors"),
        ("teacher", tmp_path / "empty", "expected model.safetensors"),
        ("init_from", box, "packed form alone.*pack --trained"),
    ):
        new = [*tiny_arguments(SMALL), f"--workdir={tmp_path / 'new'}", f"--config.{key}={source}"]
        with pytest.raises(InputError, match=rf"^{key}: .*{said}"):
            train.main(new)


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        ((2, 2, 2), {}, (2, 2, 2)),  # the devices suffice
        ((1, 1, 1), {}, (1, 1, 1)),
        ((-1, 4, 1), {}, (-1, 4, 1)),
        ((2, 8, 1), {}, (-1, 8, 1)),
        ((4, 2, 4), {}, (-1, 2, 4)),
        ((1, 3, 16), {}, (-1, 1, 8)),
        ((16, 1, -1), {}, (-1, 1, 1)),
        ((16, 4, 1), {"fsdp": 2}, (-1, 2, 1)),
        ((16, 4, 1), {"fsdp": -1}, (1, -1, 1)),
        ((2, 4, 4), {"data": 2}, (2, 1, 4)),
    ],
)
@pytest.mark.skipif(jax.device_count() != 8, reason="the sizes expected are of 8 devices")
def test_the_mesh_on_which_a_run_is_read(saved, given, expected):
    config = MeshConfig(**(dict(zip(sharding.AXES, saved)) | given), fsdp_size_limit=7)
    found = sharding.mesh_for_reading(config, given)
    assert (found.data, found.fsdp, found.tensor, found.fsdp_size_limit) == (*expected, 7)
    assert math.prod(sharding.make_mesh(found).shape.values()) <= 8


def test_sizes_that_are_given_are_not_replaced():
    with pytest.raises(InputError, match=r"^mesh"):
        sharding.make_mesh(sharding.mesh_for_reading(MeshConfig(fsdp=512), ("fsdp",)))


def test_other_data_than_the_run_learned_from_are_told(run, tmp_path, caplog, capsys):
    assert evaluate.main([f"--workdir={run}", "--json"]) == 0
    assert "fingerprint" not in caplog.text
    before = json.loads(capsys.readouterr().out)
    saved = json.loads((run / "environment.json").read_text())["data_fingerprint"]
    other = write_text(tmp_path / "other.txt", seed=5)
    assert evaluate.main([f"--workdir={run}", "--json", f"--config.data.path={other}"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] != before["loss"]
    opened = rundir.open_run(run, None, {"data.path": str(other)})
    now = opened.setup.data.fingerprint
    assert now != saved and all(f in caplog.text and f in opened.data_changed for f in (saved, now))
    (summary,), _ = collect([run], {"data.path": str(other)}, batches=1)
    assert any(saved in note and now in note for note in summary.notes)


# ------------------------------------------------------------------------- before any work is done


@pytest.mark.parametrize("changes", [{}, {"model.mlp": "weightless"}])
def test_float16_is_refused_where_it_cannot_be_computed(tiny_config, tmp_path, changes):
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match=r"^model\.dtype"):
        loop.fit(tiny_config(SMALL | changes | {"model.dtype": "float16"}), workdir)
    assert not workdir.exists()


def test_a_run_that_this_machine_cannot_compute_is_not_called_old(run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["dtype"] = "float16"
    (run / "config.json").write_text(json.dumps(config))
    (summary,), _ = collect([run], {}, batches=1)
    assert summary.state == "finished"
    assert any("model.dtype" in note for note in summary.notes)


def test_float16_is_computed_where_it_can_be(tiny_config):
    """A model without attention has no product that CPUs lack."""
    config = tiny_config(SMALL).copy_and_resolve_references().unlock()
    config.model = defaults("matmulfree")
    config.model.update(layers=1, width=16, context=16, dtype="float16")
    assert setup.assemble(config.lock()).config.model.dtype == "float16"


def test_an_interrupt_before_the_first_step_ends_with_a_sentence(
    tiny_arguments, tmp_path, monkeypatch, capsys
):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "load", interrupted)
    monkeypatch.setattr(sys, "argv", ["train", *tiny_arguments(SMALL), f"--workdir={tmp_path}/run"])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 130 and len(said) == 1 and said[0].startswith("error: interrupted")
    assert not np.any([p.name == "run" for p in tmp_path.iterdir()])
