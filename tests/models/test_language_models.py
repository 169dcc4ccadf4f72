"""What every language model promises: parallel form and decoding agree, padding changes nothing,
packing changes nothing, sizes are the published ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.deploy import generate
from quweit_jax.deploy.pack import pack
from quweit_jax.errors import InputError
from quweit_jax.models.matmulfree import MatMulFree
from quweit_jax.ops import packed_ternary
from tests.compiled import quick_jit

pytestmark = pytest.mark.usefixtures("compile_quickly")

VOCAB, TOKENS = 31, 500
SMALL = {"width": 32, "layers": 2, "context": 512}
WEIGHTLESS = {"mlp": "weightless", "weightless": {"num_luts": 48}}
KINDS = {
    "gpt": {"name": "gpt", "heads": 2, **SMALL},
    "matmulfree": {"name": "matmulfree", **SMALL},
    "matmulfree_weightless": {"name": "matmulfree", **SMALL, **WEIGHTLESS},
    "transformer_pp": {"name": "transformer_pp", "heads": 2, **SMALL},
    "transformer_pp_grouped": {
        "name": "transformer_pp",
        "heads": 4,
        "kv_heads": 2,
        "head_width": 10,
        **SMALL,
    },
    "transformer_pp_delta": {
        "name": "transformer_pp",
        "heads": 2,
        "mixer": "gated_delta+attention",
        **SMALL,
    },
}


def close(found, expected, *others):
    """Logits (..., vocabulary) are the expected ones, or at each position those of one
    of `others`.
    """
    apart = [np.abs(np.asarray(found) - np.asarray(form)).max(-1) for form in (expected, *others)]
    np.testing.assert_array_less(np.min(apart, axis=0), 1e-4 * np.ptp(expected))


def beside(model, variables, tokens):
    """Logits with what a ternary head rounds to int8 moved a little, down and up: what lies at a
    half is rounded to one side or the other by each machine's order of sums, which is worth an
    int8's step times the head's weights. None for a head of floats.
    """

    def moved(by):
        def leaf(path, value):
            if jax.tree_util.keystr(path) != "['params']['head']['norm_scale']":
                return value
            return value * (1 + by * (-1.0) ** np.arange(len(value))).astype(np.float32)

        return jax.tree_util.tree_map_with_path(leaf, variables)

    if "norm_scale" not in variables["params"].get("head", {}):
        return []
    apply = jax.jit(model.apply)
    return [apply(moved(by), tokens) for by in (-2e-6, 2e-6)]


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    """A model whose parameters are larger than at the start, so that every part of it matters;
    tokens (2, 500) and their logits.
    """
    model = models.build(KINDS[request.param], VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, TOKENS)).astype(np.int32)
    variables = jax.jit(model.init)(jax.random.key(1), tokens[:, :4])

    def grow(path, leaf):
        name = path[-1].key
        if name in ("tables", "thresholds", "gate_rate", "gate_bias") or jnp.issubdtype(
            leaf.dtype, jnp.integer
        ):
            return leaf
        key = jax.random.fold_in(jax.random.key(2), len(jax.tree_util.keystr(path)))
        return leaf * 3 + (
            0.5 * jax.random.normal(key, leaf.shape)
            if leaf.ndim == 1 or name == "lower_bounds"
            else 0
        )

    variables = jax.tree_util.tree_map_with_path(grow, variables)
    return model, variables, tokens, jax.jit(model.apply)(variables, tokens)


def test_step_by_step_decoding_equals_the_parallel_form(made):
    model, variables, tokens, expected = made

    cache, logits = generate.empty_cache(model, 2), []
    for i in range(TOKENS):
        out, cache = generate.decode_step(model, variables, cache, tokens[:, i : i + 1])
        logits.append(out)
    others = beside(model, variables, tokens)
    close(jnp.concatenate(logits, 1), expected, *others)
    # Prefill in chunks of odd sizes ends with the same cache and the same logits.
    cut, found, other = 0, [], generate.empty_cache(model, 2)
    for size in (1, 130, 369):
        out, other = generate.decode_step(model, variables, other, tokens[:, cut : cut + size])
        found.append(out)
        cut += size
    close(jnp.concatenate(found, 1), expected, *others)
    for one, two in zip(jax.tree.leaves(other), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32),
            np.asarray(two, np.float32),
            atol=1e-4 * max(1, float(jnp.abs(two).max())),
        )


def test_left_padding_changes_nothing(made):
    """A batch of texts of different lengths, padded on the left, parallel and decoded, in one piece
    or two.
    """
    model, variables, tokens, _ = made
    lengths, most = (5, 9), 9
    apply = jax.jit(model.apply)
    expected = [apply(variables, tokens[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    batch = np.stack(
        [
            np.pad(tokens[i, :n], (most - n, 0), constant_values=VOCAB - 1)
            for i, n in enumerate(lengths)
        ]
    )
    valid = np.stack([np.arange(most) >= most - n for n in lengths])
    whole = apply(variables, batch, valid)
    cache, pieces = generate.empty_cache(model, 2), []
    for part in (slice(0, 6), slice(6, most)):
        out, cache = generate.decode_step(model, variables, cache, batch[:, part], valid[:, part])
        pieces.append(out)
    following, _ = generate.decode_step(model, variables, cache, tokens[:, :1])
    for i, n in enumerate(lengths):
        close(whole[i, most - n :], expected[i])
        close(jnp.concatenate(pieces, 1)[i, most - n :], expected[i])
        close(
            following[i, 0],
            apply(variables, np.concatenate([tokens[i : i + 1, :n], tokens[i : i + 1, :1]], 1))[
                0, -1
            ],
        )


def test_packed_form(made):
    """The packed model gives the same logits, in parallel and decoding; ternary matrices take a
    quarter of a byte a weight.
    """
    model, variables, tokens, _ = made
    if model.config.mlp == "dense" and not isinstance(model, MatMulFree):
        with pytest.raises(InputError, match="nothing to pack"):
            pack(model, variables, tokens)
        return
    small = pack(model, variables, tokens)
    close(
        jax.jit(model.apply)(small, tokens[:, :20]), jax.jit(model.apply)(variables, tokens[:, :20])
    )
    found = list(generate.generate_tokens(model, small, tokens[0, :5], 12, temperature=0))
    assert found == list(
        generate.generate_tokens(model, variables, tokens[0, :5], 12, temperature=0)
    )
    ternary = sum(
        packed_ternary.packed_bytes(*leaf.shape)  # a quarter of a byte a weight, in whole tiles
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if _is_ternary(path, variables)
    )
    kernels = [leaf.nbytes for leaf in _ternary_kernels(small["packed"])]
    assert sum(kernels) == ternary > 0
    assert not any(
        "norm_scale" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(small["params"])
    )


def _ternary_kernels(packed):
    """The packed kernels; look-up tables are named otherwise."""
    leaves = jax.tree_util.tree_leaves_with_path(packed)
    return [leaf for path, leaf in leaves if path[-1].key == "kernel" and leaf.dtype == np.uint32]


def _is_ternary(path, variables):
    parent = variables["params"]
    for key in path[:-1]:
        parent = parent[key.key]
    return path[-1].key == "kernel" and "norm_scale" in parent


TERNARY = {"linear": "ternary", "sub_norms": True, "activation": "relu2", "heads": 2, **SMALL}


@pytest.mark.parametrize("mlp", ["dense", "swiglu", "bitglu", "lookup_glu"])
@pytest.mark.parametrize("name", ["gpt", "matmulfree", "transformer_pp"])
def test_how_wide_a_channel_mixer_is_drawn(name, mlp):
    def deviation(**options):
        config = KINDS[name] | {"mlp": mlp, "width": 64, "layers": 1} | options
        model = models.build(config, VOCAB)
        params = quick_jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
        mixer = params["block_0"]["mlp"]
        kernels = {k: v for k, v in mixer.items() if k in ("mix", "up", "gate")}
        return np.std(jax.tree.leaves(kernels)[0])

    if mlp == "lookup_glu":
        found = [deviation() / 2, deviation(lookup_glu={"mix_init": 0.02})]
    else:
        found = [deviation(mlp_init=0.0), deviation()]
    np.testing.assert_allclose(found, [64**-0.5, 0.02], rtol=0.1)


@pytest.mark.parametrize("mixer", ["attention", "gated_delta"])
def test_a_ternary_transformer_decodes_and_packs(mixer):
    """Sums of floats depend on their order, so that now and then an activation is rounded to the
    next of its 8 bits: nearly all logits are the same to 1e-4 of their range, all to a hundredth.
    """
    model = models.build({"name": "transformer_pp", **TERNARY, "mixer": mixer}, VOCAB)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 40)).astype(np.int32)
    variables = jax.jit(model.init)(jax.random.key(1), tokens[:, :4])
    expected = jax.jit(model.apply)(variables, tokens)
    packed = pack(model, variables, tokens[:, :4])
    held = packed["packed"]["block_1"]
    names = {"query", "key", "value", "proj"} | ({"gate"} if mixer == "gated_delta" else set())
    assert held["mixer"].keys() == names and held["mlp"].keys() == {"gate", "up", "down"}
    cache, logits = generate.empty_cache(model, 1), []
    for i in range(tokens.shape[1]):
        out, cache = generate.decode_step(model, packed, cache, tokens[:, i : i + 1])
        logits.append(out)
    for found in (jnp.concatenate(logits, 1), jax.jit(model.apply)(packed, tokens)):
        apart = np.abs(found - expected).max((0, 2)) / np.ptp(expected)
        assert (apart < 1e-4).mean() > 0.9 and apart.max() < 0.01
    assert (generate.context_of(model) is None) == (mixer == "gated_delta")


@pytest.mark.parametrize("kind", ["matmulfree", "transformer_pp_state"])
def test_state_of_fixed_size(kind):
    """What a model of states carries doesn't depend on its context; it generates beyond it."""
    sizes = []
    alone = {"name": "transformer_pp", "mixer": "gated_delta", "heads": 2, **SMALL}
    options = {"matmulfree": KINDS["matmulfree"], "transformer_pp_state": alone}[kind]
    for context in (8, 4096):
        model = models.build({**options, "context": context}, VOCAB)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(generate.empty_cache(model))))
        variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), np.int32))
        assert (
            len(list(generate.generate_tokens(model, variables, np.zeros(10, np.int32), 20))) == 20
        )
    of_delta = 2 * (2 * 16 * 16 + 3 * 3 * 32) + 1  # states, windows, and how many tokens were read
    assert sizes == [2 * 32 if kind == "matmulfree" else of_delta] * 2


