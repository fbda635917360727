"""Processes that die or hang, and runs that go on with more of them, fewer, or on two nodes."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from purify_fast import cli
from purify_fast.training import distributed
from purify_fast.training.checkpoint import last_checkpoint, read_tree

KIND = "convolutional"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trio(together):
    """The same with batches of 30, a multiple of one, two and three processes."""

    def run(*arguments, timeout="120", **options):
        return together(*arguments, TOGETHER_BATCH="30", TOGETHER_TIMEOUT=timeout, **options)

    return run


@pytest.fixture(scope="module")
def one(tmp_path_factory, trio):
    """The undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("one")
    codes, errors = trio(folder, 1, ("one", "weights", (KIND, str(folder / "run"))))
    assert codes == [0], errors
    return torch.load(folder / "one-0")


def close(found, wanted):
    for name, tensor in wanted["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-5, atol=1e-5)


def test_a_process_that_hangs_is_named_and_the_run_resumed_by_three(one, trio, tmp_path):
    run = tmp_path / "run"
    codes, errors = trio(tmp_path, 2, ("x", "hangs", (KIND, str(run), 1)), timeout="4")
    assert codes[0] == 1
    assert "ProcessLost: process 0 of 2 waited in vain in step 3 for: process 1, last in step 3" in errors[0], errors[0]
    assert read_tree(run / "checkpoint.safetensors")["step"] == 3
    # elastic: one more than before, and then one alone
    shutil.copytree(run, tmp_path / "alone")
    codes, errors = trio(tmp_path, 3, ("three", "weights", (KIND, str(run))))
    assert codes == [0, 0, 0], errors
    close(torch.load(tmp_path / "three-0"), one)
    codes, errors = trio(tmp_path, 1, ("alone", "weights", (KIND, str(tmp_path / "alone"))))
    assert codes == [0], errors
    close(torch.load(tmp_path / "alone-0"), one)


@pytest.mark.parametrize(("victim", "number", "deaf"), [(0, signal.SIGSTOP, False), (1, signal.SIGKILL, True)])
def test_a_process_without_a_sign_of_life_is_named(trio, tmp_path, victim, number, deaf):
    """Exchanges wait for half an hour here, and would say nothing: the other process ends by itself."""
    # the store is in the first process, and is stopped with it
    with socket.create_server(("127.0.0.1", 0)) as free:
        store = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    action = ("x", "gone", (KIND, str(tmp_path / "run"), victim, int(number), deaf))
    began = time.monotonic()
    codes, errors = trio(tmp_path, 2, action, timeout="1800", store=store, first=1 - victim, rest=1)
    assert codes[1 - victim] == 1 and codes[victim] == -signal.SIGKILL and time.monotonic() - began < 100
    wanted = (
        f"purify-fast: process {1 - victim} of 2 had no sign of life for 3 seconds of: process {victim}, last in step 3"
    )
    assert wanted in errors[1 - victim], errors
    assert read_tree(tmp_path / "run" / "checkpoint.safetensors")["step"] == 3


def test_a_process_that_is_only_slow_is_not_lost(trio, tmp_path):
    codes, errors = trio(tmp_path, 2, ("x", "slow", (KIND, str(tmp_path / "run"))))
    assert codes == [0, 0], errors
    assert torch.load(tmp_path / "x-0") == torch.load(tmp_path / "x-1") == 6


def test_a_silence_is_an_exception_where_one_can_be_raised(monkeypatch):
    """The other process gives two signs and no more; this one is at work, and comes to its next exchange."""
    monkeypatch.setattr(distributed, "BEAT", 0.05)
    monkeypatch.setattr(distributed, "SILENCE", 1.0)
    monkeypatch.setattr(distributed, "processes", lambda: (0, 2))
    store = torch.distributed.HashStore()
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_get_default_store", lambda: store)
    ended = []
    monkeypatch.setattr(distributed.os, "_exit", ended.append)
    raised = pytest.raises(
        distributed.ProcessLost, match="process 0 of 2 had no sign of life for 1 seconds of: process 1"
    )
    with raised, distributed.signs_of_life():
        name = distributed._watch.name
        for sign in ("0 4 works", "1 5 works"):
            store.set(f"{name} 1", sign)
            time.sleep(0.5)
            with distributed.named_when_lost():
                pass
        time.sleep(2)
        with distributed.named_when_lost():
            pytest.fail("an exchange with a process that is lost")
    assert "last in step 5" in str(raised.excinfo.value) and not ended and distributed._watch is None
    # one that has done its part owes no more signs
    with distributed.signs_of_life():
        store.set(f"{distributed._watch.name} 1", "2 5 done")
        time.sleep(2)
        with distributed.named_when_lost():
            pass
        name = distributed._watch.name
    assert store.get(f"{name} 0").endswith(b" 0 done")


def test_a_lost_process_is_named_within_two_minutes():
    assert distributed.SILENCE + 2 * distributed.BEAT + distributed.GRACE < 120


def test_the_first_process_is_killed_while_it_writes_a_checkpoint(one, trio, tmp_path):
    run = tmp_path / "run"
    codes, errors = trio(tmp_path, 3, ("x", "killed_while_writing", (KIND, str(run))))
    assert codes[0] == -signal.SIGKILL and all(code not in (0, None) for code in codes[1:]), codes
    assert any("ProcessLost" in text for text in errors[1:]), errors
    # the one before it is whole, though half of a third one lies beside it
    assert last_checkpoint(run)["step"] == 2
    codes, errors = trio(tmp_path, 2, ("two", "weights", (KIND, str(run))))
    assert codes == [0, 0], errors
    close(torch.load(tmp_path / "two-0"), one)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError(f"Gloo connectFullMesh failed with {GLOO}"), True),
        (torch.distributed.DistBackendError("NCCL error in: a.cpp:1, remote process exited"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("a data loader timed out: its peer closed the connection"), False),
        (RuntimeError("DataLoader worker (pid 3) timeout"), False),
        (RuntimeError("NCCL and gloo are names of layers of this model"), False),
    ],
)
def test_only_an_exchange_that_failed_is_a_lost_process(monkeypatch, error, lost):
    """Any error with such a word in it was taken for one."""
    monkeypatch.setattr(distributed, "processes", lambda: (0, 2))
    monkeypatch.setattr(distributed, "NOTICE", 0)
    monkeypatch.setattr(distributed, "_watch", distributed._Watch(torch.distributed.HashStore(), "alive"))
    with pytest.raises(distributed.ProcessLost if lost else RuntimeError) as told, distributed.named_when_lost():
        raise error
    assert isinstance(told.value, distributed.ProcessLost) is lost


