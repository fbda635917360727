"""Small files in the official formats, with checksums to match where torchvision asks for them."""

import gzip
import hashlib
import pickle
import struct
import urllib.request

import numpy as np
import pytest
import torch
from torchvision import datasets

from purify_fast import data

RNG = np.random.default_rng(0)
N = {"train": 12, "t10k": 6}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing but file:// can be opened."""
    real = urllib.request.urlopen

    def urlopen(request, *args, **options):
        assert request.full_url.startswith("file:"), f"{request.full_url} was asked for"
        response = real(request, *args, **options)
        response.length = None  # http's responses have one
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def idx_file(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, compressed=False):
    """Files as MNIST's; returns the arrays."""
    folder.mkdir(parents=True)
    arrays = {}
    for part, n in N.items():
        arrays[part] = RNG.integers(0, 256, (n, 5, 4), dtype=np.uint8), (np.arange(n) % 3).astype(np.uint8)
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            name = f"{part}-{kind}-ubyte" + ".gz" * compressed
            (folder / name).write_bytes(gzip.compress(idx_file(array)) if compressed else idx_file(array))
    return arrays


def same(d, arrays, name):
    for part, (x, y) in {"train": arrays["train"], "test": arrays["t10k"]}.items():
        assert np.array_equal(getattr(d, f"x_{part}").numpy()[:, 0], x)
        assert getattr(d, f"y_{part}").tolist() == y.tolist()
    assert d.x_train.dtype == torch.uint8 and d.y_train.dtype == torch.int64
    assert (d.name, d.num_classes, d.image_shape) == (name, 3, (1, 5, 4))


IDX_FILES = [("mnist", "MNIST/raw", "0"), ("fashion_mnist", "FashionMNIST/raw", "T-shirt/top")]


@pytest.mark.parametrize(("name", "place", "first"), IDX_FILES)
def test_idx(tmp_path, monkeypatch, name, place, first):
    arrays = write_idx(tmp_path / place)
    d = data.load_dataset(name, tmp_path)
    same(d, arrays, name)
    assert d.classes[0] == first
    alone = data.load_dataset(name, tmp_path, train=False)
    assert len(alone.x_train) == 0 and torch.equal(alone.x_test, d.x_test)
    # the current folder is the default
    monkeypatch.chdir(tmp_path)
    same(data.load_dataset(name), arrays, name)


def test_an_npz_comes_first(tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    x, y = RNG.integers(0, 256, (4, 2, 2), dtype=np.uint8), np.arange(4) % 2
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert data.load_dataset("mnist", tmp_path).image_shape == (1, 2, 2)


@pytest.mark.parametrize("content", [None, b"neither"])
def test_a_damaged_idx_file_is_refused(tmp_path, content):
    write_idx(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(content or path.read_bytes()[:-9])
    with pytest.raises(FileNotFoundError, match=f"no data set 'mnist': .*{tmp_path} as torchvision lays them out: "):
        data.load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "tiny_imagenet"])
def test_what_is_missing_is_said_and_nothing_is_downloaded(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, tmp_path)
    advice = "download it yourself" if name == "tiny_imagenet" else "give download=True (--download)"
    assert f"no data set '{name}': {advice}" in str(error.value) and str(tmp_path / f"{name}.npz") in str(error.value)
    assert not list(tmp_path.iterdir())


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder, monkeypatch, name):
    """Pickled batches in the official layout, their checksums given to torchvision's reader; images NCHW and labels."""
    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    place = folder / reader.base_folder
    place.mkdir(parents=True)
    made = {}
    for split in ("train_list", "test_list"):
        listed, images, labels = [], [], []
        for file, _ in getattr(reader, split):
            images.append(RNG.integers(0, 256, (4, 3072), dtype=np.uint8))
            labels += [0, 1, 2, 1]
            (place / file).write_bytes(pickle.dumps({"data": images[-1], key: [0, 1, 2, 1], "coarse_labels": [9] * 4}))
            listed.append([file, md5(place / file)])
        monkeypatch.setattr(reader, split, listed)
        made[split] = np.concatenate(images).reshape(-1, 3, 32, 32), labels
    file = place / reader.meta["filename"]
    file.write_bytes(pickle.dumps({reader.meta["key"]: ["a", "b", "c"]}))
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(file)})
    return made


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    made = write_cifar(tmp_path, monkeypatch, name)
    d = data.load_dataset(name, tmp_path)
    assert np.array_equal(d.x_train.numpy(), made["train_list"][0]) and d.y_train.tolist() == made["train_list"][1]
    assert np.array_equal(d.x_test.numpy(), made["test_list"][0]) and d.y_test.tolist() == made["test_list"][1]
    assert (d.name, d.num_classes) == (name, 3)


def test_download(tmp_path, monkeypatch):
    arrays = write_idx(tmp_path / "server", compressed=True)
    resources = [(name, md5(tmp_path / "server" / name)) for name, _ in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [(tmp_path / "server").as_uri() + "/"])
    root = tmp_path / "new" / "root"
    same(data.load_dataset("mnist", root, download=True), arrays, "mnist")
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    same(data.load_dataset("mnist", root, download=True), arrays, "mnist")  # it is there
