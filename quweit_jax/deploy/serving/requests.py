"""What a client may ask for, checked before any work is done, and errors as OpenAI's API has
them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from quweit_jax.data.asking import Asking
from quweit_jax.deploy.generate import check_prompt
from quweit_jax.deploy.sampling import Sampling
from quweit_jax.deploy.serving.engine import Wanted
from quweit_jax.errors import InputError, nearest
from quweit_jax.reading import clean_text, without_surrogates

_COMPLETION_TOKENS = 16  # of a completion that names no number, as in OpenAI's API
_MOST_STOPS = 16
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SHARED = {*_SAMPLING, "model", "max_tokens", "n", "seed", "stop", "stream", "stream_options"}
_KNOWN = {
    "completion": {*_SHARED, "prompt", "echo"},
    "chat": {*_SHARED, "messages", "max_completion_tokens"},
}
_NO_MATTER = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # what changes nothing
# What OpenAI's API has and this one has not, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
_CONTENT = "expected a text, or a list of parts {'type': 'text', 'text': ...}"


class ApiError(Exception):
    """What is told to a client. status: of HTTP. param: the field that is wrong. code: a word for
    programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message = status, without_surrogates(message)  # parts may be the client's
        self.param, self.code = None if param is None else without_surrogates(param), code

    def to_json(self) -> dict[str, Any]:
        """In the shape of OpenAI's API."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        said = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": said}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: `answers`, choice after choice of each prompt in turn.

    prompt_tokens: of all prompts together. echo: texts that answers begin with, '' for none.
    stream, usage: whether it is streamed, and with counts at the end.
    """

    kind: str
    answers: list[Wanted]
    prompt_tokens: int
    echo: list[str]
    stream: bool
    usage: bool


@dataclasses.dataclass(frozen=True)
class Offer:
    """What is served. name: of the model. max_tokens: the most of an answer. places: the most
    answers of a request.
    """

    name: str
    asking: Asking
    vocab_size: int
    context: int | None
    max_tokens: int
    places: int


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request; ApiError for another body."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        body = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        said = str(error).partition(";")[0]  # behind it Python's advice to programmers
        raise ApiError(400, f"expected a JSON object, found what is none: {said}.") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a JSON object, found {_shown(body)}.")
    return body


def check(body: Mapping[str, Any], kind: str, offer: Offer) -> Asked:
    """A request as answers that are wanted. kind: 'completion' or 'chat'.

    Raises:
      ApiError: 404 for another model, 400 for fields that cannot be, 422 for a text that the model
        cannot read.
    """
    body = {name: value for name, value in body.items() if value is not None}
    _check_model(body, offer)
    _check_fields(body, kind)
    sampling = _sampling(body)
    prompts, texts = _prompts(body, offer) if kind == "completion" else _chat(body, offer)
    count = _whole(body, "n", 1, 1, offer.places)
    if len(prompts) * count > offer.places:
        raise ApiError(
            400,
            f"n: expected at most {offer.places} answers of a request, found {len(prompts)} "
            f"prompts with n={count}; ask for fewer.",
            "n",
        )
    most = _max_tokens(body, kind, offer)
    seed = _whole(body, "seed", None, -(2**63), 2**63 - count)
    stops = _stops(body)
    echo = _flag(body, "echo")
    stream = _flag(body, "stream")
    answers = [
        Wanted(ids, most, sampling, None if seed is None else seed + i, stops)
        for ids in prompts
        for i in range(count)
    ]
    said = [text if echo else "" for text in texts for _ in range(count)]
    total = sum(map(len, prompts))
    usage = _usage(body)
    return Asked(kind, answers, total, said, stream, stream and usage)


def _check_model(body: Mapping[str, Any], offer: Offer) -> None:
    model = body.get("model")
    if not isinstance(model, str):
        raise ApiError(400, f"model: expected a name, such as '{offer.name}'.", "model")
    if model != offer.name:
        raise ApiError(
            404,
            f"model: expected '{offer.name}', which is served here, found '{model[:200]}'.",
            "model",
            "model_not_found",
        )


def _check_fields(body: Mapping[str, Any], kind: str) -> None:
    for name, value in body.items():
        if name in _KNOWN[kind] or name in _NO_MATTER:
            continue
        if name in _UNSUPPORTED:
            if not any(value == each and type(value) is type(each) for each in _allowed(name)):
                raise ApiError(
                    400, f"{name}: not supported by this server; leave it out.", name, "unsupported"
                )
            continue
        raise ApiError(
            400, f"{name[:100]}: no field of this request.{nearest(name, _KNOWN[kind])}", name[:100]
        )


def _allowed(name: str) -> list[Any]:
    """Values that ask for nothing; a number also as the other kind of number."""
    values = _UNSUPPORTED[name]
    return [*values, *(float(v) for v in values if type(v) is int)]


def _sampling(body: Mapping[str, Any]) -> Sampling:
    given: dict[str, Any] = {"temperature": 1.0}  # as in OpenAI's API
    for name in _SAMPLING:
        if name in body:
            given[name] = _whole(body, name, 0, 0) if name == "top_k" else _number(body, name)
    try:
        return Sampling(**given)
    except InputError as error:
        raise _told(400, error) from None


