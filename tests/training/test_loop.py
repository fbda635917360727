"""The shared loop: exact resume after a kill, logs, refusals, and the classifier's training."""

import pytest
import torch
from small_runs import images, task

from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import FitConfig, fit
from purify_fast.training.config import TrainingAttack
from purify_fast.training.run import read_tree, write_tree


def test_a_finished_run_is_not_trained_again_and_a_shorter_log_is_kept(tmp_path):
    x, y = images()
    first = fit(task(), x, y, FitConfig(2, 16), tmp_path)
    again = task()
    assert fit(again, x, y, FitConfig(2, 16), tmp_path) == first
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
