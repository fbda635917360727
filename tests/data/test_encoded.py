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


@pytest.fixture
def pets(tmp_path):
    pictures.folder(tmp_path / "pets", 8, 3, [(12 + i, 20 - i) for i in range(8)], ending="jpg")
    return tmp_path / "pets"


def test_images_decoded_each_time_have_the_pixels_of_those_decoded_once(pets, tmp_path):
    once = data.load_dataset(pets, image_size=(12, 10), cache=tmp_path / "cache")
    each = data.load_dataset(pets, image_size=(12, 10), decode="each_time", stream=True)
    assert not (pets / ".purify_fast").exists()
    assert isinstance(each.x_train, folders.EncodedImages) and each.x_train.shape == (16, 3, 12, 10)
    assert torch.equal(each.x_train[:], once.x_train[:]) and torch.equal(each.x_test[:], once.x_test[:])
    assert torch.equal(each.y_train, once.y_train)
    ids = torch.tensor([5, 5, 0, 15])
    assert torch.equal(each.x_train[ids], once.x_train[ids])
    # what fits into memory is read whole
    assert torch.equal(data.load_dataset(pets, image_size=(12, 10), decode="each_time").x_train, once.x_train)
    (pets / "train" / "dog" / "003.jpg").write_bytes(b"no image")
    assert each.x_train[:8].shape == (8, 3, 12, 10)
    with pytest.raises(ValueError, match=r"cannot be decoded: .*dog/003\.jpg: "):
        each.x_train[8:]


def trained(x, y, folder, callbacks=(), **options):
    torch.manual_seed(0)
    task = ClassifierTask(SmallCNN(3, 2, (12, 12), 2), ClassifierConfig())
    fit(task, x, y, FitConfig(3, 4, padding=1, **options), folder, progress=False, callbacks=callbacks)
    return task.model.state_dict()


def test_a_training_has_the_weights_of_one_in_memory_and_goes_on(pets, tmp_path):
    """Images keep their numbers: crops, starts of attacks and the order are the same."""
    options = {"image_size": (12, 12), "cache": tmp_path / "cache"}
    whole = data.load_dataset(pets, **options)
    each = data.load_dataset(pets, decode="each_time", stream=True, **options)
    expected = trained(whole.x_train, whole.y_train, None)
    run = each.x_train, each.y_train, tmp_path / "run"
    with pytest.raises(Stopped):
        trained(*run, [StopAt(7)], checkpoint_seconds=0)
    assert same(trained(*run, checkpoint_seconds=0), expected)


def test_the_command_line_decodes_each_time(pets, tmp_path, capsys):
    command = f"train classifier --data {pets} --size 16 --decode each_time --epochs 1 --batch-size 4 --width 2"
    assert main([*command.split(), "--out", str(tmp_path / "run")]) == 0
    assert "without an attack" in capsys.readouterr().out and not list((pets / ".purify_fast").glob("*/x_*.npy"))
