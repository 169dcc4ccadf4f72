"""How a text or a chat becomes the tokens that a model is asked with, and where its answer ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quweit_jax.data.prompting import Message, Prompting
from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.errors import InputError


class Asking:
    """By the tokenizer alone, of a run, or as a published model wants it.

    prompting: None for a run's model. ends: ids of tokens that end an answer. has_template: whether
    the model has a chat template.
    """

    def __init__(self, tokenizer: Tokenizer, prompting: Prompting | None):
        self.tokenizer, self.prompting = tokenizer, prompting
        self.has_template = prompting is not None and bool(prompting.chat_template)
        end = tokenizer.end_of_text
        ends = prompting.ends if prompting is not None else ()
        self.ends = {*ends, *([end] if end is not None else [])}

    def encode(self, text: str) -> np.ndarray:
        """The ids (T,) int32 of a text to continue."""
        if self.prompting is None:
            return self.tokenizer.encode(text)
        return self.prompting.encode(self.tokenizer, text)

    def encode_chat(self, messages: Sequence[Message]) -> np.ndarray:
        """The ids (T,) int32 of a chat, up to where the model is to answer.

        Raises:
          InputError: the model has no chat template, or it refuses the messages.
        """
        if self.prompting is None:
            raise InputError("--chat: a run has no chat template; leave it out.")
        return self.prompting.encode_chat(self.tokenizer, messages)
