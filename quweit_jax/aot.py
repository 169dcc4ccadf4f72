"""`python -m quweit_jax.aot`, the same as `python -m quweit_jax compile_tpu`."""

from quweit_jax.commands.cli import run
from quweit_jax.commands.compile_tpu import main

if __name__ == "__main__":
    run(main)
