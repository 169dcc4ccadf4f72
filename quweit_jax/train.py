"""`python -m quweit_jax.train`, the same as `python -m quweit_jax train`."""

from quweit_jax.commands.train import console, main

__all__ = ["console", "main"]

if __name__ == "__main__":
    console()
