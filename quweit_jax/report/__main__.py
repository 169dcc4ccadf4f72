"""`python -m quweit_jax.report`, the same as `python -m quweit_jax report`."""

from quweit_jax.__main__ import main

main("report")
