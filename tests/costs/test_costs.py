"""Counts against an independent hand count, the arithmetic written out, and against published
numbers.
"""

import jax
import pytest

from quweit_jax.config import load_file, set_value
from quweit_jax.costs import count
from quweit_jax.errors import InputError
from quweit_jax.models.registry import defaults
from tests.conftest import REPOSITORY

DEIT = {"name": "vit", "variant": "Ti/16"}
NANOGPT = {"name": "gpt", "layers": 6, "heads": 6, "width": 384, "context": 256}
LUTS = {"num_luts": 1536, "lut_inputs": 4, "thermometer_bits": 4}


def total(counts):
    return sum(counts.values())


def of_experiment(spec, **options):
    return count.of_config(load_file(f"{REPOSITORY / 'experiments/configs' / spec}"), **options)


def test_deit_tiny_by_hand():
    counted = count.count(DEIT, 1000, image_size=224)
    # 14 x 14 patches and a class token; width 192, three heads of 64, 12 blocks.
    patches, tokens = 196, 197
    patch = patches * (16 * 16 * 3) * 192
    projections = 12 * (tokens * 192 * 576 + tokens * 192 * 192)
    attention = 12 * 2 * (3 * tokens * tokens * 64)
    mlps = 12 * (tokens * 192 * 768 + tokens * 768 * 192)
    head = 192 * 1000
    assert counted.multiplications == {"float32": patch + projections + attention + mlps + head}
    assert counted.additions == counted.multiplications
    assert {kind: part.total_multiplications for kind, part in counted.by_kind().items()} == {
        "embedding": patch, "projection": projections, "attention": attention, "mlp": mlps,
        "head": head, "norm": 0, "activation": 0, "residual": 0,
    }  # fmt: skip
    # Kernels and biases; norms of scale and bias.
    block = (
        2 * (192 + 192)
        + (192 * 576 + 576)
        + (192 * 192 + 192)
        + (192 * 768 + 768)
        + (768 * 192 + 192)
    )
    assert (
        counted.parameters
        == (768 * 192 + 192) + 192 + 197 * 192 + 12 * block + 384 + (192 * 1000 + 1000)
        == 5_717_416
    )
    assert counted.bytes_stored == {"float32": 4 * 5_717_416}
    # One exponential a score, one erf a hidden number, one inverse root a norm and token (the last
    # norm is of the class token alone).
    assert counted.elementwise.functions == {
        "float32": 12 * (3 * tokens * tokens + tokens * 768 + 2 * tokens) + 1
    }
    assert counted.elementwise.divisions == {
        "float32": 12 * (3 * tokens * tokens + 2 * 2 * tokens) + 2
    }
    weights = counted.parameters  # all of them are read for one image
    moved = 196 * (768 + 192) + 12 * tokens * (
        2 * 192 + (192 + 576) + (192 + 192) + 192 + 2 * 192 + (192 + 768) + (768 + 192) + 192
    )
    moved += 12 * (
        tokens * 192 * 2 + 3 * tokens * tokens * 4 + tokens * 192 * 2
    )  # queries, keys, scores twice over, softmax's, values, results
    moved += 2 * 192 + 192 + 1000
    assert counted.bytes_moved == {"weights": 4 * weights, "activations": 4 * moved}


def test_integer_deit_tiny_by_hand():
    counted = count.count(DEIT | {"integer": True}, 10, image_size=224)
    tokens, values, scores = 197, 197 * 192, 3 * 197 * 197
    mixing = 12 * scores * 64  # 16-bit weights times 8-bit values
    assert counted.multiplications == {
        "int8": 196 * 768 * 192 + 12 * (4 * values * 192 + scores * 64 + 8 * values * 192) + 1920,
        "int16xint8": mixing,
    }  # fmt: skip
    assert counted.additions == {"int32": total(counted.multiplications)}
    # A multiplication for each branch of a requantization: after norm 1, of q k v, of scores,
    # mixed, projected, the residual sum of two, after norm 2, hidden twice, projected, the residual
    # sum; and two for a number in a norm and a score in Shiftmax, three in ShiftGELU.
    requantized = (
        12 * (values * (1 + 3 + 1 + 1 + 2 + 1 + 4 + 4 + 1 + 2) + scores)
        + 196 * 192
        + 2 * values
        + 192
    )
    inside = 12 * (2 * 2 * values + 2 * scores + 3 * 4 * values + tokens) + 2 * 192
    assert counted.elementwise.multiplications == {
        "int32": requantized + inside,
        "float32": 196 * 768 + 10,
    }  # the image in, the scores out
    assert counted.bytes_stored["int8"] == 768 * 192 + 12 * 12 * 192 * 192 + 192 * 10


