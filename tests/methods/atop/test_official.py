"""DeepFillv2 checkpoints: written and read under the official names, and what happens with files that do not fit."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import purify_fast.methods.atop.generators as module
from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.methods.atop.generators import CONSTANT, FIRST

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(1)
    made = DeepFillGenerator(width=8)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["states.pth", "states.pt", "deep/er/states.safetensors"])
def test_a_round_trip_keeps_every_tensor_under_its_official_name(generator, tmp_path, name):
    path = tmp_path / name
    generator.save_official(path)
    loaded = DeepFillGenerator.from_official(str(path))
    assert equal(loaded, generator) and loaded.arguments == generator.arguments and not loaded.training
    content = {"G": load_file(path)} if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert list(content) == ["G"] and content["G"].keys() == generator.state_dict().keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state,  # the state dict alone
        lambda state: {"G": state, "D": {"weight": torch.ones(2)}, "G_optim": {"state": {0: {"step": 1}}}, "n_iter": 7},
        lambda state: {"G": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"G": {name: tensor for name, tensor in state.items() if name != CONSTANT}},
    ],
)
def test_ways_to_hold_it(generator, tmp_path, change):
    torch.save(change(generator.state_dict()), tmp_path / "states.pth")
    assert equal(DeepFillGenerator.from_official(tmp_path / "states.pth"), generator)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("stage1.conv_bn3.conv.bias"), r"is not .*: stage1\.conv_bn3\.conv\.bias is missing$"),
        (lambda s: s.update(extra=torch.zeros(1)), r"is not .*: extra is unknown$"),
        (lambda s: s.update({"stage2.conv_bn7.conv.bias": torch.zeros(3)}), r"bias is \[3\], must be \[32\]$"),
        (lambda s: s.update({CONSTANT: torch.ones(1, 1, 3, 3)}), rf"{CONSTANT} is .*, must be the identity"),
        (lambda s: s.update(extra=3), "holds no state dict: a table of tensors is wanted"),
        (lambda s: s.update({FIRST: torch.zeros(6)}), "holds no generator of deepfillv2-pytorch"),
        (lambda s: s.pop(FIRST), "holds no generator of deepfillv2-pytorch: it has stage1"),
    ],
)
def test_states_that_do_not_fit_are_named_with_their_tensors(generator, tmp_path, change, message):
    state = dict(generator.state_dict())
    change(state)
    torch.save({"G": state}, tmp_path / "states.pth")
    with pytest.raises(ValueError, match=message):
        DeepFillGenerator.from_official(tmp_path / "states.pth")


def test_many_differences_are_counted(generator, tmp_path):
    """TensorFlow's converted states, or older ones, have other names."""
    state = {name.replace("stage2.", "other."): tensor for name, tensor in generator.state_dict().items()}
    save_file(state, tmp_path / "states.safetensors")
    with pytest.raises(ValueError, match=r"is missing; .*, and \d+ more$"):
        DeepFillGenerator.from_official(tmp_path / "states.safetensors")


class Payload:
    """What a pickle can do: call anything."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_but_tensors_is_unpickled(generator, tmp_path):
    torch.save({"G": generator.state_dict(), "D": Payload(tmp_path / "written")}, tmp_path / "states.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(tmp_path / "written"), protocol=2))
    for name in ("states.pth", "plain.pth"):
        with pytest.raises(ValueError, match=rf"{name} holds Python objects, and only tensors are read"):
            DeepFillGenerator.from_official(tmp_path / name)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", ["states.pth", "states.safetensors"])
@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_broken_and_missing_files(generator, tmp_path, name, content):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=name):
        DeepFillGenerator.from_official(path)
    if content is None:
        generator.save_official(path)
        content = path.read_bytes()[:-1000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} holds (no weights|Python objects)"):
        DeepFillGenerator.from_official(path)


def test_a_failed_write_leaves_the_old_file(generator, tmp_path, monkeypatch):
    path = tmp_path / "states.pth"
    generator.save_official(path)
    old = path.read_bytes()

    def fail(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        generator.save_official(path)
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1
