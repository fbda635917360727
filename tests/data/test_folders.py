"""Image folders: layouts, resizing, the cache and what a kill leaves of it."""

import os
import shutil

import numpy as np
import pytest
import torch
from pictures import folder, picture
from PIL import Image
from torchvision import transforms

from purify_fast import data
from purify_fast.cli.command import counted
from purify_fast.data import datasets as folders


@pytest.mark.parametrize("held_out, ending", [("val", "png"), ("test", "JPEG")])
def test_layout(tmp_path, held_out, ending):
    made = folder(tmp_path / "pets", held_out=held_out, ending=ending)
    (tmp_path / "pets" / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / "train" / "cat" / "._000.png").write_text("not an image either")
    for d in (data.load_dataset(tmp_path / "pets"), data.load_dataset("pets", tmp_path)):
        assert np.array_equal(d.x_train.numpy(), np.stack(made["train"]))
        assert np.array_equal(d.x_test.numpy(), np.stack(made["test"]))
        assert d.y_train.tolist() == [0] * 5 + [1] * 5 and d.y_test.tolist() == [0, 0, 1, 1]
        assert (d.name, d.num_classes, d.image_shape) == (f"pets/{held_out}", 2, (3, 10, 8))
        assert d.y_train.dtype == torch.int64
    assert data.load_dataset(tmp_path / "pets", num_classes=4).to("cpu").classes == ("cat", "dog")
    with pytest.raises(ValueError, match="num_classes is 1, but the labels go up to 1"):
        data.load_dataset(tmp_path / "pets", num_classes=1)


def test_the_images_of_test_are_held_out_if_they_have_labels(tmp_path):
    folder(tmp_path, test=3)
    folder(tmp_path, test=2, held_out="test")
    assert data.load_dataset(tmp_path).name == f"{tmp_path.name}/test"
    # without a folder for each class, as in many competitions
    shutil.rmtree(tmp_path / "test")
    picture(tmp_path / "test" / "0.png", 0)
    assert data.load_dataset(tmp_path).name == f"{tmp_path.name}/val"


def tiny(root):
    pixels = [picture(root / "train" / w / "images" / f"{w}_0.JPEG", i) for i, w in enumerate(("n1", "n2", "n3"))]
    held_out = [picture(root / "val" / "images" / f"val_{i}.JPEG", 10 + i) for i in range(3)]
    picture(root / "test" / "images" / "test_0.JPEG", 20)
    (root / "wnids.txt").write_text("n3\nn1\nn2\n")
    (root / "train" / "n1" / "n1_boxes.txt").write_text("n1_0.JPEG\t0\t0\t5\t5\n")
    lines = "".join(f"val_{i}.JPEG\tn{w}\t0\t0\t5\t5\n" for i, w in ((2, 3), (0, 2), (1, 1)))
    (root / "val" / "val_annotations.txt").write_text(lines)
    return pixels, held_out


def test_tiny_imagenet(tmp_path):
    pixels, held_out = tiny(tmp_path / "tiny-imagenet-200")
    for d in (data.load_dataset("tiny_imagenet", tmp_path), data.load_dataset(tmp_path / "tiny-imagenet-200")):
        assert np.array_equal(d.x_train.numpy(), np.stack(pixels)) and d.y_train.tolist() == [0, 1, 2]
        assert np.array_equal(d.x_test.numpy(), np.stack([held_out[i] for i in (2, 0, 1)]))
        assert d.y_test.tolist() == [2, 1, 0] and d.num_classes == 3
    shutil.rmtree(tmp_path / "tiny-imagenet-200" / "train")
    assert data.load_dataset("tiny_imagenet", tmp_path, train=False).y_test.tolist() == [2, 1, 0]


