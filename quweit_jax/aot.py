"""`python -m quweit_jax.aot`, the same as `python -m quweit_jax compile_tpu`."""

from quweit_jax.__main__ import main

if __name__ == "__main__":
    main("compile_tpu")
