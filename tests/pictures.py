"""Images made up for tests."""

import numpy as np


def picture(height=8, width=8, channels=3, seed=0):
    """Random pixels, uint8 (height, width, channels); the same seed gives the same."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
