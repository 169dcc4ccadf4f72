"""`python -m quweit_jax.export_model`, the same as `python -m quweit_jax export`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.export import main

if __name__ == "__main__":
    run(main)
