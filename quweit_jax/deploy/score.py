"""Log-likelihoods of texts under a language model, for zero-shot evaluation and perplexities.

Dimensions: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from quweit_jax.data.tokenizers import Tokenizer
from quweit_jax.deploy.generate import (
    context_of,
    cut_at,
    decode_step,
    empty_cache,
    generate_tokens,
    stream_text,
)
from quweit_jax.deploy.sampling import Sampling
from quweit_jax.errors import InputError, require

_SHORTEST, _LONGEST = 16, 512  # tokens read at a time
_LOGITS = 2**25  # of all texts that are read at a time: 128 MB
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = tuple(field.name for field in dataclasses.fields(Sampling))
# Options of other ways of decoding, at the values at which they change nothing.
_PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "n": 1,
    "best_of": 1,
    "encoder_repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "penalty_alpha": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
    "guidance_scale": 1,
}


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A model, its variables (which may be packed) and its tokenizer.

    start: the token put before a text that has nothing before it; None: the tokenizer's end of
      text if it has one, else a new line if it can spell one, else token 0.
    batch_size: texts scored at a time. Their logits fit 128 MB, however long they are (or are those
      of 16 tokens).
    """

    model: nn.Module
    variables: dict[str, PyTree]
    tokenizer: Tokenizer
    start: int | None = None
    batch_size: int = 8

    @property
    def context(self) -> int | None:
        """The most tokens the model reads at a time; None for no limit."""
        return context_of(self.model)

    def start_token(self) -> int:
        """See `start`."""
        if self.start is not None:
            return self.start
        if self.tokenizer.end_of_text is not None:
            return self.tokenizer.end_of_text
        try:
            return int(self.tokenizer.encode("\n")[0])
        except InputError:
            return 0

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): (the continuation's log-probability in nats, whether
        greedy decoding would say it).

        What doesn't fit the model's context is cut off at the context's beginning.

        Raises:
          InputError: a continuation is empty, or longer than the model's context.
        """
        scores = self._score([self._split(*pair) for pair in pairs])
        return [(float(sum(values)), greedy) for values, greedy in scores]

    def rolling_log_likelihoods(self, texts: Sequence[str]) -> list[float]:
        """The log-probability in nats of each text: every token once, in windows as long as the
        model reads.
        """
        windows = [list(self._windows(self.tokenizer.encode(text))) for text in texts]
        scores = iter(self._score(list(itertools.chain(*windows))))
        return [sum((float(sum(next(scores)[0])) for _ in each), 0.0) for each in windows]

    def generate_until(
        self,
        prompt: str,
        stops: str | Sequence[str] | None,
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> str:
        """The text after a prompt, up to the first of the stop strings, left out; the likeliest at
        temperature 0.

        stops: one string, several or none; empty ones don't count. settings: others of `Sampling`.

        Raises:
          InputError: a stop that is no string, or settings that cannot be sampled with.
        """
        stops = _stops(stops)
        tokens = self.tokenizer.encode(prompt) if prompt else np.asarray([self.start_token()])
        if self.context is not None:
            tokens = tokens[-self.context :]
        found = generate_tokens(
            self.model,
            self.variables,
            tokens,
            max_tokens,
            seed=seed,
            end_of_text=self.tokenizer.end_of_text,
            temperature=temperature,
            **settings,
        )
        return "".join(cut_at(stream_text(self.tokenizer, found), stops))

    def _split(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Tokens of both together, and how many of them, at the end, are the continuation's."""
        # White space belongs to the word after it: tokenizers cut there, and so does the harness.
        kept = context.rstrip()
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
        """Pieces that score every token once, as the harness cuts them: all but the first see one
        token of the one before, the last as many more as the model reads.
        """
        size = self.context or max(1, len(tokens))
        whole = np.concatenate([[self.start_token()], tokens]).astype(np.int32)
        for begin in range(0, len(tokens), size):
            end = min(begin + size, len(tokens))
            yield whole[max(0, end - size) : end + 1], end - begin

    def _score(self, rows: Sequence[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, bool]]:
        """(log-probabilities of the last `scored` tokens, whether each is the likeliest) of every
        (tokens, scored).
        """
        results: dict[int, tuple[np.ndarray, bool]] = {}
        # Alike lengths together, the longest first.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for begin in range(0, len(order), self.batch_size):
            places = order[begin : begin + self.batch_size]
            batch = self._padded([rows[i][0] for i in places], min(self.batch_size, len(rows)))
            values, likeliest = self._token_scores(batch)
            for row, i in enumerate(places):
                tokens, scored = rows[i]
                part = slice(len(tokens) - 1 - scored, len(tokens) - 1)
                greedy = bool(likeliest[row, part].all())
                results[i] = np.asarray(values[row, part], np.float64), greedy
        return [results[i] for i in range(len(rows))]

    def _padded(self, texts: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Texts, the longest first, as `count` rows (count, T + 1), T one of few sizes; what is
        behind a text is not seen by it.
        """
        longest = len(texts[0]) - 1
        width = max(_SHORTEST, 1 << (longest - 1).bit_length())  # few shapes to compile
        if self.context is not None:
            width = max(longest, min(width, self.context))
        elif longest > (window := self._window(count)):
            width = -(-longest // window) * window
        batch = np.zeros((count, width + 1), np.int32)
        for row, text in zip(batch, texts):
            row[: len(text)] = text
        return batch

    def _window(self, count: int) -> int:
        """Tokens of `count` texts that are read at a time: a power of two, so that the logits of
        all have a bounded size.
        """
        fit = _LOGITS // (count * getattr(self.model, "config").vocab_size)  # noqa: B009 - of all
        return min(_LONGEST, max(_SHORTEST, 1 << max(0, fit.bit_length() - 1)))

    def _token_scores(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens (B, T + 1) -> (log-probability of each of the last T, whether it is the
        likeliest), (B, T); read in windows, across which the model's state or cache is carried.
        """
        count, width = len(tokens), tokens.shape[1] - 1
        if width <= (window := self._window(count)):
            return jax.device_get(_score_whole(self.model, self.variables, tokens))
        cache, found = empty_cache(self.model, count), []
        for start in range(0, width, window):
            piece = tokens[:, start : start + window + 1]
            scores, cache = _score_window(self.model, self.variables, cache, piece)
            found.append(jax.device_get(scores))
        values, likeliest = (np.concatenate(parts, 1) for parts in zip(*found))
        return values, likeliest


@functools.partial(jax.jit, static_argnums=0)
def _score_whole(
    model: nn.Module, variables: dict[str, PyTree], tokens: Array
) -> tuple[Array, Array]:
    """tokens (B, T + 1) -> (log-probability of each of the last T, whether it is the likeliest)."""
    logits: Any = model.apply(variables, tokens[:, :-1])
    return _scores(logits, tokens[:, 1:])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_window(
    model: nn.Module, variables: dict[str, Any], cache: Any, tokens: Array
) -> tuple[tuple[Array, Array], Any]:
    """The same behind what the cache has seen: (the scores, the new cache)."""
    logits, cache = decode_step(model, variables, cache, tokens[:, :-1])
    return _scores(logits, tokens[:, 1:]), cache


def _scores(logits: Array, targets: Array) -> tuple[Array, Array]:
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets


def _stops(until: Any) -> list[str]:
    """One stop string, a sequence of them or None, as a list; empty ones and None are left out."""
    single = isinstance(until, str | Mapping) or not isinstance(until, Iterable)
    given: list[Any] = [until] if single else list(until)
    if not all(isinstance(stop, str | None) for stop in given):
        raise InputError(
            f"until: expected a string, a list of strings or nothing, found {until!r}; quote "
            "numbers in a task's generation_kwargs."
        )
    return [stop for stop in given if isinstance(stop, str) and stop]


def generation_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """A task's generation_kwargs as `Scorer.generate_until` takes them, normalized as
    lm-evaluation-harness does.

    Of several names of the length the first counts: max_gen_toks, max_new_tokens, max_tokens,
    max_completion_tokens; without one it is 256. do_sample false means temperature 0; without a
    temperature it is 0. What is not known here is named in a warning and left out, unless it
    changes what is decoded.

    Raises:
      InputError: a value that means nothing, or another way of decoding, such as beams, by name.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InputError(f"generation_kwargs: expected names and values, found {options!r}.")

    def number(key: str, default: float, kind: type[int] | type[float]) -> Any:
        value = options.get(key)
        try:
            found = kind(default if value is None else value)
        except (TypeError, ValueError, OverflowError):
            found = -1
        if isinstance(value, bool) or not found >= 0:
            raise InputError(
                f"{key}: expected a number, 0 or more, found {value!r}; correct the task's "
                "generation_kwargs."
            )
        return found

    if (sampled := options.get("do_sample")) not in (None, True, False):
        raise InputError(f"do_sample: expected true or false, found {sampled!r}.")
    _check_decoding(options)
    length = next((key for key in _LENGTHS if options.get(key) is not None), _LENGTHS[0])
    found = {
        "stops": _stops(options.get("until")),
        "max_tokens": number(length, 256, int),
        "temperature": 0.0 if sampled in (False,) else number("temperature", 0, float),
        "top_k": number("top_k", 0, int),
        "top_p": number("top_p", 1, float),
        "min_p": number("min_p", 0, float),
        "repetition_penalty": number("repetition_penalty", 1, float),
    }
    Sampling(**{name: found[name] for name in _SETTINGS})
    return found


def _check_decoding(options: Mapping[str, Any]) -> None:
    """Raises InputError for options that ask for another way of decoding than there is; warns of
    unknown ones.
    """
    known = {*_LENGTHS, *_PLAIN, *_SETTINGS, "until", "do_sample"}
    given = {key: value for key, value in options.items() if value is not None}
    other = [
        f"{key}={given[key]!r}" for key in _PLAIN if given.get(key, _PLAIN[key]) != _PLAIN[key]
    ]
    if "max_length" in given:
        other.append("max_length, which counts the prompt, too (give max_gen_toks)")
    if other:
        raise InputError(
            f"generation_kwargs: expected sampling or the likeliest token, found {', '.join(other)}"
            "; leave it out of the task, or evaluate with a program that has it."
        )
    if unknown := sorted(map(str, given.keys() - known)):
        warnings.warn(
            f"generation_kwargs: {', '.join(unknown)}: unknown, and left out.", stacklevel=4
        )


def evaluate_tasks(
    scorer: Scorer, tasks: Sequence[str], *, limit: int = 0
) -> dict[str, dict[str, object]]:
    """Zero-shot results of lm-evaluation-harness's tasks: {task: {metric: value}}.

    tasks: names of tasks, or folders of task files (.yaml), of which all are taken.
    limit: only so many examples of each (0: all).

    Raises:
      InputError: the harness isn't installed, or knows no such task.
    """
    require("lm_eval", "for --tasks (lm-evaluation-harness)")
    from lm_eval import evaluator as harness  # type: ignore[import-not-found]
    from lm_eval.api.model import LM  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    class Served(LM):
        """Our model behind the harness's interface."""

        def loglikelihood(self, requests, disable_tqdm=False):
            return scorer.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return scorer.rolling_log_likelihoods([request.args[0] for request in requests])

        def generate_until(self, requests, disable_tqdm=False):
            asked = [(r.args[0], generation_options(r.args[1])) for r in requests]
            return [
                scorer.generate_until(prompt, seed=i, **options)
                for i, (prompt, options) in enumerate(asked)
            ]

    folders = [task for task in tasks if os.path.isdir(task)]
    names = [task for task in tasks if task not in folders]
    manager = TaskManager(include_path=folders or None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise InputError(
            f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}; `lm_eval ls tasks` "
            "shows them, and a folder of your own .yaml files does, too."
        )
    if folders:
        names += TaskManager(include_path=folders, include_defaults=False).all_subtasks
    served, most = Served(), limit or None
    found = harness.simple_evaluate(served, tasks=names, limit=most, task_manager=manager)
    return found["results"]
