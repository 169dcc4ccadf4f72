"""`python -m quweit_jax COMMAND ...`, and the installed `quweit COMMAND ...`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "train a model, or go on with a run",
    "evaluate": "evaluate a run on the whole validation split",
    "generate": "continue a prompt with a trained language model",
    "sweep": "train every point of an experiment's sweep",
    "costs": "count what one inference costs",
    "report": "compare runs in one page",
    "export": "write a run as one StableHLO file",
    "compile_tpu": "compile a training step for a TPU that is not there",
}


def main() -> None:
    """Runs the command that the first argument names."""
    from quweit_jax.errors import nearest

    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m quweit_jax COMMAND [--help] ...\n\ncommands:")
        print("\n".join(f"  {command:<12} {about}" for command, about in COMMANDS.items()))
        return
    if name not in COMMANDS:
        known = nearest(name, COMMANDS)
        print(f"error: expected a command, found '{name}'.{known}", file=sys.stderr)
        sys.exit(2)
    from quweit_jax.commands import cli

    cli.run(importlib.import_module(f"quweit_jax.commands.{name}").main, rest)


if __name__ == "__main__":
    main()
