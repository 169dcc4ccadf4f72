"""`python -m quweit_jax.export_model`, the same as `python -m quweit_jax export`."""

from quweit_jax.commands.export import console, main

__all__ = ["console", "main"]

if __name__ == "__main__":
    console()
