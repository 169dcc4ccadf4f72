"""The FPGA area of a config, before training, beside what its trained circuit takes."""

import json

import jax
import numpy as np
import pytest

from quweit_jax.commands import costs as command
from quweit_jax.config import load_file
from quweit_jax.costs import fpga
from quweit_jax.deploy.hardware import circuit, description, synthesis, tools
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.models.registry import build
from tests.compiled import quick_jit
from tests.conftest import REPOSITORY

DIGITS = f"{REPOSITORY / 'experiments/configs/dwn_digits.py'}"
SMALL = ["--config.model.num_luts=(60,40)", "--config.model.thermometer_bits=4"]

pytestmark = pytest.mark.usefixtures("compile_quickly")


def small_config():
    config = load_file(DIGITS).unlock()
    config.model.update(num_luts=(60, 40), thermometer_bits=4, lut_inputs=6)
    return config


@pytest.mark.parametrize("pipeline", [0, 1, 2])
def test_the_estimate_bounds_a_drawn_circuit_closely(pipeline):
    config = small_config()
    inputs = np.random.default_rng(0).integers(0, 17, (300, 8, 8, 1)).astype(np.float32)
    inputs[:2] = np.asarray([0, 16])[:, None, None, None]
    model = build(config.model.to_dict(), 10)
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), inputs))
    classifier, _ = description.from_packed(model, pack(model, variables, inputs), inputs, 5)
    made = circuit.build(classifier, pipeline)
    bound = fpga.of_config(config, input_bits=5, pipeline=pipeline)
    for module, drawn in made.area().items():
        assert drawn.luts <= bound[module].luts and drawn.flip_flops <= bound[module].flip_flops
    total = sum(area.luts for area in made.area().values())
    assert total >= 0.7 * sum(area.luts for area in bound.values())
    if tools.installed("yosys") and pipeline == 1:
        found = synthesis.synthesize(made).modules[6]
        assert (
            0.65 <= sum(m.luts for m in found.values()) / sum(a.luts for a in bound.values()) <= 1
        )


def test_the_command_says_it(capsys):
    assert command.main([f"--config={DIGITS}", *SMALL, "--json", "--input_bits=7"]) == 0
    found = json.loads(capsys.readouterr().out)["fpga"]
    assert found["encoder"] == {"luts": 2 * 256, "flip_flops": 256, "comparators": 256}
    assert found["tables"]["luts"] == 100
    for name in ("luts", "flip_flops", "comparators"):
        parts = [found[part][name] for part in ("encoder", "tables", "reduction")]
        assert found["total"][name] == sum(parts)
    assert command.main([f"--config={DIGITS}", *SMALL, "--input_bits=7"]) == 0
    assert f"{found['total']['luts']:,} LUT6" in capsys.readouterr().out


def test_only_what_is_made_of_tables_has_an_area():
    gpt = load_file(f"{REPOSITORY / 'experiments/configs/gpt_char.py'}:quick")
    assert fpga.of_config(gpt) is None
    config = small_config()
    config.model.reduction = "learnable"
    assert fpga.of_config(config) is None
    for bad in ({"input_bits": 0}, {"pipeline": -1}):
        with pytest.raises(InputError, match=f"--{next(iter(bad))}"):
            fpga.of_config(small_config(), **bad)
