"""`python -m quweit_jax.report`, the same as `python -m quweit_jax report`."""

from quweit_jax.commands.report import console

console()
