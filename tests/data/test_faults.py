"""Data that disappear or change under a run, and models and images that cannot be trained on."""

import pytest
import torch
from small_models import Made

from purify_fast import cli
from purify_fast.cli.show import Info
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, fit


def task():
    torch.manual_seed(0)
    return ClassifierTask(SmallCNN(3, 2, (8, 8), 2), ClassifierConfig())


@pytest.mark.parametrize(
    ("change", "text"), [(lambda logits: {"logits": logits}, "a dict for B = 2"), (torch.flatten, r"\[4\] for B = 2")]
)
def test_a_model_whose_output_is_no_tensor_of_logits(change, text):
    x, y = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 2
    odd = Made(lambda self, x: change(self.net(x)), net=SmallCNN(3, 2, (8, 8), 2))
    for images, labels in ((x, y), ([(x, y)], None)):
        with pytest.raises(ValueError, match=rf"must map images \[B, 3, 8, 8\] to logits \[B, C\], .*{text}"):
            fit(ClassifierTask(odd, ClassifierConfig()), images, labels, FitConfig(1, 4), progress=False)


def test_values_outside_of_0_to_1_by_rounding_are_clamped():
    """A loader's images that were normalized and brought back train as the images themselves."""
    x, y = torch.linspace(0, 1, 8 * 3 * 64).view(8, 3, 8, 8), torch.arange(8) % 2
    ended = []
    for images in (x + 5e-5, (x + 5e-5).clamp(0, 1)):
        model = task()
        fit(model, [(images, y), (images, y)], None, FitConfig(1), progress=False)
        ended.append(model.model.state_dict())
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])
    with pytest.raises(ValueError, match=r"got values from 0.0002 to 1.0002: .* after a resize .* x.clamp\(0, 1\)"):
        fit(task(), [(x + 2e-4, y)], None, FitConfig(1), progress=False)


def test_an_error_of_the_package_is_raised_and_too_little_memory_is_told(monkeypatch, capsys):
    errors = [KeyError("a bug"), torch.OutOfMemoryError("CUDA out of memory")]

    def broken(self):
        raise errors.pop(0)

    monkeypatch.setattr(Info, "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["info"])
    assert cli.main(["info"]) == 2
    printed = capsys.readouterr().err
    assert "not enough memory: CUDA out of memory" in printed and "--batch-size" in printed
