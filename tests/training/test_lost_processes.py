"""Processes that die or hang, and runs that go on with more of them, fewer, or on two nodes."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import Victim, processes, together, until
from trainings import disturbed, weights

from purify_fast import _distributed, cli
from purify_fast.training import distributed
from purify_fast.training.checkpoint import last_checkpoint, read_tree

KIND = "convolutional"
BATCH = 30  # a multiple of one, two and three processes
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The undisturbed run of one process."""
    return weights(KIND, tmp_path_factory.mktemp("one"), BATCH)


def close(found, wanted):
    for name, tensor in wanted["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_the_run_resumed_by_three(one, tmp_path):
    run = tmp_path / "run"

    def hang():
        # an exchange waits for half an hour until one is in vain
        told = distributed._watch
        told.give_and_read()
        dist.barrier()
        told.give_and_read()
        if dist.get_rank() == 1:
            threading.Event().wait()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

    with processes(tmp_path, 2, lambda: disturbed(KIND, run, hang, BATCH)) as made:
        made.wait(0)
    done = made.ended()
    assert done.codes[0] == 1
    wanted = "ProcessLost: process 0 of 2 got no answer in step 3 from: process 1, last in step 3"
    assert wanted in done.errors[0], done.errors[0]
    assert read_tree(run / "checkpoint.safetensors")["step"] == 3
    # elastic: one more than before, and then one alone
    shutil.copytree(run, tmp_path / "alone")
    done = together(tmp_path, 3, lambda: weights(KIND, run, BATCH))
    assert done.codes == [0, 0, 0], done.errors
    close(done.results[0], one)
    close(weights(KIND, tmp_path / "alone", BATCH), one)


@pytest.mark.parametrize(("rank", "number", "deaf"), [(0, signal.SIGSTOP, False), (1, signal.SIGKILL, True)])
def test_a_process_without_a_sign_of_life_is_named(monkeypatch, tmp_path, rank, number, deaf):
    """Exchanges wait for half an hour here, and would say nothing: the other process ends by itself.

    If it is deaf, an exchange does not hear the end of a connection, as it does not of one that NCCL has begun.
    """
    monkeypatch.setattr(distributed, "GRACE", 1.0)
    victim = Victim(tmp_path, rank)

    def act():
        # the other one has seen a sign of this step
        for _ in range(2):
            distributed._watch.give_and_read()
            dist.barrier()
        if dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        if deaf:
            dist.all_reduce = lambda *_, **__: dist.HashStore().wait(["never"], timedelta(minutes=30))

    def work():
        victim.wait_patiently()
        disturbed(KIND, tmp_path / "run", act, BATCH)

    # the store is in the first process, and is stopped with it
    with processes(tmp_path, 2, work, "first") as made:
        victim.is_stopped(made) if number == signal.SIGSTOP else victim.is_killed(made)
        made.wait(1 - rank)
    done = made.ended()
    assert done.codes[1 - rank] == 1 and done.codes[rank] == -signal.SIGKILL
    wanted = (
        f"purify-fast: process {1 - rank} of 2 got no sign of life for 0.5 seconds from: process {rank}, last in step 3"
    )
    assert wanted in done.errors[1 - rank], done.errors
    assert read_tree(tmp_path / "run" / "checkpoint.safetensors")["step"] == 3


@pytest.mark.slow
def test_a_process_that_is_only_slow_is_not_lost(monkeypatch, tmp_path):
    """It takes much longer for a step than others may be silent."""
    monkeypatch.setattr(_distributed, "BEAT", 0.1)
    monkeypatch.setattr(_distributed, "SILENCE", 3.0)
    act = lambda: time.sleep(6 if dist.get_rank() == 1 else 0)  # noqa: E731
    done = together(tmp_path, 2, lambda: disturbed(KIND, tmp_path / "run", act, BATCH))
    assert done.codes == [0, 0] and done.results == [6, 6], done.errors


def test_a_silence_is_an_exception_where_one_can_be_raised(monkeypatch):
    """The other process gives two signs and no more; this one is at work, and comes to its next exchange."""
    monkeypatch.setattr(_distributed, "BEAT", 0.02)
    monkeypatch.setattr(_distributed, "SILENCE", math.inf)
    for module in (distributed, _distributed):
        monkeypatch.setattr(module, "processes", lambda: (0, 2))
    store = dist.HashStore()
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_get_default_store", lambda: store)
    ended = []
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    raised = pytest.raises(
        distributed.ProcessLost, match="process 0 of 2 got no sign of life for 1 seconds from: process 1"
    )
    with raised, distributed.heartbeat():
        watch = distributed._watch
        for beat, step in ((0, "4"), (1, "5")):
            store.set(f"{watch.name} 1", f"{beat} {step} works")
            until(lambda step=step: 1 in watch.signs and watch.signs[1].step == step)
            with distributed.report_missing_process():
                pass
        monkeypatch.setattr(_distributed, "SILENCE", 1.0)
        until(lambda: watch.lost)
        with distributed.report_missing_process():
            pytest.fail("an exchange with a process that is lost")
    assert "last in step 5" in str(raised.excinfo.value) and not ended and distributed._watch is None
    # one that has done its part owes no more signs
    with distributed.heartbeat():
        watch = distributed._watch
        store.set(f"{watch.name} 1", "2 5 done")
        until(lambda: watch.missed.get(1, 0) * _distributed.BEAT > 2 * _distributed.SILENCE)
        with distributed.report_missing_process():
            pass
    assert store.get(f"{watch.name} 0").endswith(b" 0 done")


def test_a_lost_process_is_named_within_two_minutes():
    assert _distributed.SILENCE + 2 * _distributed.BEAT + distributed.GRACE < 120


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
    assert any("ProcessLost" in text for text in done.errors[1:]), done.errors
    # the one before it is whole, though half of a third one lies beside it
    assert last_checkpoint(run)["step"] == 2
    done = together(tmp_path, 2, lambda: weights(KIND, run, BATCH))
    assert done.codes == [0, 0], done.errors
    close(done.results[0], one)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError(f"Gloo connectFullMesh failed with {GLOO}"), True),
        (dist.DistBackendError("NCCL error in: a.cpp:1, remote process exited"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("a data loader timed out: its peer closed the connection"), False),
        (RuntimeError("DataLoader worker (pid 3) timeout"), False),
        (RuntimeError("NCCL and gloo are names of layers of this model"), False),
    ],
)
def test_only_an_exchange_that_failed_is_a_lost_process(monkeypatch, error, lost):
    """Any error with such a word in it was taken for one."""
    monkeypatch.setattr(_distributed, "processes", lambda: (0, 2))
    monkeypatch.setattr(distributed, "NOTICE", 0)
    monkeypatch.setattr(distributed, "_watch", distributed._Watch(dist.HashStore(), "alive"))
    with pytest.raises(distributed.ProcessLost if lost else RuntimeError) as told, distributed.report_missing_process():
        raise error
    assert isinstance(told.value, distributed.ProcessLost) is lost


