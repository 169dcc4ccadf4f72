"""`python -m quweit_jax.costs`, the same as `python -m quweit_jax costs`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.costs import main

run(main)
