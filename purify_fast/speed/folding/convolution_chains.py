"""Chains of convolutions whose gradient is one autograd function.

A `Step` is a convolution with the sum, BatchNorm and activation that follow it. A `Chain` knows all uses of a map: the
last step that adds to the gradient of a map also applies the derivative of the activation. For a residual block:

    forward      h = relu(conv1(x))                          x' = relu(conv2(h) + x)
    backward     dh = conv2^T(dz') [h > 0]                   dz = (conv1^T(dh) + dz') [x > 0]

Here z and z' are the sums before the activations that made x and x'. On a CPU with matrix tiles, a step of the forward
is a single call of oneDNN, and the gradient of its input another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from ..._processor import has_tiles
from ...ops.convolution import channels_first, channels_last
from ...ops.dispatch.gradient import first_order, needs_gradient
from .kept_layouts import convolved, matrix, packed, packed_gradient
from .unrolled import gradient_is_faster, input_gradient, is_faster, patches, product

#: In a `Formula`, the shape ``(B, C, H, W)`` of the map that is convolved.
SHAPE = "shape"


class Formula(NamedTuple):
    """A number that the network computes from the shape of a map: a function of `SHAPE`, formulas and constants."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def value_of(formula: Any, shape: tuple[int, ...]) -> Any:
    """Return the value of a `Formula`, of `SHAPE` or of a constant."""
    if isinstance(formula, Formula):
        return formula.function(*[value_of(one, shape) for one in formula.arguments])
    return shape if formula == SHAPE else formula


#: The activations, and their names in oneDNN.
NONE, RELU, SILU = range(3)
_NAMES = ("none", "relu", "swish")


def onednn_serves(device: torch.device) -> bool:
    """Tell whether oneDNN computes the steps of a chain in bfloat16 on a device: on CPUs with matrix tiles only."""
    return device.type == "cpu" and has_tiles() and torch.backends.mkldnn.is_available()


