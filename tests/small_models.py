"""Models of a few weights that the code blocks of README and of the documentation are run with."""

import torch
from torch import nn


class Linear(nn.Module):
    """A classifier of one layer."""

    def __init__(self, features, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(features, classes)

    def forward(self, x):
        return self.layer(x.flatten(1))


class Halved(nn.Module):
    """A purifier of no parameters but one."""

    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, transformed, mask):
        return self.share * transformed
