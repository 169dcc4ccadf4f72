"""`python -m quweit_jax.report`, the same as `python -m quweit_jax report`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.report import main

run(main)
