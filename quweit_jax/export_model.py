"""`python -m quweit_jax.export_model`, the same as `python -m quweit_jax export`."""

from quweit_jax.__main__ import main

if __name__ == "__main__":
    main("export")
