"""Associative recall of many queries (MQAR; Arora et al. 2023, Zoology, arXiv 2312.04927): texts of
random keys with random values, and then keys whose values are to be said.

    k1 v1 k2 v2 k3 v3 . . k2 . . . k1 . k3 .      and after k2 comes v2

A text is the task's whole memory: nothing can be learned but to look up. Only what follows a key
asked for is a target; the others are -1, which losses leave out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from quweit_jax.data.registry import DataConfig, RecallSplits, source
from quweit_jax.data.tokenizers import CharTokenizer
from quweit_jax.errors import InputError

NOTHING = -1  # the target of a place where nothing is asked
_FIRST = 0x4E00  # symbols are written as ideographs, one after the other
_EXPONENT = 0.01  # of the power law by which a key is asked soon after it was given, as published
_VALIDATION = 1000  # texts


def tokenizer(symbols: int) -> CharTokenizer:
    """One character a symbol: 0 is the blank, then keys, then values."""
    return CharTokenizer("".join(chr(_FIRST + i) for i in range(symbols)))


@dataclasses.dataclass(frozen=True)
class RecallTexts(Sequence):
    """Texts of `context` tokens, each drawn from its own number: {'inputs': (T,) int32, 'targets':
    (T,) int32}.

    texts: how many. split: texts of another are others.

    Raises:
      InputError: the context has no room for so many pairs, or too few symbols are there.
    """

    texts: int
    context: int
    pairs: int
    symbols: int
    seed: int
    split: int

    def __post_init__(self):
        if self.context < 4 * self.pairs:
            raise InputError(
                f"data.recall_pairs: {self.pairs} pairs of key and value, and as much room to ask "
                f"for them, need a context of {4 * self.pairs}, found {self.context}; set "
                "--config.model.context."
            )
        if self.symbols < 2 * self.pairs + 1:
            raise InputError(
                f"data.recall_symbols: expected at least {2 * self.pairs + 1} for {self.pairs} "
                f"pairs and a blank, found {self.symbols}."
            )

    def __len__(self) -> int:
        return self.texts

    def __getitem__(self, index):  # type: ignore[override]
        draw = np.random.default_rng((self.seed, self.split, int(index)))
        half = 1 + (self.symbols - 1) // 2  # the first value
        keys = draw.choice(np.arange(1, half), self.pairs, replace=False)
        values = draw.choice(np.arange(half, self.symbols), self.pairs, replace=True)
        inputs = np.zeros(self.context, np.int32)
        targets = np.full(self.context, NOTHING, np.int32)
        inputs[0 : 2 * self.pairs : 2], inputs[1 : 2 * self.pairs : 2] = keys, values
        room = (self.context - 2 * self.pairs) // 2
        weight = _EXPONENT * np.arange(1, room + 1) ** (_EXPONENT - 1.0)
        gaps = draw.choice(room, self.pairs, replace=False, p=weight / weight.sum())
        places = 2 * self.pairs + 2 * gaps
        inputs[places], targets[places] = keys, values
        return {"inputs": inputs, "targets": targets}


@source("recall")
def recall(config: DataConfig) -> RecallSplits:
    """Texts of `recall_pairs` keys and values of `recall_symbols` symbols."""

    def texts(count: int, split: int, context: int) -> RecallTexts:
        sizes = (config.recall_pairs, config.recall_symbols, config.split_seed)
        return RecallTexts(count, context, *sizes, split)

    return RecallSplits(
        lambda context: texts(config.recall_texts, 0, context),
        lambda context: texts(_VALIDATION, 1, context),
        tokenizer(config.recall_symbols),
    )
