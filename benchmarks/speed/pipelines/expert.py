"""The parts of the contestant "expert": code as its best practitioners write it with PyTorch's public functions alone.

An attack runs on a frozen copy of the network, with folded BatchNorms and weights in bfloat16 and channels_last. Only
the gradient of the images is computed. What is trained runs under `torch.autocast`. The compiled form compiles the
networks, each together with its loss. From this package the expert has only the plain networks and their weights, and
for a comparison of results the random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion

LAST = torch.channels_last
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of all layers that a BatchNorm follows directly, with the names of the BatchNorms.

    In the networks of the pipelines, a module that was registered directly after a layer is also called directly after
    it. The comparison of the results would show if a network did otherwise.

    Args:
        model: network whose BatchNorms are folded.
    """
    found = []
    for path, module in model.named_modules():
        for (name, layer), (after, norm) in pairwise(module.named_children()):
            if isinstance(layer, _LAYERS) and isinstance(norm, _BatchNorm):
                found.append((f"{path}.{name}".lstrip("."), f"{path}.{after}".lstrip(".")))
    return found


def _fused(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a layer with its BatchNorm folded in."""
    weights: tuple[Any, ...] = (layer.weight, layer.bias)
    statistics: tuple[Any, ...] = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        return fusion.fuse_linear_bn_weights(*weights, *statistics)
    return fusion.fuse_conv_bn_weights(*weights, *statistics, transpose=isinstance(layer, nn.ConvTranspose2d))


class FrozenCopy:
    """A frozen copy of a network, in bfloat16 and channels_last, with folded BatchNorms.

    Args:
        source: network in evaluation mode. It is copied.

    Attributes:
        model: the copy.
    """

    def __init__(self, source: nn.Module):
        self.source, self.pairs = source, pairs(source)
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        for name, norm in self.pairs:
            layer = self.model.get_submodule(name)
            weight, bias = _fused(layer, self.model.get_submodule(norm))
            layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
            parent, _, own = norm.rpartition(".")
            setattr(self.model.get_submodule(parent), own, nn.Identity())
        self.model.to(torch.bfloat16)
        self.model.to(memory_format=LAST)

    @torch.no_grad()
    def refresh(self, *parts: str) -> None:
        """Give the copy the present weights of the source.

        Args:
            parts: names of the submodules whose weights may have changed. Without names, all may have.
        """
        theirs = {**dict(self.source.named_parameters()), **dict(self.source.named_buffers())}
        for name, norm in self.pairs:
            if not parts or name.startswith(parts):
                fused = _fused(self.source.get_submodule(name), self.source.get_submodule(norm))
                theirs |= {f"{name}.weight": fused[0], f"{name}.bias": fused[1]}
        changed = {name: mine for name, mine in self.model.named_parameters() if not parts or name.startswith(parts)}
        torch._foreach_copy_(list(changed.values()), [theirs[name] for name in changed])


def compiled(function: Callable, device: torch.device, enabled: bool, kind: str = "training") -> Callable:
    """Compile a function in the mode that is best for its kind on a device, or return it unchanged.

    Args:
        function: function or module.
        device: device that computes.
        enabled: False returns ``function``.
        kind: "attack" for a step that is repeated with frozen weights: on a GPU, CUDA graphs replay it. "inference" for
            a frozen network without gradients, whose weights become constants. "training" for everything else.
    """
    if not enabled:
        return function
    options: dict[str, Any] = {}
    if kind == "inference" and device.type == "cpu":
        options = {"options": {"freezing": True}}
    elif device.type == "cuda":
        options = {"mode": "max-autotune-no-cudagraphs" if kind == "training" else "reduce-overhead"}
    return torch.compile(function, dynamic=False, **options)


def half(x: Tensor) -> Tensor:
    """Convert images to bfloat16 in channels_last."""
    return x.to(torch.bfloat16, memory_format=LAST)


def loss_of(logits: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return the summed cross-entropy of images and labels as a function, which is compiled as a whole.

    Args:
        logits: function from images in bfloat16 and further arguments to logits.
    """

    def loss(x: Tensor, y: Tensor, *more: Tensor) -> Tensor:
        return F.cross_entropy(logits(half(x), *more).float(), y, reduction="sum")

    return loss


def attack(
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    steps: int,
    start: Tensor | None = None,
) -> Tensor:
    """Attack images by L-inf PGD. Only the gradient of the images is computed.

    Args:
        loss: function of images and labels that the attack maximizes, from `loss_of`.
        x: images ``[B, C, H, W]``.
        y: labels ``[B]``.
        eps: radius, a number or ``[B, 1, 1, 1]``.
        alpha: length of a step, like ``eps``.
        steps: number of steps.
        start: first point. None begins at the images.
    """
    low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    point = x if start is None else start
    for _ in range(steps):
        # A replayed CUDA graph may overwrite the results of the step before.
        torch.compiler.cudagraph_mark_step_begin()
        point = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(point, y), point)
        point = (point.detach() + alpha * gradient.sign()).clamp_(low, high)
    return point.detach()


def random_start(x: Tensor, eps: float | Tensor) -> Tensor:
    """Return uniformly random points in the L-inf balls around images."""
    return (x + eps * (2 * torch.rand_like(x) - 1)).clamp_(0, 1)