# (size, parameters with the vocabulary of 32,000): embedding + head 2 V d, blocks of 4 d^2 + 3 d h,
# and the norms' vectors.
@pytest.mark.parametrize(
    "size, width, layers",
    [("370m", 1024, 24), ("1.3b", 2048, 24), ("2.7b", 2560, 32), ("13b", 5120, 40)],
)
def test_published_sizes(size, width, layers):
    hidden, counted = 256 * -(-int(8 * width / 3) // 256), 2  # two blocks are enough to count
    assert models.build({"name": "matmulfree", "size": size}, 8).config.sizes() == (width, layers)
    layers = counted
    matrices = 2 * 32000 * width + layers * (4 * width**2 + 3 * width * hidden)
    vectors = {
        # per block: two norms, the gate's, those inside the mixer's four and the GLU's two
        # BitLinears; Gamma; the final and the head's norm
        "matmulfree": layers * (2 * width + width + 4 * width + width + hidden)
        + layers * width
        + 2 * width,
        "transformer_pp": layers * 2 * width + width,
    }
    for name, more in vectors.items():
        model = models.build({"name": name, "size": size, "layers": layers}, 32000)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))[
            "params"
        ]
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == matrices + more


def test_gates_start_open_by_depth():
    """Lower bounds: 0 in the first layer, then rising by equal shares from Gamma = 0, below 1."""
    from quweit_jax.models.matmulfree import lower_bounds

    np.testing.assert_allclose(
        lower_bounds(jnp.zeros((4, 3)))[:, 0], [0, 0.25, 0.5, 0.75], atol=1e-6
    )


