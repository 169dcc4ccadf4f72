"""Energy against its formulas by hand, published ratios, and a user's own table."""

import json
import math

import pytest

from quweit_jax.costs import count, energy
from quweit_jax.costs.technologies import TECHNOLOGIES, technology_of
from quweit_jax.errors import InputError
from quweit_jax.ops.counts import Costs, Elementwise, LayerCosts

TABLE = {
    "name": "ours",
    "source": "a test",
    "add": {"int8": 1, "int32": 4, "float16": 5, "float32": 6},
    "multiply": {"int8": 10, "int32": 160, "float16": 50, "float32": 60},
    "memory": {"near": 8, "far": 80},
}


@pytest.fixture
def table(tmp_path):
    def write(**changes):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({k: v for k, v in (TABLE | changes).items() if v is not None}))
        return path

    return write


def layer(**fields):
    return Costs((LayerCosts("a", **{"kind": "mlp", **fields}),), "token", 8)


def test_every_operation_has_its_price(table):
    mine = table()
    assert (
        energy.estimate(
            layer(multiplications={"int8": 7, "float32": 2}, additions={"int32": 3}), mine
        ).arithmetic_pj
        == 7 * 10 + 2 * 60 + 3 * 4
    )
    parts = Elementwise({"float32": 2}, {"int32": 3}, {"int32": 5}, {"float16": 7}, {"int8": 11})
    expected = 2 * 60 + 3 * 4 + 5 * 8 * (160 + 4) + 7 * 8 * (50 + 5) + 11 * 1
    assert energy.estimate(layer(elementwise=parts), mine).arithmetic_pj == expected
    assert (
        energy.estimate(layer(comparisons=9, comparison_type="float32"), mine).arithmetic_pj
        == 9 * 6
    )
    # An int8 adder is eight full adders; a multiplexer is 12 / 28 of one; four inputs choose among
    # 16 entries.
    assert energy.estimate(layer(lookups={4: 100}), mine).arithmetic_pj == pytest.approx(
        100 * 15 * (1 / 8) * 12 / 28
    )


def test_a_multiplexer_tree_grows_with_its_entries():
    technology = TECHNOLOGIES["45nm"]
    one = energy.lut_energy(1, technology)
    assert one == pytest.approx(0.03 / 8 * 12 / 28)
    assert [round(energy.lut_energy(n, technology) / one) for n in range(1, 9)] == [
        1,
        3,
        7,
        15,
        31,
        63,
        127,
        255,
    ]
    physical = energy.lut_energy(6, technology, "fpga")
    assert physical == pytest.approx(14 * 63 * one)
    assert (
        energy.lut_energy(2, technology, "fpga") == physical
    )  # a physical table is one whatever of it is used
    assert energy.lut_energy(8, technology, "fpga") == pytest.approx(14 * 255 * one)


def test_widths_between_the_table_s(table):
    mine = technology_of(table())
    # Between 8 and 32 bits adders grow from 1 to 4 (so as the width) and multipliers from 10 to 160
    # (as its square).
    assert mine.adding("int16") == pytest.approx(2)
    assert mine.multiplying("int16") == pytest.approx(40)
    assert mine.multiplying("int16xint8") == pytest.approx(20)
    assert mine.multiplying("int8xint8") == pytest.approx(10)
    assert mine.adding("bfloat16") == 5 and TECHNOLOGIES["7nm"].multiplying("bfloat16") == 0.21


def test_memory_by_level(table):
    moved = layer(bytes_moved={"weights": 800, "activations": 80, "state": 8})
    mine = energy.estimate(
        moved, table()
    )  # its own names: the dearest level for weights and state, the cheapest for activations
    assert mine.memory_by_traffic == {"weights": 100 * 80, "activations": 10 * 8, "state": 80}
    assert mine.arithmetic_pj == 0 and mine.memory_pj == mine.total_pj == 8160
    assert (
        energy.estimate(moved, table(), levels={"weights": "near"}).memory_by_traffic["weights"]
        == 100 * 8
    )
    assert energy.estimate(moved, "45nm").memory_by_traffic == {
        "weights": 100 * 1300,
        "activations": 10 * 100,
        "state": 1300,
    }


def test_choices_about_weightless_blocks(table):
    mine = table()
    summed = layer(kind="conditional_sum", additions={"int32": 10})
    assert energy.estimate(summed, mine, active_bits=0.5).arithmetic_pj == 20
    assert (
        energy.estimate(layer(additions={"int32": 10}), mine, active_bits=0.5).arithmetic_pj == 40
    )  # other sums add everything
    tables = layer(kind="lookup", bytes_moved={"weights": 8, "activations": 8})
    assert (
        energy.estimate(tables, mine).memory_pj == 88
        and energy.estimate(tables, mine, tables_in_place=True).memory_pj == 8
    )


