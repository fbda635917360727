"""Processes that die, and runs that go on with fewer of them, or on two nodes."""

import json
import os
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
from trainings import weights

from purify_fast import cli
from purify_fast.training import distributed
from purify_fast.training.run import CHECKPOINT, read_tree

KIND = "convolutional"
BATCH = 30  # a multiple of one, two and three processes


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The undisturbed run of one process."""
    return weights(KIND, tmp_path_factory.mktemp("one"), BATCH)


def close(found, wanted):
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
    close(results_of(tmp_path, 2, lambda: weights(KIND, run, BATCH))[0], one)


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
        left = found[number, 0].check(["said by 2"])
        assert left == (world == 3)
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
    assert rows == list(range(60))
    assert cli.main(["train", *words, str(tmp_path / "alone"), *few_images]) == 0
    found, wanted = (read_tree(tmp_path / name / "checkpoint.safetensors") for name in ("run", "alone"))
    assert found["step"] == wanted["step"] == 120
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=1e-3, atol=1e-4)
