"""The trainings of full size, rehearsed on the CPU: their time, what comes out, and what is told about it."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as program
from benchmarks.gpu import gpu_check, gpu_sections, gpu_train
from benchmarks.speed import sheets
from purify_fast import data
from purify_fast.models import build_classifier

CPU = torch.device("cpu")


def test_the_trainings_fit_into_nine_minutes_of_a_card():
    """By the images per second of a card, with an evaluation of each model and the start of the command."""
    size = gpu_train.FULL
    trainings = sum(part.seconds(size) for part in gpu_train.PARTS.values())
    start = 20.0
    assert start + trainings + gpu_train.JUDGING * len(gpu_train.PARTS) + gpu_train.CLOSING < 540
    assert (size.width, size.images, size.judged) == (64, 50_000, 1000)
    standard, adversarial = gpu_train.PARTS["standard"], gpu_train.PARTS["PGD-AT"]
    assert standard.epochs == 30 and size.images / adversarial.rate == pytest.approx(7, abs=0.1)
    assert {part.needs for part in gpu_train.PARTS.values()} == {"", "standard", "PGD-AT"}


@pytest.fixture
def images() -> data.DataSet:
    whole = data.load_dataset("digits")
    return replace(whole, x_train=whole.x_train[:200], y_train=whole.y_train[:200])


def test_a_training_ends_with_its_time(images, monkeypatch):
    """The clock of this test is ahead of the steps: the learning rate has come down when the time ends."""
    ticks = itertools.count()
    monkeypatch.setattr(gpu_train, "time", SimpleNamespace(monotonic=lambda: 0.5 * next(ticks)))
    _, make = gpu_train._standard(images, gpu_train.REHEARSAL, {})
    task, rates = make(), []
    step = task.optimizer.step
    task.optimizer.step = lambda *a: rates.append(task.optimizer.param_groups[0]["lr"]) or step(*a)
    row = gpu_train.train(task, images, gpu_train.REHEARSAL, 1000, 20.0)
    assert 5 < len(rates) < 40 and row["planned"] == 1000
    assert float(row["epochs"]) == pytest.approx(len(rates) / 4, abs=0.01) and 20 <= float(row["seconds"]) < 23
    assert max(rates) > 0.5 * task.config.learning_rate and rates[-1] < 0.05 * task.config.learning_rate
    assert not task.model.training


def test_weights_come_out_in_small_files(tmp_path, monkeypatch):
    model = build_classifier("preact_resnet18", (3, 32, 32), 10, width=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    paths = gpu_train.write_weights(model.state_dict(), tmp_path, "standard")
    sizes = [path.stat().st_size for path in paths]
    assert len(paths) == 2 and max(sizes) < gpu_check.MOST_BYTES == 16_000_000
    found = gpu_train.read_weights(tmp_path, "standard")
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        floating = tensor.is_floating_point()
        assert found[name].dtype == (torch.float16 if floating else tensor.dtype)
        torch.testing.assert_close(found[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_all_trainings_rehearsed(tmp_path, capsys, monkeypatch):
    """From an .npz file; what is written can be read, and is what was judged."""
    source = torch.Generator().manual_seed(0)
    arrays = {}
    for split, count in (("train", 230), ("test", 12)):
        arrays[f"x_{split}"] = torch.randint(256, (count, 32, 32, 3), generator=source, dtype=torch.uint8).numpy()
        arrays[f"y_{split}"] = np.arange(count) % 10
    np.savez(tmp_path / "images.npz", **arrays)
    out, judged = tmp_path / "out", {}
    evaluate = gpu_train.evaluate

    def seen(model, x, y, **how):
        judged[how["name"]] = model
        return evaluate(model, x, y, **how)

    monkeypatch.setattr(gpu_train, "evaluate", seen)
    words = ["--rehearse", "--data", str(tmp_path / "images.npz"), "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        program.main(["gpu_train", *words, "--weights", "PGD-AT", "CARSO"])
    assert end.value.code == 0, capsys.readouterr().err
    rows = {row["model"]: row for row in sheets.read_csv(out / gpu_train.FILE)}
    assert list(rows) == ["standard", "PGD-AT", "ARREST", "CARSO"]
    for row in rows.values():
        assert row["epochs"] == "2.00" and row["images"] == "4"
        assert float(row["images_per_s"]) == pytest.approx(400 / float(row["seconds"]), rel=0.1)
        assert 0 <= float(row["robust"]) <= float(row["clean"]) <= 100
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["CARSO-1.safetensors", "PGD-AT-1.safetensors"]
    for name, state in judged["PGD-AT"].state_dict().items():
        torch.testing.assert_close(state, gpu_train.read_weights(out, "PGD-AT")[name].to(state.dtype), rtol=0, atol=0)
    # CARSO's files have the purifier; the classifier is that of the adversarial training
    purifier = gpu_train.read_weights(out, "CARSO")
    state = judged["CARSO"].defence.state_dict()
    assert not any(name.startswith("classifier.") for name in purifier)
    for name, tensor in purifier.items():
        torch.testing.assert_close(state[name], tensor.to(state[name].dtype), rtol=0, atol=0)


def test_a_training_that_fails_is_named_and_stops_only_what_needs_it(tmp_path, monkeypatch, capsys):
    def fake(name, *rest):
        if name == "standard":
            raise FloatingPointError("the loss is not finite")
        rest[-1][name] = torch.nn.Identity()
        return {"model": name}

    monkeypatch.setattr(gpu_train, "run_part", fake)
    with pytest.raises(SystemExit) as end:
        program.main(["gpu_train", "--rehearse", "--out", str(tmp_path)])
    assert end.value.code == 1
    errors = {row["model"]: row.get("error", "") for row in sheets.read_csv(tmp_path / gpu_train.FILE)}
    failed = {
        "standard": "FloatingPointError: the loss is not finite",
        "ARREST": "ValueError: the model standard is missing",
    }
    assert errors == failed | {"PGD-AT": "", "CARSO": ""}


@pytest.mark.slow
def test_the_commands_need_neither_tyro_nor_a_gpu_to_be_imported():
    """A rented machine may lack tyro, and a server that forks processes must not have used CUDA."""
    code = """
import sys
sys.modules.update(tyro=None, pyautoattack=None)
import torch
def asked(*_):
    raise AssertionError("the import asks for a GPU")
torch._C._cuda_getDeviceCount = torch.cuda.is_available = torch.cuda.device_count = asked
import benchmarks.__main__
"""
    command = [sys.executable, "-c", code]
    done = gpu_sections.subprocess.run(command, cwd=gpu_sections.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
