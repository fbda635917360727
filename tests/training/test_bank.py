"""The adversarial bank: what it keeps and how exactly, which attacks it saves, kills, sharing, and what it refuses."""

import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import results_of
from small_runs import SHAPE, Stopped, atop_task, attack, carso_task, classifier_task, same
from trainings import banked

from purify_fast import cli
from purify_fast.attacks import pgd
from purify_fast.attacks.base import Ball
from purify_fast.methods.carso import CarsoTask
from purify_fast.methods.purifier_task import FrozenAttacks, PurifierTask
from purify_fast.models import SmallCNN
from purify_fast.training import BankConfig, FitConfig, bank as bank_module, fit, save_classifier
from purify_fast.training.bank import AdversarialBank, quantized, restored
from purify_fast.training.sources import InMemory
from purify_fast.training.task import Batch

TASKS = {
    "carso": lambda **options: carso_task(kl_delay=0.0, **options),
    "atop": atop_task,
    "atop, random starts": lambda: atop_task(attack_method="pgd", attack=attack()),
}


def images(n=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=generator), torch.arange(n) % 10


def train(task, folder, epochs=3, banks=None, callbacks=(), loop=None, **bank):
    """Train for epochs of four steps; with a folder of banks with a bank."""
    config = FitConfig(epochs, **{"batch_size": 16, **(loop or {})})
    settings = None if banks is None else BankConfig(folder=banks, **bank)
    fit(task, *images(), config, folder, progress=False, callbacks=callbacks, bank=settings)
    return task


