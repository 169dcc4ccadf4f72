"""The integer description of a packed classifier decides as the packed model does."""

import dataclasses

import jax
import numpy as np
import pytest

from quweit_jax.deploy import prune
from quweit_jax.deploy.hardware import description
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.models.dwn import DWN, DWNConfig
from tests.compiled import quick_jit
from tests.deploy.test_packed import perturbed

pytestmark = pytest.mark.usefixtures("compile_quickly")


def rows(count=60, features=7, seed=0):
    return np.random.default_rng(seed).normal(size=(count, features)).astype(np.float32)


def packed(inputs, classes=3, **options):
    model = DWN(DWNConfig(classes, **{"lut_inputs": 3, "thermometer_bits": 2, **options}))
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), inputs))
    return model, pack(model, variables, inputs)


CASES = {
    "one layer": {"num_luts": (12,)},
    "three layers": {"num_luts": (20, 13, 9), "mapping": "random"},
    "candidates": {"num_luts": (15,), "mapping": "candidates", "lut_inputs": 6},
    "one threshold for all": {"num_luts": (12,), "per_feature": False, "thermometer": "gaussian"},
    "one class": {"num_luts": (5,), "classes": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_decisions_and_counts_are_the_packed_models(case):
    inputs = rows()
    model, constants = packed(inputs, **CASES[case])
    classifier, fit = description.from_packed(model, constants, inputs)
    assert fit.exact and not fit.changed and fit.examples == len(inputs)
    out = description.evaluate(classifier, classifier.scaling.words(inputs))
    logits = np.asarray(model.apply(constants, inputs))
    np.testing.assert_array_equal(out.decision, logits.argmax(1))
    np.testing.assert_array_equal(out.score, np.rint(logits.max(1) * model.config.tau))


def test_pixels_need_as_many_bits_as_they_have_values():
    inputs = np.random.default_rng(1).integers(0, 256, (400, 2, 3, 1)).astype(np.float32) / 255
    inputs[0], inputs[1] = 0, 1
    model, constants = packed(
        inputs, num_luts=(300,), thermometer="distributive", thermometer_bits=100
    )
    classifier, fit = description.from_packed(model, constants, inputs)
    assert fit.exact and classifier.scaling.bits <= 8
    classifier, fit = description.from_packed(model, constants, inputs, 8)
    assert fit.exact
    np.testing.assert_array_equal(classifier.scaling.words(inputs), np.rint(inputs * 255))


@pytest.mark.parametrize("bits", [1, 3, 16])
def test_given_bits_are_taken(bits):
    inputs = rows()
    model, constants = packed(inputs, num_luts=(30,), thermometer_bits=9)
    classifier, fit = description.from_packed(model, constants, inputs, bits)
    assert classifier.scaling.bits == bits and classifier.scaling.signed
    found = description.evaluate(classifier, classifier.scaling.words(inputs)).decision
    logits = np.asarray(model.apply(constants, inputs))
    assert fit.changed == (found != logits.argmax(1)).sum()
    assert fit.exact or bits < 16


def test_only_wired_comparators_are_there_once():
    inputs = rows()
    model, constants = packed(inputs, num_luts=(3,), lut_inputs=2, thermometer_bits=9)
    classifier, _ = description.from_packed(model, constants, inputs)
    assert len(classifier.feature) <= 6 < 7 * 9
    pairs = set(zip(classifier.feature.tolist(), classifier.threshold.tolist()))
    assert len(pairs) == len(classifier.feature)


def test_a_pruned_model():
    inputs = rows(40)
    model = DWN(DWNConfig(3, num_luts=(12, 15), lut_inputs=3, thermometer_bits=2))
    variables = perturbed(quick_jit(model.init)(jax.random.key(0), inputs))
    deployed = prune.deploy(model, jax.device_get(variables), inputs)
    batch = [(inputs[:6], np.ones(6, np.float32))]
    pruned, _ = prune.prune(deployed, prune.count_ones(deployed, batch))
    assert "reduction" in pruned.variables["packed"]
    classifier, _ = description.from_packed(model, pruned.variables, inputs)
    out = description.evaluate(classifier, classifier.scaling.words(inputs))
    logits = np.asarray(model.apply(pruned.variables, inputs))
    np.testing.assert_array_equal(out.decision, logits.argmax(1))
    np.testing.assert_array_equal(out.score, np.rint(logits.max(1) * model.config.tau))


def test_words_saturate_and_are_numbers():
    scaling = description.Scaling(3, True, 0.5, 0.25)
    found = scaling.words(np.asarray([-9.0, 0.5, 0.6, 0.75, 99.0, np.inf]))
    np.testing.assert_array_equal(found, [-4, 0, 0, 1, 3, 3])
    with pytest.raises(InputError, match="NaN"):
        scaling.words(np.asarray([np.nan]))


def test_scores_that_are_no_counts_are_refused():
    inputs = rows()
    model, constants = packed(inputs, num_luts=(12,), reduction="learnable")
    with pytest.raises(InputError, match=r"model\.reduction"):
        description.from_packed(model, constants, inputs)


def test_what_cannot_be_done_is_said():
    inputs = rows()
    model, constants = packed(inputs, num_luts=(12,))
    with pytest.raises(InputError, match="--input_bits"):
        description.from_packed(model, constants, inputs, 17)
    with pytest.raises(InputError, match="dwn"):
        description.from_packed(dataclasses, constants, inputs)
    close = np.linspace(1, 1 + 1e-5, 60, dtype=np.float32)[:, None] * np.ones(7, np.float32)
    close[0] = -1e6
    model, constants = packed(close, num_luts=(60,), thermometer_bits=9)
    with pytest.raises(InputError, match="--input_bits"):
        description.from_packed(model, constants, close)
    assert description.from_packed(model, constants, close, 4)[1].changed