def test_quweit_on_integers_by_hand():
    """Every MLP gone: 4 thresholds a number, 1,536 tables of 4 inputs, a sum of vectors of 192
    (dense) or of single numbers (grouped).
    """
    model = DEIT | {"integer": True, "mlp": "weightless", "weightless": LUTS}
    dense = count.count(DEIT | {"integer": True}, 10, image_size=224)
    counted = count.count(model, 10, image_size=224)
    assert counted.total_multiplications == dense.total_multiplications - 12 * 197 * 8 * 192 * 192
    assert counted.lookups == {4: 12 * 197 * 1536}
    assert counted.comparisons["int8"] == 12 * 197 * 192 * 4
    blocks = counted.of_kind("thermometer", "lookup", "conditional_sum")
    assert not blocks.multiplications and not blocks.elementwise.multiplications
    assert blocks.additions == {"int32": 12 * 197 * 1536 * 192}
    # A block: 16 entries a table at one bit, 4 wires to 768 bits in 16-bit numbers, int16
    # thresholds, int8 vectors, an int32 bias.
    assert blocks.bytes_stored == {
        "1-bit": 12 * 1536 * 2,
        "wiring": 12 * 1536 * 4 * 2,
        "int16": 12 * 768 * 2,
        "int8": 12 * 1536 * 192,
        "int32": 12 * 768,
    }
    grouped = count.count(
        model | {"weightless": LUTS | {"sum": "grouped"}}, 10, image_size=224
    ).of_kind("conditional_sum")
    assert (
        grouped.additions == {"int32": 12 * 197 * 1536}
        and grouped.bytes_stored["int8"] == 12 * 1536
    )


def test_nanogpt_by_hand():
    counted = count.count(NANOGPT, 65)
    matrices, attention, head = 6 * 12 * 384 * 384, 6 * 2 * 256 * 384, 65 * 384
    assert counted.multiplications == {"float32": matrices + attention + head}
    assert counted.of_kind("mlp").total_multiplications == 6 * 8 * 384 * 384
    parameters = (
        65 * 384 + 256 * 384 + 6 * (384 + 384 * 1152 + 384 * 384 + 384 + 2 * 384 * 1536) + 384
    )
    assert counted.parameters == parameters and counted.bytes_stored == {"float32": 4 * parameters}
    assert (
        round((parameters - 256 * 384) / 1e6, 2) == 10.65
    )  # what nanoGPT prints, positions left out
    # Keys and values of 256 tokens are read, those of this token written; the state is the cache
    # itself.
    assert counted.bytes_moved["state"] == 6 * 2 * (256 + 1) * 384 * 4
    assert counted.state_bytes == 6 * 2 * 256 * 384 * 4
    # Of the embeddings one row each is read; the head reads the whole matrix.
    assert counted.bytes_moved["weights"] == 4 * (
        parameters - 65 * 384 - 256 * 384 + 2 * 384 + 65 * 384
    )
    half = count.count(NANOGPT, 65, context=128)
    assert total(counted.multiplications) - total(half.multiplications) == 6 * 2 * 128 * 384


def test_quweit_gpt_by_hand():
    counted = count.count(
        NANOGPT | {"mlp": "weightless", "weightless": LUTS | {"num_luts": 2688}}, 65
    )
    blocks = counted.of_kind("thermometer", "lookup", "conditional_sum")
    assert blocks.lookups == {4: 6 * 2688}
    assert blocks.comparisons == {"float32": 6 * 384 * 4}
    assert blocks.additions == {"int32": 6 * 2688 * 384}
    assert blocks.elementwise.multiplications == {"float32": 6 * 384}  # one scale an output