def test_a_start_does_not_read_what_an_earlier_one_wrote():
    """torchrun keeps its store when it starts processes again, with the addresses and words of those that are gone."""
    store, found = dist.HashStore(), {}

    def start(number, rank, world):
        found[number, rank] = distributed._store_of_this_launch(store, rank, world)

    for number, world in enumerate((2, 3, 2, 2)):
        # the others may come before the first one, and then find what the start before left
        threads = [threading.Thread(target=start, args=(number, rank, world)) for rank in reversed(range(world))]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        for thread in threads:
            thread.join(30)
        for rank in range(world):
            found[number, rank].set(f"said by {rank}", str(number))
        assert all(found[number, 0].get(f"said by {rank}") == str(number).encode() for rank in range(world))
    assert not found[3, 0].check(["said by 2"]) and found[1, 0].get("said by 2") == b"1"


def test_a_process_that_never_starts(monkeypatch):
    monkeypatch.setenv("PURIFY_FAST_TIMEOUT", "0.3")
    store = dist.HashStore()
    store.set("purify_fast start", "of one that is gone")
    with pytest.raises(dist.DistError):
        distributed._store_of_this_launch(store, 1, 2)
    # neither waits for the store's own patience, which is minutes
    began = time.monotonic()
    with pytest.raises(dist.DistError):
        distributed._store_of_this_launch(store, 0, 2)
    with pytest.raises(dist.DistError):
        distributed._store_of_this_launch(dist.HashStore(), 1, 2)
    assert time.monotonic() - began < 300


@pytest.mark.parametrize("text", ["0", "soon", "-3", "nan"])
def test_a_patience_that_is_none(monkeypatch, text):
    monkeypatch.setenv("PURIFY_FAST_TIMEOUT", text)
    with pytest.raises(ValueError, match="PURIFY_FAST_TIMEOUT must be a number of seconds above 0"):
        distributed.patience()


def test_two_nodes_on_one_machine(few_images, tmp_path):
    """This is the first of each node's processes."""
    words = ["classifier", "--width", "2", "--epochs", "2", "--batch-size", "20", "--out", str(tmp_path / "run")]

    def work():
        os.environ["LOCAL_RANK"] = "0"
        return cli.main(["train", *words, *few_images])

    done = together(tmp_path, 2, work, "torchrun")
    assert done.results == [0, 0], done.errors
    assert [said.count("saved to") for said in done.errors] == [1, 0]
    assert read_tree(tmp_path / "run" / "checkpoint.safetensors")["step"] == 4


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
    done = last_checkpoint(tmp_path / "run")["step"]
    assert launched.wait() == 0 and done < 120, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().count("saved to") == 1
    rows = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(60))
    assert cli.main(["train", *words, str(tmp_path / "alone"), *few_images]) == 0
    found, wanted = (read_tree(tmp_path / name / "checkpoint.safetensors") for name in ("run", "alone"))
    assert found["step"] == wanted["step"] == 120
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=1e-3, atol=1e-4)