def rows(folder):
    return [json.loads(line)["bank"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", TASKS)
def test_with_all_made_anew_it_is_the_plain_training_to_the_bit(tmp_path, kind):
    plain = train(TASKS[kind](), tmp_path / "plain", epochs=2)
    banked = train(TASKS[kind](), tmp_path / "banked", epochs=2, banks=tmp_path / "banks", refresh=1.0)
    assert same(plain, banked)
    assert all(row["read"] == 0 for row in rows(tmp_path / "banked"))
    # what it kept serves a run that reads
    train(TASKS[kind](), tmp_path / "later", epochs=1, banks=tmp_path / "banks", refresh=0.0)
    assert rows(tmp_path / "later")[-1]["read"] > 0


def test_the_share_that_is_made_anew_is_rho(tmp_path, monkeypatch):
    monkeypatch.setattr(bank_module, "TOGETHER", 16)
    task = TASKS["atop, random starts"]
    made = []
    for batch in (16, 64):
        options = {"banks": tmp_path / f"banks of {batch}", "variants": 1}
        train(task(), tmp_path / f"first of {batch}", epochs=1, refresh=0.0, **options)
        folder = tmp_path / f"second of {batch}"
        train(task(), folder, epochs=4, refresh=0.25, loop={"seed": 1, "batch_size": batch}, **options)
        made.append(rows(folder)[-1]["made"])
    # a quarter of 256 images: in batches of 16 all images of every fourth step; in large ones by draws, of which three
    # standard deviations are 21
    assert made[0] == 64 and 0 < abs(made[1] - 64) <= 21


def test_a_full_bank_is_read_and_attacks_without_a_random_start_have_one_variant(tmp_path):
    options = {"banks": tmp_path / "banks", "variants": 4}
    train(TASKS["atop"](), tmp_path / "a", epochs=3, refresh=0.5, **options)
    assert [row["made"] for row in rows(tmp_path / "a")] == [64, 64, 64]
    # a later run with the same key starts with it, with another seed and other settings of the purifier
    train(atop_task(reconstruction_weight=0.5), tmp_path / "b", refresh=0.0, loop={"seed": 5}, **options)
    assert rows(tmp_path / "b")[-1] == {"variants": 4, "refresh": 0.0, "made": 0, "read": 192}
    train(TASKS["atop, random starts"](), tmp_path / "c", epochs=6, refresh=0.0, **options)
    assert [row["made"] for row in rows(tmp_path / "c")] == [64, 128, 192, 256, 256, 256]


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_every_image_of_a_step_is_attacked_by_the_attack_of_its_place(tmp_path, monkeypatch, norm):
    """Half by PGD and half by FGSM, each with half of eps and with all of it, also where variants are read."""
    eps, seen = {"linf": 0.1, "l1": 6.0}[norm], []
    balanced = CarsoTask.balanced_batch

    def watched(self, batch, config):
        perturbed = balanced(self, batch, config)
        seen.append(((perturbed - batch.x).flatten(1), perturbed))
        return perturbed

    monkeypatch.setattr(CarsoTask, "balanced_batch", watched)
    task = TASKS["carso"](attack=attack(eps=eps, norm=norm, steps=4))
    train(task, tmp_path / "a", epochs=8, banks=tmp_path / "banks", refresh=0.3)
    assert rows(tmp_path / "a")[-1]["read"] > 30
    order = {"linf": float("inf"), "l1": 1}[norm]
    sizes = torch.stack([torch.linalg.vector_norm(change, order, dim=1) for change, _ in seen])
    assert (sizes[:, :8] == 0).all()
    for place, radius in ((8, eps / 2), (10, eps), (12, eps / 2), (14, eps)):
        size = sizes[:, place : place + 2]
        assert (size <= radius * (1 + 1e-5)).all() and (size > 0.6 * radius).all()
    if norm == "linf":
        # a step of FGSM has one length where the gradient is not 0, but at the borders of the box
        images = torch.stack([image[14:].flatten(1) for _, image in seen])
        lengths = torch.stack([change[14:].abs() for change, _ in seen])[(images > 0) & (images < 1)]
        assert ((lengths < 1e-6) | ((lengths - eps).abs() <= eps / 254 + 1e-6)).all()
    assert all(image.min() >= 0 and image.max() <= 1 for _, image in seen)


def test_the_log_says_what_the_bank_was(tmp_path):
    train(TASKS["carso"](), tmp_path / "a", banks=tmp_path / "banks", variants=6, refresh=0.25)
    assert all(row | {"variants": 6, "refresh": 0.25} == row for row in rows(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"bank\.refresh: 0\.25, now 0\.5"):
        train(TASKS["carso"](), tmp_path / "a", banks=tmp_path / "banks", variants=6, refresh=0.5)
    with pytest.raises(ValueError, match="now None"):
        train(TASKS["carso"](), tmp_path / "a")


def test_held_out_images_are_attacked_afresh(tmp_path, monkeypatch):
    (x, y), task, asked = images(), TASKS["atop"](), []
    stored = AdversarialBank.adversarial

    def watched(self, batch, rows, make):
        made = []
        found = stored(self, batch, rows, lambda rows: made.append(rows) or make(rows))
        asked.append((batch.whole, made == [None]))
        return found

    monkeypatch.setattr(AdversarialBank, "adversarial", watched)
    config = FitConfig(2, 16, validation_share=0.5)
    fit(task, x, y, config, progress=False, bank=BankConfig(folder=tmp_path / "banks"))
    # The second epoch reads all of its images, and each validation attacks all of its own.
    epochs = 2 * (len(x) // 32)
    assert sum(whole and made for whole, made in asked) == epochs and (False, False) in asked
    # The next training has no bank.
    assert task.adversarial.__func__ is PurifierTask.adversarial


def test_the_command_keeps_a_bank_and_its_options_begin_the_same_again(tmp_path):
    x, y = images()
    arrays = {"x_train": x[:, 0].numpy(), "y_train": y.numpy(), "x_test": x[:, 0].numpy(), "y_test": y.numpy()}
    np.savez(tmp_path / "small.npz", **arrays)
    save_classifier(SmallCNN(width=2), tmp_path / "classifier")
    words = ["--data", str(tmp_path / "small.npz"), "--classifier", str(tmp_path / "classifier"), "--device", "cpu"]
    words += ["--layers", "conv2", "--steps", "1", "--kl-delay", "0", "--epochs", "2", "--batch-size", "16"]
    words += ["--bank", "5", "--bank-refresh", "0.25", "--bank-folder", str(tmp_path / "banks")]
    assert cli.main(["train", "carso", *words, "--out", str(tmp_path / "a")]) == 0
    assert cli.main(["train", "carso", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "b")]) == 0
    first, second = (rows(tmp_path / name)[-1] for name in "ab")
    assert first.items() >= {"variants": 5, "refresh": 0.25}.items() and second["made"] < first["made"]
    assert len(list((tmp_path / "banks").glob("*/*.npy"))) == 1


@pytest.mark.parametrize("last", [6, 11])
def test_a_kill_in_the_middle_of_writing_goes_on_to_the_same_weights(tmp_path, monkeypatch, last):
    options = {"epochs": 3, "variants": 8, "refresh": 0.4}
    whole = train(TASKS["carso"](), tmp_path / "whole", banks=tmp_path / "banks of whole", **options)
    keep, calls = AdversarialBank.keep, []

    def torn(self, places, seed, steps, scale, numbers):
        def part(rows, values=None):
            at = tuple(place[rows] for place in places)
            keep(self, at, seed, steps[rows][:, :values], scale[rows], numbers[rows])

        calls.append(seed)
        if len(calls) < last:
            return part(slice(None))
        # The process ends after it has written one variant, and half of each other variant.
        assert len(steps) > 1
        part(slice(1))
        with pytest.raises(ValueError):
            part(slice(1, None), 100)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(AdversarialBank, "keep", torn)
        train(TASKS["carso"](), tmp_path / "a", banks=tmp_path / "banks", **options)
    resumed = train(TASKS["carso"](), tmp_path / "a", banks=tmp_path / "banks", **options)
    assert same(whole, resumed)


def test_a_step_that_is_taken_again_makes_all_that_it_made_or_nothing(tmp_path):
    """The last bits of what a model computes may depend on how many images it is given."""
    bank, x = small_bank(tmp_path), torch.rand(4, *SHAPE)

    def asked(seed):
        return ask(bank, seed, x, x)[0]

    assert asked(1) == [None] and asked(2) == [None] and asked(2) == asked(3) == []
    bank.records["number"][1, 1] = 0
    assert asked(2) == [None]
    bank.records["number"][1] = 0
    # of another step's images only those that are missing
    ((rows,),) = [asked(3)]
    assert rows.tolist() == [1]


def test_other_weights_data_attacks_or_variants_start_with_an_empty_bank(tmp_path):
    x, y = images(16)

    def made(task, x=x, **options):
        bank, run = BankConfig(folder=tmp_path / "banks", refresh=0.0, **options), tmp_path / str(next(number))
        fit(task, x, y, FitConfig(1, 16), run, progress=False, bank=bank)
        return rows(run)[-1]["made"]

    number = itertools.count()
    assert made(TASKS["carso"]()) == 8 and made(TASKS["carso"]()) == 0
    other = TASKS["carso"]()
    with torch.no_grad():
        next(other.defence.classifier.parameters())[0, 0, 0, 0] += 1e-3
    other = type(other)(other.defence, other.config)
    assert made(other) == 8
    assert made(TASKS["carso"](), x=x.flip(3)) == 8
    assert made(TASKS["carso"](attack=attack(eps=0.11))) == 8
    assert made(TASKS["carso"](attack=attack(steps=3))) == 8
    assert made(TASKS["carso"](attack=attack(norm="l2"))) == 8
    assert made(TASKS["carso"](precision="bfloat16")) == 8
    assert made(TASKS["carso"](), variants=5) == 8
    # what does not decide what an attack makes is no part of the key
    assert made(TASKS["carso"](learning_rate=1e-4, beta=0.3)) == 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5), ("l1", 12.0)])
