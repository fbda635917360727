import numpy as np
import pytest


@pytest.fixture
def few_images(tmp_path):
    """Words for the command line: 40 images of two classes in a file, on the CPU."""
    x, y = np.random.RandomState(0).randint(0, 256, (40, 12, 8)).astype(np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return ["--data", str(tmp_path / "small.npz"), "--device", "cpu"]
