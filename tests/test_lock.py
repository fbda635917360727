"""Only one run may use a folder. These tests show what is refused meanwhile, and when the lock ends."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from purify_fast._files import LOCK, FolderInUse, folder_lock

HOLD = """
import sys, time
from purify_fast._files import folder_lock
with folder_lock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(6000)
"""


def start_holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    process = start_holder(tmp_path / "run")
    yield process
    process.kill()
    process.wait()


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    began = time.monotonic()
    with folder_lock(tmp_path / "run"):
        pass
    assert time.monotonic() - began < 60 and list((tmp_path / "run").iterdir()) == []


def test_the_same_thread_may_take_it_again_and_another_may_not(tmp_path):
    refused = []

    def other():
        try:
            with folder_lock(tmp_path / "a"):
                pass
        except FolderInUse as error:
            refused.append(str(error))

    with folder_lock(tmp_path / "a"):
        with folder_lock(tmp_path / "a"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "is in use by another run" in refused[0]
    # a folder that was created for the lock alone is removed with the lock
    assert not (tmp_path / "a").exists()


def test_two_runs_of_the_command_line(tmp_path, holder, capsys):
    from purify_fast import cli

    assert cli.main(["train", "classifier", "--out", str(tmp_path / "run")]) == 2
    assert "is in use by another run" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))\n"
    )
    for attacked in (tmp_path / "model", "zoo:digits-pgd-at", f"{tmp_path}/mine.py:make"):
        assert cli.main(["evaluate", str(attacked), "--out", str(tmp_path / "run"), "--eps", "0.1"]) == 2
        assert "is in use by another run" in capsys.readouterr().err
