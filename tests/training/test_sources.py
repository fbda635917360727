"""What `fit` takes as images: what is wrong with them is said at the door, and loaders are read as they come."""

from collections import UserList

import pytest
import torch
from small_runs import StopAt, Stopped, images, same, task
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset
from torch.utils.data.sampler import BatchSampler, SubsetRandomSampler, WeightedRandomSampler

from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit, sources
from purify_fast.training.batches import check_channels
from purify_fast.training.sources import InMemory, held_out, make_sources


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_whatever_the_mode_of_the_caller(mode):
    (x, y), usual, other = images(), task(), task()
    fit(usual, x, y, FitConfig(1, 16), progress=False)
    with mode():
        fit(other, x, y, FitConfig(1, 16), progress=False)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    assert same(usual, other)


def loaded(n, **options):
    return DataLoader(TensorDataset(*images(n)), **options)


def test_a_model_that_returns_probabilities_is_told_so(caplog):
    layers = nn.Flatten(), nn.Linear(64, 2)
    fit(ClassifierTask(nn.Sequential(*layers, nn.Softmax(1)), ClassifierConfig()), *images(), FitConfig(1, 16))
    assert "returns probabilities, not logits" in caplog.text
    caplog.clear()
    fit(ClassifierTask(nn.Sequential(*layers), ClassifierConfig()), *images(), FitConfig(1, 16))
    assert "probabilities" not in caplog.text


class Indexed(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i], i


def test_the_same_batches_give_the_same_weights_to_the_bit_in_every_form():
    x, y = images()
    config = FitConfig(1, 16, flip=True, padding=1)
    tensors, listed, floats = task(), task(), task()
    last = fit(tensors, x, y, config, progress=False)
    batches = list(InMemory(x, y, config, torch.device("cpu")).epoch(0, 0))
    assert fit(listed, batches, None, config, progress=False) == last
    fit(floats, [(raw.float().div(255), *rest) for raw, *rest in batches], None, config, progress=False)
    assert same(tensors, listed) and same(tensors, floats)
    plain = task()
    fit(plain, x, y, FitConfig(1, 16, flip=True), progress=False)
    assert not same(tensors, plain)


@pytest.mark.parametrize("most", [2**30, 100])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_images_that_fit_are_moved_to_the_gpu_once_and_others_are_pinned(most, share, monkeypatch):
    """A device without values stands for the GPU. A copy from memory that is not pinned makes the host wait."""
    x, y = images()
    made, pinned = task(), []
    made.model.to("meta")
    made.check = lambda shape, classes: None
    monkeypatch.setattr(sources, "digest", lambda *tensors: "")
    monkeypatch.setattr(sources, "GPUS", ("meta",))
    monkeypatch.setattr(sources, "MOST_BYTES", most)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(tuple(self.shape)) or self)
    source, held = make_sources(made, x, y, FitConfig(1, 16, validation_share=share))
    batches = [*source.epoch(0, 0), *(held.epoch(0, 0) if held else ())]
    assert all(part.device.type == "meta" for batch in batches for part in batch)
    assert pinned == ([(16,), (16, 1, 8, 8)] * 4 if most == 100 else [])
    assert most == 100 or (source.x.device.type == "meta" and (not held or held.x is source.x))


def test_images_that_would_take_much_of_the_gpus_free_memory_stay(monkeypatch):
    x, device = images()[0], torch.device("meta")
    monkeypatch.setattr(sources, "GPUS", ("meta",))
    for free, kind in ((9 * x.nbytes, "cpu"), (11 * x.nbytes, "meta")):
        monkeypatch.setattr(sources, "free_memory", lambda device, free=free: free)
        assert sources.placed(x, device).device.type == kind


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


def order(loader, *epochs):
    source = sources.Loader(loader, FitConfig(4, 8), torch.device("cpu"))
    return [[int(label) for _, labels, _ in source.epoch(epoch, 0) for label in labels] for epoch in epochs]


def test_persistent_workers_are_in_the_same_order_after_a_kill():
    dataset = TensorDataset(torch.zeros(40, 1, 8, 8), torch.arange(40))

    def loader():
        return DataLoader(dataset, 8, shuffle=True, num_workers=1, persistent_workers=True)

    first, second, third = order(loader(), 0, 1, 2)
    assert order(loader(), 1, 2) == [second, third] and first != second != third


def test_a_distributed_sampler_shuffles_each_epoch_anew():
    dataset = TensorDataset(torch.zeros(40, 1, 8, 8), torch.arange(40))
    first, second = order(DataLoader(dataset, 10, sampler=DistributedSampler(dataset, 2, 0)), 0, 1)
    assert len(first) == 20 and first != second


class Stream(IterableDataset):
    """Batches without a length, or with one that is too large."""

    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        x, y = images()
        return iter(zip(x.split(16), y.split(16), strict=True))

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length


