"""Reads the matrices of a network whose affine layers have ReLUs between them.

A layer gets unit vectors as its inputs. The model may contain only ReLUs and polynomial operations. A polynomial that
agrees with an affine layer on random images is this layer. So the matrices are right on every image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from purify_fast.speed.eager_mode import EagerDispatchMode

#: The number of images on which matrices and model are compared.
COMPARED = 16
#: The operations of PyTorch that a model may use besides ReLUs: operations that neither compare nor round numbers.
_POLYNOMIAL = (
    "_adaptive_avg_pool2d _batch_norm_no_update _native_batch_norm_legit_no_training _reshape_alias _unsafe_view add "
    "add_ addmm alias avg_pool2d baddbmm bmm cat clone constant_pad_nd convolution detach div div_ dot empty expand "
    "mean mm mul mul_ mv native_batch_norm neg permute rsub select slice split squeeze stack sub sub_ sum t "
    "transpose unbind unsqueeze view"
)
POLYNOMIAL = frozenset(_POLYNOMIAL.split())
RELU = ("relu", "relu_")
AFFINE = "model must be affine between its ReLUs"


class Affine(NamedTuple):
    """The affine layer z = weight @ a + bias in float64; a ReLU follows each layer of a network except the last."""

    weight: Tensor
    bias: Tensor


def affine_layers(model: nn.Module, shape: Sequence[int]) -> list[Affine]:
    """Read the affine layers of a network with ReLUs between them; ValueError for another model."""
    exact, zero = copy.deepcopy(model).cpu().double().eval(), torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        with _Reading(0) as reading:
            exact(zero)
        widths = [math.prod(shape), *(z.shape[1] for z in reading.seen)]
        reading = _Reading(max(widths) + 1)
        x = reading.vectors(widths[0]).view(-1, *shape)
        with reading:
            logits = exact(x)
        answers = zip(widths, [*reading.seen, logits], strict=True)
        layers = [Affine((each[:width] - each[width]).T.contiguous(), each[width]) for width, each in answers]
        x = torch.rand(COMPARED, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if not torch.allclose(forward(layers, x.flatten(1)), exact(x), rtol=1e-9, atol=1e-9):
            raise ValueError(f"{AFFINE}, but the layers that were read do not reproduce its logits")
    return layers


def forward(layers: Sequence[Affine], x: Tensor) -> Tensor:
    """Logits ``[B, classes]`` of flat images ``[B, pixels]``."""
    for i, (weight, bias) in enumerate(layers):
        x = (x.relu() if i else x) @ weight.T + bias
    return x


class _Reading(EagerDispatchMode):
    """A mode that records each ReLU's input in ``seen``, and returns ``count`` unit vectors; 0: the input itself."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.seen = count, list[Tensor]()

    def vectors(self, width: int) -> Tensor:
        """The vectors of a basis, ``[count, width]``; a vector whose index is at least ``width`` is 0."""
        return (torch.arange(self.count)[:, None] == torch.arange(width)).double()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in RELU:
            (z,) = args
            # Keep a copy, because the model may change the input in place later.
            self.seen.append(z.flatten(1).clone())
            if not self.count:
                return z
            sent = self.vectors(z[0].numel()).view_as(z)
            return sent if name == "relu" else z.copy_(sent)
        kwargs = kwargs or {}
        if name not in POLYNOMIAL or kwargs.get("rounding_mode"):
            raise ValueError(f"{AFFINE}, but the operation {name} is not affine")
        answer = func(*args, **kwargs)
        # A result of another dtype, such as int64, may have been rounded; that of `empty` has no values yet.
        if isinstance(answer, Tensor) and answer.dtype != torch.float64 and name != "empty":
            raise ValueError(f"{AFFINE}, but the operation {name} returns {answer.dtype} instead of float64")
        return answer
