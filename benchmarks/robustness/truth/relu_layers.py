"""Reads the matrices of a network whose affine layers have ReLUs between them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: The number of images on which matrices and model are compared.
COMPARED = 16


class Affine(NamedTuple):
    """The affine layer z = weight @ a + bias in float64; a ReLU follows each layer of a network except the last."""

    weight: Tensor
    bias: Tensor


@torch.no_grad()
def affine_layers(model: nn.Sequential, shape: Sequence[int]) -> list[Affine]:
    """Read the affine layers of a sequence of modules, some of which are ReLUs.

    The modules between two ReLUs get unit vectors as their inputs.

    Args:
        model: sequence of modules.
        shape: shape of an image.

    Raises:
        ValueError: the layers do not reproduce the model's logits on random images.
    """
    exact, inputs, layers = copy.deepcopy(model).double().eval(), tuple(shape), list[Affine]()
    for is_relu, modules in groupby(exact, lambda module: isinstance(module, nn.ReLU)):
        if not is_relu:
            vectors = torch.eye(math.prod(inputs) + 1, math.prod(inputs), dtype=torch.float64).view(-1, *inputs)
            outputs = nn.Sequential(*modules)(vectors)
            *columns, bias = outputs.flatten(1)
            layers.append(Affine((torch.stack(columns) - bias).T.contiguous(), bias))
            inputs = tuple(outputs.shape[1:])
    x = torch.rand(COMPARED, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(forward(layers, x.flatten(1)), exact(x), rtol=1e-9, atol=1e-9):
        raise ValueError("model must be affine between its ReLUs, but the read layers do not reproduce its logits")
    return layers


def forward(layers: Sequence[Affine], x: Tensor) -> Tensor:
    """Logits ``[B, classes]`` of flat images ``[B, pixels]``."""
    for i, (weight, bias) in enumerate(layers):
        x = (x.relu() if i else x) @ weight.T + bias
    return x