def test_a_stream_without_a_length_needs_the_steps_of_an_epoch(tmp_path):
    with pytest.raises(TypeError, match="steps_per_epoch must be set for batches without a length"):
        fit(task(), DataLoader(Stream(), None), None, FitConfig(2), tmp_path, progress=False)
    fit(task(), DataLoader(Stream(), None), None, FitConfig(2, steps_per_epoch=3), tmp_path, progress=False)
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_a_stream_that_is_too_short_begins_again_and_says_so(tmp_path, caplog):
    fit(task(), DataLoader(Stream(6), None), None, FitConfig(2), tmp_path, progress=False)
    assert "x gave 4 batches in place of 6 in epoch 0: it begins again. Set steps_per_epoch" in caplog.text
    assert (tmp_path / "checkpoint.safetensors").exists()


def of_16(n):
    x, y = images(n)
    return [(x[k : k + 16], y[k : k + 16]) for k in range(0, n, 16)]


def carso():
    defence = Carso(SmallCNN(1, 2, (8, 8), 4), ["hidden"], (1, 8, 8), 4, 3, 2, decoder_width=2)
    return CarsoTask(defence, CarsoConfig())


class Short(list):
    def __len__(self):
        return 2


def third(change):
    """Give four batches, of which the third is changed."""

    def batches(x, y):
        good = [(images / 255, labels) for images, labels in of_16(64)]
        return [*good[:2], change(*good[2]), good[3]], None

    return batches


def with_nan(images, labels):
    images[3, 0, 5, 5] = torch.nan
    return images, labels


#: The words of an error, what `fit` is given in place of 64 images and their labels, and another task.
REFUSED = [
    (r"x must be uint8, \[N, C, H, W\], got torch.float32", lambda x, y: (x / 255, y)),
    (r"x must be uint8, \[N, C, H, W\], got torch.uint8 \[64, 8, 8\]", lambda x, y: (x[:, 0], y)),
    (r"y must be int64 \[N\] = \[64\], .*got torch.float32", lambda x, y: (x, y.float())),
    (r"y must be int64 \[N\] = \[64\], .*got torch.int64 \[9\]", lambda x, y: (x, y[:9])),
    (r"y must be int64 \[N\] = \[64\], .*got list", lambda x, y: (x, y.tolist())),
    (r"y must be int64 \[N\] = \[64\], .*got NoneType", lambda x, y: (x, None)),
    ("y must be at least 0, got -1", lambda x, y: (x, y - 1)),
    ("y: the largest label is 2, but the model has 2 classes, 0 to 1", lambda x, y: (x, y + 1)),
    ("y: the largest label is 2, but the model has 2 classes", lambda x, y: (x, y + 1), carso),
    (r"the classifier must map images \[B, 3, 8, 8\] to logits", lambda x, y: (x.expand(-1, 3, -1, -1), y)),
    (r"the classifier must map images \[B, 1, 4, 8\] to logits", lambda x, y: (x[:, :, :4], y)),
    (r"x must have images \[1, 8, 8\], got \[1, 8, 4\]", lambda x, y: (x[..., :4], y), carso),
    ("y: the largest label is 2, but the model has 2 classes", lambda x, y: ([(x, y + 1)], None)),
    ("or batches without y and validation_share, got list", lambda x, y: ([(x, y)], y)),
    ("x must be a tensor, or batches with a length above 0", lambda x, y: (iter([(x, y)]), None)),
    ("x must be a tensor, or batches with a length above 0", lambda x, y: ([], None)),
    ("x must give batches in every epoch, but gave none in epoch 0", lambda x, y: (Short(), None)),
    (r"the labels of batch 0 of x must be int64 \[N\] = \[64\], .*float32", lambda x, y: ([(x, y.float())], None)),
    (r"the images of batch 0 of x must be uint8 or float in \[0, 1\]", lambda x, y: ([(x.long(), y)], None)),
    (r"batch 2 of x must be \(images, labels\)", third(lambda x, y: {"label": y, "image": x})),
    ("the images of batch 2 of x must be a torch.Tensor or a NumPy array", third(lambda x, y: (list(x), y))),
    ("the images of batch 2 of x .* to 255: divide images in 0..255 by 255", third(lambda x, y: (255 * x, y))),
    ("batch 2 .* values from -.* if they are normalized, undo this", third(lambda x, y: (2 * x - 1, y))),
    ("the images of batch 2 of x must be in .* free of NaN, got values from nan", third(with_nan)),
    (r"batch 2 .* \[N, C, H, W\], got .*permute", third(lambda x, y: (x.expand(-1, 3, -1, -1).movedim(1, 3), y))),
    ("the labels of batch 2 of x must be at least 0, got -1", third(lambda x, y: (x, y - 1))),
    ("the images of batch 2 of x must be", third(lambda x, y: (x[:0], y[:0]))),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[0])