def _number(body: Mapping[str, Any], name: str) -> float:
    value = body[name]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    raise ApiError(400, f"{name}: expected a number, found {_shown(value)}.", name)


def _whole(body: Mapping[str, Any], name: str, default: Any, least: int, most: int = 2**53) -> Any:
    if name not in body:
        return default
    value = body[name]
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    asked = f"{least} or more" if most == 2**53 else f"{least} to {most}"
    raise ApiError(400, f"{name}: expected a whole number, {asked}, found {_shown(value)}.", name)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name}: expected true or false, found {_shown(value)}.", name)
    return value


def _usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise ApiError(
            400,
            f"stream_options: expected {{'include_usage': true}}, found {_shown(options)}.",
            "stream_options",
        )
    return _flag(options, "include_usage")


def _max_tokens(body: Mapping[str, Any], kind: str, offer: Offer) -> int:
    both = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
    name = both[0] if both else "max_tokens"
    default = (
        min(_COMPLETION_TOKENS, offer.max_tokens) if kind == "completion" else offer.max_tokens
    )
    return _whole(body, name, default, 1, offer.max_tokens)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    given = body.get("stop", [])
    stops = [given] if isinstance(given, str) else given
    few = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if few and all(isinstance(stop, str) for stop in stops):
        return tuple(stops)
    raise ApiError(
        400, f"stop: expected a text or up to {_MOST_STOPS}, found {_shown(given)}.", "stop"
    )


def _prompts(body: Mapping[str, Any], offer: Offer) -> tuple[list[np.ndarray], list[str]]:
    """The ids of each prompt, and its text."""
    given = body.get("prompt")
    one = isinstance(given, str) or (isinstance(given, list) and given and _are_ids(given))
    every: list[Any] = [given] if one else given if isinstance(given, list) else []
    if not every or not all(isinstance(each, str) or _are_ids(each) for each in every):
        raise ApiError(
            400,
            f"prompt: expected a text or token ids, or a list of such, found {_shown(given)}.",
            "prompt",
        )
    if len(every) > offer.places:
        raise ApiError(
            400, f"prompt: expected at most {offer.places}, found {len(every)}.", "prompt"
        )
    asking, found, texts = offer.asking, [], []
    for each in every:
        text = clean_text(each) if isinstance(each, str) else ""
        try:
            ids = asking.encode(text) if isinstance(each, str) else np.asarray(each, np.int64)
        except InputError as error:
            raise _told(422, error, "prompt") from None
        _check_prompt(ids, offer, "prompt")
        found.append(ids.astype(np.int32))
        texts.append(text if isinstance(each, str) else asking.tokenizer.decode(found[-1]))
    return found, texts


def _are_ids(value: Any) -> bool:
    def is_id(each: Any) -> bool:
        return isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**31

    return isinstance(value, list) and bool(value) and all(map(is_id, value))


def _chat(body: Mapping[str, Any], offer: Offer) -> tuple[list[np.ndarray], list[str]]:
    if not offer.asking.has_template:
        raise ApiError(
            400,
            f"the model '{offer.name}' has no chat template; use /v1/completions, which continues "
            "a text.",
            "messages",
            "no_chat_template",
        )
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(
            400, f"messages: expected a list of messages, found {_shown(given)}.", "messages"
        )
    messages = [_message(each, f"messages[{i}]") for i, each in enumerate(given)]
    try:
        ids = offer.asking.encode_chat(messages)
    except InputError as error:
        raise _told(422, error, "messages") from None
    _check_prompt(ids, offer, "messages")
    return [ids], [""]


def _message(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise ApiError(
            400, f"{where}: expected {{'role': ..., 'content': ...}}, found {_shown(given)}.", where
        )
    unknown = [
        name for name in given if name not in ("role", "content") and given[name] is not None
    ]
    if unknown:
        raise ApiError(400, f"{where}: {unknown[0][:100]} is not supported; leave it out.", where)
    content = given.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise ApiError(400, f"{where}: content: {_CONTENT}, found {_shown(content)}.", where)
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}: content: {_CONTENT}, found {_shown(content)}.", where)
    return {"role": given["role"].replace("developer", "system"), "content": clean_text(content)}


def _check_prompt(ids: np.ndarray, offer: Offer, param: str) -> None:
    try:
        check_prompt(ids, offer.vocab_size, offer.context)
    except InputError as error:
        long = offer.context is not None and len(ids) > offer.context
        raise _told(400, error, param, "context_length_exceeded" if long else None) from None


def _told(status: int, error: InputError, param: str | None = None, code: str | None = None):
    """An error of a command line in the words of the API."""
    message = str(error).removeprefix("--").removeprefix("generate: ")
    return ApiError(status, message, param or message.partition(":")[0], code)


def _shown(value: Any) -> str:
    """A value as JSON, not at length."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def error_of(status: int, message: str) -> ApiError:
    """The error of a status that is about no field."""
    known = {
        404: "not_found",
        405: "method_not_allowed",
        413: "too_large",
        429: "rate_limit_exceeded",
    }
    return ApiError(status, message, code=known.get(status))
