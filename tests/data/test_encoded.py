"""Images that stay JPEG or PNG files: the same pixels, labels and runs as decoded ones."""

import pictures
import pytest
import torch
from small_runs import StopAt, Stopped, same

from purify_fast import data
from purify_fast.cli import main
from purify_fast.data import folders
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit

pytestmark = pytest.mark.usefixtures("one_thread")


def folder(root):
    pictures.folder(root, 8, 3, [(12 + i, 20 - i) for i in range(8)], ending="jpg")
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


def trained(x, y, folder, callbacks=(), **options):
    torch.manual_seed(0)
    task = ClassifierTask(SmallCNN(3, 2, (12, 12), 2), ClassifierConfig())
    fit(task, x, y, FitConfig(3, 4, padding=1, **options), folder, progress=False, callbacks=callbacks)
    return task.model.state_dict()


def test_a_training_has_the_weights_of_one_in_memory_and_goes_on(tmp_path):
    """Images keep their numbers: crops, starts of attacks and the order are the same."""
    root = folder(tmp_path / "pets")
    options = {"image_size": (12, 12), "cache": tmp_path / "cache"}
    whole = data.load_dataset(root, **options)
    each = data.load_dataset(root, decode="each_time", stream=True, workers=2, **options)
    expected = trained(whole.x_train, whole.y_train, None)
    run = each.x_train, each.y_train, tmp_path / "run"
    with pytest.raises(Stopped):
        trained(*run, [StopAt(7)], checkpoint_seconds=0)
    assert same(trained(*run, checkpoint_seconds=0), expected)
    assert same(trained(each.x_train, each.y_train, None), expected)


def test_a_file_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path):
    root = folder(tmp_path / "pets")
    (root / "train" / "dog" / "003.jpg").write_bytes(b"no image")
    images = data.load_dataset(root, image_size=(8, 8), decode="each_time", stream=True).x_train
    assert images[:8].shape == (8, 3, 8, 8)
    with pytest.raises(ValueError, match=r"cannot be decoded: .*dog/003\.jpg: "):
        images[8:]
    with pytest.raises(ValueError, match=r"001\.jpg has 13 x 19 .* 12 x 20.* image_size=\(H, W\)"):
        data.load_dataset(folder(tmp_path / "others"), decode="each_time")
    with pytest.raises(ValueError, match="decode='each_time' needs an image folder, but digits"):
        data.load_dataset("digits", decode="each_time")


def test_the_command_line_decodes_each_time(tmp_path, capsys):
    root = folder(tmp_path / "pets")
    command = f"train classifier --data {root} --size 16 --decode each_time --epochs 1 --batch-size 4 --width 2"
    assert main([*command.split(), "--out", str(tmp_path / "run")]) == 0
    assert "without an attack" in capsys.readouterr().out and not list((root / ".purify_fast").glob("*/x_*.npy"))
