"""Image files for tests of data sets."""

import numpy as np
from PIL import Image


def picture(path, seed, size=(10, 8), mode="RGB"):
    """A random image of (H, W), PNG or JPEG; returns its pixels as Pillow reads them, [3, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(levels).convert(mode).save(path)
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