def test_kinds_add_up_and_assumptions_are_said():
    counted = count.count(
        {"name": "vit", "variant": "mu/8", "integer": True, "mlp": "weightless"}, 10, image_size=16
    )
    found = energy.estimate(counted, "7nm", lut_model="fpga")
    assert (
        math.isclose(sum(found.by_kind.values()), found.total_pj)
        and found.total_pj == found.arithmetic_pj + found.memory_pj
    )
    assert 0 < found.matrix_pj < found.arithmetic_pj
    text = "\n".join(found.assumptions)
    for said in ("Jouppi", "Kuon", "dram", "16 by 8 bits", "every bit", "division", "batch of one"):
        assert said in text


@pytest.mark.parametrize("technology", ["45nm", "7nm"])
def test_published_energy_ratios(technology):
    """The papers' 2.2 (I-ViT-T in int8) and 2.5 (nanoGPT) are what a grouped sum gives; a dense one
    costs an addition for each weight replaced.
    """

    def ratio(model, outputs, options, **kwargs):
        luts = {"num_luts": 1536 if model["name"] == "vit" else 2688, **options}
        ours = count.count(model | {"mlp": "weightless", "weightless": luts}, outputs, **kwargs)
        dense = count.count(model, outputs, **kwargs)
        return (
            energy.estimate(dense, technology).matrix_pj
            / energy.estimate(ours, technology).matrix_pj
        )

    vit, gpt = (
        {"name": "vit", "integer": True},
        {"name": "gpt", "layers": 6, "heads": 6, "width": 384, "context": 256},
    )
    assert ratio(vit, 10, {"sum": "grouped"}, image_size=224, precision="int8") == pytest.approx(
        2.25, abs=0.01
    )
    assert ratio(vit, 10, {"sum": "grouped"}, image_size=224) == pytest.approx(
        2.12, abs=0.02
    )  # attention's 16-bit weights counted as such
    assert 1.5 < ratio(vit, 10, {"sum": "dense"}, image_size=224) < 1.6
    assert ratio(gpt, 65, {"sum": "grouped"}) == pytest.approx(2.49, abs=0.01)
    assert 2.4 < ratio(gpt, 65, {"sum": "dense"}) < 2.45


def test_tables_are_those_published():
    assert TECHNOLOGIES["45nm"].multiply == {
        "int8": 0.2,
        "int32": 3.1,
        "float16": 1.1,
        "float32": 3.7,
    }
    assert TECHNOLOGIES["45nm"].add == {"int8": 0.03, "int32": 0.1, "float16": 0.4, "float32": 0.9}
    assert {k: v for k, v in TECHNOLOGIES["7nm"].multiply.items() if k != "bfloat16"} == {
        "int8": 0.07,
        "int32": 1.48,
        "float16": 0.34,
        "float32": 1.31,
    }


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"add": None}, "needs 'add'"),
        ({"ad": {}}, "Did you mean 'add'"),
        ({"add": {"int8": 1}}, "lacks int32, float16, float32"),
        (
            {"multiply": TABLE["multiply"] | {"int8": -1}},
            "multiply.int8 should be a positive number",
        ),
        ({"multiply": TABLE["multiply"] | {"int8": "1"}}, "found '1'"),
        ({"multiply": TABLE["multiply"] | {"int4": 1}}, "found 'int4'"),
        ({"memory": {}}, "needs 'memory'"),
    ],
)
def test_mistakes_in_a_table_are_named(changes, said, table):
    with pytest.raises(InputError, match=said):
        energy.estimate(layer(), table(**changes))


def test_mistakes_are_named(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for technology, said in [
        ("5nm", "found '5nm', which is no file"),
        (broken, "is not JSON"),
        (tmp_path / "list.json", "found a list"),
    ]:
        with pytest.raises(InputError, match=said):
            energy.estimate(layer(), technology)
    for options, said in [
        ({"levels": {"weight": "dram"}}, "Did you mean 'weights'"),
        ({"levels": {"weights": "sram"}}, "level of weights at 45nm"),
        ({"lut_model": "relay"}, "found 'relay'"),
        ({"active_bits": 1.5}, "found 1.5"),
    ]:
        with pytest.raises(InputError, match=said):
            energy.estimate(layer(), **options)