def test_a_variant_is_within_eps_over_254_of_what_was_made_and_in_ball_and_box(norm, eps):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    x, y = torch.rand(50, 3, 8, 8), torch.arange(50) % 10
    x[:10], x[10:20] = 0.0, 1.0
    made = pgd(model, x, y, eps=eps, norm=norm, steps=5, alpha=eps / 2)
    steps, scale = quantized(x, made)
    assert steps.dtype == torch.int8 and scale.shape == (50,)
    read = restored(x, steps, scale, Ball(torch.full((50,), eps), norm))
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    assert read.min() >= 0 and read.max() <= 1
    distance = torch.linalg.vector_norm((read - x).flatten(1).double(), order, dim=1)
    assert (distance <= eps * (1 + 1e-6)).all()
    error = (read - made).flatten(1).double()
    if norm == "linf":
        assert error.abs().max() <= eps / 254 * (1 + 1e-4)
    assert (error.norm(dim=1) <= 192**0.5 * eps / 254).all()
    unprojected = x + steps.view(x.shape) * scale[:, None, None, None]
    assert ((unprojected - made).abs().flatten(1).amax(1) <= scale / 2 * (1 + 1e-4)).all()
    assert (scale / 2 <= eps / 254 * (1 + 1e-4)).all() and error.abs().max() > 0


def test_an_image_that_no_attack_moves_stays_and_one_that_is_no_number_is_not_kept(tmp_path):
    bank = small_bank(tmp_path, variants=1, random=False)
    x = torch.rand(3, *SHAPE)
    broken = torch.stack([x[0], x[1], torch.full(SHAPE, float("nan"))])
    for seed, made in ((1, 3), (2, 1)):
        asked, got = ask(bank, seed, x, broken)
        assert torch.equal(got[:2], x[:2]) and got[2].isnan().all()
        assert [3 if rows is None else len(rows) for rows in asked] == [made]


