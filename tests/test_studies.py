"""The studies' own command: trains what is missing, finds what is finished, and writes table, figures and curves."""

import json
import sys

from experiments import weightless_vs_dense


def study(monkeypatch, tmp_path, *extra):
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--name", "tiny"]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "study",
            "--variant=quick",
            "--config.mesh.data=1",
            "--config.data.limit_bytes=20000",
            "--steps=1",
            "--kinds",
            "none",
            "--seeds",
            "0",
            "1",
            *folders,
            *extra,
        ],
    )
    weightless_vs_dense.main()


def test_study_writes_its_results_and_reads_finished_runs(monkeypatch, tmp_path, capsys):
    study(monkeypatch, tmp_path)
    table = (tmp_path / "out" / "tiny.md").read_text().splitlines()
    results = json.loads((tmp_path / "out" / "tiny.json").read_text())["results"]["none"]
    assert len(table) == 3 and table[2].startswith("| none |") and set(results) == {"0", "1"} and results["0"] != results["1"]
    assert f"{results['0']['loss']:.4f}, {results['1']['loss']:.4f}" in table[2]
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 1000
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")}
    study(monkeypatch, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")} == before
    assert (tmp_path / "out" / "tiny.md").read_text().splitlines() == table
