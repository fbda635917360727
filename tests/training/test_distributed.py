"""Several processes train what one trains; BatchNorm over all of them; kills, refusals, and the command by torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import results_of, together, until
from trainings import TASKS, batchnorm, captured, first_fails, refusals, small_task, weights

from purify_fast import cli
from purify_fast.training import distributed
from purify_fast.training.run import CHECKPOINT, read_tree

KINDS = tuple(TASKS)
#: Trainings whose attack steps are captured, although BatchNorms of the first wait for the other process.
CAPTURED = ("convolutional", "atop gan")
NORMS = {  # layer, shape, images of the first process, mean, dtype
    "2d": ("2d", (7, 3, 4, 5), 3, 0.0, torch.float64),
    "1d": ("1d", (6, 3), 2, 0.5, torch.float64),
    "far": ("2d", (8, 3, 4, 5), 4, 3e3, torch.float32),
    "bfloat16": ("2d", (8, 3, 4, 5), 3, 0.5, torch.bfloat16),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder, and what each of two processes made of everything in which none of them dies."""
    folder = tmp_path_factory.mktemp("two")

    def work():
        made = {kind: weights(kind, folder / f"run-{kind}") for kind in KINDS}
        made |= {f"captured {kind}": captured(kind) for kind in CAPTURED}
        made |= {name: batchnorm(*arguments) for name, arguments in NORMS.items()}
        return made | {"refusals": refusals(), "first fails": first_fails()}

    return folder, results_of(folder, 2, work)


def results(two, name):
    return [made[name] for made in two[1]]


def close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_with_the_weights_and_metrics_of_one(two, kind):
    one = weights(kind)
    first, second = results(two, kind)
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    assert first["last"] == second["last"] == pytest.approx(one["last"], rel=1e-4)
    start = small_task(kind).model.state_dict()
    assert any((one["state"][name] - start[name]).abs().max() > 1e-3 for name in start)
    close(first["state"], one["state"])
    assert len((two[0] / f"run-{kind}" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", CAPTURED)
def test_two_processes_capture_attacks_between_validations_that_they_share(two, kind):
    one, (first, second) = captured(kind), results(two, f"captured {kind}")
    # 25 images in 3 epochs, in batches of 16 at most
    assert first["validated"] == [16] * 3 and second["validated"] == [9] * 3 and one["validated"] == [25] * 3
    assert first["last"] == second["last"] == pytest.approx(one["last"], rel=1e-4)
    assert all(torch.equal(tensor, second["state"][name]) for name, tensor in first["state"].items())
    close(first["state"], one["state"])


def test_batchnorms_of_others_are_as_before_the_training(two):
    for made in results(two, "BatchNorms of others"):
        assert made["kinds"] == [type(part) for part in small_task("BatchNorms of others").model.modules()]


@pytest.mark.parametrize("name", NORMS)
def test_batchnorm_over_two_processes_is_torchs_over_all_images(two, name):
    layer, shape, first, mean, dtype = NORMS[name]
    y, dx, dweight, dbias, *running = batchnorm(f"torch {layer}", shape, first, mean, torch.float64)
    a, b = results(two, name)
    found = [torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), a[2] + b[2], a[3] + b[3], *a[4:]]
    assert all(torch.equal(*pair) for pair in zip(a[4:], b[4:], strict=True))
    # float32 at a mean of 3,000 holds 4 digits of the deviations; their squares' sum would hold none
    digits = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 3e-2}[dtype]
    tolerance = {"rtol": digits, "atol": digits}
    assert {a[0].dtype, a[1].dtype} == {dtype}
    for got, want in zip(found, [y, dx, dweight, dbias, *running], strict=True):
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_what_cannot_be_trained_together_is_refused_in_every_process(two):
    first, second = results(two, "refusals")
    assert first == second
    assert "module 0 is a OwnNorm, a BatchNorm over one process, which cannot be converted" in first["own batchnorm"]
    assert first["data"].startswith("ValueError: process 1 trains on other data or settings than the first (data: ")
    # BatchNorm1d uses the images of both processes
    assert first["an image each"] is None
    assert first["compiled"].startswith("ValueError: compile must be False: BatchNorms wait for the other processes")
    assert first["diverged"].startswith("FloatingPointError: epoch 0: training diverged")


def test_what_ends_the_first_process_ends_the_others(two):
    """Of Ctrl-C and an exit, which are no `Exception`, the others heard nothing: they waited for half an hour."""
    first, second = results(two, "first fails")
    assert first == ["KeyboardInterrupt: ", "SystemExit: 143", "Unpicklable: a and b"]
    assert second == ["KeyboardInterrupt: ", "SystemExit: 143", "RuntimeError: Unpicklable: a and b"]


