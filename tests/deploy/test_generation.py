"""`deploy.generate`: with a cache the text is the one found without, for prompts and texts
longer than the context too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quweit_jax import models
from quweit_jax.data import tokenizers
from quweit_jax.deploy import generate
from quweit_jax.deploy.sampling import Sampling
from quweit_jax.errors import InputError
from quweit_jax.models.gpt import GPT, GPTConfig
from quweit_jax.models.options import WeightlessOptions
from tests.compiled import quick_jit

VOCABULARY, CONTEXT = 11, 8
MODEL = GPT(
    GPTConfig(
        VOCABULARY,
        context=CONTEXT,
        layers=2,
        heads=2,
        width=8,
        mlp="dense+weightless",
        tie_embeddings=False,
        weightless=WeightlessOptions(num_luts=16, vector_init=0.3),
    )
)


@pytest.fixture(scope="module")
def variables():
    """Larger than at the start, so that texts do not repeat one token."""
    start = jax.device_get(quick_jit(MODEL.init)(jax.random.key(1), np.zeros((1, 1), np.int32)))
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: (
            20 * p if path[-1].key in ("kernel", "embedding", "position_embedding") else p
        ),
        start["params"],
    )
    return {**start, "params": params}


@pytest.fixture(scope="module")
def logits_of(variables):
    """The logits behind up to CONTEXT tokens, in one parallel pass without a cache."""
    apply = quick_jit(MODEL.apply)

    def run(tokens):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply(variables, padded))[0, len(tokens) - 1]

    return run


def greedy_without_cache(logits_of, prompt, count):
    text, window = list(prompt), list(prompt)[-CONTEXT:]
    for _ in range(count):
        token = int(np.argmax(logits_of(window)))
        text.append(token)
        window = [*window, token] if len(window) < CONTEXT else text[-(CONTEXT // 2) :]
    return text[len(prompt) :]


@pytest.mark.parametrize("length", [1, 3, CONTEXT - 1, CONTEXT])
def test_greedy_with_cache_is_greedy_without(variables, logits_of, length):
    prompt = np.random.default_rng(length).integers(0, VOCABULARY, length)
    count = 3 * CONTEXT  # past the context several times
    found = list(generate.generate_tokens(MODEL, variables, prompt, count, temperature=0))
    assert found == greedy_without_cache(logits_of, prompt, count)
    assert len(set(found)) > 2


@pytest.mark.parametrize("length", range(1, CONTEXT + 1))
def test_prefill_in_pieces(variables, logits_of, length):
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, length)
    (logits,), cache, taken = generate.prefill(MODEL, variables, [prompt])
    np.testing.assert_allclose(logits, logits_of(prompt), rtol=1e-4, atol=1e-3)
    assert length <= taken <= CONTEXT
    assert cache["positions"].tolist() == [length]


@pytest.mark.parametrize("length", [1, 15, 17, 33, 40])
def test_prompts_padded_to_a_piece_change_nothing(length):
    """A context of two pieces and a half, filled once and a half."""
    sizes = {"context": 40, "layers": 1, "heads": 1, "width": 8, "mlp": "dense"}
    model = GPT(GPTConfig(VOCABULARY, tie_embeddings=False, **sizes))
    start = quick_jit(model.init)(jax.random.key(2), np.zeros((1, 1), np.int32))
    large = jax.tree.map(lambda p: 20 * p if p.ndim > 1 else p, start)
    apply = quick_jit(model.apply)

    def logits_of(tokens):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(apply(large, padded))[0, len(tokens) - 1]

    prompt = np.random.default_rng(length).integers(0, VOCABULARY, length)
    found = list(generate.generate_tokens(model, large, prompt, 60, temperature=0))
    text, window = list(prompt), list(prompt)
    for token in found:  # the likeliest, but for what rounding decides
        logits = logits_of(window)
        assert logits[token] >= logits.max() - 1e-3 * np.ptp(logits)
        text.append(token)
        window = [*window, token] if len(window) < 40 else text[-20:]
    assert len(found) == 60 and len(set(found)) > 1


def test_each_row_of_a_batch_is_what_it_is_alone(variables):
    """Of other lengths, past the context several times, one ending early."""
    draw = np.random.default_rng(5)
    prompts = [draw.integers(0, VOCABULARY, n) for n in (1, CONTEXT, 5, CONTEXT - 2)]
    count, how = 2 * CONTEXT + 3, {"temperature": 1.2, "top_k": 4}
    alone = [
        list(generate.generate_tokens(MODEL, variables, prompt, count, seed=seed, **how))
        for seed, prompt in enumerate(prompts)
    ]
    rows = list(
        generate.generate_batch(
            MODEL,
            variables,
            prompts,
            count,
            sampling=Sampling(**how),
            ends=lambda number, tokens: number == 2 and len(tokens) == 7,
        )
    )
    found = [[token for token in column if token is not None] for column in zip(*rows)]
    assert found[2] == alone[2][:7]
    assert [found[i] for i in (0, 1, 3)] == [alone[i] for i in (0, 1, 3)]


def test_a_prompt_of_another_length_compiles_nothing():
    model = models.build({"name": "matmulfree", "width": 8, "layers": 1, "context": 8}, 11)
    variables = quick_jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    run = functools.partial(generate.generate_tokens, model, variables, max_tokens=3)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        list(run(np.arange(3) % 11))
        first = len(compiled)
        for length in (1, 7, 16, 40, 100):
            list(run(np.arange(length) % 11))
        assert len(compiled) == first > 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_text_is_cut_at_the_first_stop():
    pieces = ["a", "bc", "ab", "d", "ab", "e"]
    for stops, expected in (
        (["abd"], "abc"),
        (["abe", "bca"], "a"),
        ([], "abcabdabe"),
        (["", "x"], "abcabdabe"),
        (["abex"], "abcabdabe"),
        (["e"], "abcabdab"),
    ):
        assert "".join(generate.cut_at(iter(pieces), stops)) == expected
    # what may begin a stop is held back, and no longer
    assert list(generate.cut_at(iter(pieces), ["abd"])) == ["abc"]


def test_a_penalty_lowers_what_was_said_and_min_p_drops_the_unlikely():
    logits = jnp.asarray([2.0, 1.9, -1.0, 0.5])
    greedy = Sampling(0.0, repetition_penalty=1.5)
    assert int(greedy.pick(jax.random.key(0), logits)) == 0
    assert int(greedy.pick(jax.random.key(0), logits, jnp.asarray([1, 0, 0, 0], bool))) == 1
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = jax.vmap(lambda key: Sampling(1.0, min_p=0.5).pick(key, logits))(keys)
    assert set(np.asarray(drawn).tolist()) == {0, 1}
    drawn = jax.vmap(lambda key: Sampling(1.0, min_p=0.2).pick(key, logits))(keys)
    assert set(np.asarray(drawn).tolist()) == {0, 1, 3}


def test_same_seed_same_text(variables):
    sample = functools.partial(generate.generate_tokens, MODEL, variables, np.asarray([1, 2]), 25)
    one, again, other = (list(sample(temperature=1.5, seed=seed)) for seed in (0, 0, 1))
    assert one == again and one != other
    assert all(isinstance(token, int) and 0 <= token < VOCABULARY for token in one)


def test_one_candidate_is_the_likeliest(variables):
    sample = functools.partial(generate.generate_tokens, MODEL, variables, np.asarray([1, 2]), 20)
    assert list(sample(temperature=0.9, top_k=1, seed=3)) == list(sample(temperature=0))


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.0, 2), (2.0, 3), (1.0, 9)]
)
def test_samples_have_the_right_frequencies(temperature, top_k):
    logits = np.asarray([1.0, 3.0, 2.0, 2.5], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = quick_jit(
        jax.vmap(lambda key: generate.sample_logits(key, logits, temperature, top_k))
    )(keys)
    kept = np.argsort(-logits)[: top_k or None]
    expected = np.zeros(4)
    expected[kept] = np.exp(logits[kept] / temperature)
    np.testing.assert_allclose(
        np.bincount(draws, minlength=4) / 20_000, expected / expected.sum(), atol=0.015
    )
    assert (np.bincount(draws, minlength=4)[expected == 0] == 0).all()


def test_no_tokens_wanted(variables):
    assert list(generate.generate_tokens(MODEL, variables, np.asarray([1]), 0)) == []


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt has no tokens; give at least one character"),
        ([1], {"temperature": -0.1}, r"--temperature: .*found -0\.1"),
        ([1], {"temperature": float("nan")}, r"--temperature: .*found nan"),
        ([1], {"top_k": -1}, "--top_k: .*found -1"),
        ([1], {"max_tokens": -1}, "--max_tokens: .*found -1"),
    ],
)
def test_errors(prompt, options, message):
    arguments = {"max_tokens": 3} | options
    with pytest.raises(InputError, match=message):
        next(generate.generate_tokens(MODEL, {}, np.asarray(prompt, np.int32), **arguments))


TEXTS = ["plain", "größe", "数据🦊!", "🦊🦊🦊", "a\u0301 e", "\ufffd stays"]


@pytest.mark.parametrize("kind", tokenizers.KINDS)
def test_streamed_text_is_the_text(kind):
    tokenizer = tokenizers.train(kind, "".join(TEXTS), bpe_vocab_size=260)
    for text in TEXTS:
        pieces = list(generate.stream_text(tokenizer, iter(map(int, tokenizer.encode(text)))))
        assert "".join(pieces) == text


def test_each_character_is_streamed_as_soon_as_it_is_whole():
    pieces = list(generate.stream_text(tokenizers.ByteTokenizer(), iter("aé🦊b".encode())))
    assert pieces == ["a", "é", "🦊", "b"]


@pytest.mark.parametrize(
    "data",
    [
        b"\xffabcdefgh" + "é🦊".encode(),  # a stray byte long before whole characters
        b"\xff" * 7 + "é".encode(),
        b"\x80" * 12 + "z🦊".encode(),
        "🦊".encode()[:3],  # ends in the middle
        "🦊".encode()[:2] + b"a",
        "é".encode() + b"\xf0\x9f" + "é".encode(),
    ],
)
def test_streaming_bytes_that_are_not_text(data):
    tokenizer = tokenizers.ByteTokenizer()
    assert "".join(generate.stream_text(tokenizer, iter(data))) == tokenizer.decode(list(data))


def test_generation_stops_at_the_end_of_text(variables):
    prompt = np.asarray([1, 2])
    whole = list(generate.generate_tokens(MODEL, variables, prompt, 12, temperature=1.0, seed=3))
    end = whole[5]
    short = list(
        generate.generate_tokens(
            MODEL, variables, prompt, 12, temperature=1.0, seed=3, end_of_text=end
        )
    )
    assert short == whole[: whole.index(end)]


@pytest.mark.parametrize("temperature", [1e-39, 1e-30, 1e30, 1e39, float("inf")])
def test_extreme_temperatures_stay_among_the_top(temperature):
    logits = jnp.asarray([1.0, 5.0, 3.0, -2.0, -jnp.inf])
    keys = jax.random.split(jax.random.key(0), 40)

    def drawn(top_k):
        pick = jax.vmap(lambda key: generate.sample_logits(key, logits, temperature, top_k))
        return set(np.asarray(pick(keys)).tolist())

    small = temperature < 1
    assert drawn(2) == ({1} if small else {1, 2})
    assert drawn(0) == ({1} if small else {0, 1, 2, 3})  # never what is impossible


def test_what_cannot_be_sampled_is_named():
    for logits, options, message in (
        (jnp.zeros(0), (1.0, 0), "logits"),
        (jnp.zeros(3), (-1.0, 0), "temperature"),
        (jnp.zeros(3), (float("nan"), 0), "temperature"),
        (jnp.zeros(3), (1.0, -1), "top_k"),
    ):
        with pytest.raises(InputError, match=message):
            generate.sample_logits(jax.random.key(0), logits, *options)


def test_of_equal_logits_only_the_first_k_are_drawn():
    keys = jax.random.split(jax.random.key(0), 100)
    for logits, kept in (([1.0] * 6, {0, 1}), ([jnp.nan, 0.0, 1.0, jnp.nan], {1, 2})):
        draw = jax.vmap(lambda key: generate.sample_logits(key, jnp.asarray(logits), jnp.inf, 2))  # noqa: B023
        assert set(np.asarray(draw(keys)).tolist()) == kept
    assert generate.sample_logits(keys[0], jnp.asarray([0.0, jnp.nan, 1.0]), 0.0, 0) == 2
