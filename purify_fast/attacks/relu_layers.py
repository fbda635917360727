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

from .._compiler import EagerDispatchMode
from ..protocols import Classifier

#: A model with more weights than this is not read, because it would have too many ReLUs for the search.
MOST_WEIGHTS = 4_000_000
#: The basis vectors in a call of the model, and the images on which matrices and model are compared.
AT_ONCE, COMPARED = 256, 16
#: The operations of PyTorch that a model may use besides ReLUs: operations that neither compare nor round numbers.
_POLYNOMIAL = (
    "_adaptive_avg_pool2d _batch_norm_no_update _native_batch_norm_legit_no_training _reshape_alias _unsafe_view add "
    "add_ addmm alias avg_pool2d baddbmm bmm cat clone constant_pad_nd convolution detach div div_ dot empty expand "
    "mean mm mul mul_ mv native_batch_norm neg permute rsub select slice split squeeze stack sub sub_ sum t "
    "transpose unbind unsqueeze view"
)
POLYNOMIAL = frozenset(_POLYNOMIAL.split())
RELU = ("relu", "relu_")


class Affine(NamedTuple):
    """The affine layer z = weight @ a + bias in float64; a ReLU follows each layer of a network except the last."""

    weight: Tensor
    bias: Tensor


def affine_layers(model: Classifier, shape: Sequence[int], most: int | None = None) -> list[Affine]:
    """Read the affine layers of a network with ReLUs between them."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module of affine layers and ReLUs, got {type(model).__name__}")
    if most is not None and (weights := sum(weight.numel() for weight in model.parameters())) > MOST_WEIGHTS:
        raise ValueError(f"model must have at most {MOST_WEIGHTS} weights, got {type(model).__name__} with {weights}")
    pixels = math.prod(shape)
    # The code of a user's model may raise any error on tensors for which it was not written.
    try:
        exact = copy.deepcopy(model).cpu().double().eval()
        with torch.no_grad():
            # Tensors on the device "meta" have no values. So a model that computes outside of PyTorch, for example in
            # NumPy, raises an error here.
            empty, x = copy.deepcopy(exact).to("meta"), torch.empty(1, *shape, dtype=torch.float64, device="meta")
            with _Reading(None) as reading:
                empty(x)
            widths = [pixels, *(z.shape[1] for z in reading.seen)]
            units = sum(widths[1:])
            if most is None or units <= most:
                layers = _read(exact, shape, widths)
                x = torch.rand(
                    COMPARED, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device="cpu"
                )
                logits = exact(x)
    except Exception as error:
        raise _refused(model, f"{type(error).__name__}: {error}") from error
    if most is not None and units > most:
        raise ValueError(f"model must have at most {most} ReLUs, got {units}")
    if not torch.allclose(forward(layers, x.flatten(1)), logits, rtol=1e-9, atol=1e-9):
        raise _refused(model, "the affine layers that were read from it do not reproduce its logits")
    return layers


def forward(layers: Sequence[Affine], x: Tensor) -> Tensor:
    """Logits ``[B, classes]`` of flat images ``[B, pixels]``."""
    for i, (weight, bias) in enumerate(layers):
        x = (x.relu() if i else x) @ weight.T + bias
    return x


def _refused(model: nn.Module, why: str) -> ValueError:
    reason = why.partition("\n")[0]
    return ValueError(f"model must be affine between its ReLUs, got {type(model).__name__} ({reason})")


def _read(model: nn.Module, shape: Sequence[int], widths: Sequence[int]) -> list[Affine]:
    """Read the layers from the model's outputs for each vector of a basis, and for 0."""
    parts = []
    for first in range(0, max(widths) + 1, AT_ONCE):
        basis = torch.arange(first, min(first + AT_ONCE, max(widths) + 1), device="cpu")
        reading = _Reading(basis)
        x = reading.vectors(widths[0]).view(-1, *shape)
        with reading:
            logits = model(x)
        parts.append([*reading.seen, logits])
    layers = []
    for width, rows in zip(widths, zip(*parts, strict=True), strict=True):
        answers = torch.cat(rows)
        layers.append(Affine((answers[:width] - answers[width]).T.contiguous(), answers[width]))
    return layers


class _Reading(EagerDispatchMode):
    """A mode that records every ReLU's input in ``seen``, and returns the unit vectors with the indices ``basis``."""

    def __init__(self, basis: Tensor | None):
        super().__init__()
        self.basis, self.seen = basis, list[Tensor]()

    def vectors(self, width: int) -> Tensor:
        """The vectors of a basis, ``[B, width]``; a vector whose index is at least ``width`` is 0."""
        assert self.basis is not None
        return (self.basis[:, None] == torch.arange(width, device=self.basis.device)).double()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in RELU:
            (z,) = args
            # Keep a copy, because the model may change the input in place later.
            self.seen.append(z.flatten(1).clone())
            if self.basis is None:
                return z
            sent = self.vectors(z[0].numel()).view_as(z)
            return sent if name == "relu" else z.copy_(sent)
        kwargs = kwargs or {}
        if name not in POLYNOMIAL or kwargs.get("rounding_mode"):
            raise TypeError(f"the operation {name} is not affine")
        answer = func(*args, **kwargs)
        # A result of another dtype, such as int64, may have been rounded; that of `empty` has no values yet.
        if isinstance(answer, Tensor) and answer.dtype != torch.float64 and name != "empty":
            raise TypeError(f"the operation {name} returns {answer.dtype} instead of float64")
        return answer
