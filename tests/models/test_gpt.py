"""`models.gpt`: its shape, options and errors; decoding, remat and dtypes against the plain
parallel form.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.config import load_file
from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPT, GPTBlock, GPTConfig
from quweit_jax.models.options import WeightlessOptions
from tests.compiled import quick_jit

VOCABULARY, CONTEXT = 11, 9
CONFIG = GPTConfig(
    VOCABULARY,
    context=CONTEXT,
    layers=3,
    heads=2,
    width=8,
    mlp="dense+weightless+none",
    weightless=WeightlessOptions(num_luts=16, vector_init=0.3),
)


def with_changes(**changes):
    return GPT(dataclasses.replace(CONFIG, **changes))


def tokens(batch=2, length=CONTEXT, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


@pytest.fixture(scope="module")
def variables():
    """Larger than at the start, so that logits differ visibly."""
    start = jax.device_get(quick_jit(GPT(CONFIG).init)(jax.random.key(0), tokens()))
    widened = jax.tree_util.tree_map_with_path(
        lambda path, p: 8 * p if path[-1].key in ("kernel", "embedding") else p, start["params"]
    )
    return {**start, "params": widened}


@pytest.fixture(scope="module")
def logits(variables):
    return np.asarray(quick_jit(GPT(CONFIG).apply)(variables, tokens()))


def test_each_block_has_its_own_mlp(variables):
    params = variables["params"]
    assert set(params) == {
        "token_embedding",
        "position_embedding",
        "block_0",
        "block_1",
        "block_2",
        "final_norm",
    }
    assert set(params["block_0"]["mlp"]) == {"up", "down"}
    assert {"luts_0", "thresholds", "vectors", "bias", "norm"} == set(params["block_1"]["mlp"])
    assert set(params["block_2"]) == {"attention", "attention_norm"}
    assert set(variables["wiring"]) == {"block_1"}


def test_logits(logits):
    assert logits.shape == (2, CONTEXT, VOCABULARY) and logits.dtype == np.float32
    assert np.isfinite(logits).all() and logits.std() > 0.1


def test_it_is_causal(variables, logits):
    changed = tokens()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    out = np.asarray(quick_jit(GPT(CONFIG).apply)(variables, changed))
    np.testing.assert_array_equal(out[:, :5], logits[:, :5])
    assert (out[:, 5:] != logits[:, 5:]).any(axis=-1).all()


@pytest.mark.parametrize("pieces", [(1,) * CONTEXT, (4, 1, 4)], ids=str)
def test_decoding_is_the_parallel_form(variables, logits, pieces):
    model = GPT(CONFIG)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens()[:, :1], decode=True))[
        "cache"
    ]
    cache = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    step = quick_jit(
        lambda cache, piece: model.apply(
            {**variables, "cache": cache}, piece, decode=True, mutable=["cache"]
        )
    )
    start = 0
    for size in pieces:
        out, changed = step(cache, tokens()[:, start : start + size])
        np.testing.assert_allclose(out, logits[:, start : start + size], atol=1e-4)
        cache, start = changed["cache"], start + size


def gradients(model, variables):
    def loss(params):
        out = model.apply(
            {**variables, "params": params},
            tokens(),
            train=True,
            rngs={"dropout": jax.random.key(5)},
        )
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(out), tokens(seed=1)[..., None], axis=-1)
        )

    return quick_jit(jax.value_and_grad(loss))(variables["params"])


def test_remat_changes_nothing(variables):
    plain, remat = (
        gradients(with_changes(remat=on, dropout=0.3), variables) for on in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)
    for path, gradient in jax.tree_util.tree_leaves_with_path(plain[1]):
        assert np.abs(gradient).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


def test_dropout_only_while_training(variables, logits):
    model = with_changes(dropout=0.5)
    np.testing.assert_array_equal(quick_jit(model.apply)(variables, tokens()), logits)
    train = quick_jit(
        lambda key: model.apply(variables, tokens(), train=True, rngs={"dropout": key})
    )
    one, again, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9 and (one != logits).mean() > 0.9


def test_tied_and_untied_embeddings(variables):
    model = with_changes(tie_embeddings=False, layers=1, mlp="none")
    untied = jax.device_get(quick_jit(model.init)(jax.random.key(0), tokens())["params"])
    assert untied["head"]["kernel"].shape == (8, VOCABULARY)
    head = np.random.default_rng(0).normal(size=(8, VOCABULARY)).astype(np.float32)
    tied = {k: v for k, v in untied.items() if k != "head"}
    # Unlike a separate head, a tied one is the embedding itself: with the same numbers both give
    # the same logits.
    same = untied | {"head": {"kernel": untied["token_embedding"]["embedding"].T}}
    apply_tied = quick_jit(with_changes(layers=1, mlp="none").apply)
    np.testing.assert_allclose(
        apply_tied({"params": tied}, tokens()), model.apply({"params": same}, tokens()), atol=1e-6
    )
    assert (
        np.asarray(model.apply({"params": untied | {"head": {"kernel": head}}}, tokens()))
        != apply_tied({"params": tied}, tokens())
    ).any()


def test_bfloat16():
    model = with_changes(dtype="bfloat16", mlp="dense+none+none")
    variables = jax.device_get(quick_jit(model.init)(jax.random.key(0), tokens()))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {np.dtype("float32")}
    traced = jax.make_jaxpr(lambda v: model.apply(v, tokens()))(variables)
    assert traced.out_avals[0].dtype == jnp.float32 and "bf16" in str(traced)
    full = with_changes(mlp="dense+none+none").apply(variables, tokens())
    np.testing.assert_allclose(
        quick_jit(model.apply)(variables, tokens()), full, atol=0.02 * float(jnp.abs(full).max())
    )


def test_parameters_of_nanogpt():
    config = load_file(
        str(Path(__file__).parents[2] / "experiments" / "configs" / "gpt_char.py") + ":nanogpt"
    )
    params = jax.eval_shape(
        models.build(config.model, 65).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    # The count that nanoGPT prints, 10.65 million, leaves the positions out.
    assert total - params["position_embedding"].size == 10_646_784
    assert params["position_embedding"].shape == (256, 384)


def test_build_takes_nested_and_listed_values():
    model = models.build(
        {"name": "gpt", "layers": 2, "heads": 1, "width": 4, "weightless": {"num_luts": [8, 4]}}, 7
    )
    assert model.config == GPTConfig(
        7, layers=2, heads=1, width=4, weightless=WeightlessOptions(num_luts=(8, 4))
    )
    assert hash(model.config) == hash(dataclasses.replace(model.config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gtp"}, r"model.name: .*found 'gtp'.*Did you mean 'gpt'\?"),
        ({"name": None}, "model.name: .*found None"),
        ({"widht": 8}, r"model: unknown key 'widht'\. Did you mean 'width'\?"),
        (
            {"weightless": {"num_lut": 8}},
            r"model\.weightless: unknown key 'num_lut'\. Did you mean 'num_luts'\?",
        ),
        ({"weightless": {"sum": "dens"}}, r"model\.weightless\.sum: .*Did you mean 'dense'\?"),
        (
            {"weightless": {"lut_inputs": 9}},
            r"model\.weightless\.lut_inputs: .*1 to 8 inputs, found 9",
        ),
        (
            {"weightless": {"thermometer_bits": 0}},
            r"model\.weightless\.thermometer_bits: expected at least 1, found 0",
        ),
        ({"vocab_size": None}, r"model: missing vocab_size"),
        ({"vocab_size": 0}, r"model\.vocab_size: expected at least 1, found 0"),
        ({"layers": 0}, r"model\.layers: expected at least 1, found 0"),
        (
            {"width": 9, "heads": 2},
            r"model\.width: 9 is not a multiple of model\.heads = 2; use 10",
        ),
        ({"dropout": 1.0}, r"model\.dropout: expected 0 <= dropout < 1, found 1\.0"),
        ({"dtype": "bfloat"}, r"model\.dtype: .*Did you mean 'bfloat16'\?"),
        (
            {"attention": "flash"},
            r"model\.attention: expected one of \['auto', 'xla', 'cudnn'\], found 'flash'",
        ),
        ({"mlp": "weightles"}, r"model\.mlp: .*Did you mean 'weightless'\?"),
        (
            {"mlp": "dense+weightless"},
            r"model\.mlp: expected 1 kind or 3 \(one a block\), found 2: 'dense\+weightless'",
        ),
    ],
)
def test_errors(changes, message):
    values = {"name": "gpt", "vocab_size": 5, "layers": 3, "heads": 2, "width": 8} | changes
    with pytest.raises(InputError, match=message):
        models.build({k: v for k, v in values.items() if v is not None or k == "name"})


def test_too_many_tokens(variables):
    with pytest.raises(
        InputError, match="GPT: 10 tokens do not fit its context of 9; pass the last 9"
    ):
        GPT(CONFIG).apply(variables, tokens(length=CONTEXT + 1))


@pytest.mark.parametrize("mlp", ["dense", "weightless"])
def test_mlps_drop_only_while_training(mlp):
    block = GPTBlock(GPTConfig(11, context=4, heads=2, width=8, dropout=0.5, mlp=mlp), mlp)
    x = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
    variables = jax.device_get(quick_jit(block.init)(jax.random.key(0), x))
    # attention adds nothing, so that what is added is the MLP's
    variables["params"]["attention"]["proj"]["kernel"] = np.zeros((8, 8), np.float32)
    plain = np.asarray(block.apply(variables, x) - x)
    np.testing.assert_array_equal(block.apply(variables, x) - x, plain)
    rngs = {"dropout": jax.random.key(1)}
    dropped = np.asarray(block.apply(variables, x, None, True, rngs=rngs) - x)
    assert 0.2 < np.mean(dropped == 0) < 0.8
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 2 * plain[kept], rtol=1e-3, atol=1e-6)
