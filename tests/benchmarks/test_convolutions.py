"""The layers that are timed are those of the generator; the command that times them."""

import re

import pytest

from benchmarks import __main__ as program
from benchmarks.speed import convolutions
from purify_fast.ops import REGISTRY


def test_the_layers_are_the_generators():
    layers = convolutions.layers_of_generator()
    assert sum(layers.values()) == 42 and layers[convolutions.Layer(96, 192, 32)] == 10
    assert all(layer.side % layer.stride == 0 for layer in layers)


@pytest.mark.usefixtures("one_thread")  # the command leaves the process with one
def test_command(monkeypatch, capsys):
    if REGISTRY["convolution"].kernel("cpu") == "reference":
        pytest.skip("no kernel: it needs AVX512-BF16, and no AMX")
    layer = convolutions.Layer(16, 8, 6, stride=2)
    assert layer.flop == 2 * 4 * 9 * 16 * 8 * 9
    monkeypatch.setattr(convolutions, "layers_of_generator", lambda: {layer: 3})
    program.main(["convolutions", "--runs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| 16 to 8 channels, 6 x 6, stride 2 | 3 | ")
    assert lines[3].startswith("| all 3 |  | ")


def test_mistakes(monkeypatch, capsys):
    """One line says what is wrong, before anything runs."""
    monkeypatch.setattr(convolutions, "table", lambda *given: pytest.fail("it ran"))
    monkeypatch.setitem(REGISTRY["convolution"].available, "cpu", ("reference",))
    for arguments, message in (
        (["--runs", "0"], r"error: argument --runs: .*\b0$"),
        ([], "error: .*convolutions.*AVX512-BF16"),
    ):
        with pytest.raises(SystemExit) as ended:
            program.main(["convolutions", *arguments])
        *_, last = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(message, last)
