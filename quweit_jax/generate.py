"""`python -m quweit_jax.generate`, the same as `python -m quweit_jax generate`."""

from quweit_jax.__main__ import main

if __name__ == "__main__":
    main("generate")