def test_matmulfree_370m_by_hand():
    counted = of_experiment("matmulfree.py:370m")
    hidden = 2816  # 8 / 3 of 1,024 is 2,730.7, rounded up to 256
    ternary = 24 * (4 * 1024 * 1024 + 1024 * 2 * hidden + hidden * 1024) + 1024 * 32000
    assert counted.multiplications == {} and counted.total_multiplications == 0
    assert counted.additions == {"int32": ternary}
    # Norms: two a block, one in each BitLinear (the last of a block over the hidden width), one of
    # the gate, and before the head two.
    norms = 24 * ((1 + 4 + 1 + 1 + 1) * 1024 + hidden) + 2 * 1024
    assert counted.of_kind("norm").elementwise.multiplications == {"float32": 3 * norms}
    bounds = 24 * 1024
    assert counted.parameters == 32000 * 1024 + ternary + norms + bounds
    assert 370e6 < counted.parameters < 375e6
    assert counted.bytes_stored == {
        "bfloat16": 2 * 32000 * 1024,
        "2-bit": ternary // 4,
        "float32": 4 * (norms + bounds + 24 * 6 + 1),
    }
    assert (
        counted.state_bytes == 24 * 1024 * 4 and counted.bytes_moved["state"] == 2 * 24 * 1024 * 4
    )
    assert counted.of_kind("recurrence").elementwise.functions == {"float32": 24 * 3 * 1024}
    assert (
        of_experiment("matmulfree.py:370m", context=100_000).layers == counted.layers
    )  # its cost does not grow with the text


def test_transformer_pp_370m_by_hand():
    counted = of_experiment("transformer_pp.py:370m")
    matrices = 24 * (4 * 1024 * 1024 + 3 * 1024 * 2816) + 1024 * 32000
    assert counted.context == 2048
    assert counted.multiplications == {"bfloat16": matrices + 24 * 2 * 2048 * 1024}
    assert counted.additions == {"float32": total(counted.multiplications)}
    norms = (2 * 24 + 1) * 1024
    assert counted.parameters == 32000 * 1024 + matrices + norms
    assert counted.bytes_stored == {"bfloat16": 2 * (32000 * 1024 + matrices), "float32": 4 * norms}
    assert counted.state_bytes == 24 * 2 * 2048 * 1024 * 2
    shared = count.count(
        load_file(str(REPOSITORY / "experiments/configs/transformer_pp.py:370m")).model.to_dict()
        | {"kv_heads": 4},
        32000,
    )
    assert shared.state_bytes == counted.state_bytes // 4  # four of sixteen heads
    assert counted.total_multiplications - shared.total_multiplications == 24 * 2 * 1024 * 12 * 64
    assert shared.of_kind("attention").total_multiplications == 24 * 2 * 2048 * 1024


def test_dwn_by_hand():
    config = load_file(str(REPOSITORY / "experiments/configs/dwn_digits.py"))
    set_value(config, "model.num_luts", "(500, 300)")
    counted = count.of_config(config)
    assert counted.multiplications == {} and counted.unit == "image"
    assert counted.comparisons == {"float32": 64 * 8}
    assert counted.lookups == {6: 800}
    assert counted.additions == {"int8": 300}  # ten groups of thirty bits
    assert counted.bytes_stored == {
        "float32": 64 * 8 * 4,
        "wiring": 500 * 6 * 2 + 300 * 6 * 2,
        "1-bit": 800 * 8,
    }
    # The first layer's wiring is learned: a score for each of 512 bits and 3,000 slots.
    assert counted.parameters == 800 * 64 + 512 * 3000


def test_int8_products_among_floats_by_hand():
    """Weights and inputs of products in int8, each with a scale an output; every input is rounded,
    every result rescaled.
    """
    counted = count.count(
        {"name": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 16}, 11, precision="int8"
    )
    assert counted.multiplications == {"int8": 12 * 32 * 32 + 2 * 16 * 32 + 11 * 32}
    assert counted.additions == {"int32": total(counted.multiplications)}
    assert counted.bytes_stored["int8"] == 12 * 32 * 32 + 11 * 32
    projections = counted.of_kind("projection", "mlp", "head")
    assert projections.elementwise.multiplications == {
        "float32": (32 + 96) + (32 + 32) + (32 + 128) + (128 + 32) + (32 + 11)
    }
    assert counted.state_bytes == 2 * 16 * 32