def test_the_command_by_several_processes(few_images, tmp_path):
    words = ["classifier", "--width", "2", "--epochs", "2", "--batch-size", "20", "--out", str(tmp_path / "classifier")]
    done = together(tmp_path, 2, lambda: cli.main(["train", *words, *few_images]), "torchrun")
    assert done.results == [0, 0], done.errors
    for text in ("last epoch: loss", "accuracy without an attack", "saved to"):
        assert [len(re.findall(text, said, re.M)) for said in done.errors] == [1, 0]
    words = ["carso", "--classifier", str(tmp_path / "classifier"), "--layers", "conv2", "--epochs", "2"]
    words += ["--steps", "1", "--kl-delay", "0", "--batch-size", "21", "--out", str(tmp_path / "carso")]
    done = together(tmp_path, 2, lambda: cli.main(["train", *words, *few_images]), "torchrun")
    assert done.results == [2, 2]
    for name, text in zip(("purify-fast: ", "purify-fast, process 1: "), done.errors, strict=True):
        assert f"{name}--batch-size must be a multiple of 2, the number of processes, got 21" in text


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "processes", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.own_device("cpu") == "cpu" and not chosen
    assert distributed.own_device("cuda") == "cuda:1" and chosen == [1]


# -- processes that die, and runs that go on with fewer of them, or on two nodes ---------------------------------------


KIND = "convolutional"
BATCH = 30  # a multiple of one, two and three processes


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The undisturbed run of one process."""
    return weights(KIND, tmp_path_factory.mktemp("one"), BATCH)


def same_weights(found, wanted):
    for name, tensor in wanted["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-5)


def test_the_first_process_is_killed_while_it_writes_a_checkpoint(one, tmp_path):
    """The file of its third one is half there."""
    run, replace, times = tmp_path / "run", os.replace, []

    def dying(source, target):
        if Path(target).name == "checkpoint.safetensors" and dist.get_rank() == 0:
            times.append(target)
            if len(times) == 3:
                Path(source).write_bytes(Path(source).read_bytes()[:500])
                os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    def work():
        os.replace = dying
        weights(KIND, run, BATCH)

    done = together(tmp_path, 3, work)
    assert done.codes[0] == -signal.SIGKILL and all(code != 0 for code in done.codes[1:]), done.codes
    # the one before it is whole, though half of a third one lies beside it
    assert read_tree(run / CHECKPOINT)["step"] == 2
    same_weights(results_of(tmp_path, 2, lambda: weights(KIND, run, BATCH))[0], one)


def test_a_start_does_not_read_what_an_earlier_one_wrote(monkeypatch):
    """torchrun keeps its store when it starts processes again, with the addresses and words of those that are gone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store, found = dist.HashStore(), {}
    for number, world in enumerate((2, 3)):

        def start(rank, number=number, world=world):
            found[number, rank], _ = distributed._own_store(store, rank, world)

        # the others may come before the first one, and then find what the start before left
        threads = [threading.Thread(target=start, args=(rank,)) for rank in reversed(range(world))]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(30)
        for rank in range(world):
            found[number, rank].set(f"said by {rank}", str(number))
        assert all(found[number, 0].get(f"said by {rank}") == str(number).encode() for rank in range(world))
        assert found[number, 0].check(["said by 2"]) == (world == 3)
        for rank in reversed(range(world)):
            del found[number, rank]


def test_a_process_that_never_starts(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("PURIFY_FAST_TIMEOUT", "0.3")
    store = dist.HashStore()
    for _ in range(2):
        # neither without a port nor with one of a start that is gone does it wait for half an hour
        with pytest.raises(dist.DistError):
            distributed._own_store(store, 1, 2)
        store.set("purify_fast port", "1")


@pytest.mark.parametrize("text", ["0", "soon"])
def test_a_patience_that_is_none(monkeypatch, text):
    monkeypatch.setenv("PURIFY_FAST_TIMEOUT", text)
    with pytest.raises(ValueError, match="PURIFY_FAST_TIMEOUT must be a number of seconds above 0"):
        distributed.patience()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not tell a process's children")
def test_torchrun_starts_a_run_again_one_of_whose_processes_was_killed(few_images, tmp_path):
    words = ["classifier", "--width", "2", "--epochs", "60", "--batch-size", "20", "--checkpoint-seconds", "0", "--out"]
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *how, "-m", "purify_fast", "train", *words, str(tmp_path / "run"), *few_images]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (tmp_path / "said").open("w") as said:
        launched = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    until(lambda: launched.poll() is not None or (tmp_path / "run" / "checkpoint.safetensors").is_file())
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    done = read_tree(tmp_path / "run" / CHECKPOINT)["step"]
    assert launched.wait() == 0 and done < 120, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().count("saved to") == 1
    rows = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(60)) and cli.main(["train", *words, str(tmp_path / "alone"), *few_images]) == 0
    found, wanted = (read_tree(tmp_path / name / "checkpoint.safetensors") for name in ("run", "alone"))
    assert found["step"] == wanted["step"] == 120
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=1e-3, atol=1e-4)