@pytest.mark.parametrize("name", ["matmulfree", "transformer_pp"])
def test_half_precision_remat_and_mixed_blocks(name):
    """bfloat16 and rematerialized blocks give finite gradients everywhere;
    remat changes no value.
    """
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 16)).astype(np.int32)
    losses = []
    for options in ({"remat": True}, {}, {"dtype": "bfloat16"}):
        model = models.build(
            {
                "name": name,
                "width": 32,
                "layers": 3,
                "mlp": "dense+weightless+none",
                "weightless": {"num_luts": 24},
                **options,
            },
            VOCAB,
        )
        variables = jax.jit(model.init)(jax.random.key(0), tokens)
        constants = {k: v for k, v in variables.items() if k != "params"}
        step = jax.jit(
            jax.value_and_grad(
                lambda p, m=model, c=constants: jnp.square(
                    m.apply({"params": p, **c}, tokens)
                ).mean()
            )
        )
        loss, grads = step(variables["params"])
        losses.append(float(loss))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[2] == pytest.approx(
        losses[1], rel=0.1
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"name": "matmulfree", "size": "7b"}, "model.size: .*'7b'"),
        (
            {"name": "matmulfree", "layers": -1},
            "model.layers: expected a positive number, or 0 for the size's own, found -1",
        ),
        ({"name": "matmulfree", "recurrence": "parallel"}, "model.recurrence"),
        ({"name": "matmulfree", "mlp": "weightless+dense"}, "model.mlp: expected 1 kind or 4"),
        ({"name": "matmulfree", "context": 0}, "model.context: expected at least 1, found 0"),
        (
            {"name": "transformer_pp", "width": 36},
            "model.width: expected a multiple of twice the 4 heads .* found 36",
        ),
        ({"name": "transformer_pp", "kv_heads": 3}, "model.kv_heads: 4 heads cannot share 3"),
        ({"name": "transformer_pp", "head_width": 7}, "model.head_width: expected an even number"),
    ],
)
def test_config_errors(options, said):
    with pytest.raises(InputError, match=said):
        models.build(options, VOCAB)


def test_prompt_errors():
    model = models.build(KINDS["transformer_pp"], VOCAB)
    with pytest.raises(
        InputError, match="the prompt has 513 tokens, but this model reads at most 512 at a time"
    ):
        generate.generate_tokens(model, {}, np.zeros(513, np.int32), 3)
    with pytest.raises(InputError, match="expected token ids from 0 to 30, found 31"):
        generate.generate_tokens(model, {}, np.asarray([0, 31]), 3)
    with pytest.raises(InputError, match="TransformerPP: 513 tokens do not fit its context of 512"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 513), jnp.int32))
