"""A run that is damaged, or has numbers and names that nobody expects, is told; all others are
reported.
"""

import csv
import dataclasses
import io
import json
import os

import pytest

from quweit_jax.costs import count, energy
from quweit_jax.errors import InputError
from quweit_jax.report import collect, owned_folder, page
from quweit_jax.training import rundir
from quweit_jax.training.defaults import base_config
from tests.report.test_report_page import CONFIG, made

pytestmark = pytest.mark.usefixtures("compile_quickly")

INF, NAN = float("inf"), float("nan")
DEEP = json.loads("[" * 90 + "]" * 90)
WHOLE = base_config().to_dict() | CONFIG
ROW = {"step": 4, "split": "validation", "loss": 1.0, "accuracy": 0.5}

# Contents of a run's files that stop nothing but, at most, this run: (file, content).
CONFIGS = {
    "a model that is a text": {**WHOLE, "model": "x"},
    "no model": {**WHOLE, "model": None},
    "a name that is a list": {**WHOLE, "model": {"name": ["gpt"]}},
    "another's": {"n_layer": 2, "n_head": 2},
    "endless steps": {**WHOLE, "steps": INF},
    "no steps": {**WHOLE, "steps": "4"},
    "numbers that are none": {
        **WHOLE,
        "batch_size": NAN,
        "model": {**CONFIG["model"], "width": INF},
    },
    "half a letter": {**WHOLE, "note": "\ud83d", "data": {**CONFIG["data"], "name": "\udfff"}},
    "a section that is a list": {**WHOLE, "optimizer": [1, 2]},
    "deep": {**WHOLE, "note": DEEP},
    "a million blocks": {**WHOLE, "model": {**CONFIG["model"], "layers": 10**6}},
    "names with dots": {**WHOLE, "a.b": {"c.d": 1}},
}
ROWS = {
    "endless losses": [{**ROW, "loss": INF}, {**ROW, "step": 5, "loss": -INF}],
    "losses that are none": [{**ROW, "loss": NAN}, {**ROW, "accuracy": NAN}],
    "huge": [{**ROW, "loss": 1e38}, {**ROW, "step": 10**300}, {**ROW, "loss": 10**300}],
    "no split": [{"step": 1, "loss": 2.0}, ROW],
    "texts": [{**ROW, "step": "4"}, {**ROW, "accuracy": "0.5"}, {**ROW, "split": ["train"]}],
    "no objects": [None, [], 3, "x", {}],
}
NAMES = ("$$", "$x_{$", "a_^{b", os.fsdecode(b"caf\xe9"), "two\nlines", "<b>&amp;", "x" * 200)


def write_run(folder, config=WHOLE, rows=(ROW,)):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text('{"format": 1, "note": "\\ud83d"}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The report of a good run among strange ones: rows of runs.csv by name, and the page."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "good")
    for i, config in enumerate(CONFIGS.values()):
        write_run(root / f"config {i}", config)
    for i, rows in enumerate(ROWS.values()):
        write_run(root / f"rows {i}", rows=rows)
    for name in NAMES:
        write_run(root / name)
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        for kind in ("pipe", "folder", "link", "empty", "bytes"):
            file = write_run(root / f"{name} {kind}") / name
            file.unlink()
            if kind == "pipe":
                os.mkfifo(file)
            elif kind == "folder":
                file.mkdir()
            elif kind == "link":
                file.symlink_to("/dev/zero")
            else:
                file.write_bytes(b"" if kind == "empty" else b"\xff\xfe\x00{" * 9)
    runs, skipped = collect.collect([root], {}, batches=1)
    files = page.write(runs, skipped, technology="45nm")
    table = csv.DictReader(io.StringIO(files["runs.csv"].decode()))
    return {row["name"]: row for row in table}, files["index.html"].decode()


def test_every_run_is_there(reported):
    rows, html = reported
    assert len(rows) == 1 + len(CONFIGS) + len(ROWS) + len(NAMES) + 15
    assert rows["good"]["validation loss"] == "1.0" and rows["good"]["energy, pJ"]
    assert all(row["reason"] for row in rows.values() if row["state"] != "finished")
    assert "cannot be shown" not in html


@pytest.mark.parametrize(
    "name", ["a model that is a text", "another's", "endless steps", "no steps"]
)
def test_what_is_no_run_is_damaged(reported, name):
    rows, _ = reported
    assert rows[f"config {[*CONFIGS].index(name)}"]["state"] == "damaged"


@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "empty", "bytes"])
def test_what_is_no_file_is_named(reported, kind):
    rows, _ = reported
    for name in ("config.json", "environment.json"):
        assert name in rows[f"{name} {kind}"]["reason"]
    if kind not in ("empty", "bytes"):
        assert "metrics.jsonl" in rows[f"metrics.jsonl {kind}"]["reason"]


@pytest.mark.parametrize(("name", "bad"), [("no split", 1), ("texts", 3), ("no objects", 5)])
def test_rows_that_are_none_are_counted(reported, name, bad):
    rows, _ = reported
    assert f"metrics.jsonl: {bad} of" in rows[f"rows {[*ROWS].index(name)}"]["reason"]


def test_a_run_that_cannot_be_shown_is_left_out():
    counted = energy.estimate(count.of_config(CONFIG))
    endless = dataclasses.replace(counted, technology=None)
    strange = [
        made(2, rows=[{**ROW, "loss": "low"}]),
        made(3, config={**CONFIG, "model": 3}),
        made(4, environment={"versions": {1, 2}}),
        made(5, energy=endless, text=(3, 4)),
    ]
    files = page.write([made(1), *strange], [("nowhere", "nothing")], technology="45nm")
    shown = files["index.html"].decode()
    rows = list(csv.DictReader(io.StringIO(files["runs.csv"].decode())))
    assert {row["run"] for row in rows} >= {"1"} and not {row["run"] for row in rows} & {
        "2",
        "3",
        "4",
    }
    assert shown.count("cannot be shown") >= 3 and "nowhere" in shown
    with pytest.raises(InputError, match="none of the runs can be shown"):
        page.write(strange[:3], [], technology="45nm")


def test_an_older_report_is_no_way_out_of_its_folder(tmp_path):
    out = tmp_path / "out"
    owned_folder.write(out, {"index.html": b"one", "a.png": b"x"})
    other = tmp_path / "other.txt"
    other.write_text("mine")
    (out / "index.html").unlink()
    for replace in (lambda p: p.symlink_to(other), os.mkfifo, lambda p: p.mkdir()):
        replace(out / "index.html")
        with pytest.raises(InputError, match=r"--out: .*index\.html"):
            owned_folder.write(out, {"index.html": b"two"})
        assert other.read_text() == "mine"
        (out / "index.html").rmdir() if (out / "index.html").is_dir() else (
            out / "index.html"
        ).unlink()
    for content in (
        "null",
        "[]",
        '{"files": 3, "written_by": "quweit_jax.report"}',
        "\udcff",
        "[" * 9999,
    ):
        (out / "report.json").write_bytes(os.fsencode(content))
        with pytest.raises(InputError, match="--out: "):
            owned_folder.check(out)


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write_run(tmp_path / "good")
    closed = write_run(tmp_path / "closed")
    may = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode, **k: os.fspath(path) != str(closed) and may(path, mode, **k),
    )
    found, skipped = collect.find_runs([tmp_path])
    assert found == [tmp_path / "good"]
    assert [path for path, _ in skipped] == [str(closed)] and "Permission denied" in skipped[0][1]
    with pytest.raises(InputError, match="closed cannot be read"):
        rundir.read_config(closed)
