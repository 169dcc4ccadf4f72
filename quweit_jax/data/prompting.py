"""How a published language model is asked: the special tokens that its tokenizer puts around a
text, its chat template, and the tokens that end an answer.

Chat templates are Jinja, as Hugging Face's programs write them, and are run in Jinja's sandbox:
they come with a checkpoint and may do anything to the text, but reach nothing else.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quweit_jax.data.tokenizers import FileTokenizer, Tokenizer
from quweit_jax.errors import InputError, first_line, require
from quweit_jax.reading import decode_text, is_whole, kind_of, read_bytes, read_json, shown

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # {'role': 'user', 'content': ...}


@dataclasses.dataclass(frozen=True)
class Prompting:
    """How to ask a model.

    ends: ids of tokens that end an answer, beside the tokenizer's end of text. begin: an id that is
    put before a text which the tokenizer does not begin with it already. chat_template: Jinja, ''
    for none. special: the texts of special tokens by their names in templates, such as 'bos_token'.
    """

    ends: tuple[int, ...] = ()
    begin: int | None = None
    chat_template: str = ""
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, tokenizer: FileTokenizer) -> Prompting:
        """What tokenizer_config.json, generation_config.json, config.json and chat_template.jinja
        of a folder say, as far as they are there.

        Raises:
          InputError: one is damaged, or names a token that the tokenizer has not.
        """
        config, generation, model = (
            read_json(folder / name, "--model") if os.path.isfile(folder / name) else {}
            for name in (_CONFIG, _GENERATION, "config.json")
        )
        special = {name: _text(config[name]) for name in _NAMED if config.get(name)}
        ends = generation.get("eos_token_id")
        ends = model.get("eos_token_id") if ends is None else ends
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(is_whole(token) for token in ends):
            raise InputError(
                f"--model: {shown(folder)}: eos_token_id: expected a token's number or a list of "
                f"them, found {ends!r}; mend generation_config.json."
            )
        begin = None
        if config.get("add_bos_token") is True and "bos_token" in special:
            begin = tokenizer.special_id(special["bos_token"])
            if begin is None:
                raise InputError(
                    f"--model: {shown(folder / _CONFIG)} names the bos_token "
                    f"{special['bos_token']!r}, which the tokenizer.json beside it has not; mend "
                    "one of them."
                )
        return cls(tuple(ends), begin, _template(folder, config), special)

    @classmethod
    def from_json(cls, saved: object) -> Prompting:
        """The inverse of `to_json`; InputError for another value."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(saved, dict) or saved.keys() - fields:
            raise InputError(
                f"model.json: prompting: expected an object of {', '.join(sorted(fields))}, found "
                f"{kind_of(saved)}; write the folder again."
            )
        return cls(**{**saved, "ends": tuple(saved.get("ends", ()))})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"ends": list(self.ends)}

    def encode(self, tokenizer: Tokenizer, text: str) -> np.ndarray:
        """The ids (N,) int32 of a text to continue, with the special tokens that the tokenizer
        puts before one; those that it puts behind are left out. Text never becomes a special token.
        """
        ids = tokenizer.encode(text)
        before = tokenizer.before_a_text() if isinstance(tokenizer, FileTokenizer) else []
        if self.begin is not None and self.begin not in before:
            before = [self.begin, *before]
        return np.concatenate([np.asarray(before, np.int32), ids]) if before else ids

    def encode_chat(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> np.ndarray:
        """The ids (N,) int32 of messages as the chat template writes them, up to where the model
        is to answer. Names of special tokens in the template's text become those tokens, as in
        Hugging Face's programs also those in a message.

        Raises:
          InputError: there is no template, or it refuses the messages.
        """
        if not isinstance(tokenizer, FileTokenizer):
            raise InputError("--chat: expected a tokenizer with special tokens; leave it out.")
        return tokenizer.encode_marked(self.render(messages))

    def render(self, messages: Sequence[Message]) -> str:
        """Messages, each {'role': ..., 'content': ...}, as the chat template writes them, up to
        where the model is to answer.

        Raises:
          InputError: there is no template, or it is no Jinja, or it refuses the messages.
        """
        if not self.chat_template:
            raise InputError(
                "--chat: this model has no chat template (tokenizer_config.json has none); "
                "leave it out, and the text itself is continued."
            )
        wrong = [m for m in messages if m.get("role") not in _ROLES]
        if wrong or not messages:
            raise InputError(
                f"--chat: expected messages with a role of {', '.join(_ROLES)}, found "
                f"{wrong[:1] or 'none'}."
            )
        jinja2 = require("jinja2", "for chat templates")
        try:
            return (
                _environment()
                .from_string(self.chat_template)
                .render(
                    messages=list(messages),
                    add_generation_prompt=True,
                    tools=None,
                    documents=None,
                    **self.special,
                )
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"--chat: the model's chat template refuses these messages ({first_line(error)}); "
                "give others, or --no-chat."
            ) from None


def _environment() -> Any:
    """What Hugging Face's programs run templates in, as far as templates ask for it."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks an answer for training, and changes no text."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    made.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    made.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return made


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    """The chat template of a folder, '' for none."""
    for name in _TEMPLATES:
        path = folder / name
        if os.path.isfile(path):
            text = decode_text(read_bytes(path, "--model"), f"--model: {shown(path)}", strict=True)
            return text if name.endswith(".jinja") else _chosen(read_json(path, "--model"), path)
    return _chosen(config, folder / _CONFIG)


def _chosen(values: Mapping[str, Any], where: Path) -> str:
    """The template of a file, or of several by name the default one."""
    found = values.get("chat_template") or ""
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default", "")
    if not isinstance(found, str):
        raise InputError(
            f"--model: {shown(where)}: chat_template: expected a text, found {kind_of(found)}; "
            "mend it or take it away."
        )
    return found


def _text(token: Any) -> str:
    """A token's text, which may be given as an object with a 'content'."""
    return str(token.get("content", "") if isinstance(token, dict) else token)
