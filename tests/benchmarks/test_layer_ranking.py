"""The ranking of layers measures what it says."""

import torch
from torch import nn

from benchmarks.robustness.studies.layer_ranking import rank_layers
from purify_fast import data
from purify_fast.models.classifiers import SmallCNN


class Known(nn.Module):
    """A classifier with one layer that is the image itself, one that is noise, and one that is constant."""

    def __init__(self):
        super().__init__()
        self.image, self.constant, self.scrambled = nn.Identity(), nn.Identity(), nn.Identity()
        self.linear = nn.Linear(256, 10)

    def forward(self, x):
        x = self.image(x)
        self.constant(torch.zeros_like(x))
        self.scrambled(torch.frac(x * 1e4))
        return self.linear(x.flatten(1))


def test_known_layers():
    digits = data.load_dataset("digits")
    x, y = data.to_float(digits.x_test[:200]), digits.y_test[:200]
    torch.manual_seed(0)
    scores = {s.layer: s for s in rank_layers(Known(), ["image", "constant", "scrambled"], x, y, eps=1e-4, steps=2)}
    assert scores["image"].image > 0.8 and scores["image"].probe > 0.8 and scores["image"].drift < 0.01
    assert scores["constant"].probe < 0.3 and abs(scores["constant"].image) < 0.1
    assert scores["scrambled"].probe < 0.75 * scores["image"].probe and scores["scrambled"].drift > 0.2


def test_order_and_the_callers_model_untouched():
    digits = data.load_dataset("digits")
    x, y = data.to_float(digits.x_test[:100]), digits.y_test[:100]
    torch.manual_seed(0)
    model = SmallCNN(width=4).train()
    whole = rank_layers(model, ["conv1", "conv4", "hidden"], x, y, eps=0.2, steps=3)
    assert [s.probe for s in whole] == sorted((s.probe for s in whole), reverse=True)
    assert {s.layer: s.features for s in whole} == {"conv1": 256, "conv4": 128, "hidden": 32}
    assert model.training and not model.conv1._forward_hooks
    assert whole == rank_layers(model, ["conv1", "conv4", "hidden"], x, y, eps=0.2, steps=3)
