"""The report command on a trained run and on what becomes of runs: unfinished, of another version,
damaged, not there.
"""

import csv
import json
import shutil

import pytest

from quweit_jax.commands import report
from quweit_jax.errors import InputError
from quweit_jax.report import collect
from quweit_jax.training import loop, rundir

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = {
    "steps": 4,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "eval_batches": 1,
    "model.layers": 1,
    "model.width": 16,
}


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """A finished run of a weightless GPT."""
    workdir = tmp_path_factory.mktemp("runs") / "good"
    loop.fit(tiny_config(SMALL), workdir, progress=False)
    return workdir


def changed(trained, root, name, **files):
    """A copy of the run with some of its files changed by functions of their JSON value, or removed
    (None).
    """
    copy = root / name
    shutil.copytree(trained, copy)
    for stem, change in files.items():
        path = copy / f"{stem}.json"
        if change is None:
            path.unlink()
        else:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return copy


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    """A folder of runs in all states, and the report of it, as rows of runs.csv by name."""
    root = tmp_path_factory.mktemp("many")
    changed(trained, root, "a-good")
    changed(trained, root, "unfinished", config=lambda c: {**c, "steps": 9})
    changed(trained, root, "old-format", environment=lambda e: {**e, "format": rundir.FORMAT + 1})
    changed(trained, root, "old-keys", config=lambda c: {**c, "model": {**c["model"], "shape": 3}})
    changed(
        trained,
        root,
        "less",
        config=lambda c: {**c, "data": {k: v for k, v in c["data"].items() if k != "threads"}},
    )
    changed(
        trained, root, "much-less", config=lambda c: {k: v for k, v in c.items() if k != "prefetch"}
    )
    changed(trained, root, "other-shape", config=lambda c: {**c, "optimizer": 3})
    changed(trained, root, "no-config", config=None)
    changed(
        trained,
        root,
        "no-data",
        config=lambda c: {**c, "data": {**c["data"], "path": str(root / "gone.txt")}},
    )
    broken = changed(trained, root, "broken-json")
    (broken / "config.json").write_text('{"model": ')
    cut = changed(trained, root, "cut")
    for path in (
        p for p in (cut / "checkpoints").rglob("*") if p.is_file() and p.stat().st_size > 100
    ):
        path.write_bytes(path.read_bytes()[:50])
    lines = changed(trained, root, "lines")
    (lines / "metrics.jsonl").write_text(
        '{"step": 1}\n[3]\n' + (lines / "metrics.jsonl").read_text() + '{"step": 5, "spl'
    )
    young = changed(trained, root, "young")
    shutil.rmtree(young / "checkpoints")
    (young / "metrics.jsonl").unlink()
    out = tmp_path_factory.mktemp("out") / "report"
    assert (
        report.main(
            [str(root), str(root / "nothing"), f"--out={out}", "--batches=1", "--title=All states"]
        )
        == 0
    )
    with (out / "runs.csv").open() as text:
        return {row["name"]: row for row in csv.DictReader(text)}, (out / "index.html").read_text()


STATES = {
    "a-good": ("finished", ""),
    "unfinished": ("unfinished", "at step 4 of 9"),
    "old-format": ("older version", "written in format 2, this version reads 1"),
    "old-keys": ("older version", "model.shape"),
    "less": ("finished", ""),
    "much-less": ("finished", ""),  # what a saved config lacks has its default
    "other-shape": ("older version", "this version cannot open it: --workdir: "),
    "no-config": ("damaged", "config.json: there is none"),
    "no-data": ("finished", ""),
    "broken-json": ("damaged", "config.json: not whole"),
    "cut": ("damaged", "checkpoint of step"),
    "lines": ("damaged", "2 of"),
    "young": ("unfinished", "nothing noted yet of 4 steps"),
}


@pytest.mark.parametrize("name", STATES)
def test_every_run_appears_with_its_state(reported, name):
    rows, html = reported
    state, reason = STATES[name]
    assert rows[name]["state"] == state and reason in rows[name]["reason"]
    assert reason.replace("'", "&#39;") in html


def test_what_a_whole_run_shows(reported):
    rows, html = reported
    good = rows["a-good"]
    assert (
        int(good["parameters"]) > 0
        and float(good["validation loss"]) > 0
        and 0 < float(good["multiplications replaced"]) < 1
    )
    assert "Text it writes" in html and "tables could be dropped" in html and "All states" in html
    assert "there is nothing" in html  # of the path without a run


def test_without_data_there_is_text_and_a_note(reported):
    _, html = reported
    assert "without its data" in html and "tables were not watched at work" in html
    assert "lacks data.threads" in html and "lacks prefetch" in html


def test_a_run_given_twice_is_one(trained):
    found, skipped = collect.find_runs([trained, trained.parent])
    assert found == [trained.absolute()] and not skipped
    assert collect.short_names([trained.parent / "x" / "a", trained.parent / "y" / "a"]) == [
        "x/a",
        "y/a",
    ]


def test_nothing_to_report_on(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError,
        match=r"no run to report on: .*neither a run directory nor a folder that holds some",
    ):
        report.main([str(tmp_path / "empty"), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batches=-1", "--batches: expected 0"),
        ("--config.model.width=3", "a report reads runs as they are"),
        ("--config.data.dir=x", "Did you mean 'data.data_dir'"),
        ("--technology=3nm", "3nm"),
    ],
)
def test_mistakes_show_before_the_work(trained, tmp_path, argument, message):
    with pytest.raises(InputError, match=message):
        report.main([str(trained), f"--out={tmp_path / 'out'}", argument])
