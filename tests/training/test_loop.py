"""The shared loop: exact resume after a kill, logs, refusals, and the classifier's training."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_runs import images, task

from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import FitConfig, fit
from purify_fast.training.checkpoint import read_tree, write_tree
from purify_fast.training.config import TrainingAttack

#: What a process made and read since it began, and the time and the memory that it took.
OF_PROCESS = ("images_per_second", "bank", "seconds", "expected_seconds", "peak_memory")
RUN = """
import sys, torch
from purify_fast import data
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models import SmallCNN
from purify_fast.training import BankConfig, FitConfig, TrainingAttack, fit
torch.set_num_threads(1)
torch.manual_seed(0)
digits = data.load_dataset("digits")
defence = Carso(SmallCNN(width=4), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)
target, _, banked = sys.argv[2].partition(", ")
task = CarsoTask(defence, CarsoConfig(attack_target=target, attack=TrainingAttack(eps=0.2, steps=3)))
config = FitConfig(4, 64, padding=0 if banked else 1, flip=True, checkpoint_seconds=0.2)
bank = BankConfig(8, 0.3, sys.argv[1] + " bank") if banked else None
print("ready", flush=True)
fit(task, digits.x_train, digits.y_train, config, sys.argv[1], bank=bank)
"""


def run(folder, target, kill_after=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    process.stdout.readline()
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.parametrize("target", ["pipeline", "classifier, with a bank"])
def test_killed_at_random_moments_and_resumed_gives_the_same_weights_to_the_bit(tmp_path, target):
    assert run(tmp_path / "whole", target)[0] == 0
    kills, code = 0, None
    while code != 0:
        # after a few kills the run may finish, however slow the machine
        after = random.uniform(0.3, 1.5) if kills < 2 else None
        code, errors = run(tmp_path / "killed", target, after)
        assert code in (0, -signal.SIGKILL), errors
        kills += code != 0
    assert kills >= 1
    whole, killed = (read_tree(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "killed"))
    assert whole["step"] == killed["step"] == 4 * (1297 // 64)
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, killed["model"][name]), name
    assert whole["last"] == killed["last"]
    logs = [
        [json.loads(line) | dict.fromkeys(OF_PROCESS, 0) for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("whole", "killed")
    ]
    assert logs[0] == logs[1] and [row["epoch"] for row in logs[0]] == [0, 1, 2, 3]


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
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", "kernels.json", "log.jsonl"}


def test_the_global_generator_is_left_as_it_was():
    made = task(attack=TrainingAttack(eps=0.1, steps=1))
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    fit(made, *images(), FitConfig(1, 16))
    assert torch.equal(torch.rand(3), want)


def test_trees_round_trip(tmp_path):
    shared = torch.rand(2)
    tree = {"a": [1, None, "x", {2: torch.arange(3)}], "b": shared, "c": shared, "d": torch.zeros(0), "e": 1e-7}
    write_tree(tmp_path / "t", tree)
    back = read_tree(tmp_path / "t")
    assert back["a"][:3] == [1, None, "x"] and torch.equal(back["a"][3][2], torch.arange(3))
    assert torch.equal(back["b"], shared) and back["d"].shape == (0,) and back["e"] == 1e-7
