"""`export --to=verilog` and `--to=c`, as a user would."""

import json
import re

import numpy as np
import pytest

from quweit_jax.commands import export
from quweit_jax.config import load_file
from quweit_jax.deploy.hardware import tools
from quweit_jax.errors import InputError
from quweit_jax.training import loop
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("sklearn")
    workdir = tmp_path_factory.mktemp("run") / "digits"
    config = load_file(f"{REPOSITORY / 'experiments/configs/dwn_digits.py'}").unlock()
    config.update(steps=3, eval_every=3, checkpoint_every=3)
    config.model.update(num_luts=(40,), lut_inputs=4, thermometer_bits=2)
    config.mesh.data = 1
    loop.fit(config.lock(), workdir, progress=False)
    return workdir


def test_verilog(trained, tmp_path, capsys):
    checks = ["--verify"] if tools.installed("iverilog") or tools.installed("verilator") else []
    out = tmp_path / "circuit"
    command = ["--to=verilog", f"--workdir={trained}", f"--out={out}", "--examples=30"]
    assert export.main([*command, "--pipeline=2", *checks]) == 0
    said = capsys.readouterr().out
    about = json.loads((out / "input_scaling.json").read_text())
    assert f"latency {about['latency']} clock edges, of {len(about['stages'])} stages" in said
    assert about["validation_agree"] == about["validation_examples"] == 360
    assert "360 of 360 validation examples" in said
    assert ("PASSED" in said) == bool(checks)
    assert about["training"]["exact"] and len(about["labels"]) == 10
    lines = (out / "inputs.hex").read_text().splitlines()
    assert {len(line.split()) for line in lines} == {len(about["inputs"])}
    golden = about["golden_vectors"]
    assert golden["examples"] == 30 and sum(golden.values()) == len(lines)
    ports = re.findall(r"^  input \[4:0\] (\w+),$", (out / "dwn.v").read_text(), re.MULTILINE)
    assert ports == [entry["port"] for entry in about["inputs"]]
    with pytest.raises(InputError, match="--out"):
        export.main(command)
    assert export.main([*command, "--overwrite", "--input_bits=3"]) == 0
    assert json.loads((out / "input_scaling.json").read_text())["bits"] == 3


def test_c_goes_beside_the_run(trained, capsys):
    assert export.main(["--to=c", f"--workdir={trained}", "--word=32", "--examples=0"]) == 0
    out = trained / "c"
    assert {"dwn.c", "bench.c", "README.md"} <= {path.name for path in out.iterdir()}
    assert "#define WORD 32" in (out / "dwn.c").read_text()
    expected = np.loadtxt(out / "expected.hex", dtype=str)
    assert len(expected) > 360


@pytest.mark.parametrize(
    "arguments, key",
    [
        (["--to=vhdl"], "--to"),
        ([], "--out"),
        (["--verify", "--out=x"], "--verify"),
        (["--to=verilog", "--packed"], "--packed"),
        (["--to=verilog", "--word=32"], "--word"),
        (["--to=c", "--synthesize"], "--synthesize"),
        (["--to=c", "--pipeline=1"], "--pipeline"),
        (["--to=c", "--word=16"], "--word"),
        (["--to=verilog", "--examples=-1"], "--examples"),
        (["--to=verilog", "--pipeline=-1"], "--pipeline"),
        (["--to=verilog", "--input_bits=40"], "--input_bits"),
    ],
)
def test_bad_options(trained, tmp_path, arguments, key):
    where = (
        []
        if any(a.startswith("--out") for a in arguments) or not arguments
        else [f"--out={tmp_path / 'there'}"]
    )
    with pytest.raises(InputError, match=f"^{key}"):
        export.main([f"--workdir={trained}", *arguments, *where])
    assert not (tmp_path / "there").exists()