def test_wrong_images_and_labels_are_named_and_tensors_before_any_step(tmp_path, row):
    message, change, make = (*row, task)[:3]
    made, steps, given = make(), [], change(*images())
    step = made.training_step
    made.training_step = lambda batch: steps.append(batch) or step(batch)
    with pytest.raises((TypeError, ValueError), match=message):
        fit(made, *given, FitConfig(1, 16), tmp_path / "run", progress=False)
    assert not isinstance(given[0], torch.Tensor) or not (steps or (tmp_path / "run").exists())


@pytest.mark.parametrize("shape", [(2, 9, 128, 1), (2, 8, 64, 3)])
def test_signals_with_few_columns_have_their_channels_first(shape):
    check_channels("x", torch.rand(shape))


@pytest.mark.parametrize("more", [(["a.png"] * 16,), (torch.rand(16), "more")])
def test_further_parts_of_a_batch_change_nothing(more):
    usual, other = task(), task()
    fit(usual, of_16(64), None, FitConfig(1), progress=False)
    fit(other, [(*pair, *more) for pair in of_16(64)], None, FitConfig(1), progress=False)
    assert same(usual, other)


class Noisy(Dataset):
    """Images with noise from a generator of the data set's own."""

    def __init__(self, draws):
        (self.x, self.y), self.draws = images(40), draws

    def __len__(self):
        return 40

    def __getitem__(self, i):
        noise = torch.randint(0, 9, (), generator=self.draws)
        return (self.x[i] // 2 + int(noise)).byte(), self.y[i]


def own():
    return torch.Generator().manual_seed(5)


OWNED = {
    "shuffled": lambda: loaded(40, batch_size=8, shuffle=True),
    "weighted": lambda: loaded(40, batch_size=8, sampler=WeightedRandomSampler(torch.ones(40), 40, generator=own())),
    "batches": lambda: loaded(
        40, batch_sampler=BatchSampler(SubsetRandomSampler(range(40), generator=own()), 8, drop_last=False)
    ),
    "both": lambda: loaded(
        40, batch_size=8, generator=own(), sampler=SubsetRandomSampler(range(40), generator=own().manual_seed(6))
    ),
    "subset of a data set": lambda: DataLoader(Subset(Noisy(own()), range(40)), 8),
}


@pytest.mark.parametrize("name", OWNED)
def test_generators_that_a_user_owns_draw_the_same_after_a_kill(name, tmp_path):
    whole, resumed = task(), task()
    fit(whole, OWNED[name](), None, FitConfig(3), progress=False)
    with pytest.raises(Stopped):
        fit(task(), OWNED[name](), None, FitConfig(3), tmp_path, progress=False, callbacks=[StopAt(12)])
    fit(resumed, OWNED[name](), None, FitConfig(3), tmp_path, progress=False)
    assert same(whole, resumed)


def test_the_epochs_and_two_generators_of_a_loader_draw_different_numbers():
    loader = DataLoader(TensorDataset(torch.zeros(40, 1, 8, 8), torch.arange(40)), 8)
    loader.first, loader.second = own(), own()
    found = []
    for epoch in (0, 1, 0):
        order(loader, epoch)
        found.append([int(torch.randint(2**40, (), generator=one)) for one in (loader.first, loader.second)])
    assert found[0] == found[2] and len({*found[0], *found[1]}) == 4


def test_other_batches_of_a_loader_are_trained_on_as_they_come():
    x, y = images(40)

    def sizes(batches):
        made, seen = task(), []
        step = made.training_step
        made.training_step = lambda batch: seen.append(len(batch.x)) or step(batch)
        fit(made, batches, None, FitConfig(1), progress=False)
        return seen

    # the smaller batch is not the last, is the only one, or is not known beforehand
    assert sizes([(x[:16], y[:16]), (x[16:20], y[16:20]), (x[20:36], y[20:36])]) == [16, 4, 16]
    assert sizes(loaded(10, batch_size=16)) == [10] and sizes(UserList(of_16(40))) == [16, 16, 8]


def test_held_out_images_are_a_function_of_the_seed_and_are_not_trained_on():
    kept, held = held_out(100, 0.25, 3)
    assert len(held) == 25 and torch.equal(torch.cat([kept, held]).sort().values, torch.arange(100))
    assert all(torch.equal(a, b) for a, b in zip(held_out(100, 0.25, 3), (kept, held), strict=True))
    assert not torch.equal(held_out(100, 0.25, 4)[1], held)
    for share, n in ((0.001, 100), (0.999, 100)):
        with pytest.raises(ValueError, match="validation_share"):
            held_out(n, share, 0)
