"""`python -m quweit_jax.sweep`, the same as `python -m quweit_jax sweep`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.sweep import main

if __name__ == "__main__":
    run(main)
