"""`python -m quweit_jax.train`, the same as `python -m quweit_jax train`."""

from quweit_jax.__main__ import main

if __name__ == "__main__":
    main("train")
