"""Images that stay in a file: reading, reading ahead, memory, and training from them."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from small_runs import StopAt, Stopped

from purify_fast._tensors import content_hash, digest
from purify_fast.data import StreamedImages, batches, read_ahead
from purify_fast.data.streaming import AHEAD
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit
from purify_fast.training.checkpoint import read_tree
from purify_fast.training.config import TrainingAttack

X = torch.randint(0, 256, (70, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
Y = torch.arange(70) % 2


@pytest.fixture
def streamed(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    return StreamedImages(tmp_path / "x.npy", digest_of(X))


def digest_of(x):
    """The cache keeps the hash that a tensor brings to `digest`."""
    content = content_hash(x.dtype, x.shape)
    content.update(x.numpy().tobytes())
    return content.hexdigest()


def test_looks_and_reads_as_the_tensor(streamed):
    assert len(streamed) == 70 and streamed.shape == X.shape and streamed.dtype == X.dtype
    assert streamed.device == streamed.to("cpu").device == X.device
    ids = torch.tensor([69, 0, 5, 5])
    assert torch.equal(streamed[ids], X[ids])
    for index in (slice(None), slice(3), slice(60, 99), slice(-4, None), slice(1, 9, 3), slice(0, 0)):
        assert torch.equal(streamed[index], X[index])
    # what is read is a copy
    streamed[:2].zero_()
    assert torch.equal(streamed[:], X)
    assert digest(streamed, Y) == digest(X, Y) != digest(255 - X, Y)
    assert digest(X, Y) != digest(Y, X) != digest(Y)


def test_other_files_are_refused(tmp_path):
    for name, array in {"float": X.float().numpy(), "flat": X.flatten(1).numpy()}.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            StreamedImages(tmp_path / f"{name}.npy", "")


@pytest.mark.parametrize("steps", [0, 1, AHEAD, 9])
def test_every_batch_in_order(streamed, steps):
    order = batches(70, 7, 0, 0)[:steps]
    for x in (X, streamed):
        read = list(read_ahead(x, order))
        assert len(read) == steps
        for ids, (got, images) in zip(order, read, strict=True):
            assert got is ids and torch.equal(images, X[ids])


def test_the_next_batches_are_read_in_a_thread_while_the_caller_works(streamed, monkeypatch):
    read, original = [], StreamedImages.read
    monkeypatch.setattr(StreamedImages, "read", lambda *a: read.append(threading.current_thread().name) or original(*a))
    reader = read_ahead(streamed, batches(70, 7, 0, 0))
    for step in range(10):
        next(reader)
        until = time.monotonic() + 600
        while len(read) < min(step + 1 + AHEAD, 10) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(read) == min(step + 1 + AHEAD, 10)  # so many, and no more
    assert all(name.startswith("read-ahead") for name in read)


def test_what_fails_in_the_thread_is_raised_and_the_thread_ends(streamed):
    order = [torch.tensor([1]), torch.tensor([99]), torch.tensor([2])]
    reader = read_ahead(streamed, order)
    assert torch.equal(next(reader)[1], X[1:2])
    with pytest.raises(IndexError):
        next(reader)
    reader = read_ahead(streamed, batches(70, 7, 0, 0))
    next(reader)
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def task():
    torch.manual_seed(0)
    attack = TrainingAttack(eps=0.05, steps=1, relative_alpha=2.0, eps_warmup=0.2)
    return ClassifierTask(SmallCNN(1, 2, (8, 8), 4), ClassifierConfig(attack=attack))


def test_training_from_a_file_is_the_same_to_the_bit_whichever_form_resumes(streamed, tmp_path):
    config = FitConfig(3, 16, padding=1, flip=True, checkpoint_seconds=0)
    runs = {"memory": [X], "file": [streamed], "file, memory": [streamed, X], "memory, file": [X, streamed]}
    for name, forms in runs.items():
        if len(forms) == 2:
            with pytest.raises(Stopped):
                fit(task(), forms[0], Y, config, tmp_path / name, callbacks=[StopAt(7)])
        fit(task(), forms[-1], Y, config, tmp_path / name)
    want = read_tree(tmp_path / "memory" / "checkpoint.safetensors")
    assert want["step"] == 12
    for name in runs:
        got = read_tree(tmp_path / name / "checkpoint.safetensors")
        assert got["last"] == want["last"] and got["facts"] == want["facts"]
        for key, tensor in want["model"].items():
            assert torch.equal(got["model"][key], tensor), (name, key)
    rows = [json.loads(line) for line in (tmp_path / "memory, file" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_batch_arrives_whole(streamed):
    x = streamed.to("cuda")
    assert x.device.type == "cuda" and x[:3].is_cuda
    order = [ids.cuda() for _ in range(20) for ids in batches(70, 7, 0, 0)]
    seen = []
    for ids, images in read_ahead(x, order):
        torch.cuda._sleep(100_000)  # the host runs ahead of the device
        seen.append(torch.equal(images.cpu(), X[ids.cpu()]))
    assert len(seen) == 200 and all(seen)
