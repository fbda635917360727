"""Images that stay JPEG or PNG files, or lie in tar shards: the same pixels, labels and runs as decoded ones."""

import io
import tarfile

import numpy as np
import pytest
import torch
from pictures import picture

from purify_fast import data
from purify_fast.cli import main
from purify_fast.data import folders, shards
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def folder(root, train=8, held_out=3, ending="jpg"):
    for part, count in (("train", train), ("val", held_out)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(root / part / name / f"{i:03d}.{ending}", 100 * label + i, (12 + i, 20 - i))
    return root


def shard(path, samples):
    """A tar file of (name, content) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def sharded(root, source, train=3):
    """The images of a folder in shards, the training images in several."""
    for part, count in (("train", train), ("val", 1)):
        files = sorted((source / part).glob("*/*"))
        for k in range(count):
            samples = []
            for path in files[k::count]:
                key = f"images/{path.parent.name}-{path.stem}"
                label = str(["cat", "dog"].index(path.parent.name)).encode()
                samples += [(f"{key}.{path.suffix[1:].upper()}", path.read_bytes()), (f"{key}.cls", label + b"\n")]
                samples += [(f"{key}.json", b"{}")]
            shard(root / part / f"{part}-{k:04d}.tar", samples)
    return root


def test_images_decoded_each_time_have_the_pixels_of_those_decoded_once(tmp_path):
    root = folder(tmp_path / "pets")
    once = data.load_dataset(root, image_size=(12, 10), cache=tmp_path / "cache")
    each = data.load_dataset(root, image_size=(12, 10), decode="each_time", stream=True, workers=3)
    assert not (root / ".purify_fast").exists()
    assert isinstance(each.x_train, folders.EncodedImages) and each.x_train.shape == (16, 3, 12, 10)
    assert torch.equal(each.x_train[:], once.x_train[:]) and torch.equal(each.x_test[:], once.x_test[:])
    assert torch.equal(each.y_train, once.y_train)
    ids = torch.tensor([5, 5, 0, 15])
    assert torch.equal(each.x_train[ids], once.x_train[ids])
    # what fits into memory is read whole
    assert torch.equal(data.load_dataset(root, image_size=(12, 10), decode="each_time").x_train, once.x_train)


@pytest.mark.parametrize("decode", ["once", "each_time"])
def test_shards_have_the_images_of_their_folder(tmp_path, decode):
    source, root = folder(tmp_path / "pets"), tmp_path / "shards"
    sharded(root, source)
    whole = data.load_dataset(source, image_size=(12, 10), cache=tmp_path / "cache")
    packed = data.load_dataset(root, image_size=(12, 10), decode=decode, stream=True, cache=tmp_path / "cache")
    # every third image stands in the first shard
    order = torch.tensor([i for k in range(3) for i in range(k, 16, 3)])
    assert torch.equal(packed.x_train[:], whole.x_train[order]) and torch.equal(packed.y_train, whole.y_train[order])
    assert torch.equal(packed.x_test[:], whole.x_test) and packed.num_classes == 2


def test_headers_are_read_once(tmp_path, monkeypatch):
    root = sharded(tmp_path / "shards", folder(tmp_path / "pets"))
    first = data.load_dataset(root, image_size=(8, 8), decode="each_time")
    monkeypatch.setattr(shards, "_samples", None)
    again = data.load_dataset(root, image_size=(8, 8), decode="each_time")
    assert torch.equal(first.x_train, again.x_train) and torch.equal(first.y_train, again.y_train)
    monkeypatch.undo()
    # a shard that changed is read anew
    files = sorted((tmp_path / "pets" / "train" / "dog").glob("*"))[:2]
    samples = [
        (f"{i}.{end}", content)
        for i, path in enumerate(files)
        for end, content in (("jpg", path.read_bytes()), ("cls", b"1"))
    ]
    shard(root / "train" / "train-0001.tar", samples)
    changed = data.load_dataset(root, image_size=(8, 8), decode="each_time")
    assert len(changed.x_train) == 13 and changed.y_train[6:8].tolist() == [1, 1]


def trained(x, y, folder, epochs=3, **options):
    torch.manual_seed(0)
    task = ClassifierTask(SmallCNN(3, 2, (12, 12), 2), ClassifierConfig())
    fit(task, x, y, FitConfig(epochs, 4, **options), folder, progress=False)
    return task.model.state_dict()


def test_a_training_has_the_weights_of_one_in_memory_and_goes_on(tmp_path):
    """Images keep their numbers: crops, starts of attacks and the order are the same."""
    root = sharded(tmp_path / "shards", folder(tmp_path / "pets"))
    options = {"image_size": (12, 12), "cache": tmp_path / "cache"}
    whole = data.load_dataset(root, **options)
    each = data.load_dataset(root, decode="each_time", stream=True, workers=2, **options)
    expected = trained(whole.x_train, whole.y_train, None, padding=1)
    got = trained(each.x_train, each.y_train, tmp_path / "run", padding=1)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())

    class Ended(Exception):
        pass

    class Task(ClassifierTask):
        def training_step(self, batch):
            if batch.step == 6:
                raise Ended
            return super().training_step(batch)

    torch.manual_seed(0)
    task = Task(SmallCNN(3, 2, (12, 12), 2), ClassifierConfig())
    config = FitConfig(3, 4, padding=1, checkpoint_seconds=0)
    with pytest.raises(Ended):
        fit(task, each.x_train, each.y_train, config, tmp_path / "killed", progress=False)
    resumed = trained(each.x_train, each.y_train, tmp_path / "killed", padding=1, checkpoint_seconds=0)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_a_file_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "train" / "dog" / "003.jpg").write_bytes(b"no image")
    images = data.load_dataset(root, image_size=(8, 8), decode="each_time", stream=True).x_train
    assert images[:8].shape == (8, 3, 8, 8)
    with pytest.raises(ValueError, match=r"cannot be decoded: .*dog/003\.jpg: "):
        images[8:]
    with pytest.raises(ValueError, match=r"001\.jpg has 13 x 19 .* 12 x 20.* image_size=\(H, W\)"):
        data.load_dataset(folder(tmp_path / "others", ending="jpg"), decode="each_time")
    with pytest.raises(ValueError, match="on_bad_image='skip' needs decode='once'"):
        data.load_dataset(root, image_size=(8, 8), decode="each_time", on_bad_image="skip")
    with pytest.raises(ValueError, match="decode='each_time' needs an image folder, but digits"):
        data.load_dataset("digits", decode="each_time")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("a.jpg", b"")], r"'a' has no label \(\.cls\)"),
        ([("a.cls", b"1")], "'a' has no image"),
        ([("a.jpg", b""), ("a.cls", b"cat")], r"a\.cls must .* label.* got b'cat'"),
        ([("a.jpg", b""), ("a.png", b""), ("a.cls", b"0")], "two images with the name 'a'"),
        ([("notes.txt", b"")], r"train contain no image \(\.jpg"),
    ],
)
def test_shards_of_another_form_are_refused(tmp_path, samples, message):
    shard(tmp_path / "set" / "train" / "0.tar", samples)
    (tmp_path / "set" / "val").mkdir()
    shard(tmp_path / "set" / "val" / "0.tar", samples)
    with pytest.raises(ValueError, match=message):
        data.load_dataset(tmp_path / "set")


def test_a_compressed_shard_and_a_split_without_shards_are_refused(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "val").mkdir()
    with tarfile.open(tmp_path / "set" / "train" / "0.tar", "w:gz"):
        pass
    with pytest.raises(FileNotFoundError, match="val has no shards, but train"):
        data.load_dataset(tmp_path / "set")
    shard(tmp_path / "set" / "val" / "0.tar", [])
    with pytest.raises(ValueError, match=r"0\.tar is not an uncompressed tar file"):
        data.load_dataset(tmp_path / "set")


def test_labels_of_held_out_shards_must_be_known(tmp_path):
    root = sharded(tmp_path / "shards", folder(tmp_path / "pets"))
    image = (tmp_path / "pets" / "val" / "cat" / "000.jpg").read_bytes()
    shard(root / "val" / "val-0000.tar", [("a.jpg", image), ("a.cls", b"5")])
    with pytest.raises(ValueError, match=r"val has labels above 1, .*train"):
        data.load_dataset(root, image_size=(8, 8))


def test_the_command_line_reads_shards_each_time(tmp_path, capsys):
    root = sharded(tmp_path / "shards", folder(tmp_path / "pets"))
    command = f"train classifier --data {root} --size 16 --decode each_time --epochs 1 --batch-size 4 --width 2"
    assert main([*command.split(), "--out", str(tmp_path / "run")]) == 0
    assert "clean" in capsys.readouterr().out and not list((root / ".purify_fast").glob("*/x_*.npy"))
    assert np.load(root / ".purify_fast" / "shards_train.npz")["arr_4"].sum() == 8
