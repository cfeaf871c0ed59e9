"""Small pictures of noise, for processes that must not import the package."""

import numpy as np
from PIL import Image


def picture(seed, width=32, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
