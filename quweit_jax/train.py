"""`python -m quweit_jax.train`, the same as `python -m quweit_jax train`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.train import main

if __name__ == "__main__":
    run(main)
