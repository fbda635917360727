import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from purify_fast import data

RNG = np.random.default_rng(0)


def arrays(n=12, m=6, shape=(8, 9), classes=3, **replace):
    images = {f"x_{p}": RNG.integers(0, 256, (k, *shape), dtype=np.uint8) for p, k in (("train", n), ("test", m))}
    labels = {f"y_{p}": np.arange(k) % classes for p, k in (("train", n), ("test", m))}
    return images | labels | replace


def saved(folder, **arrays_):
    np.savez(folder / "set.npz", **arrays_)
    return folder / "set.npz"


def test_digits():
    d = data.load_dataset("digits")
    assert d.x_train.shape == (1297, 1, 16, 16) and d.x_test.shape == (500, 1, 16, 16)
    assert d.x_train.dtype == torch.uint8 and d.y_train.dtype == torch.int64
    assert (d.name, d.num_classes, d.image_shape) == ("digits", 10, (1, 16, 16))


def test_the_digits_are_the_same_bits_and_need_no_other_package():
    """The zoo's models were trained on these very bits, which scikit-learn's data set gave before."""
    code = (
        "import hashlib, sys\n"
        "sys.modules['sklearn'] = None\n"
        "from purify_fast.data import load_dataset\n"
        "d = load_dataset('digits')\n"
        "names = ('x_train', 'y_train', 'x_test', 'y_test')\n"
        "print(hashlib.sha256(b''.join(getattr(d, name).numpy().tobytes() for name in names)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout.strip() == "0fb2d8f147eccb9098cd779a58448e6786336a76cba75042365d2e01b33225ae"


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (1, 8, 9), (8, 9, 3), (3, 8, 9)])
def test_layouts(tmp_path, shape):
    a = arrays(shape=shape)
    d = data.load_dataset(saved(tmp_path, **a))
    channels = 3 if 3 in shape else 1
    assert d.image_shape == (channels, 8, 9) and d.num_classes == 3 and d.name == "set"
    want = a["x_test"]
    if len(shape) == 2:
        want = want[:, None]
    elif shape[-1] in (1, 3):
        want = want.transpose(0, 3, 1, 2)
    assert np.array_equal(d.x_test.numpy(), want) and d.x_test.is_contiguous()
    assert np.array_equal(d.y_train.numpy(), a["y_train"])


def test_two_classes_column_labels_and_override(tmp_path):
    a = arrays(classes=2)
    a["y_train"] = a["y_train"][:, None].astype(np.uint8)
    d = data.load_dataset(saved(tmp_path, **a))
    assert d.num_classes == 2 and d.y_train.shape == (12,) and d.y_train.dtype == torch.int64
    assert data.load_dataset(tmp_path / "set.npz", num_classes=5).num_classes == 5
    only = a | {"y_train": np.full(12, 3), "y_test": np.full(6, 1)}
    assert data.load_dataset(saved(tmp_path, **only), num_classes=4).num_classes == 4


def with_(array, index, value):
    array = array.copy()
    array[index] = value
    return array


X, Y = arrays()["x_test"], arrays()["y_test"]
BAD = {
    "int images": ({"x_test": X.astype(np.int32)}, "x_test must be uint8, got int32"),
    "float images": ({"x_test": (X / 255).astype(np.float32)}, r"x_test must be uint8, got float32: .*\(255 \* x\)"),
    "flat": ({"x_test": X.reshape(6, -1)}, r"x_test must be \[N, H, W\].*\[6, 72\]"),
    "no channels": (
        {"x_test": X.reshape(6, 8, 3, 3)[:, :, :2, :2]},
        r"x_test has the shape .*neither.* x\[\.\.\., :3\]",
    ),
    "two channels": ({"x_test": np.zeros((6, 3, 8, 3), np.uint8)}, "x_test has the shape .*both"),
    "other size": ({"x_test": X[:, :7]}, "x_test must have images of the shape"),
    "other channels": ({"x_test": np.stack([X] * 3, 1)}, "x_test must have images of the shape"),
    "empty": ({"x_test": X[:0], "y_test": Y[:0]}, "x_test is empty"),
    "no labels": ({"y_test": Y[:0]}, "y_test is empty"),
    "length": ({"y_test": Y[:5]}, "y_test must have a label for each of the 6 images of x_test, got 5"),
    "float labels": ({"y_test": Y.astype(float)}, "y_test must be integers, got float64: .*astype"),
    "one-hot labels": ({"y_test": np.eye(3)[Y]}, r"y_test must be \[N\].* y\.argmax\(1\)"),
    "negative": ({"y_test": with_(Y, 4, -1)}, r"y_test\[4\] is -1"),
    "huge": ({"y_test": with_(Y.astype(np.uint64), 4, 2**63)}, r"y_test\[4\] is 9223372036854775808"),
    "gap": ({"y_test": with_(Y, 3, 4)}, "labels go up to 4, but no image has label 3"),
    "objects": ({"y_test": np.array([0, 1, None, 1, 2, 0], dtype=object)}, "is damaged, or not"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path, case):
    replace, message = BAD[case]
    path = saved(tmp_path, **arrays() | replace)
    with pytest.raises(ValueError, match=message):
        data.load_dataset(path)


def test_missing_arrays_and_other_files(tmp_path):
    path = saved(tmp_path, x_train=X, y_train=Y)
    with pytest.raises(ValueError, match="lacks x_test, y_test"):
        data.load_dataset(path)
    path = saved(tmp_path, **arrays())
    with pytest.raises(ValueError, match=r"y_train\[2\] is 2: .*0 \.\. 1"):
        data.load_dataset(path, num_classes=2)
    path = saved(tmp_path, **arrays(classes=1))
    with pytest.raises(ValueError, match=r"y_train and y_test must .* two classes.* 0$"):
        data.load_dataset(path)
    (tmp_path / "text.npz").write_text("not a zip file")
    with pytest.raises(ValueError, match=r"stream=True needs an image folder, but .*text\.npz"):
        data.load_dataset(tmp_path / "text.npz", stream=True)
    with pytest.raises(ValueError, match=r"text\.npz"):
        data.load_dataset(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ValueError, match=r"one\.npy is damaged, or not .*numpy\.savez"):
        data.load_dataset(tmp_path / "one.npy")


def test_missing_file_says_where_and_what(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("nowhere", tmp_path)
    text = str(error.value)
    assert str(tmp_path / "nowhere.npz") in text and "x_train" in text and "'digits'" in text
    assert re.search(r"looked for .*, .*, ", text)


def test_to(tmp_path):
    d = data.load_dataset(saved(tmp_path, **arrays()))
    assert repr(d) == "DataSet('set', 12 training and 6 held-out images of 1 x 8 x 9, 3 classes, on cpu)"
    there = d.to("meta")
    assert there.x_test.device.type == there.y_train.device.type == "meta" and there.image_shape == d.image_shape
    with pytest.raises(AttributeError):
        d.name = "other"


def test_to_float():
    levels = data.to_float(torch.arange(256, dtype=torch.uint8))
    assert levels.dtype == torch.float32 and float(levels[255]) == 1 and float(levels[51]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="uint8"):
        data.to_float(levels)
