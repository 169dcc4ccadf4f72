"""Circuits say what the integer description says, whatever is drawn; nothing is larger than the
rules of `ops.area` allow.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quweit_jax.deploy.hardware import circuit, description, network
from quweit_jax.errors import InputError
from quweit_jax.ops import area
from tests.deploy.hardware.configurations import Configuration, configurations

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def plain(classifier, words):
    """The same decisions, an example and a table at a time."""
    rows = []
    for word in words:
        bits = [int(word[f] > t) for f, t in zip(classifier.feature, classifier.threshold)]
        for layer in classifier.layers:
            addresses = [sum(bits[w] << i for i, w in enumerate(row)) for row in layer.wiring]
            bits = [int(table[a]) for table, a in zip(layer.tables, addresses)]
        counts = [int(n) for n in classifier.offset]
        for bit, group in zip(bits, classifier.group):
            counts[group] += bit
        best = max(range(len(counts)), key=lambda k: (counts[k], -k))
        rows.append((best, counts[best]))
    return np.asarray(rows).T


def number(bits):
    return sum(bit.astype(np.int64) << i for i, bit in enumerate(bits))


def simulated(made, words):
    c = made.classifier
    given = {
        f"x_{f}_{i}": (words[:, f] >> i & 1).astype(bool)
        for f in range(c.features)
        for i in range(c.scaling.bits)
    }
    found = network.simulate(made.network, made.outputs, given)
    return number(found[: len(made.decision)]), number(found[len(made.decision) :])


@FEW
@given(configurations())
def test_the_network_says_what_the_description_says(configuration):
    classifier = configuration.classifier()
    words = configuration.words(classifier)
    expected = plain(classifier, words)
    out = description.evaluate(classifier, words)
    np.testing.assert_array_equal(np.stack([out.decision, out.score]), expected)
    made = circuit.build(classifier, configuration.pipeline)
    np.testing.assert_array_equal(np.stack(simulated(made, words)), expected)


@FEW
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 70), min_size=1, max_size=3))
def test_a_count_is_the_number_of_ones(seed, sizes):
    draw, bits = np.random.default_rng(seed), sum(sizes)
    through = description.Layer(np.tile([False, True], (bits, 1)), np.arange(bits)[:, None])
    classifier = description.Classifier(
        features=bits,
        scaling=description.Scaling(1, False, 0.0, 1.0),
        feature=np.arange(bits),
        threshold=np.zeros(bits, np.int64),
        layers=(through,),
        group=np.repeat(np.arange(len(sizes)), sizes),
        offset=draw.integers(0, 9, len(sizes)),
    )
    words = (draw.random((64, bits)) < draw.random((64, 1))).astype(np.int64)
    words[:2] = [[0] * bits, [1] * bits]
    out = simulated(circuit.build(classifier, int(draw.integers(0, 3))), words)
    np.testing.assert_array_equal(out, plain(classifier, words))


@FEW
@given(configurations())
def test_every_way_through_has_the_latency(configuration):
    made = configuration.circuit()
    registers = {}
    for signal in made.network.used(made.outputs):
        node = made.network.nodes[signal]
        before = {registers[s] for s in node.inputs if registers[s] is not None}
        assert len(before) <= 1
        own = before.pop() if before else 0 if node.kind == "input" else None
        registers[signal] = own + 1 if own is not None and node.kind == "register" else own
    ends = {registers[s] for s in made.outputs} - {None}
    assert ends <= {made.latency}
    every, stages = configuration.pipeline, len(made.stages)
    assert made.latency == (-(-stages // every) if every else 0)


@FEW
@given(configurations())
def test_the_estimate_bounds_what_is_drawn(configuration):
    classifier = configuration.classifier()
    equal = np.arange(len(classifier.group)) // (len(classifier.group) // classifier.classes)
    classifier = description.Classifier(
        **{**vars(classifier), "group": equal, "offset": np.zeros(classifier.classes, np.int64)}
    )
    drawn = circuit.build(classifier, configuration.pipeline).area()
    bound = area.classifier_area(
        len(classifier.feature),
        [(len(layer.tables), layer.wiring.shape[1]) for layer in classifier.layers],
        classifier.classes,
        input_bits=configuration.bits,
        pipeline=configuration.pipeline,
    )
    for module, own in drawn.items():
        assert own.luts <= bound[module].luts
        assert own.flip_flops <= bound[module].flip_flops
        assert own.comparators <= bound[module].comparators


def test_the_estimate_is_exact_where_nothing_can_be_simplified():
    draw = np.random.default_rng(0)
    scaling = description.Scaling(8, False, 0.0, 1.0)
    places = np.arange(40)
    layers = tuple(
        description.Layer(
            draw.random((40, 2**6)) < 0.5,
            (places[:, None] * 7 + np.asarray([0, 1, 3, 8, 15, 22])) % 40,
        )
        for _ in range(2)
    )
    # thresholds with other low bits than ones, and two chunks each
    classifier = description.Classifier(
        40, scaling, places, 2 * places + 64, layers, places // 10, np.zeros(4, np.int64)
    )
    drawn = circuit.build(classifier, 1).area()
    bound = area.classifier_area(40, [(40, 6), (40, 6)], 4, input_bits=8, pipeline=1)
    assert drawn["tables"] == bound["tables"]
    assert drawn["reduction"].luts == bound["reduction"].luts
    assert drawn["encoder"].flip_flops == bound["encoder"].flip_flops == 40


@FEW
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_a_table_keeps_its_function(seed, inputs):
    draw = np.random.default_rng(seed)
    made = network.Network()
    names = [f"x_{i}_0" for i in range(4)]
    signals = [network.FALSE, network.TRUE, *(made.input(name) for name in names)]
    signals.append(made.table(np.asarray([True, False]), [signals[2]], "tables"))
    entries = draw.random(2**inputs) < draw.choice([0.1, 0.5, 0.9])
    chosen = draw.choice(signals, inputs)
    out = made.table(entries, [int(s) for s in chosen], "tables")
    values = {name: np.arange(16) >> i & 1 == 1 for i, name in enumerate(names)}
    wired = network.simulate(made, [int(s) for s in chosen], values)
    np.testing.assert_array_equal(network.simulate(made, [out], values)[0], entries[number(wired)])
    tables = [node for node in made.nodes if node.kind == "table"]
    assert all(len(node.inputs) <= area.LUT_INPUTS for node in tables)


def test_a_table_of_eight_inputs_takes_what_the_rule_says():
    made, draw = network.Network(), np.random.default_rng(3)
    for inputs, luts in ((6, 1), (7, 3), (8, 5)):
        signals = [made.input(f"x_{inputs}_{i}") for i in range(inputs)]
        before = len(made.nodes)
        made.table(draw.random(2**inputs) < 0.5, signals, "tables")
        assert len(made.nodes) - before == area.table_luts(inputs) == luts


def test_one_class_needs_no_tournament():
    made = Configuration(0, 2, 4, False, 5, (7,), 3, 1, False, 1).circuit()
    assert made.decision == (network.FALSE,)
    assert not any(stage.startswith("round") for stage in made.stages)


def test_bad_numbers():
    with pytest.raises(InputError, match="--pipeline"):
        circuit.build(Configuration(0, 2, 4, False, 5, (7,), 3, 1, False, 1).classifier(), -1)
    with pytest.raises(InputError, match="classifier_area"):
        area.classifier_area(4, [(7, 6)], 2, input_bits=8)
