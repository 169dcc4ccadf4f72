"""The studies' own command: trains what is missing, finds what is finished, and writes table,
figures and curves.
"""

import json
import shutil
import sys

import pytest

from experiments.studies import (
    blocks,
    compare_lm,
    convert,
    dwn_ablation,
    dwn_mnist,
    recall,
    weightless_vs_dense,
)
from quweit_jax.commands import train
from quweit_jax.deploy.hardware import tools
from quweit_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("compile_quickly")


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
    assert (
        len(table) == 3
        and table[2].startswith("| none |")
        and set(results) == {"0", "1"}
        and results["0"] != results["1"]
    )
    assert f"{results['0']['loss']:.4f}, {results['1']['loss']:.4f}" in table[2]
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 1000
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")}
    study(monkeypatch, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.json*")} == before
    assert (tmp_path / "out" / "tiny.md").read_text().splitlines() == table
    shutil.rmtree(tmp_path / "runs")
    redraws(monkeypatch, tmp_path, table)


def redraws(monkeypatch, tmp_path, table):
    """--table needs no run: curves where the JSON has them, what they end at where it has none."""
    picture, told = (tmp_path / "out" / f"tiny.{kind}" for kind in ("png", "json"))
    found, drawn = json.loads(told.read_text()), picture.read_bytes()
    for kept in (found, {key: value for key, value in found.items() if key != "curves"}):
        told.write_text(json.dumps(kept))
        picture.unlink()
        study(monkeypatch, tmp_path, "--table")
        assert (picture.read_bytes() == drawn) == ("curves" in kept)
        assert json.loads(told.read_text()) == kept
        assert (tmp_path / "out" / "tiny.md").read_text().splitlines() == table
    told.unlink()
    with pytest.raises(InputError, match="--table"):
        study(monkeypatch, tmp_path, "--table")


def test_language_models_are_compared_as_deployed_and_take_turns(monkeypatch, tmp_path, tiny_text):
    model = [
        "--config.model.width=16",
        "--config.model.layers=1",
        "--config.model.context=16",
        "--config.model.weightless.num_luts=16",
    ]
    data = [
        "--config.data.source=text_file",
        f"--config.data.path={tiny_text}",
        "--config.data.validation_split=",
        "--config.mesh.data=1",
    ]
    sizes = [
        "--config.batch_size=4",
        "--config.eval_batches=1",
        "--config.checkpoint_every=1",
        "--config.eval_every=1",
        "--steps=1",
    ]
    folders = [
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path),
        "--name",
        "tiny",
        "--kinds",
        "quweit",
        "matmulfree",
        "--rates",
        "1e-3",
        "--seeds",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", ["study", *model, *data, *sizes, *folders, "--speeds"])
    compare_lm.main()
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert set(found["runs"]) == {"quweit-1e-3-0", "matmulfree-1e-3-0"}
    for run in found["runs"].values():
        assert abs(run["loss"] - run["loss_deployed"]) < 1e-3
        assert run["bytes_deployed"] < 4 * run["parameters"]
    speeds = found["speeds"]
    assert list(speeds) == ["quweit", "matmulfree"] and min(speeds.values()) > 0
    table = (tmp_path / "tiny.md").read_text().splitlines()
    assert len(table) == 4 and "(1.00)" in table[2]
    assert (tmp_path / "tiny.png").stat().st_size > 1000
    # --table trains and measures nothing
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--table"])
    for name in ("finish", "score"):
        monkeypatch.setattr(compare_lm.common, name, lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(compare_lm, "speeds", lambda *_: pytest.fail("measured"))
    compare_lm.main()
    assert (tmp_path / "tiny.md").read_text().splitlines() == table


def test_a_dense_run_is_converted_and_its_results_are_read_again(
    tiny_arguments, tmp_path, monkeypatch, capsys
):
    shape = {"model.mlp": "dense", "model.layers": 1, "model.lookup_glu.hidden": 32}
    dense, runs = tmp_path / "dense", tmp_path / "runs"
    steps = {"steps": 10, "checkpoint_every": 10}
    assert train.main([*tiny_arguments(shape | steps), f"--workdir={dense}"]) == 0
    options = [f"--dense={dense}", f"--runs={runs}", f"--out={tmp_path}", "--share=0.4"]
    assert convert.main(options) == 0
    found = json.loads((tmp_path / "convert.json").read_text())["results"]
    assert {name: row["steps"] for name, [row] in found.items()} == {
        "dense": 10,
        "converted": 4,
        "scratch": 4,
    }
    assert found["converted"][0]["loss"] < found["scratch"][0]["loss"]
    saved = json.loads((runs / "dense-converted" / "config.json").read_text())
    assert saved["distill"]["fit_steps"] == 2 and saved["model"]["mlp"] == "lookup_glu"
    table = (tmp_path / "convert.md").read_text()
    monkeypatch.setattr(convert, "finish", lambda config, workdir: workdir)
    assert convert.main(options) == 0 and (tmp_path / "convert.md").read_text() == table
    with pytest.raises(InputError, match="--share"):
        convert.main([*options, "--share=2"])
    with pytest.raises(InputError, match="--solve"):
        convert.main([*options, "--solve=4"])
    with pytest.raises(InputError, match="different names"):
        convert.main([*options, "--dense", str(dense), str(dense)])


def test_what_a_conversion_solves_on_counts_among_its_steps(tmp_path, tiny_config, monkeypatch):
    dense = tiny_config({"model.mlp": "dense", "steps": 100})
    monkeypatch.setattr(
        convert.rundir, "read_config", lambda workdir: dense.copy_and_resolve_references()
    )
    made = convert.configs(
        convert.arguments([f"--dense={tmp_path}", "--solve=3", "--rate=1e-5"]), tmp_path
    )
    assert (made["converted"].steps, made["converted"].distill.solve_batches) == (7, 3)
    assert made["converted"].distill.fit_steps == 0 and made["scratch"].steps == 10
    assert not made["scratch"].distill.solve_batches
    rates = {name: config.optimizer.learning_rate for name, config in made.items()}
    assert rates["converted"] == 1e-5 != rates["scratch"]
    assert all(config.model.lookup_glu.train_tables for config in made.values())


def test_channel_mixers_are_compared_by_kind_and_rate(monkeypatch, tmp_path, tiny_text, capsys):
    config = {
        "model.width": 16,
        "model.layers": 1,
        "model.heads": 2,
        "model.context": 16,
        "data.source": "text_file",
        "data.path": tiny_text,
        "data.name": "",
        "data.validation_split": "",
        "mesh.data": 1,
        "batch_size": 4,
        "eval_batches": 1,
        "eval_every": 1,
        "checkpoint_every": 1,
    }
    kinds = ["lookup_glu", "lookup_glu_ternary_attention"]
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out", "name": "tiny"}
    argv = [
        "study",
        *(f"--config.{name}={value}" for name, value in config.items()),
        *(f"--{name}={value}" for name, value in folders.items()),
        *("--steps=1", "--rates", "1e-3", "--seeds", "0", "--kinds", *kinds),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    blocks.main()
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["runs"]
    assert set(found) == {f"{kind}-1e-3-0" for kind in kinds}
    for run in found.values():
        assert run["loss_deployed"] == pytest.approx(run["loss"], abs=1e-3)
    table = (tmp_path / "out" / "tiny.md").read_text().splitlines()
    assert len(table) == 4 and "ternary projections" in table[3]
    assert f"{found['lookup_glu-1e-3-0']['loss']:.4f}" in table[2]
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 1000
    # --table trains nothing: a rate that was not trained stays out
    monkeypatch.setattr(sys, "argv", [*argv, "--table", "--rates", "1e-3", "2e-3"])
    monkeypatch.setattr(blocks.common, "finish", lambda *_: pytest.fail("trained"))
    blocks.main()
    again = (tmp_path / "out" / "tiny.md").read_text().splitlines()
    assert len(again) == 4 and " / - |" in again[2]
    shown = capsys.readouterr().out
    assert table[2] in shown and again[2] in shown


def test_a_conversion_to_ternary_projections_with_and_without_a_teacher(
    tmp_path, tiny_config, monkeypatch
):
    dense = tiny_config({"model.mlp": "dense", "model.linear": "dense", "steps": 100})
    monkeypatch.setattr(
        convert.rundir, "read_config", lambda workdir: dense.copy_and_resolve_references()
    )
    told = ["--mlp=dense", "--fit=0", "--continued", "--config.model.linear=ternary"]
    told += ["--config.distill.blocks=0.1", "--rate=5e-4"]
    made = convert.configs(convert.arguments([f"--dense={tmp_path}", *told]), tmp_path)
    assert list(made) == ["converted", "continued", "scratch"]
    assert {config.model.linear for config in made.values()} == {"ternary"}
    assert {config.steps for config in made.values()} == {10}
    converted, continued, scratch = made.values()
    assert converted.teacher == converted.init_from == continued.init_from == str(tmp_path)
    assert not continued.teacher and not scratch.init_from and not scratch.teacher
    assert converted.distill.blocks == 0.1 and not continued.distill.blocks
    assert converted.optimizer.learning_rate == continued.optimizer.learning_rate == 5e-4
    # who only gives the beginning says nothing more
    told += ["--solve=4"]
    made = convert.configs(convert.arguments([f"--dense={tmp_path}", *told]), tmp_path)
    assert {name: config.steps for name, config in made.items()} == {
        "converted": 6,
        "continued": 6,
        "scratch": 10,
    }
    continued = made["continued"]
    assert continued.teacher and continued.distill.solve_batches == 4
    assert continued.distill.weight == continued.distill.blocks == 0


@pytest.mark.parametrize("tool", ["iverilog", "yosys"])
def test_circuits_need_their_tools_before_anything_is_trained(tool, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["study", f"--out={tmp_path}", f"--runs={tmp_path}"])
    monkeypatch.setattr(dwn_mnist.common, "finish", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(dwn_mnist.tools, "installed", lambda name: name if name != tool else None)
    with pytest.raises(InputError, match=f"expected {tool}, found none"):
        dwn_mnist.main()


@pytest.mark.skipif(
    not (tools.installed("iverilog") and tools.installed("yosys")),
    reason="needs iverilog and yosys",
)
def test_classifiers_become_circuits_that_are_counted(monkeypatch, tmp_path, capsys):
    config = {"data.source": "digits", "eval_every": 2, "checkpoint_every": 2, "mesh.data": 1}
    argv = ["study", "--kinds", "360", "360-plain", "--steps=2", "--name=tiny"]
    argv += [f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}"]
    argv += [f"--config.{name}={value}" for name, value in config.items()]
    for kind, seed in (("360", "0"), ("360", "1"), ("360-plain", "0")):
        monkeypatch.setattr(sys, "argv", [*argv, "--kinds", kind, "--seeds", seed])
        dwn_mnist.main()
    rates = [
        json.loads((tmp_path / "runs" / name / "config.json").read_text())["optimizer"]
        for name in ("360-0", "360-plain-0")
    ]
    assert [(of["learning_rate"], of["ema"]) for of in rates] == [(0.02, 0.999), (0.01, 0.0)]
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["results"]["360"]
    assert list(found) == ["0", "1"]
    for made in found.values():
        assert made["validation_agree"] == made["validation_examples"] < made["vectors"]
        assert made["lut6"]["tables"] <= 360 and made["lut6"]["encoder"] <= made["comparators"]
        assert made["accuracy"] == made["accuracy_deployed"]
    monkeypatch.setattr(sys, "argv", [*argv, "--table"])
    monkeypatch.setattr(dwn_mnist.common, "finish", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    dwn_mnist.main()
    table = (tmp_path / "out" / "tiny.md").read_text()
    totals = [sum(made["lut6"].values()) for made in found.values()]
    assert f"({totals[0]:,}, {totals[1]:,})" in table and table in capsys.readouterr().out
    assert (tmp_path / "out" / "tiny.png").stat().st_size > 1000


def test_token_mixers_recall_more_and_more_pairs(monkeypatch, tmp_path, capsys):
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out", "name": "tiny"}
    config = {"model.width": 16, "model.hidden": 16, "mesh.data": 1, "eval_batches": 1}
    config |= {"batch_size": 4, "eval_every": 1, "checkpoint_every": 1}
    argv = ["study", "--kinds", "hybrid", "matmulfree", "--pairs", "1", "2", "--steps=1"]
    argv += [f"--{name}={value}" for name, value in folders.items()]
    argv += [f"--config.{name}={value}" for name, value in config.items()]
    monkeypatch.setattr(sys, "argv", argv)
    recall.main()
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["results"]
    assert {kind: list(seeds["0"]) for kind, seeds in found.items()} == {
        "hybrid": ["1", "2"],
        "matmulfree": ["1", "2"],
    }
    saved = json.loads((tmp_path / "runs" / "hybrid-2-0" / "config.json").read_text())
    assert saved["init_from"] == str(tmp_path / "runs" / "hybrid-1-0")
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert len(table.splitlines()) == 4 and "| gated delta+attention | dense |" in table
    # a call for one kind keeps what is known of the others
    monkeypatch.setattr(sys, "argv", [*argv, "--kinds", "hybrid"])
    recall.main()
    assert json.loads((tmp_path / "out" / "tiny.json").read_text())["results"] == found
    monkeypatch.setattr(sys, "argv", [*argv, "--table"])
    monkeypatch.setattr(recall.common, "finish", lambda *_: pytest.fail("trained"))
    recall.main()
    assert (tmp_path / "out" / "tiny.md").read_text() == table and table in capsys.readouterr().out


def test_gradients_and_wirings_are_compared(monkeypatch, tmp_path, capsys):
    argv = ["study", "--kinds", "fd", "efd_learned", "--steps=2", "--name=tiny"]
    argv += [f"--out={tmp_path / 'out'}", f"--runs={tmp_path / 'runs'}"]
    config = {"data.source": "digits", "data.augment.crop": "none", "data.augment.flip": False}
    config |= {"eval_every": 2, "checkpoint_every": 2, "mesh.data": 1, "model.num_luts": (40, 20)}
    argv += [f"--config.{name}={value}" for name, value in config.items()]
    monkeypatch.setattr(sys, "argv", argv)
    dwn_ablation.main()
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())["results"]
    assert list(found) == ["fd", "efd_learned"] and found["fd"] != found["efd_learned"]
    model = json.loads((tmp_path / "runs" / "fd-0" / "config.json").read_text())["model"]
    assert (model["mapping"], model["beta"], model["num_luts"]) == ("random", 0.0, [40, 20])
    table = (tmp_path / "out" / "tiny.md").read_text()
    assert "| 57.42% |" in table and len(table.splitlines()) == 4
    monkeypatch.setattr(sys, "argv", [*argv, "--table"])
    monkeypatch.setattr(dwn_ablation.common, "finish", lambda *_: pytest.fail("trained"))
    dwn_ablation.main()
    assert (tmp_path / "out" / "tiny.md").read_text() == table