def _by_onednn(x: Tensor) -> bool:
    # The rewritten network is compared with its original in float64, for which oneDNN has no calls.
    return x.dtype == torch.bfloat16 and onednn_serves(x.device)


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return the numbers of rows and columns of the result, from those of the images and the kernel."""
    around = padding[0] + padding[1], padding[2] + padding[3]
    return [
        (pixels + zeros - taps) // step + 1
        for pixels, zeros, taps, step in zip(size, around, kernel, stride, strict=True)
    ]


@dataclass(frozen=True)
class Step:
    """A convolution with what follows it. Maps have numbers: those that enter the chain, then the results.

    ``total`` is the sum z before normalization and activation; ``out`` is z without an activation.
    """

    layer: nn.Conv2d
    norm: Any
    activation: int
    input: int
    added: int | None
    padding: tuple[int | Formula, ...]
    total: int
    out: int

    def settings(self, size: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return stride and padding for a map of the given height and width."""
        shape = 1, self.layer.in_channels, *size
        return list(self.layer.stride), [value_of(one, shape) for one in self.padding]

    def by_onednn(self, x: Tensor, added: Tensor | None) -> Tensor | None:
        """Return the result of the step by one call of oneDNN, ``[B, H', W', O]`` in bfloat16; None if impossible."""
        layer, (_, (top, bottom, left, right)) = self.layer, self.settings(x.shape[1:3])
        if self.norm is not None or (top, left) != (bottom, right) or (added is not None and self.activation == SILU):
            return None
        images, name = channels_first(x), _NAMES[self.activation]
        if is_faster(images, layer.weight, layer.stride, (top, left)):
            rows = patches(images, layer.kernel_size, layer.stride, (top, left))
            return product(rows, layer.weight, matrix, layer.bias, added=added, name=name)
        weight = packed(layer.weight, x.shape[1:3], layer.stride, (top, left))
        settings = [top, left], layer.stride
        beside = None if added is None else channels_first(added)
        return channels_last(convolved(images, weight, layer.bias, settings, added=beside, name=name))

    def plainly(self, x: Tensor, added: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        """Return the result of the step by PyTorch's operators, ``[B, H', W', O]``, and the sum z if ``keep``."""
        layer, (stride, (top, bottom, left, right)) = self.layer, self.settings(x.shape[1:3])
        images, at_ends = channels_first(x), (top, left)
        if (top, left) != (bottom, right):
            images, at_ends = F.pad(images, (left, right, top, bottom)), (0, 0)
        shift = None if layer.bias is None else layer.bias.to(x.dtype)
        out = total = F.conv2d(images, layer.weight, shift, stride, padding=at_ends)
        if added is not None:
            out = total = total + channels_first(added)
        if self.norm is not None:
            norm = self.norm
            out = F.batch_norm(out, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        if self.activation:
            out = F.relu(out) if self.activation == RELU else F.silu(out)
        return channels_last(out).contiguous(), channels_last(total).contiguous() if keep else None

    def gradient(
        self, grad: Tensor, size: Sequence[int], earlier: Tensor | None, entered: Tensor | None, beside: Tensor | None
    ) -> Tensor:
        """Return the gradient of the convolved map ``[B, H, W, C]``, or of its sum before a ReLU if it ``entered`` one.

        ``earlier`` is the gradient of the map from its other uses, and ``beside`` that of its sum.
        """
        layer, (stride, (top, bottom, left, right)) = self.layer, self.settings(size)
        given, padding = (channels_first(grad), layer.weight), (top, left)
        around = [taps - 1 - zeros for taps, zeros in zip(layer.kernel_size, padding, strict=True)]
        even = padding == (bottom, right)
        unrolls = even and _by_onednn(grad) and gradient_is_faster(*given)
        if even and _by_onednn(grad) and stride == [1, 1] and min(around) >= 0 and not unrolls:
            weight = packed_gradient(layer.weight, grad.shape[1:3], around)
            other = None if earlier is None else channels_first(earlier)
            found = channels_last(convolved(given[0], weight, None, (around, stride), added=other))
        else:
            height, width = size
            shape = torch.Size((len(grad), layer.in_channels, height, width))
            if unrolls:
                of_map = input_gradient(*given, shape, tuple(stride), padding)
            elif even:
                of_map = conv2d_input(shape, layer.weight, given[0], stride, padding)
            else:
                whole = (*shape[:2], height + top + bottom, width + left + right)
                of_map = conv2d_input(whole, layer.weight, given[0], stride)[:, :, top:, left:][:, :, :height, :width]
            found = channels_last(of_map).contiguous()
            if earlier is not None:
                found.add_(earlier)
        if entered is not None:
            torch.ops.aten.threshold_backward.grad_input(found, entered, 0, grad_input=found)
        return found if beside is None else found.add_(beside)


class Chain(nn.Module):
    """Runs steps one after the other: ``maps [B, C, H, W]`` -> a tuple of maps, in the dtype of the frozen weights."""

    def __init__(self, steps: Sequence[Step], inputs: int, outputs: Sequence[int]):
        super().__init__()
        self.steps, self.inputs, self.outputs = tuple(steps), inputs, tuple(outputs)
        self.producers = {step.out: step for step in steps if step.activation}
        self.uses = Counter(value for step in steps for value in (step.input, step.added) if value is not None)
        self.has_gradient = all(step.norm is None and step.activation != SILU for step in steps)
        self.saved = sorted(self.producers)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        dtype = self.steps[0].layer.weight.dtype
        maps = tuple(one.to(dtype) for one in maps)
        if needs_gradient(*maps):
            results: tuple[Tensor, ...] = _Chained.apply(self, *maps)
            return results
        values = self.run(maps, saving=False)
        return tuple(channels_first(values[one]) for one in self.outputs)

    def run(self, maps: Sequence[Tensor], saving: bool) -> dict[int, Tensor]:
        """Return all maps with channels last, by their numbers; with ``saving`` also those that the backward needs."""
        values = {number: channels_last(one).contiguous() for number, one in enumerate(maps)}
        wanted = {*self.outputs, *self.uses, *(self.saved if saving else ())}
        left = Counter(self.uses)
        for step in self.steps:
            x, added = values[step.input], None if step.added is None else values[step.added]
            if added is not None:
                # oneDNN reads the added map at every pixel, and networks may add a map that is broadcast.
                size = output_size(x.shape[1:3], step.layer.kernel_size, *step.settings(x.shape[1:3]))
                added = added.expand(len(x), *size, step.layer.out_channels).contiguous()
            keep = step.activation != NONE and step.total in wanted
            result = step.by_onednn(x, added) if not keep and _by_onednn(x) else None
            if result is None:
                result, total = step.plainly(x, added, keep)
                if total is not None:
                    values[step.total] = total
            values[step.out] = result
            for value in (step.input, step.added):
                left.subtract([] if value is None else [value])
                if value is not None and left[value] == 0 and not saving and value not in self.outputs:
                    # Nothing reads this map any more, so its memory is freed.
                    values.pop(value, None)
        return values

    def gradients(
        self, grads: dict[int, Tensor], saved: dict[int, Tensor], wanted: set[int], sizes: list[Any]
    ) -> dict[int, Tensor]:
        """Return the gradients of the maps that enter the chain, in the dictionary ``grads`` of those that leave it."""
        left, wanted = Counter(self.uses), set(wanted)
        for step in self.steps:
            if wanted & {step.input, step.added}:
                wanted |= {step.total, step.out}
        for step, size in zip(reversed(self.steps), reversed(sizes), strict=True):
            grad = self._of_sum(step, grads, saved)
            left.subtract(value for value in (step.input, step.added) if value is not None)
            if grad is None:
                continue
            if step.added in wanted:
                _add(grads, step.added, grad)
            if step.input not in wanted:
                continue
            # No other step adds to the gradient of this map, so its activation can be passed at once.
            before = self.producers.get(step.input) if left[step.input] == 0 else None
            earlier, entered, beside = grads.pop(step.input, None), None, None
            if before is not None:
                entered, beside = saved[step.input], grads.pop(before.total, None)
            target = step.input if before is None else before.total
            grads[target] = step.gradient(grad, size, earlier, entered, beside)
        return grads

    def _of_sum(self, step: Step, grads: dict[int, Tensor], saved: dict[int, Tensor]) -> Tensor | None:
        """Return the gradient of a step's sum z. Pass its activation, if no later step has passed it."""
        late = grads.pop(step.out, None) if step.activation else None
        grad = grads.pop(step.total, None)
        if late is None:
            return grad
        late = torch.ops.aten.threshold_backward(late, saved[step.out], 0)
        return late if grad is None else grad + late


def _add(grads: dict[int, Tensor], number: int, grad: Tensor) -> None:
    grads[number] = grads[number] + grad if number in grads else grad


# This class has no `setup_context`; `transformed` explains why.
class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *maps: Tensor) -> tuple[Tensor, ...]:
        assert chain.has_gradient, "the gradient needs steps without SiLU and BatchNorm"
        values = chain.run(maps, saving=True)
        ctx.chain = chain
        ctx.sizes = [values[step.input].shape[1:3] for step in chain.steps]
        # The weights are not read from here. Autograd raises an error if they were changed before the backward.
        weights = [step.layer.weight for step in chain.steps]
        ctx.save_for_backward(*[values[one] for one in chain.saved], *weights)
        ctx.set_materialize_grads(False)
        # These are views, so autograd raises an error if they are changed in place.
        return tuple(channels_first(values[one]) for one in chain.outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        chain, given = ctx.chain, dict[int, Tensor]()
        for number, grad in zip(chain.outputs, grads, strict=True):
            if grad is not None:
                _add(given, number, channels_last(grad).contiguous())
        wanted = {number for number, needed in enumerate(ctx.needs_input_grad[1:]) if needed}
        saved = dict(zip(chain.saved, ctx.saved_tensors, strict=False))
        found = chain.gradients(given, saved, wanted, sizes=ctx.sizes)
        of_maps = [channels_first(found[i]) if i in wanted and i in found else None for i in range(chain.inputs)]
        return None, *of_maps