def small_bank(folder, variants=2, random=True, refresh=0.0):
    attacks = FrozenAttacks((0.1,), (random,), 1.0, "linf", {"model": "some"})
    task = SimpleNamespace(frozen_attacks=lambda: attacks, result=SimpleNamespace())
    source = InMemory(*images(10), FitConfig(1, 1), torch.device("cpu"))
    source.batch_size = 4
    return AdversarialBank(source, BankConfig(variants, refresh, folder), task)


def ask(bank, seed, x, found):
    """The rows that a step asks for, of which an attack makes those of ``found``, and the step's images."""
    asked, ids = [], torch.arange(len(x))
    made = lambda rows: asked.append(rows) or (found if rows is None else found[rows])  # noqa: E731
    return asked, bank.adversarial(Batch(x, ids, ids, seed), slice(None), made)


def test_the_oldest_variant_gives_way(tmp_path):
    """A refresh of 0.5 attacks all images in every second step."""
    bank, x = small_bank(tmp_path, variants=3, refresh=0.5), torch.full((1, *SHAPE), 0.5)

    def change(seed, asks):
        asked, got = ask(bank, seed, x, x + 0.001 * seed)
        assert len(asked) == asks
        return round(float((got - x).mean()) / 0.001)

    for seed in range(10, 15):
        # a step that is taken again writes nothing twice
        assert change(seed, asks=1) == change(seed, asks=0) == seed
    assert sorted(bank.records["draw"][0]) == [12, 13, 14]
    assert change(13, asks=0) == 13
    bank.refresh = 0.0
    assert {change(seed, asks=0) for seed in range(99, 120)} == {12, 13, 14}


def test_mirrored_images_are_images_of_their_own(tmp_path, monkeypatch):
    """FGSM's image of a mirrored image is not that of the image: what is read must be of what the step sees."""
    options = {"epochs": 4, "loop": {"flip": True}}
    plain = train(TASKS["atop"](), tmp_path / "plain", **options)
    banked = train(TASKS["atop"](), tmp_path / "banked", banks=tmp_path / "banks", refresh=0.0, **options)
    assert rows(tmp_path / "banked")[-1]["read"] > 100 and 100 < rows(tmp_path / "banked")[-1]["made"] <= 128
    # the same images up to what int8 leaves
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(banked.model.state_dict()[name], value, rtol=2e-2, atol=2e-3)
    train(TASKS["atop"](), tmp_path / "straight", banks=tmp_path / "banks", refresh=0.0)
    assert rows(tmp_path / "straight")[-1]["made"] == 64 and len(list((tmp_path / "banks").iterdir())) == 2


def test_a_full_disk_is_told_before_any_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: .*\.npy"):
        small_bank(tmp_path)
    assert not list(tmp_path.glob("*/*.npy"))


@pytest.mark.parametrize(
    ("make", "settings", "options", "message"),
    [
        (lambda: carso_task("pipeline"), {}, {}, "bank must be None"),
        (classifier_task, {}, {}, "bank must be None"),
        (TASKS["carso"], {"padding": 1}, {}, "bank needs x as a tensor, without accumulate and padding"),
        (TASKS["carso"], {}, {"variants": 3}, "variants must be at least 4, one for each attack, got 3"),
        (lambda: TASKS["carso"](attack=attack(eps_warmup=0.5)), {}, {}, "set eps_warmup to 0, got 0.5"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, make, settings, options, message):
    with pytest.raises(ValueError, match=message):
        train(make(), tmp_path / "a", banks=tmp_path / "banks", loop=settings, **options)
    assert not (tmp_path / "banks").exists() or not list((tmp_path / "banks").iterdir())
    with pytest.raises(ValueError, match="bank needs x as a tensor"):
        fit(TASKS["carso"](), [images()], None, FitConfig(1), bank=BankConfig(folder=tmp_path))


@pytest.mark.slow
def test_two_processes_share_a_bank_and_train_as_one(tmp_path):
    folder = tmp_path / "two"
    first, second = results_of(folder, 2, lambda: banked(folder / "run", folder / "banks"))
    one = banked(tmp_path / "run of one", tmp_path / "banks of one")
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    # an image that one process attacked is read by the other
    for name in ("made", "read"):
        assert first[name] + second[name] == one[name] > 100 and min(first[name], second[name]) > 0
    for name, value in one["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-3, atol=1e-3)
    # both use one file, with the variants of one process
    (shared,), (own,) = (list(path.glob("*/*.npy")) for path in (folder / "banks", tmp_path / "banks of one"))
    assert shared.parent.name == own.parent.name