def test_published_shares():
    vit = load_file(str(REPOSITORY / "experiments/configs/vit_cifar.py:paper"))
    ours, dense = count.of_config(vit), count.of_config(vit, model=count.baseline(vit.model)[0])  # type: ignore[index]
    assert round(dense.total_multiplications / 1e6, 1) == 1253.5
    assert round(dense.of_kind("mlp").total_multiplications / 1e6, 1) == 697.2
    assert 0.55 < count.multiplications_replaced(ours, dense) < 0.56
    gpt = load_file(str(REPOSITORY / "experiments/configs/gpt_char.py:nanogpt,mlp=weightless"))
    dense = count.of_config(gpt, model=count.baseline(gpt.model)[0])  # type: ignore[index]
    assert 0.59 < count.multiplications_replaced(count.of_config(gpt), dense) < 0.60
    deit = count.count(DEIT, 1000, image_size=224)
    assert 0.61 < deit.of_kind("mlp").parameters / deit.parameters < 0.63


def test_kinds_of_mlp_add_up():
    """What one block saves does not depend on the others."""
    both, first, none = (
        count.count(NANOGPT | {"layers": 2, "mlp": mlp}, 65).total_multiplications
        for mlp in ("dense", "dense+none", "none+none")
    )
    assert both - first == first - none == 8 * 384 * 384


def test_thirteen_billion_weights_are_counted_without_any():
    config, before = (
        load_file(str(REPOSITORY / "experiments/configs/matmulfree.py:13b")),
        len(jax.live_arrays()),
    )
    counted = count.of_config(config)
    dense = count.of_config(config, model=count.baseline(config.model)[0])  # type: ignore[index]
    assert len(jax.live_arrays()) == before
    assert count.multiplications_replaced(counted, dense) == 1
    assert 12.9e9 < counted.parameters < 13.1e9 and dense.parameters == pytest.approx(
        counted.parameters, rel=1e-3
    )
    assert total(dense.bytes_stored) > 7 * total(counted.bytes_stored)


@pytest.mark.parametrize("width", [0, 96, 32])
def test_the_baseline_of_matmulfree_can_be_built(width):
    model = defaults("matmulfree").to_dict() | {"width": width, "size": "2.7b", "layers": 2}
    dense, name = count.baseline(model)  # type: ignore[misc]
    assert "Transformer++" in name
    assert count.count(dense, 100).total_multiplications > 0
    assert count.baseline({"name": "dwn"}) is None


def test_what_data_decide_is_said():
    assert of_experiment("vit_cifar.py:quick,dataset=cifar100").assumptions == (
        "100 classes of cifar100",
        "images of 32 x 32 pixels and 3 channels",
    )
    assert "65" in of_experiment("gpt_char.py:nanogpt").assumptions[0]
    assert "4,096" in of_experiment("compare_lm.py:stdlib").assumptions[0]
    assert of_experiment("gpt_char.py:nanogpt", outputs=100).assumptions == ()


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: count.count({"name": "gtp"}, 65), "Did you mean 'gpt'"),
        (lambda: count.count(NANOGPT | {"widht": 3}, 65), "Did you mean 'width'"),
        (lambda: count.count(DEIT, 10), "give it"),
        (lambda: count.count(DEIT, 10, image_size=100), "multiple of the patch size 16, found 100"),
        (lambda: count.count(NANOGPT, 65, context=257), "1 to 256 tokens, found 257"),
        (lambda: count.count(NANOGPT, 65, context=0), "found 0"),
        (lambda: count.count(NANOGPT, 65, precision="int4"), "found 'int4'"),
        (
            lambda: count.count(DEIT | {"integer": True}, 10, image_size=224, precision="float16"),
            "integer model",
        ),
        (lambda: of_experiment("vit_cifar.py:quick,dataset=my_images"), "--outputs"),
        (lambda: of_experiment("gpt_char.py:quick,data.source=text_file"), "--outputs"),
        (
            lambda: of_experiment("vit_cifar.py:quick,data.image_size=0,dataset=imagenet2012"),
            "--config.data.image_size",
        ),
        (
            lambda: count.multiplications_replaced(
                count.count(NANOGPT, 65), count.count(DEIT, 10, image_size=224)
            ),
            "one unit",
        ),
        (
            lambda: count.multiplications_replaced(*2 * [of_experiment("dwn_digits.py")]),
            "multiplies nothing",
        ),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(InputError, match=said):
        make()
