"""A fixed number of texts that one compiled program continues, each at a place of its own.

Dimensions: S slots, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from quweit_jax.deploy.generate import (
    context_of,
    decode_step,
    empty_cache,
    piece_sizes,
    prefill_pieces,
)
from quweit_jax.deploy.sampling import Sampling, Settings, pick_each
from quweit_jax.errors import InputError

_PIECES, _MANY = 16, 2**12  # lengths of prompts that have pieces of every size, where one is longer
Read = tuple[Array, PyTree, int]  # what `generate.prefill` has: logits (1, V), cache, places taken


class State(NamedTuple):
    """What the device knows of the texts.

    caches: the model's cache of one text, with an axis of slots before it. tokens: (S,) int32, the
    newest of each text, which its cache has not read yet. steps: (S,) int32, how many new tokens a
    text has. keys: uint32 (S, ...), each text's random key. seen: bool (S, V), the tokens it has.
    """

    caches: PyTree
    tokens: Array
    steps: Array
    keys: Array
    settings: Settings
    seen: Array


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(
    model: nn.Module, variables: dict[str, PyTree], state: State, active: Array
) -> tuple[Array, State]:
    """A token more for each active text: (tokens (S,), the new state)."""

    def one(cache: PyTree, token: Array, valid: Array) -> tuple[Array, PyTree]:
        logits, cache = decode_step(model, variables, cache, token[None, None], valid[None, None])
        return logits[0, -1], cache

    logits, caches = jax.vmap(one)(state.caches, state.tokens, active)
    keys = jax.random.wrap_key_data(state.keys)
    picked = pick_each(state.settings, keys, state.steps, logits, state.seen)
    seen = state.seen.at[jnp.arange(len(picked)), picked].set(True)
    return picked, State(caches, picked, state.steps + 1, state.keys, state.settings, seen)


@functools.partial(jax.jit, donate_argnums=0)
def _join(
    state: State,
    slot: Array | int,
    logits: Array,
    cache: PyTree,
    step: Array | int,
    key: Array,
    settings: Settings,
    seen: Array,
) -> tuple[Array, State]:
    """A text whose prompt has been read takes a slot: (its next token, the new state). logits, key,
    settings and seen have an axis of one text.
    """
    steps = jnp.asarray(step, jnp.int32)[None]
    picked = pick_each(settings, jax.random.wrap_key_data(key), steps, logits, seen)
    seen = seen.at[0, picked[0]].set(True)
    one = State(cache, picked[0], steps[0] + 1, key[0], _first(settings), seen[0])
    return picked[0], jax.tree.map(lambda whole, part: whole.at[slot].set(part), state, one)


def _first(settings: Settings) -> Settings:
    return jax.tree.map(lambda setting: jnp.asarray(setting)[0], settings)


class Slots:
    """The slots of a model, and the programs that fill and advance them.

    variables may be packed. count: S, at least one.

    Raises:
      InputError: there is no memory for so many.
    """

    def __init__(self, model: nn.Module, variables: dict[str, PyTree], count: int):
        self.model, self.count = model, count
        self.vocab_size, self.context = model.config.vocab_size, context_of(model)
        self._variables = jax.device_put(variables)  # once, and not for each token
        self._empty = empty_cache(model)
        try:
            self._state = self._start()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise self._too_many() from None

    def _start(self) -> State:
        key = jax.random.key_data(jax.random.key(0))
        caches, keys = jax.tree.map(
            lambda leaf: jnp.zeros((self.count, *leaf.shape), leaf.dtype), (self._empty, key)
        )
        counts = jnp.zeros(self.count, jnp.int32)
        settings = jax.tree.map(jnp.asarray, Settings.of([Sampling()] * self.count))
        seen = jnp.zeros((self.count, self.vocab_size), bool)
        return State(caches, counts, jnp.zeros_like(counts), keys, settings, seen)

    def _too_many(self) -> InputError:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self._empty))
        return InputError(
            f"--slots: expected as many as there is memory for, {size:,} bytes each, found "
            f"{self.count:,}; give fewer."
        )

    def compile(self) -> None:
        """Compiles all that will ever run: a prompt of another length, or other settings, compile
        nothing more.
        """
        most = self.context or _MANY
        lengths = [n for n in (1, _PIECES, most - 1, most) if 1 <= n <= most]
        sizes = {size for n in lengths for size in piece_sizes(n, self.context)}
        read = None
        for size in sizes:
            tokens, valid = np.zeros((1, size), np.int32), np.ones((1, size), bool)
            logits, cache = decode_step(self.model, self._variables, self._empty, tokens, valid)
            read = logits[:, -1], cache, size
        assert read is not None
        self.join(0, read, [0], 0, 0, Sampling())
        self.advance(np.zeros(self.count, bool))
        self._state = self._start()

    def read(self, prompt: np.ndarray) -> Iterator[Read]:
        """Reads a prompt (T,) piece by piece, apart from the slots; the last yield is what `join`
        takes.
        """
        return prefill_pieces(self.model, self._variables, [prompt], self._empty)

    def join(
        self, slot: int, read: Read, text: Sequence[int], step: int, seed: int, sampling: Sampling
    ) -> int:
        """Puts a text that was read into a slot and draws the token behind it.

        text: all its ids, also those that its context has lost. step: how many of them are new.
        """
        seen = np.zeros((1, self.vocab_size), bool)
        seen[0, np.asarray(text)] = True
        key = jax.random.key_data(jax.random.key(seed))[None]
        given: tuple[Any, ...] = (np.int32(step), key, Settings.of([sampling]), seen)
        picked, self._state = _join(self._state, np.int32(slot), read[0], read[1], *given)
        return int(picked)

    def advance(self, active: np.ndarray) -> list[int]:
        """Reads the newest token of each active text, bool (S,), and draws the next; what is given
        for others means nothing.
        """
        picked, self._state = _advance(self.model, self._variables, self._state, active)
        return np.asarray(picked).tolist()
