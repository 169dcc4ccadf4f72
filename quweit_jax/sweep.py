"""`python -m quweit_jax.sweep`, the same as `python -m quweit_jax sweep`."""

from quweit_jax.__main__ import main

if __name__ == "__main__":
    main("sweep")
