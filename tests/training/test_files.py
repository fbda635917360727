"""Checkpoints and saved models that changed on the disk, and a disk that is full."""

import errno
import os
import random

import pytest
from small_runs import train

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import load_classifier, save_classifier
from purify_fast.training.run import CHECKPOINT, read_tree, write_tree


def flipped(path, bit):
    """The file with one bit changed, and how to change it back."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_every_changed_bit_of_a_model_and_a_checkpoint_is_seen_and_a_damaged_checkpoint_stays(tmp_path):
    save_classifier(SmallCNN(1, 2, (8, 8), 2), tmp_path)
    train(tmp_path, epochs=2)
    readers = {
        "model.safetensors": lambda: load_classifier(tmp_path),
        CHECKPOINT: lambda: read_tree(tmp_path / CHECKPOINT),
    }
    for name, read in readers.items():
        whole, draw = (tmp_path / name).read_bytes(), random.Random(0)
        for _ in range(30):
            flipped(tmp_path / name, draw.randrange(8 * len(whole)))
            with pytest.raises(ValueError):
                read()
            (tmp_path / name).write_bytes(whole)
        read()
    flipped(tmp_path / CHECKPOINT, 8 * 3000)
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} .*remove it to start anew"):
        train(tmp_path, epochs=3)
    assert (tmp_path / CHECKPOINT).is_file()


def test_the_checkpoint_before_a_full_disk_is_kept(tmp_path, monkeypatch):
    train(tmp_path, epochs=1)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def no_room(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match=r"No space left on device: .*checkpoint\.safetensors"):
        write_tree(tmp_path / CHECKPOINT, {"step": 1})
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
    write_tree(tmp_path / CHECKPOINT, {"step": 1})
    assert done == (["file", "name", "folder"] if os.path.isdir("/proc/self/fd") else done)
    assert done.index("name") == 1 and len(done) == 3