def test_a_start_does_not_read_what_an_earlier_one_wrote():
    """torchrun keeps its store when it starts processes again, with the addresses and words of those that are gone."""
    store, found = torch.distributed.HashStore(), {}

    def start(number, rank, world):
        found[number, rank] = distributed._of_this_start(store, rank, world)

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
    store = torch.distributed.HashStore()
    store.set("purify_fast start", "of one that is gone")
    with pytest.raises(torch.distributed.DistError):
        distributed._of_this_start(store, 1, 2)
    # neither waits for the store's own patience, which is minutes
    began = time.monotonic()
    with pytest.raises(torch.distributed.DistError):
        distributed._of_this_start(store, 0, 2)
    with pytest.raises(torch.distributed.DistError):
        distributed._of_this_start(torch.distributed.HashStore(), 1, 2)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["0", "soon", "-3", "nan"])
def test_a_patience_that_is_none(monkeypatch, text):
    monkeypatch.setenv("PURIFY_FAST_TIMEOUT", text)
    with pytest.raises(ValueError, match="PURIFY_FAST_TIMEOUT must be a number of seconds above 0"):
        distributed.patience()


@pytest.mark.slow
def test_two_nodes_on_one_machine(torchrun, tmp_path):
    """Two torchruns of one process each, which meet at one address, as on two machines."""
    words = ["classifier", "--width", "2", "--epochs", "2", "--batch-size", "20", "--out", tmp_path / "run"]
    port = str(29500 + os.getpid() % 400)
    how = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
    nodes = [torchrun([*how, str(node)], *words) for node in range(2)]
    printed = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert [out.count("saved to") for out, _ in printed] == [1, 0]
    assert read_tree(tmp_path / "run" / "checkpoint.safetensors")["step"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not tell a process's children")
def test_torchrun_starts_a_run_again_one_of_whose_processes_was_killed(torchrun, tmp_path):
    words = ["classifier", "--width", "2", "--epochs", "60", "--batch-size", "20", "--checkpoint-seconds", "0", "--out"]
    how = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    launched = torchrun(how, *words, tmp_path / "run", PURIFY_FAST_TIMEOUT="20")
    while not (tmp_path / "run" / "checkpoint.safetensors").is_file():
        assert launched.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    done = last_checkpoint(tmp_path / "run")["step"]
    out, errors = launched.communicate(timeout=120)
    assert launched.returncode == 0 and done < 120 and out.count("saved to") == 1, errors
    rows = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(60))
    few = ["--data", str(tmp_path / "small.npz"), "--device", "cpu"]
    assert cli.main(["train", *words, str(tmp_path / "alone"), *few]) == 0
    found, wanted = (read_tree(tmp_path / name / "checkpoint.safetensors") for name in ("run", "alone"))
    assert found["step"] == wanted["step"] == 120
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(found["model"][name], tensor, rtol=1e-3, atol=1e-4)
