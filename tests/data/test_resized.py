"""Images of arrays at another size, like PIL's."""

import numpy as np
import pytest
import torch
from PIL import Image

from purify_fast import data
from purify_fast.data.datasets import _resized


def stored(count=6, height=8, width=8):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count, 3, height, width), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "shape"), [((32, 32), (8, 8)), ((4, 4), (8, 8)), ((16, 16), (8, 12)), ((16, 24), (8, 8))]
)
def test_images_are_resized_as_pillow_does_and_their_center_is_cropped(size, shape):
    images = stored(2, *shape)
    resized = _resized(images, size)
    assert resized.shape == (2, 3, *size) and resized.dtype == torch.uint8
    factor = max(size[0] / shape[0], size[1] / shape[1])
    whole = (round(factor * shape[1]), round(factor * shape[0]))
    for image, ours in zip(images, resized, strict=True):
        pillow = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(whole, Image.Resampling.BILINEAR))
        top, left = (whole[1] - size[0]) // 2, (whole[0] - size[1]) // 2
        wanted = pillow[top : top + size[0], left : left + size[1]].transpose(2, 0, 1).astype(int)
        assert np.abs(ours.numpy().astype(int) - wanted).max() <= 1


def test_a_data_set_is_loaded_at_another_size(tmp_path):
    x, y = stored(20).permute(0, 2, 3, 1).numpy(), np.arange(20) % 10
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    images = data.load_dataset("small", tmp_path, num_classes=10, image_size=(12, 12))
    assert images.image_shape == (3, 12, 12) and images.x_test.shape == (4, 3, 12, 12)
    assert torch.equal(images.x_train[:4], images.x_test) and len(images.x_train) == 20