@pytest.mark.parametrize("side", [8, 13, 30])
def test_squares_are_resized_and_cropped_as_by_torchvision(tmp_path, side):
    folder(tmp_path, sizes=((10, 17), (23, 13), (16, 16), (13, 13)))
    d = data.load_dataset(tmp_path, image_size=(side, side))
    like = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])
    files = sorted((tmp_path / "train").rglob("*.png"))
    assert torch.equal(d.x_train, torch.stack([like(Image.open(path)) for path in files]))


def test_files_in_folders_inside_a_class_are_sorted_by_their_whole_path(tmp_path):
    names = ("b.png", "a/x.png", "a/deeper/0.png", "c/x.PNG", ".hidden/y.png", "a/.hidden.png")
    made = {name: picture(tmp_path / "train" / "cat" / name, i) for i, name in enumerate(names)}
    hidden = ("train/.ipynb_checkpoints/0.png", "val/cat/a/@eaDir/0.png", "val/.cat/0.png")
    for name in ("train/dog/0.png", "val/cat/0.png", *hidden):
        picture(tmp_path / name, 7)
    d = data.load_dataset(tmp_path)
    want = ["a/deeper/0.png", "a/x.png", "b.png", "c/x.PNG"]
    assert np.array_equal(d.x_train[:4].numpy(), np.stack([made[name] for name in want]))
    assert d.y_train.tolist() == [0] * 4 + [1] and d.num_classes == 2 and d.y_test.tolist() == [0]


def test_held_out_images_alone(tmp_path):
    made = folder(tmp_path)
    (tmp_path / "train" / "bee").mkdir()  # an empty folder counts as a class, for which no image is needed
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_text("no image")
    alone = data.load_dataset(tmp_path, train=False)
    assert alone.classes == ("bee", "cat", "dog") and alone.y_test.tolist() == [1, 1, 2, 2]
    assert np.array_equal(alone.x_test.numpy(), made["test"])
    assert alone.image_shape == (3, 10, 8) and len(alone.x_train) == len(alone.y_train) == 0
    shutil.rmtree(tmp_path / "train")
    assert data.load_dataset(tmp_path, train=False).classes == ("cat", "dog")
    with pytest.raises(FileNotFoundError, match="it lacks train/"):
        data.load_dataset(tmp_path)


def test_other_shapes_cover_the_target_and_are_centred(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            image = np.zeros((40, 20, 3), np.uint8)
            image[18:22] = 255  # a bar across the middle
            Image.fromarray(image).save(tmp_path / part / name / "0.png")
    d = data.load_dataset(tmp_path, image_size=(10, 20))
    assert d.image_shape == (3, 10, 20) and d.x_train[0, 0, :, 0].tolist() == [0] * 3 + [255] * 4 + [0] * 3
    assert data.load_dataset(tmp_path, image_size=(20, 5)).x_train[0, 0, 9:11].min() > 200


def damaged(path):
    path.write_bytes(path.read_bytes()[:60])


def with_16_bits(path):
    Image.fromarray(np.zeros((10, 8), np.uint16)).save(path)


def with_200_megapixels(path):
    """The header alone says so: nothing of that size is ever in memory."""
    Image.new("1", (20_000, 10_000)).save(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(damaged, ""), (with_16_bits, "its mode is I;16"), (with_200_megapixels, r".*200000000 pixels\) exceeds limit")],
)
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, damage, reason):
    folder(tmp_path)
    damage(tmp_path / "train" / "cat" / "003.png")
    with pytest.raises(ValueError, match=rf"cannot be decoded: .*cat/003\.png: {reason}"):
        data.load_dataset(tmp_path)
    assert not list((tmp_path / ".purify_fast").rglob("*x_train*.npy"))


MODES = [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("RGB", "bmp"), ("RGB", "TIFF")]


@pytest.mark.parametrize(("mode", "ending"), MODES)
def test_files_of_every_kind_and_8_bit_mode_become_rgb(tmp_path, mode, ending):
    folder(tmp_path)
    want = picture(tmp_path / "train" / "cat" / f"zzz.{ending}", 3, mode=mode)
    read = data.load_dataset(tmp_path)
    assert read.y_train[:6].tolist() == [0] * 6 and np.array_equal(read.x_train[5].numpy(), want)
    assert torch.equal(data.read_image(tmp_path / "train" / "cat" / f"zzz.{ending}"), read.x_train[5])


