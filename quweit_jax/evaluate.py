"""`python -m quweit_jax.evaluate`, the same as `python -m quweit_jax evaluate`."""

from quweit_jax.__main__ import main

if __name__ == "__main__":
    main("evaluate")
