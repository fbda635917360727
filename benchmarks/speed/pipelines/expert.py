"""The parts of the contestant "expert": code as its best practitioners write it with PyTorch's public functions alone.

An attack runs on a frozen copy of the network in channels_last, with folded BatchNorms, in bfloat16 or in float32,
whichever is faster on the device. Only the gradient of the images is computed. What is trained runs under
`torch.autocast`, if bfloat16 is faster. The compiled form compiles the networks, each together with its loss, and a
whole step of an attack. From this package the expert has only the plain networks and their weights, and for a
comparison of results the random numbers.
"""

from __future__ import annotations

import copy
import time
import timeit
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion

LAST = torch.channels_last
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def fastest() -> torch.dtype:
    """Return bfloat16 if a convolution is faster in it than in float32, which not all processors with bfloat16 have."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 + torch.cpu._is_avx512_bf16_supported()]:
        x, weight = (torch.rand(n, 64, side, side).to(dtype, memory_format=LAST) for n, side in ((8, 32), (64, 3)))
        convolution = partial(torch.conv2d, x, weight, padding=1)
        times[dtype] = min(timeit.repeat(convolution, timer=time.process_time, number=5, repeat=5))
    return min(times, key=times.__getitem__)


#: The dtypes of the frozen copies on the types of devices. Compiled code can read this table, but not time anything.
DTYPES = {"cpu": fastest(), "cuda": torch.bfloat16}


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which an expert trains: autocast to bfloat16 if that is faster, or else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=DTYPES[device.type] == torch.bfloat16)


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
    """A frozen copy of a network in channels_last, with folded BatchNorms.

    Args:
        source: network. It is copied, and the copy is in evaluation mode.
        dtype: dtype of the copy. None is the faster one on the source's device.

    Attributes:
        model: the copy.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None = None):
        self.source, self.pairs = source, pairs(source)
        self.model = copy.deepcopy(source).requires_grad_(False).eval()
        for name, norm in self.pairs:
            layer = self.model.get_submodule(name)
            weight, bias = _fused(layer, self.model.get_submodule(norm))
            layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
            parent, _, own = norm.rpartition(".")
            setattr(self.model.get_submodule(parent), own, nn.Identity())
        self.model.to(dtype or DTYPES[next(source.parameters()).device.type])
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
            a function without gradients by autograd, whose weights become constants. "training" for everything else:
            max-autotune would tune every convolution for minutes.
    """
    if not enabled:
        return function
    options: dict[str, Any] = {}
    if kind == "inference" and device.type == "cpu":
        options = {"options": {"freezing": True}}
    elif device.type == "cuda" and kind != "training":
        options = {"mode": "reduce-overhead"}
    return torch.compile(function, dynamic=False, **options)


def entering(x: Tensor) -> Tensor:
    """Convert images to the dtype of the frozen copies, in channels_last."""
    return x.to(DTYPES[x.device.type], memory_format=LAST)


def loss_of(logits: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return the summed cross-entropy of images and labels as a function, which is compiled as a whole.

    Args:
        logits: function from images in the dtype of the frozen copies, and further arguments, to logits.
    """

    def loss(x: Tensor, y: Tensor, *more: Tensor) -> Tensor:
        return F.cross_entropy(logits(entering(x), *more).float(), y, reduction="sum")

    return loss


def ascent(loss: Callable[..., Tensor], device: torch.device, enabled: bool, constant: bool) -> Callable[..., Tensor]:
    """Return a step of L-inf PGD, a function of the point, the labels, both limits, ``alpha`` and further arguments.

    The compiled form is one graph of the forward pass, the gradient and the step. With `torch.autograd.grad` it would
    be two graphs, and the step would be outside them.

    Args:
        loss: function of images, labels and further arguments that the attack maximizes, from `loss_of`.
        device: device that computes.
        enabled: True to compile the step.
        constant: True if the weights never change. A compiled step on a CPU then packs them once.
    """

    def step(x: Tensor, y: Tensor, low: Tensor, high: Tensor, alpha: float | Tensor, *more: Tensor) -> Tensor:
        if enabled:
            gradient = torch.func.grad(loss)(x, y, *more)
        else:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(loss(leaf, y, *more), leaf)
        return (x + alpha * gradient.sign()).clamp(low, high)

    return compiled(step, device, enabled, "inference" if constant else "attack")


@torch.no_grad()
def attack(
    step: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    alpha: float | Tensor,
    steps: int,
    start: Tensor | None = None,
    more: Callable[[], tuple[Tensor, ...]] = tuple,
) -> Tensor:
    """Attack images by L-inf PGD. Only the gradient of the images is computed.

    Args:
        step: a step of the attack, from `ascent`.
        x: images ``[B, C, H, W]``.
        y: labels ``[B]``.
        eps: radius, a number or ``[B, 1, 1, 1]``.
        alpha: length of a step, like ``eps``.
        steps: number of steps.
        start: first point. None begins at the images.
        more: function that returns the further arguments of a step.
    """
    low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    point = x if start is None else start
    for _ in range(steps):
        # A replayed CUDA graph may overwrite the results of the step before.
        torch.compiler.cudagraph_mark_step_begin()
        point = step(point, y, low, high, alpha, *more()).clone()
    return point


def random_start(x: Tensor, eps: float | Tensor) -> Tensor:
    """Return uniformly random points in the L-inf balls around images."""
    return (x + eps * (2 * torch.rand_like(x) - 1)).clamp_(0, 1)