def test_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    folder(tmp_path / "pets")

    def load():
        return data.load_dataset(tmp_path / "pets", image_size=(8, 8), cache=tmp_path / "cache").x_train

    first = load()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_image", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load(), first)
    changed = picture(tmp_path / "pets" / "train" / "cat" / "000.png", 999, (8, 8))
    again = load()
    assert np.array_equal(again[0].numpy(), changed) and torch.equal(again[1:], first[1:])
    # the images are mapped into memory, and a write to them does not change the file
    whole = again.clone()
    again.zero_()
    assert torch.equal(load(), whole) and not (tmp_path / "pets" / ".purify_fast").exists()
    # the old file is gone, and a file that was cut off is written again
    (path,) = (tmp_path / "cache").glob("pets-*/8x8/x_train-*.npy")
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(load(), whole)


#: Folders: their files, by the first of which the pixels of one have another size; and the words of the error.
REFUSED = {
    r"is not an image folder: it lacks test/ and val/.* train/": [],
    "the classes cow, which the folder train/ lacks": ["train/cat/0", "train/dog/0", "val/cow/0"],
    "contains no image of cow: remove the folder": ["train/cat/0", "train/dog/0", "train/cow/", "val/cow/0"],
    r"at least 2 classes, got \['only'\]": ["train/only/0", "val/only/0"],
    "val contains no image": ["train/cat/0", "train/dog/0", "val/"],
    r"1\.png has 9 x 8 .* 10 x 8.* image_size=\(H, W\)": ["train/cat/0", "train/cat/1", "train/dog/0", "val/cat/0"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(tmp_path, message):
    for name in REFUSED[message]:
        if name.endswith("/"):
            (tmp_path / name).mkdir(parents=True)
        else:
            picture(tmp_path / f"{name}.png", 0, (10 - int(name[-1]), 8))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load_dataset(tmp_path)


def test_photos_of_phones_and_browsers_are_read_or_told_of(tmp_path):
    for name in ("train/cat/0", "train/dog/0", "test/cat/1"):
        picture(tmp_path / "pets" / f"{name}.png", 0, (8, 8))
    train = tmp_path / "pets" / "train"
    (train / "dog" / "0.png").rename(train / "dog" / "0.jfif")
    for ending in ("raw9", "raw9", "txt"):
        (train / "dog" / f"{len(list((train / 'dog').iterdir()))}.{ending}").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"train are left out, because this Pillow opens none like them: 2 \.raw9"):
        loaded = data.load_dataset(tmp_path / "pets")
    assert loaded.y_train.tolist() == [0, 1]
    assert counted(loaded) == "pets: 2 training images (cat 1, dog 1), 1 held-out images (cat 1, dog 0)"


def test_folders_of_one_name_share_no_cache(tmp_path):
    """Archives with fixed times give files of equal names, sizes and times."""
    means = []
    for place, color in (("clean", 200), ("fog", 20)):
        for name in ("train/cat/0", "train/dog/0", "test/cat/1"):
            path = tmp_path / place / "pets" / f"{name}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (color,) * 3).save(path)
            os.utime(path, (315_532_800, 315_532_800))
        means.append(data.load_dataset(tmp_path / place / "pets", cache=tmp_path / "cache").x_train.float().mean())
    assert means == [200, 20]


def test_a_test_folder_of_other_classes_has_no_labels(tmp_path):
    """Many competitions keep their unlabelled images in test/unknown."""
    for name in ("train/cat/0", "train/dog/0", "val/cat/1", "test/unknown/2"):
        picture(tmp_path / "pets" / f"{name}.png", 0, (8, 8))
    assert data.load_dataset(tmp_path / "pets").name == "pets/val"
