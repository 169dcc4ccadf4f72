"""`python -m quweit_jax.generate`, the same as `python -m quweit_jax generate`."""

from quweit_jax.commands.generate import console, main

__all__ = ["console", "main"]

if __name__ == "__main__":
    console()
