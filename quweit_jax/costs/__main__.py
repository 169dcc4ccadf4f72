"""`python -m quweit_jax.costs`, the same as `python -m quweit_jax costs`."""

from quweit_jax.__main__ import main

main("costs")
