"""`python -m quweit_jax.sweep`, the same as `python -m quweit_jax sweep`."""

from quweit_jax.commands.sweep import console, main

__all__ = ["console", "main"]

if __name__ == "__main__":
    console()
