"""The shared loop: exact resume after a kill, logs, refusals, and the classifier's training. The tests of the
options of a classifier's training follow."""

import errno
import json
import math
import os
import random

import pytest
import torch
from small_runs import StopAt, Stopped, atop_task, images, on_step, task, train
from torch import nn
from torch.nn import functional as F

from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import Stream, philox
from purify_fast.training import (
    ClassifierConfig,
    ClassifierTask,
    FitConfig,
    TrainingState,
    fit,
    load_classifier,
    save_classifier,
)
from purify_fast.training.config import TrainingAttack
from purify_fast.training.loop import INTERVAL
from purify_fast.training.run import CHECKPOINT, read_model, read_tree, save_model, write_tree
from purify_fast.training.task import Batch


def test_a_finished_run_is_not_trained_again_and_a_shorter_log_is_kept(tmp_path):
    x, y = images()
    first = fit(task(), x, y, FitConfig(2, 16), tmp_path)
    assert fit(task(), x, y, FitConfig(2, 16), tmp_path) == first
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 9, "step": 99}\n{"epoch": 10, "st')  # a later line, and one cut by a kill
    fit(task(), x, y, FitConfig(2, 16), tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def carso(seed, origin="scratch", samples=1):
    torch.manual_seed(seed)
    defence = Carso(SmallCNN(1, 2, (8, 8), 4), ["conv2"], (1, 8, 8), 4, 2, samples, decoder_width=2)
    return CarsoTask(defence, CarsoConfig(attack=TrainingAttack(eps=0.1, steps=1), kl_delay=0.0), origin)


def test_another_run_is_refused_by_what_differs(tmp_path):
    x, y = images()
    fit(task(), x, y, FitConfig(1, 16), tmp_path / "a")
    fit(carso(0), x, y, FitConfig(1, 16), tmp_path / "b")
    for folder, other, pixels, size, message in (
        ("a", task(), x, 32, "batch_size: 16, now 32"),
        ("a", task(weight_decay=0.1), x, 16, r"weight_decay: 0\.0005, now 0\.1"),
        ("a", task(), 255 - x, 16, r"settings \(data: '64 images, \w+', now '64 images, \w+'\)"),
        # only what differs is named
        ("b", carso(0, samples=3), x, 16, r"settings \(defence\.samples: 1, now 3\)"),
        ("b", carso(0, samples=3), 255 - x, 16, r"\(data: .*; defence\.samples: 1, now 3\)"),
        ("a", task(8), x, 16, "structure: "),
        ("a", carso(0), x, 16, "task: 'classifier', now 'carso'"),
        ("b", carso(1), x, 16, "classifier: "),
        ("b", carso(0, "other"), x, 16, "origin: 'scratch', now 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(other, pixels, y, FitConfig(1, size), tmp_path / folder)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    x, y = images()
    for name in (".checkpoint-abc.safetensors", ".model-a1_.safetensors", ".log-1.jsonl"):
        (tmp_path / name).write_bytes(b"half")
    fit(task(), x, y, FitConfig(1, 16), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", "log.jsonl"}


def test_the_global_generator_is_left_as_it_was():
    made = task(attack=TrainingAttack(eps=0.1, steps=1))
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    fit(made, *images(), FitConfig(1, 16))
    assert torch.equal(torch.rand(3), want)


def test_trees_round_trip(tmp_path):
    shared = torch.rand(2)
    named = {"optimizers": {"slow": {2: torch.arange(3)}}, "2": 1}
    tree = {"a": [1, None, "x", named], "b": shared, "c": shared, "d": torch.zeros(0), "e": 1e-7}
    write_tree(tmp_path / "t", tree)
    back = read_tree(tmp_path / "t")
    assert back["a"][:3] == [1, None, "x"] and back["a"][3]["2"] == 1
    assert torch.equal(back["a"][3]["optimizers"]["slow"][2], torch.arange(3))
    assert torch.equal(back["b"], shared) and back["d"].shape == (0,) and back["e"] == 1e-7


# -- A training that diverges: when it is seen, and that its last checkpoint stays -------------------------------------
class Fragile(ClassifierTask):
    """Its loss at a step, or the gradient of it, is not finite."""

    def __init__(self, at, how="loss"):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())
        self.at, self.how, self.seen = at, how, []

    def training_step(self, batch):
        loss, metrics = super().training_step(batch)
        self.seen.append(batch)
        if batch.step != self.at:
            return loss, metrics
        weight = next(self.model.parameters()).flatten()[0]
        # the second is finite itself
        return (loss * math.nan if self.how == "loss" else loss + (weight - weight.detach()).abs().sqrt()), metrics


def test_it_is_seen_at_the_next_look_without_a_checkpoint():
    """An epoch of 1,000 steps and no folder: nothing else would wait for the device before its end."""
    task = Fragile(30)
    with pytest.raises(FloatingPointError, match=r"epoch 0: training diverged before step 100, a loss or a weight"):
        fit(task, *images(2000), FitConfig(1, 2), progress=False)
    assert len(task.seen) == INTERVAL


def test_statistics_that_are_not_finite_never_enter_a_checkpoint(tmp_path):
    """Finite losses and weights, but a BatchNorm whose statistics overflowed."""

    class Overflowing(Fragile):
        def after_step(self):
            self.model.norm.running_var.fill_(math.inf)

    task = Overflowing(999)
    task.model.norm = torch.nn.BatchNorm1d(2)
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        fit(task, *images(), FitConfig(1, 16), tmp_path, progress=False)
    assert not (tmp_path / CHECKPOINT).is_file()


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 5])
def test_what_is_not_finite_never_enters_a_checkpoint(tmp_path, how, at):
    config = FitConfig(3, 16, checkpoint_seconds=0)
    with pytest.raises(FloatingPointError, match=r"training diverged"):
        fit(Fragile(at, how=how), *images(), config, tmp_path, progress=False)
    saved = read_tree(tmp_path / CHECKPOINT)
    assert saved["step"] == at
    assert all(value.isfinite().all() for value in (*saved["model"].values(), *saved["sums"].values()))
    healthy = Fragile(math.inf)
    last = fit(healthy, *images(), config, tmp_path, progress=False)
    assert math.isfinite(last["loss"]) and all(weight.isfinite().all() for weight in healthy.model.parameters())


# -- listeners to a training: foreign loggers, JSONL, the bar ----------------------------------------------------------
class Structural:
    """A callback of another package, which has the three methods that `fit` calls."""

    def __init__(self):
        self.steps, self.epochs, self.ends = [], [], []
        self.on_step, self.on_epoch = self.steps.append, self.epochs.append

    def on_end(self, state):
        self.ends.append((state, state.task.model.training))


def test_what_a_callback_sees():
    seen = Structural()
    trained = task()
    last = fit(trained, *images(), FitConfig(2, 16), progress=False, callbacks=[seen])
    assert [(s.step, s.epoch, s.images) for s in seen.steps] == [(i + 1, i // 4, 16) for i in range(8)]
    assert all(isinstance(s, TrainingState) and s.total_steps == 8 and s.epochs == 2 for s in seen.steps)
    assert all(s.metrics["loss"].dim() == 0 and not s.metrics["loss"].requires_grad for s in seen.steps)
    for epoch, state in enumerate(seen.epochs):
        steps = [float(s.metrics["loss"]) for s in seen.steps[4 * epoch : 4 * epoch + 4]]
        assert state.metrics["loss"] == pytest.approx(sum(steps) / 4, rel=1e-5)
        assert state.images == 64 and state.images_per_second > 0 and state.step == 4 * epoch + 4
    ((end, training),) = seen.ends
    assert end.metrics == last and end.step == 8 and end.task is trained and not training
    with pytest.raises(AttributeError):
        end.step = 3


def test_the_jsonl_file_has_a_row_an_epoch_with_the_mean_metrics(tmp_path):
    last = fit(task(), *images(), FitConfig(2, 16), tmp_path, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    times = ["images_per_second", "seconds", "peak_memory"]
    assert [list(row) for row in rows] == [["epoch", "step", "loss", "accuracy", "learning_rate", *times]] * 2
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 4), (1, 8)]
    assert {name: rows[-1][name] for name in last} == last


def test_the_log_has_the_time_and_the_memory(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("purify_fast.training.run.time.monotonic", lambda: clock[0])

    # each step takes a second, those of the second epoch two, and those of the third epoch three
    slow = on_step(lambda state: clock.__setitem__(0, clock[0] + state.epoch + 1))

    def rows():
        return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    with pytest.raises(Stopped):
        fit(task(), *images(), FitConfig(3, 16), tmp_path, progress=False, callbacks=[slow, StopAt(7)])
    assert [row["seconds"] for row in rows()] == [4]
    clock[0] += 1000
    # The steps since the last checkpoint are taken again, and the time between the runs does not count.
    fit(task(), *images(), FitConfig(3, 16), tmp_path, progress=False, callbacks=[slow])
    assert [row["seconds"] for row in rows()] == [4, 12, 24]
    assert all(10**7 < row["peak_memory"] < 10**11 for row in rows())


def test_a_finished_run_calls_on_end_alone(tmp_path):
    last = fit(task(), *images(), FitConfig(1, 16), tmp_path, progress=False)
    seen = Structural()
    assert fit(task(), *images(), FitConfig(1, 16), tmp_path, progress=False, callbacks=[seen]) == last
    assert not seen.steps and not seen.epochs and seen.ends[0][0].metrics == last


# -- checkpoints and saved models that changed on the disk, and a disk that is full ------------------------------------
def flipped(path, bit):
    """The file with one bit changed, and how to change it back."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_changed_bit_of_a_model_and_a_checkpoint_is_seen_and_a_damaged_checkpoint_stays(tmp_path):
    save_classifier(SmallCNN(1, 2, (8, 8), 2), tmp_path)
    train(tmp_path, epochs=2)
    readers = {
        "model.safetensors": lambda: load_classifier(tmp_path),
        CHECKPOINT: lambda: read_tree(tmp_path / CHECKPOINT),
    }
    for name, read in readers.items():
        whole, draw = (tmp_path / name).read_bytes(), random.Random(0)
        for _ in range(30):
            flipped(tmp_path / name, draw.randrange(8 * len(whole)))
            with pytest.raises(ValueError):
                read()
            (tmp_path / name).write_bytes(whole)
        read()
    flipped(tmp_path / CHECKPOINT, 8 * 3000)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} .*remove it to start anew"):
        train(tmp_path, epochs=3)
    assert (tmp_path / CHECKPOINT).is_file()


def test_the_checkpoint_before_a_full_disk_is_kept(tmp_path, monkeypatch):
    train(tmp_path, epochs=1)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.safetensors"):
        write_tree(tmp_path / CHECKPOINT, {"step": 1})
    assert (tmp_path / CHECKPOINT).read_bytes() == before and not list(tmp_path.glob(".checkpoint*"))


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(tmp_path, monkeypatch):
    """After a power failure a file is whole or absent only in this order."""
    done, sync, replace = [], os.fsync, os.replace

    def record_sync(handle):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    def record_replace(source, target):
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_tree(tmp_path / CHECKPOINT, {"step": 1})
    assert done == (["file", "name", "folder"] if os.path.isdir("/proc/self/fd") else done)
    assert done.index("name") == 1 and len(done) == 3


# -- checkpoints and saved models give back the values of get_extra_state ----------------------------------------------
class Extra(nn.Linear):
    value = None

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def extra(value):
    made = nn.Sequential(nn.Flatten(), Extra(64, 2))
    made[1].value = value
    return made


def run(made, folder, **options):
    torch.manual_seed(0)
    task = ClassifierTask(made, ClassifierConfig())
    config = FitConfig(3, 16, checkpoint_seconds=0, validation_share=0.25, keep_best="loss")
    fit(task, *images(), config, folder, progress=False, **options)
    return task


@pytest.mark.parametrize("value", [{"version": 3, "names": [1, None, "x"]}, torch.arange(3.0)], ids=["JSON", "tensor"])
def test_a_run_continues_with_the_extra_state_of_a_model(value, tmp_path):
    torch.manual_seed(1)
    whole = run(extra(value), tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(Stopped):
        run(extra(value), tmp_path / "cut", callbacks=[StopAt(5)])
    resumed = extra(torch.zeros(3) if isinstance(value, torch.Tensor) else None)
    run(resumed, tmp_path / "cut")
    assert all(map(torch.equal, whole.model.parameters(), resumed.parameters())) and str(resumed[1].value) == str(value)


def test_a_saved_model_has_the_extra_state(tmp_path):
    state = {"weight": torch.ones(2), "1._extra_state": {"version": 5}}
    save_model(tmp_path, "Kind", {}, state)
    facts, back = read_model(tmp_path)
    assert torch.equal(back.pop("weight"), state.pop("weight"))
    assert back == state and facts.keys() == {"kind", "arguments", "version"}


# -- options of a classifier's training --------------------------------------------------------------------------------
# The options of a classifier's training: accumulated gradients, smoothed labels, and noise.

ATTACK = TrainingAttack(0.1, 2)


def shallow_task(classes=2, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.SiLU(), nn.Linear(8, classes))
    return ClassifierTask(model, ClassifierConfig(**options))


def gradients(made):
    """The norms of the gradients with which the optimizer steps, and the sizes of the parts of a batch."""
    norms, sizes, step, train = [], [], made.optimizer.step, made.training_step

    def seen():
        norms.append(float(sum(weight.grad.square().sum() for weight in made.model.parameters()).sqrt()))
        return step()

    made.optimizer.step = seen
    made.training_step = lambda batch: sizes.append(len(batch.x)) or train(batch)
    return norms, sizes


def test_parts_of_a_batch_give_the_weights_of_the_whole_batch():
    usual, parts = shallow_task(attack=ATTACK), shallow_task(attack=ATTACK)
    wanted = fit(usual, *images(60), FitConfig(2, 20), progress=False)
    norms, sizes = gradients(parts)
    found = fit(parts, *images(60), FitConfig(2, 20, accumulate=3), progress=False)
    assert len(norms) == 6 and sizes[-3:] == [7, 7, 6] and found == pytest.approx(wanted, rel=1e-4)
    for one, other in zip(parts.model.parameters(), usual.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_update_follows_all_parts_of_the_update_before():
    """AToP with a discriminator has two updates a step."""
    made, order = atop_task(gan_grad=True, discriminator_width=1), []
    for name, optimizer in made.optimizers.items():
        optimizer.step = lambda step=optimizer.step, name=name: order.append(name) or step()
    x, y = torch.randint(0, 256, (32, 1, 16, 16), dtype=torch.uint8), torch.arange(32) % 10
    fit(made, x, y, FitConfig(1, 16, accumulate=2), progress=False)
    assert len(order) == 4 and order[:2] == order[2:] and set(order) == set(made.optimizers)


def test_labels_are_smoothed_in_the_training_and_not_in_a_validation():
    made, seen = shallow_task(label_smoothing=0.2), []
    step = made.training_step
    made.training_step = lambda batch: seen.append((batch, made.model(batch.x).detach())) or step(batch)
    last = fit(made, *images(), FitConfig(1, 48, validation_share=0.25), progress=False)
    ((batch, logits),) = seen
    plain, smoothed = (float(F.cross_entropy(logits, batch.y, label_smoothing=share)) for share in (0.0, 0.2))
    assert last["loss"] == pytest.approx(smoothed) != pytest.approx(plain)
    logits = made.model(batch.x).detach()
    assert float(made.validate(batch)["loss"]) == pytest.approx(float(F.cross_entropy(logits, batch.y)))


def test_noise_is_added_to_the_images_of_steps_and_validations():
    made, x, y = shallow_task(attack=TrainingAttack(eps=0.0, steps=1), noise=0.25), *images()
    batch = Batch(x[:8].float() / 255, y[:8].long(), torch.arange(8), seed=3)
    key = torch.tensor([3])
    noise = philox(key, batch.sample_ids, x[0].numel(), stream=Stream.SMOOTHING, distribution="normal")
    with torch.no_grad():
        expected = float(F.cross_entropy(made.model(batch.x + 0.25 * noise.view(batch.x.shape)), batch.y))
        assert expected != pytest.approx(float(F.cross_entropy(made.model(batch.x), batch.y)))
    for loss in (made.training_step(batch)[0], made.training_step(batch)[0], made.validate(batch)["loss"]):
        assert float(loss.detach()) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"noise needs clean images, eps 0, got noise=0.25"):
        ClassifierConfig(attack=ATTACK, noise=0.25)
