"""Sampling from a language model with a key-value cache, one token at a time.

Dimensions: B batch (1 here), T tokens, V vocabulary, C context.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError

_LONGEST = 512  # tokens of a prompt that are read at a time
_FLOAT = np.finfo(np.float32)
_KNOWN = 16  # tokens before a piece that are decoded with it


def check_sampling(temperature: float, top_k: int, max_tokens: int, top_p: float = 1.0) -> None:
    """Raises InputError for settings that cannot be sampled with."""
    if not temperature >= 0:
        raise InputError(
            f"--temperature: expected 0 (always the likeliest) or more, found {temperature}."
        )
    if top_k < 0:
        raise InputError(f"--top_k: expected 0 (all) or a number of tokens, found {top_k}.")
    if max_tokens < 0:
        raise InputError(f"--max_tokens: expected 0 or more, found {max_tokens}.")
    if not 0 <= top_p <= 1:
        raise InputError(f"top_p: expected a probability, 0 to 1 (all), found {top_p}.")


def sample_logits(
    key: Array, logits: Array, temperature: float, top_k: int, top_p: float = 1.0
) -> Array:
    """One token id from logits (V,): among the top_k likeliest (0: all), at a temperature (0: the
    likeliest; infinite: each as often).

    top_p: of these only the likeliest that are needed to reach this probability together, one at
      least (nucleus sampling, arXiv 1904.09751, section 3.1).

    Raises:
      InputError: no logits, or settings that cannot be sampled with.
    """
    check_sampling(temperature, top_k, 0, top_p)
    if logits.ndim != 1 or not logits.size:
        raise InputError(
            f"sample_logits: expected logits (V,) of one token, found {list(logits.shape)}."
        )
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)  # the likeliest is a number
    least, most = (float(limit) for limit in (_FLOAT.tiny, _FLOAT.max))
    if temperature < least:  # what float32 would divide by as by 0
        return jnp.argmax(logits).astype(jnp.int32)
    largest = logits.max()
    # below 0 by as much, so that no quotient is too large; the equal ones, also infinite, are at 0
    below = jnp.where(logits == largest, 0.0, logits - largest)
    scaled = below / temperature if temperature <= most else jnp.zeros_like(below)
    scaled = jnp.where(below == -jnp.inf, -jnp.inf, scaled)
    if 0 < top_k < logits.shape[-1]:
        kept = jax.lax.top_k(logits, top_k)[1]  # of equal ones the first
        scaled = jnp.full_like(scaled, -jnp.inf).at[kept].set(scaled[kept])
    if top_p < 1:
        scaled = _nucleus(scaled, top_p)
    return jax.random.categorical(key, scaled).astype(jnp.int32)


def _nucleus(logits: Array, top_p: float) -> Array:
    """Logits (V,) with -inf for all but the likeliest that reach top_p together."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits)[order]
    before = jnp.cumsum(probabilities) - probabilities
    kept = (before < top_p).at[0].set(True)
    return jnp.where(jnp.zeros_like(kept).at[order].set(kept), logits, -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(
    model: nn.Module,
    variables: dict[str, PyTree],
    cache: PyTree,
    tokens: Array,
    valid: Array | None = None,
) -> tuple[Array, PyTree]:
    """Reads tokens (B, T), of which valid (B, T) are not padding, behind the cache: (logits (B, T,
    V), the new cache).

    The variables may be packed.
    """
    given = {**variables, "cache": cache}
    logits, changed = model.apply(given, tokens, valid, decode=True, mutable=["cache"])
    return logits, changed["cache"]  # type: ignore[return-value]


def empty_cache(model: nn.Module, batch: int = 1) -> PyTree:
    """A cache that holds nothing yet."""
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((batch, 1), jnp.int32), decode=True)
    )["cache"]
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def prefill(
    model: nn.Module, variables: dict[str, PyTree], tokens: np.ndarray
) -> tuple[Array, PyTree]:
    """Reads a prompt (T,) in pieces of powers of two (few shapes to compile), none so long that its
    logits take much memory: (logits of the last token (V,), cache).
    """
    cache, start, logits = empty_cache(model), 0, None
    while start < len(tokens):
        size = min(_LONGEST, 1 << ((len(tokens) - start).bit_length() - 1))
        logits, cache = decode_step(
            model, variables, cache, jnp.asarray(tokens[None, start : start + size], jnp.int32)
        )
        start += size
    assert logits is not None
    return logits[0, -1], cache


