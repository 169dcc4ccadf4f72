"""Generation from a language model with a key-value cache or a state, one token at a time.

Dimensions: B batch, T tokens, V vocabulary, C context.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.deploy.sampling import Sampling, pick_batch
from quweit_jax.deploy.spelling import Speller, Stops
from quweit_jax.errors import InputError

_PIECE, _LONGEST = 16, 256  # tokens of a prompt that are read at a time


def sample_logits(
    key: Array, logits: Array, temperature: float, top_k: int, top_p: float = 1.0
) -> Array:
    """One token id (int32) from logits (V,), see `Sampling`."""
    return Sampling(temperature, top_k, top_p).pick(key, logits)


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def next_tokens(
    model: nn.Module,
    sampling: Sampling,
    variables: dict[str, PyTree],
    cache: PyTree,
    tokens: Array,
    valid: Array,
    keys: Array,
    step: Array | int,
    seen: Array | None,
) -> tuple[Array, PyTree]:
    """Reads a token of each text, (B,), and draws the one after it: (tokens (B,), the new cache).

    One program, so that little but the model's own work is done for a token. valid: bool (B, 1).
    keys, step, seen: see `sampling.pick_batch`.
    """
    logits, cache = decode_step(model, variables, cache, tokens[:, None], valid)
    return pick_batch(sampling, keys, step, logits[:, -1], seen), cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_cache(model: nn.Module, batch: int = 1) -> PyTree:
    """A cache that holds nothing yet. Compiled: tracing a model for every text took longer than
    reading it.
    """
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((batch, 1), jnp.int32), decode=True)
    )["cache"]
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def prefill(
    model: nn.Module, variables: dict[str, PyTree], prompts: Sequence[np.ndarray]
) -> tuple[Array, PyTree, int]:
    """Reads prompts (T,), each of its own length: (logits of their last tokens (B, V), the cache,
    the places of it that are taken).

    They are read in pieces of few sizes, so that a prompt of another length compiles nothing; the
    first piece is padded on the left where the context has room for that.
    """
    *_, read = prefill_pieces(model, variables, prompts, empty_cache(model, len(prompts)))
    return read


def prefill_pieces(
    model: nn.Module, variables: dict[str, PyTree], prompts: Sequence[np.ndarray], cache: PyTree
) -> Iterator[tuple[Array, PyTree, int]]:
    """Yields what `prefill` has after each piece; the last is what it returns. cache: an empty one
    for so many prompts, which stays as it is.
    """
    longest, context = max(map(len, prompts)), context_of(model)
    sizes = piece_sizes(longest, context)
    total = sum(sizes)
    tokens = np.zeros((len(prompts), total), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, total - len(prompt) :], valid[row, total - len(prompt) :] = prompt, True
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        logits, cache = decode_step(model, variables, cache, tokens[:, part], valid[:, part])
        start += size
        yield logits[:, -1], cache, start


def piece_sizes(longest: int, context: int | None) -> list[int]:
    """The sizes in which a prompt is read, at least as many tokens as it has."""
    whole, rest = divmod(longest, _PIECE)
    # with room for some tokens more, or the next ones would find the cache full at once
    fits = context is None or (whole + 2) * _PIECE <= context
    first = ([_PIECE] if fits else [1] * rest) if rest else []
    long, short = divmod(whole * _PIECE, _LONGEST)
    return first + [_LONGEST] * long + [_PIECE] * (short // _PIECE)


def generate_tokens(
    model: nn.Module,
    variables: dict[str, PyTree],
    prompt: np.ndarray,
    max_tokens: int,
    *,
    seed: int = 0,
    end_of_text: int | Collection[int] | None = None,
    **settings: Any,
) -> Iterator[int]:
    """Yields up to `max_tokens` new token ids after a prompt (T,) of at least one; variables may be
    packed. See `generate_batch`; `settings` are those of `Sampling`: temperature, top_k, ...
    """
    rows = generate_batch(
        model,
        variables,
        [prompt],
        max_tokens,
        sampling=Sampling(**settings),
        seeds=[seed],
        end_of_text=end_of_text,
    )
    return (token for (token,) in rows if token is not None)


def generate_batch(
    model: nn.Module,
    variables: dict[str, PyTree],
    prompts: Sequence[np.ndarray],
    max_tokens: int,
    *,
    sampling: Sampling | None = None,
    seeds: Sequence[int] = (),
    end_of_text: int | Collection[int] | None = None,
    ends: Callable[[int, Sequence[int]], bool] | None = None,
) -> Iterator[list[int | None]]:
    """Yields a new token id for each prompt (T,), up to `max_tokens` times; None for a row that has
    ended. Each row gets the tokens that it would get alone, but for what rounding changes.

    A row ends before `end_of_text`, the tokenizer's token of that meaning or several such. Where a
    row's context is full, the newer half of it is read again into an empty cache and generation
    goes on behind that; a model that carries a state has no limit.

    Args:
      sampling: None for the defaults. seeds: one a prompt; none: 0, 1, ...
      ends: (row, its new tokens) -> whether it has said enough, asked after each token.

    Raises:
      InputError: a prompt that is empty, too long or of unknown tokens, or a count that cannot be.
    """
    if max_tokens < 0:
        raise InputError(f"--max_tokens: expected 0 or more, found {max_tokens}.")
    seeds = seeds or range(len(prompts))
    if not prompts or len(seeds) != len(prompts):
        raise InputError(
            f"generate: expected prompts and a seed for each, found {len(prompts)} prompts and "
            f"{len(seeds)} seeds."
        )
    for prompt in prompts:
        check_prompt(prompt, model.config.vocab_size, context_of(model))
    rows = [_Row([int(t) for t in prompt], len(prompt), len(prompt)) for prompt in prompts]
    sampling = sampling or Sampling()
    last = [end_of_text] if isinstance(end_of_text, int) else end_of_text or ()
    return _generate(model, variables, rows, max_tokens, sampling, seeds, frozenset(last), ends)


@dataclasses.dataclass
class _Row:
    """text: prompt and new tokens. held: of the newest tokens, how many the cache has."""

    text: list[int]
    held: int
    prompt: int
    alive: bool = True


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
    rows: list[_Row],
    max_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    last: frozenset[int],
    ends: Callable[[int, Sequence[int]], bool] | None,
) -> Iterator[list[int | None]]:
    context, taken = context_of(model), 0
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    seen = _seen(rows, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
    variables = jax.device_put(variables)  # once, and not for each token
    picked, cache = None, None
    for i in range(max_tokens):
        if picked is None:
            held = [np.asarray(row.text[-row.held :]) for row in rows]
            logits, cache, taken = prefill(model, variables, held)
            picked = pick_batch(sampling, keys, i, logits, seen)
        tokens: list[int] = np.asarray(picked).tolist()
        for row, token in zip(rows, tokens):
            row.alive &= token not in last
            row.text += [token] * row.alive
        if not any(row.alive for row in rows):
            return
        yield [token if row.alive else None for row, token in zip(rows, tokens)]
        for number, row in enumerate(rows):
            row.alive &= ends is None or not ends(number, row.text[row.prompt :])
        if i + 1 == max_tokens or not any(row.alive for row in rows):
            return
        if seen is not None:
            seen = seen.at[jnp.arange(len(rows)), picked].set(True)
        for row in rows:  # what it has said last is not in the cache yet
            row.held = row.held + row.alive
            if context is not None and row.held > context:
                row.held = max(1, context // 2)
        if taken == context:
            picked = None
        else:
            valid = np.asarray([[row.alive] for row in rows])
            read = (variables, cache, picked, valid)
            picked, cache = next_tokens(model, sampling, *read, keys, i + 1, seen)
            taken += 1


def _seen(rows: Sequence[_Row], vocab_size: int) -> Array:
    """Which tokens each text has, bool (B, V)."""
    seen = np.zeros((len(rows), vocab_size), bool)
    for row, text in zip(seen, rows):
        row[text.text] = True
    return jnp.asarray(seen)


def cut_at(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pieces of a text up to the first of the stop strings, which is left out, see
    `spelling.Stops`.
    """
    passing = Stops(stops)
    for piece in pieces:
        if text := passing.feed(piece):
            yield text
        if passing.found:
            return
    if text := passing.rest():
        yield text


def stream_text(
    tokenizer: Tokenizer, tokens: Iterator[int], after: Sequence[int] | np.ndarray = ()
) -> Iterator[str]:
    """Decodes tokens as they come, see `spelling.Speller`."""
    speller = Speller(tokenizer, after)
    for token in tokens:
        if text := speller.feed(token):
            yield text
    if text := speller.rest():
        yield text
