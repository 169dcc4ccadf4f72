"""Blocks of integer-only transformers as Verilog and C: what the packed model computes, bit for
bit; deliberate faults are caught.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax.commands import export_block
from quweit_jax.data.image_sources import ArrayExamples
from quweit_jax.deploy.hardware import tools
from quweit_jax.deploy.hardware.blocks import (
    activations,
    description,
    folder,
    schedule,
    synthesis,
    verilog,
)
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError, RunError
from quweit_jax.models.dwn import DWN, DWNConfig
from quweit_jax.models.registry import build
from quweit_jax.ops import int64
from tests.deploy.hardware import blocks
from tests.deploy.hardware.test_tools import needs

pytestmark = pytest.mark.usefixtures("compile_quickly")


def write(place, kind, seed, **changed):
    made = blocks.block(seed)
    circuit = verilog.build(made, **{**blocks.options(made, seed), **changed})
    exported = folder.Export(kind, circuit, blocks.tokens(made), 0)
    folder.write(exported, place, overwrite=True)
    return circuit


def verdict(place, kind, tool):
    (found,) = tools.verify(place, kind, [tool], verilog.NAME)
    return found


@needs("iverilog")
@pytest.mark.parametrize("seed", range(6))
def test_verilog_is_bit_exact(tmp_path, seed):
    circuit = write(tmp_path, "verilog", seed)
    said = verdict(tmp_path, "verilog", "iverilog")
    assert said.passed, said.text
    about = json.loads((tmp_path / "block.json").read_text())
    assert about["latency"] == circuit.schedule.latency
    assert f"{circuit.schedule.latency:,} cycles behind" in (tmp_path / "README.md").read_text()


@needs("gcc")
@pytest.mark.parametrize("seed", range(3))
def test_c_is_bit_exact(tmp_path, seed):
    write(tmp_path, "c", seed)
    said = verdict(tmp_path, "c", "gcc")
    assert said.passed, said.text


FAULTS = {
    "codes exchanged": ("{group_0, code_0, code_1}", "{group_0, code_1, code_0}"),
    "an entry without its sign": ("entry_0 = read_0", "entry_0 = {1'b0, read_0[6:0]}"),
    "a sum moved too early": (".shift(issue)", ".shift(begun)"),
    "a stream without its sign": ("b_next = b_high + ", "b_next = $unsigned(b_high) + "),
    "halves that go up": ("_rounded <= $signed(a_product", "_rounded <= 1 + $signed(a_product"),
    "the next token too early": ("ready = state == 0", "ready = state != 1"),
}


@needs("iverilog")
def test_faults_are_caught(tmp_path):
    seed = next(s for s in range(0, 99, 3) if len(blocks.block(s).tables) > 1)
    write(tmp_path, "verilog", seed, parallel=1, pipeline=1)
    source = tmp_path / f"{verilog.NAME}.v"
    text = source.read_text()
    assert verdict(tmp_path, "verilog", "iverilog").passed
    for fault, (right, wrong) in FAULTS.items():
        assert right in text, fault
        source.write_text(text.replace(right, wrong))
        assert not verdict(tmp_path, "verilog", "iverilog").passed, fault


def test_a_branch_is_requantized_as_layers_do():
    draw = np.random.default_rng(0)
    x = draw.integers(-(2**31), 2**31, (400, 8)) >> draw.integers(0, 30, (400, 1))
    multiplier = np.asarray([0, 1, 2**30, 2**31 - 1, *draw.integers(2**30, 2**31, 4)])
    shift = np.asarray([0, 1, 31, 63, *draw.integers(0, 64, 4)])
    found = description.Branch(multiplier, shift)(x)
    given = (jnp.asarray(part, jnp.int32) for part in (x, multiplier, shift))
    expected = np.clip(np.asarray(jax.jit(int64.multiply_shift)(*given)), -(2**29), 2**29)
    np.testing.assert_array_equal(found, expected)


def test_aligned_branches_are_the_same_numbers():
    branch = description.Branch(
        np.asarray([0, 3 << 20, 5 << 29, 2**31 - 1]), np.asarray([63, 30, 31, 40])
    )
    multipliers, shift = branch.aligned()
    for i, m in enumerate(multipliers):
        assert m * 2 ** int(branch.shift[i]) == int(branch.multiplier[i]) * 2**shift
    assert any(m & 1 for m in multipliers)


@pytest.fixture(scope="module")
def vit():
    """A tiny integer-only ViT with both kinds of block, its ranges set, and images."""
    options = {
        "name": "vit",
        "variant": "mu/4",
        "width": 12,
        "depth": 2,
        "heads": 2,
        "integer": True,
        "mlp": "weightless+lookup_glu",
        "weightless": {"num_luts": (20, 24), "lut_inputs": 3, "sum": "grouped"},
        "lookup_glu": {"hidden": 10, "table_groups": 5, "train_tables": True, "code_bits": 3},
    }
    model = build(options, 3)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)

    @jax.jit
    def calibrated(key):
        variables = model.init(key, images)
        return {**variables, **model.apply(variables, images, mutable=["ranges"])[1]}

    packed = pack(model, calibrated(jax.random.key(0)), images)
    setup = types.SimpleNamespace(
        model=model,
        init_inputs=images,
        data=types.SimpleNamespace(validation=ArrayExamples(images, np.zeros(4, np.int32))),
    )
    return types.SimpleNamespace(setup=setup), packed


@pytest.mark.parametrize("number", [0, 1])
def test_descriptions_are_the_packed_model(vit, number):
    opened, packed = vit
    model, images = opened.setup.model, opened.setup.init_inputs
    block = description.from_packed(model, packed, images, number)
    found = activations.record(model, packed, images, number)
    assert found.x.shape == found.residual.shape == (4 * 5, 12)  # with the class token
    assert len(np.unique(found.y)) > 20
    np.testing.assert_array_equal(description.evaluate(block, found.x, found.residual), found.y)


def test_the_command_writes_a_block(vit, tmp_path, capsys):
    opened, packed = vit
    options = {"block": 1, "parallel": 3, "pipeline": 2, "examples": 8}
    made = export_block.run(opened.setup, packed, tmp_path / "v", "verilog", options, {}, False)
    said = capsys.readouterr().out
    assert "block 1, lookup_glu, of 12 features; exact on 20 tokens" in said
    assert "there are 0 (weightless), too" in said and made.schedule.rows == 4
    lines = (tmp_path / "v" / "inputs.hex").read_text().splitlines()
    assert len(lines) == 8 + 12 and {len(line.split()) for line in lines} == {24}
    with pytest.raises(InputError, match=r"^--block: expected one of 0 \(weightless\), 1 \(lookup"):
        export_block.run(
            opened.setup, packed, tmp_path / "v", "verilog", {**options, "block": 2}, {}, 0
        )
    with pytest.raises(InputError, match=r"^--parallel: expected 1 to 10 units"):
        export_block.run(
            opened.setup, packed, tmp_path / "w", "c", {**options, "parallel": 11}, {}, 0
        )


def test_what_is_no_circuit_is_said():
    with pytest.raises(InputError, match="expected a classifier made of tables"):
        description.choices(DWN(DWNConfig(2, (4,), 2)))
    with pytest.raises(InputError, match="ViT in floats"):
        description.choices(build({"name": "vit"}, 2))
    with pytest.raises(InputError, match="found dense, dense"):
        description.choices(build({"name": "vit", "integer": True, "depth": 2}, 2))
    grouped = blocks.tables(1, True)
    with pytest.raises(InputError, match="one feature at a time"):
        schedule.plan(grouped, 2)
    with pytest.raises(InputError, match=r"^--pipeline"):
        schedule.plan(grouped, 1, -1)


def test_netlists_are_counted():
    """Two tables behind a chain of two carries, and what yosys left alone is an error."""

    def cell(kind, inputs, outputs):
        ways = dict.fromkeys(inputs, "input") | dict.fromkeys(outputs, "output")
        return {"type": kind, "port_directions": ways, "connections": inputs | outputs}

    cells = {
        "a": cell("CARRY4", {"CI": ["0"], "S": [2]}, {"CO": [3], "O": [4]}),
        "b": cell("CARRY4", {"CI": [3], "S": [5]}, {"CO": [6], "O": [7]}),
        "c": cell("LUT2", {"I0": [7]}, {"O": [8]}),
        "d": cell("LUT6", {"I0": [8], "I1": [2]}, {"O": [9]}),
        "e": cell("FDRE", {"D": [9]}, {"Q": [2]}),
        "f": cell("RAMB36E1", {"A": [9]}, {"Q": [10]}),
        "g": cell("RAM32M", {"A": [2]}, {"Q": [11]}),
    }
    found = synthesis._count("block", cells, {})
    assert found == synthesis.Synthesized(luts=6, carries=2, flip_flops=1, memories=2, depth=3)
    with pytest.raises(RunError, match="not mapped"):
        synthesis._count("block", {**cells, "h": cell("$mul", {}, {})}, {})
