"""The layers that are timed are those of the generator; the command that times them."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.ops import REGISTRY

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks import __main__ as program
from benchmarks import convolutions


def test_the_layers_are_the_generators():
    generator, found = DeepFillGenerator(5, 48), Counter()

    def seen(layer, inputs, _):
        one = (layer.in_channels, layer.out_channels, inputs[0].shape[2])
        found[(*one, layer.stride[0], layer.dilation[0], layer.kernel_size[0])] += 1

    for layer in generator.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.padding[0] == layer.dilation[0] * (layer.kernel_size[0] // 2)
            layer.register_forward_hook(seen)
    with torch.no_grad():
        generator(torch.zeros(1, 5, 128, 128), torch.zeros(1, 1, 128, 128))
    listed = Counter()
    for layer in convolutions.LAYERS:
        listed[(layer.inputs, layer.outputs, layer.side, layer.stride, layer.dilation, layer.kernel)] += layer.count
    assert listed == found


def test_table():
    if REGISTRY["convolution"].kernel("cpu") == "reference":
        pytest.skip("no kernel: it needs AVX512-BF16, and no AMX")
    layer = convolutions.Layer(16, 8, 6, 3, stride=2)
    assert layer.flop == 2 * 4 * 9 * 16 * 8 * 9
    lines = convolutions.table((layer,), 1)
    assert lines[2].startswith("| 16 to 8 channels, 6 x 6, stride 2 | 3 | ") and lines[3].startswith("| all 3 | | ")
    assert {line.count("|") for line in lines} == {6}


@pytest.mark.usefixtures("one_thread")  # the command leaves the process with one
def test_command(monkeypatch, capsys):
    if REGISTRY["convolution"].kernel("cpu") == "reference":
        pytest.skip("no kernel: it needs AVX512-BF16, and no AMX")
    monkeypatch.setattr(convolutions, "LAYERS", (convolutions.Layer(16, 8, 6, 3),))
    program.main(["convolutions", "--runs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 16 to 8 channels, 6 x 6 | 3 | ")


def test_mistakes(monkeypatch, capsys):
    """One line says what is wrong, before anything runs."""
    monkeypatch.setattr(convolutions, "main", lambda runs: pytest.fail("it ran"))
    monkeypatch.setitem(REGISTRY["convolution"].available, "cpu", ("reference",))
    for arguments, message in (
        (["--runs", "0"], "error: --runs must be at least 1, got 0"),
        (["--runs", "-3"], "error: --runs must be at least 1, got -3"),
        (["--runs", "many"], "argument --runs: invalid int value: 'many'"),
        (["--layers", "2"], "error: unrecognized arguments: --layers 2"),
        ([], "error: this package's convolutions have no kernel here: they need the compiled extension, and a"),
    ):
        with pytest.raises(SystemExit) as ended:
            program.main(["convolutions", *arguments])
        *_, last = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and message in last
