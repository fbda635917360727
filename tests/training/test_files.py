"""Checkpoints and saved models that changed on the disk, a disk that is full, and two checkpoints instead of one."""

import errno
import logging
import os
import random
import subprocess
import sys

import pytest
from small_runs import same, train

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import load_classifier, save_classifier
from purify_fast.training.checkpoint import CHECKPOINT, PREVIOUS, last_checkpoint, read_tree, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def flipped(path, bit):
    """The file with one bit changed, and how to change it back."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_of_200_changed_bits_of_a_checkpoint_all_are_seen_and_the_one_before_it_is_taken(tmp_path, caplog):
    train(tmp_path, epochs=2)
    whole, draw, taken = (tmp_path / CHECKPOINT).read_bytes(), random.Random(1), 0
    with caplog.at_level(logging.WARNING, "purify_fast"):
        for _ in range(200):
            flipped(tmp_path / CHECKPOINT, draw.randrange(8 * len(whole)))
            taken += last_checkpoint(tmp_path)["step"] == 4
            (tmp_path / CHECKPOINT).write_bytes(whole)
    assert taken == caplog.text.count("the checkpoint before it, of step 4, is used") == 200
    assert last_checkpoint(tmp_path)["step"] == 8


def test_every_changed_bit_of_a_saved_model_is_seen(tmp_path):
    save_classifier(SmallCNN(1, 2, (8, 8), 2), tmp_path)
    path, draw = tmp_path / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    for _ in range(60):
        flipped(path, draw.randrange(8 * len(whole)))
        with pytest.raises(ValueError):
            load_classifier(tmp_path)
        path.write_bytes(whole)
    load_classifier(tmp_path)


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(tmp_path, caplog):
    whole = train(tmp_path / "whole")
    train(tmp_path / "run")
    flipped(tmp_path / "run" / CHECKPOINT, 8 * 3000)
    assert same(whole, train(tmp_path / "run"))
    assert "the checkpoint before it, of step 8, is used" in caplog.text
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3


def test_two_damaged_checkpoints_are_both_named_and_stay(tmp_path):
    train(tmp_path, epochs=2)
    for name in (CHECKPOINT, PREVIOUS):
        flipped(tmp_path / name, 8 * 3000)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} .*{PREVIOUS} .*no other checkpoint"):
        train(tmp_path, epochs=2)
    assert all((tmp_path / name).is_file() for name in (CHECKPOINT, PREVIOUS))


#: A training that may not write files larger than 13,500 bytes, which are less than a checkpoint.
FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import small_runs as t
# a checkpoint is larger, the other files of a run are smaller
resource.setrlimit(resource.RLIMIT_FSIZE, (13500, resource.RLIM_INFINITY))
t.train(sys.argv[1], epochs=1, checkpoint_seconds=0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_ends_a_run_with_the_file_named_and_the_run_goes_on_later(tmp_path):
    script = [sys.executable, "-c", FULL, str(tmp_path / "run"), os.path.dirname(__file__)]
    done = subprocess.run(script, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0 and f"{tmp_path}/run/{CHECKPOINT}" in last
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert same(train(tmp_path / "run", epochs=1), train(None, epochs=1))


def test_the_checkpoint_before_a_full_disk_is_kept(tmp_path, monkeypatch):
    train(tmp_path, epochs=1)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.safetensors"):
        save_checkpoint(tmp_path, {"step": 1})
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob(".checkpoint*"))


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
    save_checkpoint(tmp_path, {"step": 1})
    assert done == (["file", "name", "folder"] if os.path.isdir("/proc/self/fd") else done)
    assert done.index("name") == 1 and len(done) == 3


def test_a_run_killed_between_the_names_of_its_checkpoints_loses_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})
    replace = os.replace

    def killed(source, target):
        if target == tmp_path / CHECKPOINT:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"step": 3})
    assert not (tmp_path / CHECKPOINT).exists() and last_checkpoint(tmp_path)["step"] == 2
    monkeypatch.undo()
    save_checkpoint(tmp_path, {"step": 3})
    assert [read_tree(tmp_path / name)["step"] for name in (CHECKPOINT, PREVIOUS)] == [3, 2]
