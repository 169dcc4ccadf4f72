"""`python -m quweit_jax.generate`, the same as `python -m quweit_jax generate`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.generate import main

if __name__ == "__main__":
    run(main)
