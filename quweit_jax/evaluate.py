"""`python -m quweit_jax.evaluate`, the same as `python -m quweit_jax evaluate`."""

from quweit_jax.commands.evaluate import console, main

__all__ = ["console", "main"]

if __name__ == "__main__":
    console()
