"""Log-likelihoods of texts under a language model: what zero-shot evaluation and perplexities are
made of.

Dimensions: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from quweit_jax.deploy import generate as generation
from quweit_jax.errors import InputError

_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model, its variables (which may be packed) and its tokenizer.

    start: the token put before a text that has nothing before it; None: the tokenizer's end of text
      if it has one, else a new line
    if it can spell one, else token 0. batch_size: texts scored at a time.
    """

    model: nn.Module
    variables: dict[str, Any]
    tokenizer: Any
    start: int | None = None
    batch_size: int = 8

    @property
    def context(self) -> int | None:
        """The most tokens the model reads at a time; None for no limit."""
        return generation.context_of(self.model)

    def start_token(self) -> int:
        """See `start`."""
        if self.start is not None:
            return self.start
        end = getattr(self.tokenizer, "end_of_text", None)
        if end is not None:
            return int(end)
        try:
            return int(self.tokenizer.encode("\n")[0])
        except InputError:
            return 0

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): (the continuation's log-probability in nats, whether it
        is what greedy decoding would say).

        What doesn't fit the model's context is cut off at the context's beginning.

        Raises:
          InputError: a continuation is empty, or longer than the model's context.
        """
        return [
            (float(sum(values)), greedy)
            for values, greedy in self._score([self._split(*pair) for pair in pairs])
        ]

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-probability in nats of each whole text: of every token once, in windows as long
        as the model reads.
        """
        windows, owners = [], []
        for i, text in enumerate(texts):
            for window in self._windows(self.tokenizer.encode(text)):
                windows.append(window)
                owners.append(i)
        totals = [0.0] * len(texts)
        for owner, (values, _) in zip(owners, self._score(windows), strict=True):
            totals[owner] += float(sum(values))
        return totals

    def generate_until(self, prompt: str, stops: Sequence[str], max_tokens: int) -> str:
        """The likeliest text after a prompt, token by token, up to the first of the stop strings,
        which is left out.
        """
        tokens = self.tokenizer.encode(prompt) if prompt else np.asarray([self.start_token()])
        if self.context is not None:
            tokens = tokens[-self.context :]
        text, end = "", getattr(self.tokenizer, "end_of_text", None)
        found = generation.generate_tokens(
            self.model, self.variables, tokens, max_tokens, temperature=0, end_of_text=end
        )
        for piece in generation.stream_text(self.tokenizer, found):
            text += piece
            stopped = [text.index(stop) for stop in stops if stop and stop in text]
            if stopped:
                return text[: min(stopped)]
        return text

    def _split(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Tokens of both together, and how many of them, at the end, are the continuation's."""
        # Spaces belong to the word after them: tokenizers cut there.
        kept = context.rstrip(" ")
        continuation = context[len(kept) :] + continuation
        whole = self.tokenizer.encode(kept + continuation)
        before = self.tokenizer.encode(kept) if kept else whole[:0]
        scored = len(whole) - len(before)
        if scored < 1:
            raise InputError(
                "log_likelihoods: expected a continuation of at least one token, found "
                f"{continuation!r} after {kept[-40:]!r}."
            )
        if not len(before):
            whole = np.concatenate([[self.start_token()], whole])
        if self.context is not None:
            if scored > self.context:
                raise InputError(
                    f"log_likelihoods: a continuation of {scored} tokens doesn't fit the model's "
                    f"context of {self.context}."
                )
            whole = whole[-(self.context + 1) :]
        return np.asarray(whole, np.int32), scored

    def _windows(self, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Pieces in which every token is scored once; all but the first see one token of the piece
        before.
        """
        size = self.context or max(1, len(tokens))
        whole = np.concatenate([[self.start_token()], tokens]).astype(np.int32)
        for begin in range(0, len(tokens), size):
            piece = whole[begin : begin + size + 1]
            yield piece, len(piece) - 1

    def _score(self, rows: Sequence[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, bool]]:
        """(log-probabilities of the last `scored` tokens, whether each is the likeliest) of every
        (tokens, scored).
        """
        results: list[Any] = [None] * len(rows)
        order = sorted(
            range(len(rows)), key=lambda i: -len(rows[i][0])
        )  # alike lengths together, the longest first
        for begin in range(0, len(order), self.batch_size):
            places = order[begin : begin + self.batch_size]
            longest = max(len(rows[i][0]) for i in places) - 1
            width = max(_SHORTEST, 1 << (longest - 1).bit_length())  # few shapes to compile
            width = width if self.context is None else max(longest, min(width, self.context))
            batch = np.zeros(
                (self.batch_size, width + 1), np.int32
            )  # padding behind a text is not seen by it
            for row, i in enumerate(places):
                batch[row, : len(rows[i][0])] = rows[i][0]
            values, likeliest = jax.device_get(_token_scores(self.model, self.variables, batch))
            for row, i in enumerate(places):
                end = len(rows[i][0]) - 1
                part = slice(end - rows[i][1], end)
                results[i] = (
                    np.asarray(values[row, part], np.float64),
                    bool(likeliest[row, part].all()),
                )
        return results


@functools.partial(jax.jit, static_argnums=0)
def _token_scores(
    model: nn.Module, variables: dict[str, Any], tokens: Array
) -> tuple[Array, Array]:
    """tokens (B, T + 1) -> (log-probability of each of the last T given those before, whether it is
    the likeliest), both (B, T).
    """
    logits = model.apply(variables, tokens[:, :-1])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]
    return chosen, logits.argmax(-1) == tokens[:, 1:]


def evaluate_tasks(scorer: Scorer, tasks: Sequence[str], *, limit: int = 0) -> dict[str, Any]:
    """Zero-shot results of lm-evaluation-harness's tasks: {task: {metric: value}}.

    tasks: names of tasks; also folders of your own task files (.yaml, as the harness describes
      them), of which all are taken.
    limit: only so many examples of each (0: all).

    Raises:
      InputError: the harness isn't installed, or knows no such task.
    """
    try:
        from lm_eval import evaluator as harness  # type: ignore[import-not-found]
        from lm_eval.api.model import LM  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            "--tasks: needs lm-evaluation-harness; pip install 'quweit_jax[harness]'."
        ) from None

    class Served(LM):
        """Our model behind the harness's interface."""

        def loglikelihood(
            self, requests: Any, disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return scorer.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return scorer.rolling_log_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [
                scorer.generate_until(
                    prompt, options.get("until", []), options.get("max_gen_toks", 256)
                )
                for prompt, options in (r.args for r in requests)
            ]

    folders = [task for task in tasks if Path(task).is_dir()]
    manager, names = (
        TaskManager(include_path=folders or None),
        [task for task in tasks if task not in folders],
    )
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(
            f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` "
            "shows them, and a folder of your own .yaml files does, too."
        )
    if folders:
        names += TaskManager(include_path=folders, include_defaults=False).all_subtasks
    return harness.simple_evaluate(
        model=Served(), tasks=names, limit=limit or None, task_manager=manager
    )["results"]
