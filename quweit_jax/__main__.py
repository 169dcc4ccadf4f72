"""`python -m quweit_jax COMMAND ...`, installed as `quweit COMMAND ...`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from quweit_jax.commands import cli
from quweit_jax.errors import InputError, nearest

COMMANDS = {
    "train": "trains a model, or goes on with a run where it ended",
    "evaluate": "evaluates a run on the whole validation split, or on zero-shot tasks",
    "generate": "continues a prompt with a trained language model",
    "serve": "serves a language model to clients of OpenAI's API",
    "sweep": "trains every point of an experiment's sweep and writes one table",
    "costs": "counts what one inference costs: operations, look-ups, bytes and energy",
    "report": "compares runs in one HTML page",
    "pack": "writes a run's model into one folder, as deployed",
    "export": "writes a run as one StableHLO file that plain JAX runs",
    "compile_tpu": "compiles a training step for TPUs that are not there",
}


def command(argv: Sequence[str]) -> int:
    """Runs the command that the first argument names; only then JAX is imported."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: python -m quweit_jax COMMAND [options]\n")
        for known, what in COMMANDS.items():
            print(f"  {known:<12} {what}")
        print("\nEach tells its options: python -m quweit_jax COMMAND --help")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise InputError(f"expected a command, found '{name}'.{nearest(name, COMMANDS)}")
    return importlib.import_module(f"quweit_jax.commands.{name}").main(argv[1:])


def main(*before: str) -> None:
    """Runs the command line of this process; `before` is put before its arguments."""
    cli.run(lambda argv: command([*before, *argv]))


if __name__ == "__main__":
    main()