def generate_tokens(
    model: nn.Module,
    variables: dict[str, PyTree],
    prompt: np.ndarray,
    max_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end_of_text: int | None = None,
) -> Iterator[int]:
    """Yields up to `max_tokens` new token ids after a prompt (T,) of at least one; variables may be
    packed.

    Stops before `end_of_text`, the tokenizer's token of that meaning, if there is one. When the
    context is full, the newer half of it is read again into an empty cache and generation goes on
    behind that; a model that carries a state has no limit.

    Raises:
      InputError: settings that cannot be sampled with, or a prompt that is empty, too long or of
        unknown tokens.
    """
    check_sampling(temperature, top_k, max_tokens, top_p)
    check_prompt(prompt, model.config.vocab_size, context_of(model))
    return itertools.takewhile(
        lambda token: token != end_of_text,
        _generate(model, variables, prompt, max_tokens, temperature, top_k, top_p, seed),
    )


def context_of(model: nn.Module) -> int | None:
    """The most tokens a language model reads at a time; None for no limit."""
    return model.config.context if getattr(model, "limited_context", True) else None


def check_prompt(prompt: np.ndarray, vocab_size: int, context: int | None) -> None:
    """Raises InputError for a prompt (T,) that is empty, longer than the context (None: no limit)
    or of ids outside the vocabulary.
    """
    if len(prompt) < 1:
        raise InputError("generate: the prompt has no tokens; give at least one character.")
    if context is not None and len(prompt) > context:
        raise InputError(
            f"generate: the prompt has {len(prompt)} tokens, but this model reads at most "
            f"{context} at a time; give its last {context}, or a "
            "model trained with a larger --config.model.context."
        )
    wrong = [int(t) for t in prompt if not 0 <= t < vocab_size]
    if wrong:
        raise InputError(
            f"generate: expected token ids from 0 to {vocab_size - 1}, found {wrong[0]}; encode "
            "the prompt with the tokenizer the model was trained with."
        )


def _generate(
    model: nn.Module,
    variables: dict[str, PyTree],
    prompt: np.ndarray,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    text, context = [int(t) for t in prompt], context_of(model)
    held = len(text)
    logits, cache = prefill(model, variables, np.asarray(text))
    key = jax.random.key(seed)
    pick = jax.jit(
        functools.partial(sample_logits, temperature=temperature, top_k=top_k, top_p=top_p)
    )
    for i in range(max_tokens):
        token = int(pick(jax.random.fold_in(key, i), logits))
        yield token
        text.append(token)
        if context is not None and held == context:
            held = max(1, context // 2)
            logits, cache = prefill(model, variables, np.asarray(text[-held:]))
        else:
            out, cache = decode_step(model, variables, cache, jnp.asarray([[token]], jnp.int32))
            logits, held = out[0, -1], held + 1


def stream_text(
    tokenizer: Tokenizer, tokens: Iterator[int], after: Sequence[int] | np.ndarray = ()
) -> Iterator[str]:
    """Decodes tokens as they come, holding back pieces that aren't whole characters yet.

    after: ids before them (the prompt's), without which some tokenizers take the first token for
    the beginning of a text.
    """
    known, ids, shown = [int(i) for i in after][-_KNOWN:], [], ""
    before = tokenizer.decode(known) if known else ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(known + ids)[len(before) :]
        # Only the last U+FFFD can be a character that isn't whole yet.
        whole = text[:-1] if text.endswith("\ufffd") else text
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
        if whole == text:
            known, ids, shown = ids[-_KNOWN:], [], ""
            before = tokenizer.decode(known)
    if ids:
        yield tokenizer.decode(known + ids)[len(before) + len(shown) :]
