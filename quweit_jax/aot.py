"""`python -m quweit_jax.aot`, the same as `python -m quweit_jax compile_tpu`."""

from quweit_jax.commands.compile_tpu import console, main

__all__ = ["console", "main"]

if __name__ == "__main__":
    console()
