"""Images that are resized when they are read: like PIL's, streamed like files, and trained on."""

import numpy as np
import pytest
import torch
from PIL import Image

from purify_fast import data
from purify_fast.data.streaming import ResizedImages
from purify_fast.models import build_classifier
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def stored(count=6, height=8, width=8):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count, 3, height, width), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "shape"), [((32, 32), (8, 8)), ((4, 4), (8, 8)), ((16, 16), (8, 12)), ((16, 24), (8, 8))]
)
def test_images_are_resized_as_pillow_does_and_their_center_is_cropped(size, shape):
    images = stored(2, *shape)
    resized = ResizedImages(images, size)[:]
    assert resized.shape == (2, 3, *size) and resized.dtype == torch.uint8
    factor = max(size[0] / shape[0], size[1] / shape[1])
    whole = (round(factor * shape[1]), round(factor * shape[0]))
    for image, ours in zip(images, resized, strict=True):
        pillow = np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize(whole, Image.Resampling.BILINEAR))
        top, left = (whole[1] - size[0]) // 2, (whole[0] - size[1]) // 2
        wanted = pillow[top : top + size[0], left : left + size[1]].transpose(2, 0, 1).astype(int)
        assert np.abs(ours.numpy().astype(int) - wanted).max() <= 1


def test_they_are_read_like_a_file():
    images = ResizedImages(stored(), (16, 16))
    assert torch.equal(images[torch.tensor([4, 1])], images[:][[4, 1]]) and len(images) == 6
    ids = [torch.tensor([0, 3]), torch.tensor([5])]
    for wanted, (got, read) in zip(ids, data.read_ahead(images, ids), strict=True):
        assert torch.equal(got, wanted) and torch.equal(read, images[wanted])
    assert images.digest != ResizedImages(stored(), (16, 8)).digest != ResizedImages(stored() + 1, (16, 8)).digest


def test_a_data_set_is_loaded_at_another_size_and_trained_on(tmp_path):
    x, y = stored(20).permute(0, 2, 3, 1).numpy(), np.arange(20) % 10
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    images = data.load_dataset("small", tmp_path, num_classes=10, image_size=(12, 12))
    assert images.image_shape == (3, 12, 12) and images.to("cpu").x_test[:].shape == (4, 3, 12, 12)
    assert isinstance(data.load_dataset("small", tmp_path, num_classes=10, image_size=(8, 8)).x_train, torch.Tensor)

    def trained(x):
        torch.manual_seed(0)
        task = ClassifierTask(build_classifier("small_cnn", (3, 12, 12), 10, width=2), ClassifierConfig())
        return fit(task, x, images.y_train, FitConfig(1, 5), progress=False)

    assert trained(images.x_train) == trained(images.x_train[:])
