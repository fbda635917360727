"""One run per folder: who holds the lock, when it ends, and what is refused meanwhile."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from purify_fast import _lock
from purify_fast._lock import NAME, FolderInUse, folder_lock

HOLD = """
import sys, time
from purify_fast._lock import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_run_is_refused_by_name(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(FolderInUse) as told, folder_lock(tmp_path / "run"):
        pass
    words = str(told.value)
    assert words.startswith(f"{tmp_path / 'run'} is written by another run: process {holder.pid} on ")
    assert "since 20" in words and "wait for it, end it, or give another folder" in words
    assert time.monotonic() - began < 2


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / NAME).is_file()
    began = time.monotonic()
    with folder_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()
    assert time.monotonic() - began < 2 and not (tmp_path / "run" / NAME).exists()


def test_the_same_thread_may_take_it_again_and_another_may_not(tmp_path):
    refused = []

    def other():
        try:
            with folder_lock(tmp_path / "a"):
                pass
        except FolderInUse as error:
            refused.append(str(error))

    with folder_lock(tmp_path / "a"), folder_lock(tmp_path / "a"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another thread of this process" in refused[0]
    # a folder that was made for the lock alone goes with it
    assert not (tmp_path / "a").exists()


def _fork_takes_it(folder, out):
    try:
        with folder_lock(folder):
            out.put("taken")
    except FolderInUse as error:
        out.put(str(error))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_forked_process_does_not_hold_it(tmp_path):
    context = multiprocessing.get_context("fork")
    with folder_lock(tmp_path):
        found = context.Queue()
        process = context.Process(target=_fork_takes_it, args=(tmp_path, found))
        process.start()
        assert f"process {os.getpid()} on" in found.get(timeout=30)
        process.join()


def left(folder, **content):
    """A lock's file as another machine left it."""
    folder.mkdir(exist_ok=True)
    facts = {"host": "elsewhere", "boot": "other", "process": 7, "started": "1", "since": "then", "command": "c"}
    (folder / NAME).write_text(json.dumps({**facts, "token": "t", "beat": 0, **content}))


def test_another_machines_lock_counts_while_its_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(_lock, "BEAT", 0.2)
    monkeypatch.setattr(_lock, "WATCH", 1.0)
    left(tmp_path)
    ended = threading.Event()

    def live():
        beat = 0
        while not ended.wait(0.2):
            beat += 1
            left(tmp_path, beat=beat)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(FolderInUse, match="process 7 on elsewhere since then"), folder_lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()
    began = time.monotonic()
    with folder_lock(tmp_path):
        assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("start", ["own", "other"])
def test_without_locks_of_the_system_the_process_is_looked_for(tmp_path, monkeypatch, start):
    """A process of the same number that started at another time is another process."""
    if not os.path.exists("/proc/self/stat"):
        pytest.skip("this system does not tell when processes started")
    monkeypatch.setattr(_lock, "_lock", lambda handle: None)
    own = _lock._own()
    left(tmp_path, host=own["host"], boot=own["boot"], process=own["process"],
         started=own["started"] if start == "own" else "1")  # fmt: skip
    if start == "own":
        with pytest.raises(FolderInUse), folder_lock(tmp_path):
            pass
    else:
        with folder_lock(tmp_path):
            pass


def test_another_folder_does_not_wait_while_a_lock_is_watched(tmp_path, monkeypatch):
    """The lock of another machine is watched for seconds; all locks of this process once waited for that."""
    monkeypatch.setattr(_lock, "BEAT", 0.2)
    monkeypatch.setattr(_lock, "WATCH", 1.5)
    left(tmp_path / "watched")
    thread = threading.Thread(target=lambda: folder_lock(tmp_path / "watched").__enter__())
    thread.start()
    while not _lock._taking:
        time.sleep(0.01)
    began = time.monotonic()
    with folder_lock(tmp_path / "other"):
        assert time.monotonic() - began < 0.5
    with pytest.raises(FolderInUse, match="another thread of this process"), folder_lock(tmp_path / "watched"):
        pass
    assert time.monotonic() - began < 1.0
    thread.join()


WATCHED = HOLD.replace("from purify_fast._lock", "from purify_fast import _lock\nfrom purify_fast._lock").replace(
    "with", "_lock.BEAT, _lock.WATCH = 0.2, 2.0\nwith"
)


def test_of_two_processes_that_watch_one_takes_the_lock_and_is_named_by_the_other(tmp_path, monkeypatch):
    """The other one named the process that had left the lock, which was gone."""
    monkeypatch.setattr(_lock, "BEAT", 0.2)
    monkeypatch.setattr(_lock, "WATCH", 8.0)
    left(tmp_path)
    words = [sys.executable, "-c", WATCHED, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        with pytest.raises(FolderInUse, match=f"process {process.pid} on "), folder_lock(tmp_path):
            pass
        assert process.stdout.readline() == "held\n"
    finally:
        process.kill()
        process.wait()


def test_a_lock_on_a_full_disk(tmp_path, monkeypatch):
    """What the file says is for messages alone where the system locks it; elsewhere the file is named."""

    def full(handle, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_lock, "_write", full)
    if sys.platform != "win32":
        with folder_lock(tmp_path):
            pass
    monkeypatch.setattr(_lock, "_lock", lambda handle: None)
    with pytest.raises(OSError, match=r"No space left on device.*purify_fast\.lock"), folder_lock(tmp_path):
        pass


def test_a_file_of_garbage_is_no_lock(tmp_path):
    (tmp_path / NAME).write_bytes(b"\xff{")
    with folder_lock(tmp_path):
        pass


def test_many_at_once(tmp_path):
    """Of processes that start together one at a time has the lock, and all get it in turn."""
    script = (
        "import sys, time\nfrom purify_fast._lock import FolderInUse, folder_lock\nfrom pathlib import Path\n"
        "done = 0\n"
        "while done < 5:\n"
        "    try:\n"
        "        with folder_lock(sys.argv[1]):\n"
        "            Path(sys.argv[1], 'inside').touch(exist_ok=False)\n"
        "            time.sleep(0.01)\n"
        "            Path(sys.argv[1], 'inside').unlink()\n"
        "            done += 1\n"
        "    except FolderInUse:\n"
        "        time.sleep(0.002)\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]


def test_two_runs_of_the_command_line(tmp_path, holder, capsys):
    from purify_fast import cli

    for words in (["train", "classifier", "--out"], ["ablate", "--out"], ["demo", "--out"]):
        assert cli.main([*words, str(tmp_path / "run")]) == 2
        assert f"process {holder.pid} on" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))\n"
    )
    for attacked in (tmp_path / "model", "zoo:digits-pgd-at", f"{tmp_path}/mine.py:make"):
        assert cli.main(["evaluate", str(attacked), "--out", str(tmp_path / "run"), "--eps", "0.1"]) == 2
        assert f"process {holder.pid} on" in capsys.readouterr().err


def test_a_second_race_of_the_same_kernels(tmp_path, monkeypatch, capsys):
    """Two at once would slow each other, and both write one file."""
    import torch

    from purify_fast import _library, cli
    from purify_fast.ops.dispatch import cache

    if not _library.loaded():
        pytest.skip("the CPU's kernels are the extension's")
    monkeypatch.setenv("PURIFY_FAST_CACHE", str(tmp_path / "cache"))
    place = cache.file_of("raced", torch.device("cpu")).with_suffix("")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert cli.main(["tune", "--device", "cpu", "--ops", "pgd_step"]) == 2
        assert f"process {process.pid} on" in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.parametrize("words", [["study", "carso_digits", "--quick"], ["gpu_check", "tests", "--dry"]])
def test_the_studies_and_the_check_of_a_gpu_lock_their_folders(tmp_path, holder, words):
    from benchmarks.__main__ import main

    with pytest.raises(FolderInUse, match=f"process {holder.pid} on"):
        main([*words, "--out", str(tmp_path / "run")])
