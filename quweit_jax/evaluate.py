"""`python -m quweit_jax.evaluate`, the same as `python -m quweit_jax evaluate`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.evaluate import main

if __name__ == "__main__":
    run(main)
