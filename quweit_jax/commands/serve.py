"""python -m quweit_jax serve --workdir=runs/x|--model=FOLDER [--port=8000] [--slots=8]"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quweit_jax.commands import cli
from quweit_jax.commands.opening import add_packed, add_source, open_source, text_of
from quweit_jax.errors import InputError, RunError, first_line, require

if TYPE_CHECKING:
    from quweit_jax.deploy.serving.engine import Engine

_LONGEST = 7 * 24 * 3600  # seconds of grace


def main(argv: Sequence[str]) -> int:
    """Serves a language model by OpenAI's API until it is told to stop (Ctrl-C, SIGTERM)."""
    args, overrides = cli.parse(_parser(), argv)
    for name, least in {"slots": 1, "queue": 0, "max_tokens": 1, "grace": 0}.items():
        if not getattr(args, name) >= least:
            raise InputError(f"--{name}: expected {least} or more, found {getattr(args, name)}.")
    if args.grace > _LONGEST:
        raise InputError(f"--grace: expected at most {_LONGEST:,} seconds, found {args.grace:g}.")
    for package in ("starlette", "uvicorn"):
        require(package, "to serve a model")
    from quweit_jax.data.asking import Asking
    from quweit_jax.deploy.serving import web
    from quweit_jax.deploy.serving.engine import Engine
    from quweit_jax.deploy.serving.requests import Offer
    from quweit_jax.deploy.serving.slots import Slots

    with web.bind(args.host, args.port) as listening:
        opened = open_source(args, overrides)
        asking = Asking(text_of(args, opened), opened.prompting)
        slots = Slots(opened.model, opened.deployed(args.packed), args.slots)
        engine = Engine(slots, asking.tokenizer, asking.ends, args.queue)
        name = args.name or os.path.basename(os.path.normpath(args.model or args.workdir))
        offer = Offer(name, asking, slots.vocab_size, slots.context, args.max_tokens, engine.places)
        server = web.make_server(engine, offer, args.grace)
        engine.start()
        server.on_start = lambda: _tell(name, args.host, *listening.getsockname()[:2])
        server.on_stop = lambda: _tell_end(name, engine, args.grace)
        try:
            server.run(sockets=[listening])
        finally:
            engine.close()
    if engine.failure is not None:
        raise RunError(
            f"serve: the model has failed: {first_line(engine.failure)}; start it again."
        )
    return 0


def _tell(name: str, asked: str, host: str, port: int) -> None:
    """Where it listens; with a warning if that is not this machine alone."""
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{port}/v1; Ctrl-C stops it", flush=True)
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        print(
            f"warning: --host={asked}: whoever reaches this address may use the model; there are "
            "no passwords, and nothing is encrypted",
            file=sys.stderr,
        )


def _tell_end(name: str, engine: Engine, grace: float) -> None:
    """That it stops, and what it waits for; nothing of a model that has failed."""
    if engine.failure is not None:
        return
    counts, said = engine.counts(), f"stopping {name}"
    if under_way := counts["busy"] + counts["waiting"]:
        said += f"; answers under way: {under_way}, which have {grace:g} seconds"
        said += " (Ctrl-C ends them at once)"
    with contextlib.suppress(OSError):  # nobody reads it
        print(said, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("serve", "Serves a trained language model by OpenAI's API.")
    add_source(parser)
    add = parser.add_argument
    add(
        "--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)"
    )
    add("--port", type=int, default=8000, help="0: any that is free")
    add("--name", help="what clients call the model (default: the last part of its path)")
    add("--slots", type=int, default=8, help="answers that are made at once")
    add("--queue", type=int, default=64, help="answers that may wait; more are refused (429)")
    add("--max_tokens", type=int, default=1024, help="the most that an answer may have")
    add("--grace", type=float, default=30, help="seconds for answers under way, at the end")
    add_packed(parser)
    return parser
