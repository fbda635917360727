"""Image files for tests of data sets."""

import numpy as np
from PIL import Image


def picture(path, seed, size=(10, 8), mode="RGB"):
    """A random image of (H, W), PNG or JPEG; returns its pixels as Pillow reads them, [3, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(levels).convert(mode).save(path)
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def folder(root, train=5, test=2, sizes=((10, 8),), held_out="val", ending="png"):
    """Two classes; returns the pixels by split, in the order of the sorted names."""
    made = {"train": [], "test": []}
    for part, n in (("train", train), (held_out, test)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(n):
                seed = 1000 * (part == "train") + 100 * label + i
                path = root / part / name / f"{i:03d}.{ending}"
                made["train" if part == "train" else "test"].append(picture(path, seed, sizes[seed % len(sizes)]))
    return made


def write_bars(path, count, held_out, height, width):
    """A data set of a user's own: two classes, grey, one light in its upper half and one in its lower half."""
    state = np.random.RandomState(0)

    def split(n):
        y = np.arange(n) % 2
        x = state.randint(0, 120, (n, height, width))
        x[y == 0, : height // 2] += 100
        x[y == 1, height // 2 :] += 100
        return x.astype(np.uint8), y

    (x, y), (x_test, y_test) = split(count), split(held_out)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return str(path)
