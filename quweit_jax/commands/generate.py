"""python -m quweit_jax generate --workdir=runs/x|--model=FOLDER --prompt="To be" [--stop=...]"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quweit_jax.commands import cli
from quweit_jax.commands.opening import add_packed, add_source, open_source, text_of
from quweit_jax.errors import InputError
from quweit_jax.reading import clean_text, decode_text, read_bytes

if TYPE_CHECKING:
    from quweit_jax.data.prompting import Prompting
    from quweit_jax.data.tokenizers import Tokenizer


def main(argv: Sequence[str]) -> int:
    """Continues prompts with a trained language model; a single one streams to the terminal. Speed
    is told on standard error.
    """
    args, overrides = cli.parse(_parser(), argv)
    from quweit_jax.deploy.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    if args.samples < 1:
        raise InputError(f"--samples: expected 1 or more, found {args.samples}.")
    prompts = _prompts(args)
    opened = open_source(args, overrides)
    model, tokenizer = opened.model, text_of(args, opened)
    variables = opened.deployed(args.packed)
    texts = [prompt for prompt in prompts for _ in range(args.samples)]
    seeds = [args.seed + i for _ in prompts for i in range(args.samples)]
    asked = _Asked(tokenizer, opened.prompting, args.chat, args.system)
    work = _Work(args, model, variables, asked, sampling, texts, seeds)
    work.stream() if len(texts) == 1 and not args.json else work.whole()
    work.tell_speed()
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Continues prompts with a trained language model."
    parser = cli.parser("generate", about, "json")
    add_source(parser)
    add = parser.add_argument
    add(
        "--prompt",
        action="append",
        help="the text to continue (default: a new line); several times for a batch; - reads it "
        "from standard input",
    )
    add("--prompts", help="a file with a prompt a line; - is standard input")
    add("--samples", type=int, default=1, help="texts for each prompt, with seeds of their own")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take the prompt for a message and answer it, by the model's chat template (default: "
        "where the model has one)",
    )
    add("--system", default="", help="of a chat, the system's message before the prompt's")
    add("--max_tokens", type=int, default=300, help="how many tokens to add")
    add("--stop", action="append", default=[], help="end before this text; may be given again")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest; 1: as trained")
    add("--top_k", type=int, default=0, help="sample among the k likeliest tokens only (0: all)")
    add("--top_p", type=float, default=1.0, help="... that have this probability together (1: all)")
    add("--min_p", type=float, default=0.0, help="... this many times as likely as the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: against what was said")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add_packed(parser)
    return parser


def _prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, as texts of the training data are read.

    Raises:
      InputError: one is empty, or a file that cannot be read.
    """
    if args.prompts and args.prompt:
        raise InputError("--prompt, --prompts: give one of them, found both.")
    if args.prompts:
        given = [line for line in _read("--prompts", args.prompts).splitlines() if line]
    else:
        given = [_read("--prompt", p) if p == "-" else clean_text(p) for p in args.prompt or ["\n"]]
    if not given or not all(given):
        where = "--prompts" if args.prompts else "--prompt"
        raise InputError(f"{where}: expected at least one character, found none.")
    return given


def _read(option: str, path: str) -> str:
    if path == "-":
        return decode_text(sys.stdin.buffer.read(), f"{option}: standard input")
    return decode_text(read_bytes(Path(path), option), f"{option}: {path}")


class _Asked:
    """What a prompt is: a text to continue, or a message to answer.

    chat: None: a message where the model has a template.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompting: Prompting | None, chat: bool | None, system: str
    ):
        from quweit_jax.data.asking import Asking

        self.asking, self.tokenizer = Asking(tokenizer, prompting), tokenizer
        self.chat = self.asking.has_template if chat is None else chat
        self.system = [{"role": "system", "content": clean_text(system)}] if system else []
        if self.chat and prompting is None:
            raise InputError("--chat: a run has no chat template; leave it out.")
        if system and not self.chat:
            raise InputError("--system: expected a chat; this model has no chat template.")
        self.ends = self.asking.ends

    def encode(self, prompt: str) -> np.ndarray:
        """The ids (T,) int32 of one prompt."""
        if not self.chat:
            return self.asking.encode(prompt)
        return self.asking.encode_chat([*self.system, {"role": "user", "content": prompt}])


class _Work:
    """Prompts that are continued, and how long it takes."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: Any,
        variables: Any,
        asked: _Asked,
        sampling: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
    ):
        self.args, self.model, self.variables, self.asked = args, model, variables, asked
        self.sampling, self.prompts, self.seeds = sampling, prompts, seeds
        self.tokenizer = asked.tokenizer
        self.ids: list[np.ndarray] = [asked.encode(prompt) for prompt in prompts]
        self.times: list[float] = []
        self.made = 0

    def stream(self) -> None:
        """The one text, as it comes."""
        from quweit_jax.deploy.generate import cut_at, stream_text

        sys.stdout.write("" if self.asked.chat else self.prompts[0])
        tokens = (row[0] for row in self._rows() if row[0] is not None)
        for piece in cut_at(stream_text(self.tokenizer, tokens, self.ids[0]), self.args.stop):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()

    def whole(self) -> None:
        """Each text when all are done."""
        found: list[list[int]] = [[] for _ in self.prompts]
        for row in self._rows(found):
            for tokens, token in zip(found, row):
                tokens += [token] if token is not None else []
        for number, (prompt, seed) in enumerate(zip(self.prompts, self.seeds)):
            text = self._text(number, found[number])
            if self.args.json:
                said = {"prompt": prompt, "text": text, "seed": seed, "tokens": len(found[number])}
                print(json.dumps(said))
            else:
                shown = f"{prompt}\n---\n{text}" if self.asked.chat else f"{prompt}{text}"
                print(f"=== {number + 1} of {len(self.prompts)}, seed {seed}\n{shown}")

    def _text(self, number: int, tokens: Sequence[int]) -> str:
        from quweit_jax.deploy.generate import cut_at, stream_text

        pieces = stream_text(self.tokenizer, iter(tokens), self.ids[number])
        return "".join(cut_at(pieces, self.args.stop))

    def _rows(self, found: Sequence[Sequence[int]] = ()) -> Iterator[list[int | None]]:
        """New tokens a row, timed. found: where they are collected, if stops are to end rows."""
        from quweit_jax.deploy.generate import generate_batch

        def ends(number: int, tokens: Sequence[int]) -> bool:
            text = self.tokenizer.decode(list(tokens))
            return any(stop in text for stop in self.args.stop if stop)

        self.times = [time.perf_counter()]
        for row in generate_batch(
            self.model,
            self.variables,
            self.ids,
            self.args.max_tokens,
            sampling=self.sampling,
            seeds=self.seeds,
            end_of_text=self.asked.ends,
            ends=ends if self.args.stop and found else None,
        ):
            self.times.append(time.perf_counter())
            self.made += sum(token is not None for token in row)
            yield row

    def tell_speed(self) -> None:
        """Time to the first token and tokens a second after it, on standard error."""
        if len(self.times) < 2:
            return
        begun, first, last = self.times[0], self.times[1], self.times[-1]
        form = "packed" if "packed" in self.variables else "not packed"
        said = f"first token after {first - begun:.2f} s (with compiling); {self.made} tokens"
        if len(self.times) > 2:
            rest = self.made * (1 - 1 / (len(self.times) - 1))
            said += f", {rest / (last - first):,.1f} a second"
        chat = "; by the chat template (--no-chat continues the text)" * self.asked.chat
        print(f"{said}; {form}{chat}", file=sys.stderr)
