"""Data sets: the digits, and files of a user's own: what is read of them, at which size, and what is refused."""

import hashlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from purify_fast import cli, data
from purify_fast.cli.show import Info
from purify_fast.data.datasets import _resized
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

RNG = np.random.default_rng(0)


def arrays(n=12, m=6, shape=(8, 9), classes=3, **replace):
    images = {f"x_{p}": RNG.integers(0, 256, (k, *shape), dtype=np.uint8) for p, k in (("train", n), ("test", m))}
    labels = {f"y_{p}": np.arange(k) % classes for p, k in (("train", n), ("test", m))}
    return images | labels | replace


def saved(folder, **arrays_):
    np.savez(folder / "set.npz", **arrays_)
    return folder / "set.npz"


def test_the_digits_are_the_same_bits_and_need_no_other_package(monkeypatch):
    """The zoo's models were trained on these very bits, which scikit-learn's data set gave before."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    d = data.load_dataset("digits")
    arrays = [part.numpy().tobytes() for part in (d.x_train, d.y_train, d.x_test, d.y_test)]
    found = hashlib.sha256(b"".join(arrays)).hexdigest()
    assert found == "0fb2d8f147eccb9098cd779a58448e6786336a76cba75042365d2e01b33225ae"


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (1, 8, 9), (8, 9, 3), (3, 8, 9)])
def test_layouts(tmp_path, shape):
    a = arrays(shape=shape)
    d = data.load_dataset(saved(tmp_path, **a))
    channels = 3 if 3 in shape else 1
    assert d.image_shape == (channels, 8, 9) and d.num_classes == 3 and d.name == "set"
    last = shape[-1] in (1, 3)
    want = a["x_test"].transpose(0, 3, 1, 2) if last else a["x_test"].reshape(6, channels, 8, 9)
    assert np.array_equal(d.x_test.numpy(), want) and d.x_test.is_contiguous()
    assert np.array_equal(d.y_train.numpy(), a["y_train"]) and d.to("meta").y_test.device.type == "meta"
    column = a | {"y_train": a["y_train"][:, None].astype(np.uint8)}
    d = data.load_dataset(saved(tmp_path, **column), num_classes=5)
    assert d.num_classes == 5 and d.y_train.shape == (12,) and d.y_train.dtype == torch.int64


X, Y = arrays()["x_test"], arrays()["y_test"]
IMAGES, LABELS = r"x_test must be uint8 \[N, H, W\]", r"y_test must be integers \[N\]"
BAD = {
    "int images": ({"x_test": X.astype(np.int32)}, IMAGES),
    "float images": ({"x_test": (X / 255).astype(np.float32)}, rf"{IMAGES}.*\(255 \* x\)"),
    "flat": ({"x_test": X.reshape(6, -1)}, rf"{IMAGES}.* \[6, 72\]"),
    "empty": ({"x_test": X[:0], "y_test": Y[:0]}, IMAGES),
    "no channels": ({"x_test": X.reshape(6, 8, 3, 3)[:, :, :2, :2]}, "x_test must have 1 or 3 channels.* neither"),
    "two channels": ({"x_test": np.zeros((6, 3, 8, 3), np.uint8)}, "x_test must have 1 or 3 channels.* both"),
    "other size": ({"x_test": X[:, :7]}, "x_test must have images of the shape"),
    "length": ({"y_test": Y[:5]}, "y_test must have a label for each of the 6 images, got 5"),
    "float labels": ({"y_test": Y.astype(float)}, LABELS),
    "one-hot labels": ({"y_test": np.eye(3, dtype=int)[Y]}, LABELS),
    "negative": ({"y_test": Y - 1}, "y_test must have labels from 0 to .* got -1 to 1"),
    "huge": ({"y_test": Y.astype(np.uint64) + np.uint64(2**63)}, "y_test must have labels from 0 to "),
    "gap": ({"y_test": 2 * Y}, r"every label .* must occur, got 4 labels up to 4: pass num_classes"),
    "one class": ({"y_train": 0 * arrays()["y_train"], "y_test": 0 * Y}, "every label .* got 1 labels up to 0"),
    "missing": ({"x_test": None, "y_test": None}, "lacks x_test, y_test"),
    "more labels": ({}, "num_classes is 2, but the labels go up to 2", ("num_classes", 2)),
    "size": ({}, "image_size must be", ("image_size", (0, 4))),
    "objects": ({"y_test": np.array([0, 1, None, 1, 2, 0], dtype=object)}, "is damaged, or not"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path, case):
    replace, message, *options = BAD[case]
    given = {name: value for name, value in (arrays() | replace).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        data.load_dataset(saved(tmp_path, **given), **dict(options))


def test_other_files(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip file")
    np.save(tmp_path / "one.npy", X)
    for name in ("text.npz", "one.npy"):
        with pytest.raises(ValueError, match=rf"{name} is damaged, or not .*numpy\.savez"):
            data.load_dataset(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"'digits'.*x_train") as error:
        data.load_dataset("nowhere", tmp_path)
    assert str(tmp_path / "nowhere.npz") in str(error.value)


def test_held_out_images_alone(tmp_path):
    path = saved(tmp_path, x_test=X, y_test=Y)
    alone = data.load_dataset(path, train=False)
    assert alone.num_classes == 3 and len(alone.x_test) == 6 and alone.x_train.shape == (0, 1, 8, 9)
    resized = data.load_dataset("digits", train=False, image_size=(8, 8))
    assert resized.image_shape == (1, 8, 8) and (len(resized.x_train), len(resized.x_test)) == (0, 500)


def test_the_names_of_the_classes(tmp_path):
    assert data.load_dataset("digits").classes == tuple("0123456789")
    for classes, want in ((["no", "so", "yes"], ("no", "so", "yes")), (2, None), ([0, 1, 2], None)):
        assert data.load_dataset(saved(tmp_path, **arrays(), classes=classes)).classes == want


def stored(count=6, height=8, width=8):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count, 3, height, width), dtype=np.uint8))


SIZES = [((32, 32), (8, 8)), ((4, 4), (8, 8)), ((16, 16), (8, 12)), ((16, 24), (8, 8))]


@pytest.mark.parametrize(("size", "shape"), SIZES)
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


# -- data that disappear or change under a run, and models and images that cannot be trained on ------------------------


def task():
    torch.manual_seed(0)
    return ClassifierTask(SmallCNN(3, 2, (8, 8), 2), ClassifierConfig())


def test_values_outside_of_0_to_1_by_rounding_are_clamped():
    """A loader's images that were normalized and brought back train as the images themselves."""
    x, y = torch.linspace(0, 1, 8 * 3 * 64).view(8, 3, 8, 8), torch.arange(8) % 2
    ended = []
    for images in (x + 5e-5, (x + 5e-5).clamp(0, 1)):
        model = task()
        fit(model, [(images, y), (images, y)], None, FitConfig(1), progress=False)
        ended.append(model.model.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    with pytest.raises(ValueError, match=r"got values from 0.0002 to 1.0002: .* after a resize .* x.clamp\(0, 1\)"):
        fit(task(), [(x + 2e-4, y)], None, FitConfig(1), progress=False)


def test_an_error_of_the_package_is_raised_and_too_little_memory_is_told(monkeypatch, capsys):
    errors = [KeyError("a bug"), torch.OutOfMemoryError("CUDA out of memory")]

    def broken(self):
        raise errors.pop(0)

    monkeypatch.setattr(Info, "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["info"])
    assert cli.main(["info"]) == 2
    printed = capsys.readouterr().err
    assert "not enough memory: CUDA out of memory" in printed and "--batch-size" in printed
