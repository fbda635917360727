"""What `fit` takes as images: what is wrong with them is said at the door, and loaders are read as they come."""

import pytest
import torch
from small_runs import StopAt, Stopped, images, same, task
from torch.utils.data import DataLoader, Dataset, TensorDataset

from purify_fast.methods.atop import Atop, AtopConfig, AtopTask, SmallGenerator
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import FitConfig, fit
from purify_fast.training.sources import InMemory, held_out

pytestmark = pytest.mark.usefixtures("one_thread")


# -- images at the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x / 255, y), r"x must be uint8 \[N, C, H, W\], got torch.float32 .*255 \* x"),
        (lambda x, y: (x[:, 0], y), r"x must be uint8 \[N, C, H, W\], got torch.uint8 \[64, 8, 8\]"),
        (lambda x, y: (x, y.int()), r"y must be int64 \[N\] = \[64\], got torch.int32"),
        (lambda x, y: (x, y[:9]), r"y must be int64 \[N\] = \[64\], got torch.int64 \[9\]"),
        (lambda x, y: (x, y.tolist()), r"y must be int64 \[N\] = \[64\], got list"),
        (lambda x, y: (x, None), r"y must be int64 \[N\] = \[64\], got NoneType"),
        (lambda x, y: (x, y - 1), "y must hold labels of at least 0, got -1"),
        (lambda x, y: (x, y + 1), "y: the largest label is 2, but the model has 2 classes, 0 to 1"),
        (lambda x, y: (x.expand(-1, 3, -1, -1), y), r"the classifier must map images \[B, 3, 8, 8\] to logits"),
        (lambda x, y: (x[:, :, :4], y), r"the classifier must map images \[B, 1, 4, 8\] to logits"),
    ],
)
def test_wrong_images_and_labels_are_named_before_any_step(tmp_path, change, message):
    made = task()
    made.training_step = lambda batch: pytest.fail("a step was taken")
    with pytest.raises(ValueError, match=message):
        fit(made, *change(*images()), FitConfig(1, 16), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["carso", "atop"])
def test_defences_name_images_and_labels_that_they_do_not_take(method):
    classifier = SmallCNN(1, 2, (8, 8), 4)
    if method == "carso":
        made = CarsoTask(Carso(classifier, ["hidden"], (1, 8, 8), 4, 3, 2, decoder_width=2), CarsoConfig())
    else:
        made = AtopTask(Atop(classifier, SmallGenerator(1, width=2), (1, 8, 8), block=2), AtopConfig())
    x, y = images()
    with pytest.raises(ValueError, match=r"x must have images \[1, 8, 8\], got \[1, 8, 4\]"):
        fit(made, x[..., :4], y, FitConfig(1, 16))
    with pytest.raises(ValueError, match="y: the largest label is 2, but the model has 2 classes"):
        fit(made, x, y + 1, FitConfig(1, 16))


def test_something_else_than_a_task_is_refused():
    with pytest.raises(TypeError, match=r"task must be a purify_fast\.training\.Task, got SmallCNN"):
        fit(SmallCNN(), *images(), FitConfig(1, 16))


# -- loaders ----------------------------------------------------------------------------------------------------------


class Indexed(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i], i


def as_batches(epoch, x, y, config):
    return list(InMemory(x, y, config, 0, 1).epoch(epoch, 0))


def test_the_same_batches_give_the_same_weights_to_the_bit_in_every_form():
    x, y = images()
    config = FitConfig(3, 16, padding=1, flip=True)
    tensors, function, floats = task(), task(), task()
    last = fit(tensors, x, y, config, progress=False)
    assert fit(function, lambda epoch: as_batches(epoch, x, y, config), None, config, progress=False) == last

    def in_floats(epoch):
        return [(raw.float().div(255), *rest) for raw, *rest in as_batches(epoch, x, y, config)]

    fit(floats, in_floats, None, config, progress=False)
    assert same(tensors, function) and same(tensors, floats)


@pytest.mark.parametrize("indices", [False, True])
def test_a_shuffling_loader_is_in_the_same_order_every_time(indices):
    x, y = images(60)
    dataset = Indexed(x, y) if indices else TensorDataset(x, y)
    one, two = task(), task()
    for made, seed in ((one, 1), (two, 2)):
        torch.manual_seed(seed)
        own = torch.Generator().manual_seed(seed) if indices else None
        fit(made, DataLoader(dataset, 16, shuffle=True, generator=own), None, FitConfig(2), progress=False)
    assert same(one, two)


@pytest.mark.parametrize(("form", "again"), [("loader", [1, 1, 1, 1, 2, 2, 2, 2]), ("function", [1, 2, 2, 2, 2])])
def test_a_loaders_run_is_resumed_at_an_epochs_end_and_a_functions_at_any_step(tmp_path, form, again):
    x, y = images()
    config = FitConfig(3, 16, checkpoint_seconds=0)
    if form == "loader":
        data = DataLoader(Indexed(x, y), 16, shuffle=True)
    else:

        def data(epoch):
            return as_batches(epoch, x, y, config)

    whole = task()
    fit(whole, data, None, config, tmp_path / "whole", progress=False)
    with pytest.raises(Stopped):
        fit(task(), data, None, config, tmp_path / "cut", progress=False, callbacks=[StopAt(8)])
    resumed, taken = task(), []
    step = resumed.training_step
    resumed.training_step = lambda batch: taken.append(batch.epoch) or step(batch)
    fit(resumed, data, None, config, tmp_path / "cut", progress=False)
    assert taken == again and same(whole, resumed)


def test_loaders_that_cannot_be_used_are_refused():
    x, y = images()
    for wrong in (iter([(x, y)]), 3):
        with pytest.raises(
            TypeError, match=r"x must be a tensor of images, .* that has a length .such as a DataLoader"
        ):
            fit(task(), wrong, None, FitConfig(1))

    class Short(list):
        def __len__(self):
            return 2

    for wrong, message in (
        ([], "x must have at least 1 batch, got 0"),
        (Short([(x, y)]), "x must give 2 batches, .* it gave 1 in epoch 0"),
        ([(x, y.int())], r"x: labels must be int64 \[B\] = \[64\], got torch.int32"),
        ([(x.long(), y)], r"x: images must be float in \[0, 1\] or uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(task(), wrong, None, FitConfig(1), progress=False)
    with pytest.raises(ValueError, match="y must be None if x is a loader"):
        fit(task(), [(x, y)], y, FitConfig(1))


def test_a_loaders_last_smaller_batch_is_trained_on():
    x, y = images(40)
    seen = []
    made = task()
    step = made.training_step
    made.training_step = lambda batch: seen.append(batch.sample_ids.tolist()) or step(batch)
    fit(made, DataLoader(TensorDataset(x, y), 16), None, FitConfig(1), progress=False)
    assert seen == [list(range(16)), list(range(16, 32)), list(range(32, 40))]


# -- held-out images --------------------------------------------------------------------------------------------------


def test_held_out_images_are_a_function_of_the_seed_and_are_not_trained_on():
    kept, held = held_out(100, 0.25, 3)
    assert len(held) == 25 and torch.equal(torch.cat([kept, held]).sort().values, torch.arange(100))
    assert all(torch.equal(a, b) for a, b in zip(held_out(100, 0.25, 3), (kept, held), strict=True))
    assert not torch.equal(held_out(100, 0.25, 4)[1], held)
    for share, n in ((0.001, 100), (0.999, 100)):
        with pytest.raises(ValueError, match="validation_share"):
            held_out(n, share, 0)
