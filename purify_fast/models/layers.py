"""Layers that several networks use.

`LeakyReLU` and the BatchNorms have slope, eps and momentum as constants in the code, because dynamic compilation treats
a number in an attribute as variable. In training mode with several processes, BatchNorm uses the statistics of the
images of all processes, each of which must have an image. On CUDA it calls the function of torch.nn.SyncBatchNorm.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm
from torch.optim import swa_utils

from .._process import processes
from .._settings import first_tensor
from .._validation import check_counts

#: For each module by its name, its outputs in a pass, each with the count of writes to it.
Outputs = dict[str, list[tuple[Any, int]]]


class Recorder:
    """The forward hook of a layer. It is a class, because a model with a closure as hook could not be pickled."""

    def __init__(self, owner: Representation, index: int):
        self.owner, self.index = owner, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        owner = self.owner
        outputs = owner.traced if torch.compiler.is_compiling() else owner.outputs.get(threading.get_ident())
        if outputs is not None:
            outputs[self.index] = output.clone() if owner.overwritten[self.index] else output


def without_recorders(model: nn.Module) -> nn.Module:
    """Remove the hooks of `Representation` from a model in place, and return the model."""
    for module in model.modules():
        # PyTorch lists no hooks, and their handles remove them only from the original model, not from a copy.
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Recorder)]:
            del module._forward_hooks[key]
    return model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode within the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.inference_mode(False)
def outputs_of(model: nn.Module, modules: dict[str, nn.Module], image_shape: Sequence[int]) -> tuple[Outputs, int]:
    """Call a model once, and return the outputs of modules with their counts of writes, and the number of classes.

    The modules are in the order in which they return.
    """
    seen: Outputs = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        version = output._version if isinstance(output, Tensor) else -1
        seen.setdefault(name, []).append((output, version))

    first = first_tensor(model)
    handles = [module.register_forward_hook(partial(see, name)) for name, module in modules.items()]
    try:
        # Use two images, because a BatchNorm that a user's model keeps in training mode refuses a single image.
        images = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
        with evaluation_mode(model), torch.no_grad():
            classes = count_classes(lambda: model(images), image_shape, 2)
    finally:
        for handle in handles:
            handle.remove()
    return seen, classes


def count_classes(classify: Callable[[], Any], image_shape: Sequence[int], batch: int) -> int:
    """The number of classes, which is the number of logits that a classifier returns for an image."""
    want = f"the classifier must map images [B, {', '.join(map(str, image_shape))}] to logits [B, C]"
    try:
        logits = classify()
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{want}, but the call failed: {error}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != batch:
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"{want}, but it returned {got} for B = {batch}")
    if logits.shape[1] < 2:
        raise ValueError("the classifier must return logits of at least two classes, such as torch.cat([-z, z], 1) / 2")
    return logits.shape[1]


class Representation:
    """Returns the outputs of chosen layers of a model, from a single forward pass. Several threads may use it together.

    Args:
        model: any module from images ``[B, *image_shape]`` to logits. It is not copied, and its weights may change.
        layers: names of the layers, as in ``model.named_modules()``. The outputs are returned in this order.
        image_shape: shape (C, H, W) of the images, for a first pass.

    Attributes:
        outputs: for each thread with a pass in progress, the outputs that the hooks have read so far.
        traced: the outputs that the hooks have read while a graph is traced; None at other times.
        shapes: for each layer, the shape of its output without the batch dimension.
        overwritten: for each layer, whether its output is cloned because the model overwrites the output later.
        num_classes: the number of classes of the model.

    Raises:
        ValueError: a layer is unknown, is named twice, or does not run exactly once in a forward pass. Or its output is
            not a tensor [B, C, H, W], [B, T, D] or [B, F].
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], image_shape: tuple[int, int, int]):
        modules = dict(model.named_modules(remove_duplicate=False))
        if isinstance(layers, str):
            raise ValueError(f"layers must be a list of names, got the string {layers!r}: write [{layers!r}]")
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers must name at least one module, each once, got {list(layers)}")
        if unknown := [name for name in layers if name not in modules or name == ""]:
            names = ", ".join(path for path in modules if path)[:400]
            raise ValueError(f"layers: the classifier has no module {unknown[0]!r}, its modules are {names}")
        self.model, self.layers = model, tuple(layers)
        self.traced: list[Tensor | None] | None = None
        self.outputs: dict[int, list[Tensor | None]] = {}
        self.overwritten = [False] * len(layers)
        self.shapes: list[tuple[int, ...]] = []
        # In a first pass, check the outputs of the layers.
        seen, self.num_classes = outputs_of(model, {name: modules[name] for name in layers}, image_shape)
        for index, name in enumerate(layers):
            outputs = seen.get(name, [])
            if len(outputs) != 1:
                raise ValueError(f"layers: {name!r} must run once in a forward pass; it runs {len(outputs)} times")
            output, version = outputs[0]
            if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4) or output.shape[0] != 2:
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                needs = f"layers: the output of {name!r} must be [B, C, H, W], [B, T, D] or [B, F]"
                raise ValueError(f"{needs}; for B = 2 it is {got}")
            self.overwritten[index] = output._version != version
            self.shapes.append(tuple(output.shape[1:]))
        for index, name in enumerate(layers):
            modules[name].register_forward_hook(Recorder(self, index))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs of the layers for images ``[B, C, H, W]``, in the order of ``layers``, with gradients."""
        return self.with_logits(x)[1]

    def with_logits(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits and outputs of the layers. A layer without a gradient is refused if the logits have one."""
        outputs: list[Any] = [None] * len(self.layers)
        if torch.compiler.is_compiling():
            self.traced = outputs
            logits = self.model(x)
            self.traced = None
            return logits, outputs
        thread = threading.get_ident()
        self.outputs[thread] = outputs
        try:
            logits = self.model(x)
            read = zip(self.layers, outputs, strict=True)
            cut = [name for name, output in read if output is not None and not output.requires_grad]
            if cut and x.requires_grad and logits.requires_grad:
                advice = "choose another layer, or write use_reentrant=False in calls of torch.utils.checkpoint"
                raise ValueError(f"layers: the output of {cut[0]!r} has no gradient, unlike the logits: {advice}")
            return logits, outputs
        finally:
            # Remove the outputs also after an error. Otherwise their memory and their graph would not be freed.
            del self.outputs[thread]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "outputs": {}}


# -- layers that several networks use ----------------------------------------------------------------------------------

#: A statistic of images: a number for all channels, or one per channel.
Statistic: TypeAlias = float | Sequence[float] | Tensor | np.ndarray


class LeakyReLU(nn.Module):
    """LeakyReLU with the slope of CARSO, 0.2."""

    negative_slope = 0.2

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2)


class _LiteralBatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(self, num_features: int):
        super().__init__(num_features)

    def forward(self, input: Tensor) -> Tensor:
        # The function of torch has no type annotations.
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        if self.training and (world := processes()[1]) > 1:
            return batch_norm_everywhere(input, self, world)
        return F.batch_norm(
            input, mean, var, weight=self.weight, bias=self.bias, training=self.training, momentum=0.1, eps=1e-5
        )


def _unfilled(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class Synchronized(nn.modules.batchnorm._BatchNorm):
    """The part of a class of BatchNorms that takes the statistics of all processes, see `synchronized`."""

    activates = False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A copy or a file has the module's own class, because this class belongs to a training.
        return _unfilled, (type(self).__bases__[1],), self.__dict__

    def forward(self, input: Tensor) -> Tensor:
        world = processes()[1]
        if not self.training or world == 1:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        out = batch_norm_everywhere(input, self, world)
        # timm's BatchNorm contains an activation and a dropout.
        return self.act(self.drop(out)) if self.activates else out  # type: ignore[operator]


@functools.cache
def synchronized(kind: type[nn.Module]) -> type[nn.Module] | None:
    """A class of the same name that takes the statistics of all processes; None for an unknown forward pass."""
    usual = vars(nn.modules.batchnorm._BatchNorm)["forward"]
    of_timm = (kind.__module__.partition(".")[0], kind.__name__) == ("timm", "BatchNormAct2d")
    if not of_timm and kind.forward is not usual:
        return None
    # A copy for attacks folds the BatchNorms of torch and those of this package.
    own = {"__module__": kind.__module__ if of_timm else __name__, "activates": of_timm}
    return type(kind.__name__, (Synchronized, kind), own)


class BatchNorm1d(_LiteralBatchNorm, nn.BatchNorm1d):
    """torch's BatchNorm1d with its default eps and momentum, changed as the docstring of this file describes."""


class BatchNorm2d(_LiteralBatchNorm, nn.BatchNorm2d):
    """torch's BatchNorm2d with its default eps and momentum, changed as the docstring of this file describes."""


def check_sizes(num_classes: int, **counts: int) -> None:
    """Raise a ValueError unless there are at least two classes and all other sizes are at least 1."""
    check_counts(num_classes=num_classes, **counts)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")


def normalization(mean: Statistic, std: Statistic, channels: int) -> dict[str, list[float]]:
    """Convert the mean and standard deviation of the images to lists, which can be saved in files."""
    statistics = {}
    for name, statistic in {"mean": mean, "std": std}.items():
        # torch.as_tensor would lose the numbers if the modules are made on the meta device.
        numbers = np.ravel(statistic.tolist() if isinstance(statistic, Tensor) else statistic)
        statistics[name] = [float(number) for number in numbers]
        if len(numbers) not in (1, channels):
            raise ValueError(f"{name} needs 1 or {channels} numbers, got {len(numbers)}")
    if not min(statistics["std"]) > 0:
        raise ValueError(f"std must be above 0, got {statistics['std']}")
    return statistics


class Normalize(nn.Module):
    """Normalizes images ``[B, C, H, W]``: (x - mean) / std for each channel. Neither is in the state dict.

    Args:
        mean: a number, or a number for each channel, in image units.
        std: the standard deviation in the same form; above 0.
        channels: number of channels of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Statistic, std: Statistic, channels: int):
        super().__init__()
        self.arguments = normalization(mean, std, channels)
        for name, values in self.arguments.items():
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def batch_norm_everywhere(x: Tensor, norm: Any, world: int) -> Tensor:
    """Compute a BatchNorm in training mode with the statistics of all processes."""
    running_mean, running_var, eps, momentum = norm.running_mean, norm.running_var, norm.eps, norm.momentum
    if x.is_cuda:
        # In this function the host waits for the GPU, to leave out processes without images. But its kernels read and
        # write each map few times, where the operators below do it dozens of times.
        group = dist.group.WORLD
        return SyncBatchNorm.apply(x, norm.weight, norm.bias, running_mean, running_var, eps, momentum, group, world)
    wide = x if x.dtype == torch.float64 else x.float()
    dims, shape = [0, *range(2, x.dim())], [-1, *[1] * (x.dim() - 2)]
    sums = wide.sum(dims)
    total, count = _Total.apply(torch.stack([sums, torch.full_like(sums, x.numel() / x.shape[1])]))
    mean, count = total / count.detach(), count.detach()
    centered = wide - mean.view(shape)
    # The formula E[x^2] - E[x]^2 would lose digits if the means are large.
    variance = _Total.apply(centered.square().sum(dims)) / count
    with torch.no_grad():
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(variance * count / (count - 1), alpha=momentum)
    scale = norm.weight * torch.rsqrt(variance + eps)
    return (centered * scale.view(shape) + norm.bias.view(shape)).to(x.dtype)


class _Total(torch.autograd.Function):
    """The sum of a tensor over all processes. Its gradient is the sum of the gradients in all processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Total.apply(grad)


# -- names of a classifier's layers whose outputs can be its representation --------------------------------------------


def representation_before_pooling(model: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """The name of the layer that is used as a classifier's representation if the user names no layers."""
    before = getattr(model, "before_pooling", None)
    if not isinstance(before, str):
        raise layers_missing(model, image_shape, "name the module whose output is the last map before pooling", last=1)
    return before


def layers_missing(model: nn.Module, image_shape: tuple[int, int, int], advice: str, last: int = 0) -> ValueError:
    """The error for a classifier whose layers the user must name; it lists stages, or else layers, with maps.

    A stage is a module with parts, at most one level below the classifier. The error lists the ``last`` names; 0: all.
    """
    seen, _ = outputs_of(model, dict(model.named_modules()), image_shape)
    sizes = {name: _positions(outputs[0][0]) for name, outputs in seen.items() if name and len(outputs) == 1}
    stages = [n for n in sizes if sizes[n] and n.count(".") <= 1 and any(model.get_submodule(n).children())]
    # The output of a global pooling has a single position.
    likely = ", ".join((stages or [n for n in sizes if sizes[n] > 1] or list(sizes))[-last:])[:400]
    name = getattr(model, "spec", type(model).__name__)
    return ValueError(f"layers must be given for {name}: {advice}, such as {likely}")


def _positions(output: Any) -> int:
    """The number of positions of maps ``[B, C, H, W]`` or tokens ``[B, T, D]``; 0 for another output."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        return 0
    return output.shape[1] if output.dim() == 3 else output.shape[2:].numel()


# -- computes a moving average of a model's weights over a training ----------------------------------------------------

#: The dtypes whose average is kept in float32.
HALF = (torch.float16, torch.bfloat16)


class AveragedModel(swa_utils.AveragedModel):
    """A copy of a model. Floating-point weights are averaged in float32, or in float64 if they are float64.

    It has the name and the state of PyTorch's class, which copies its count of updates to the device in every step.
    """

    def __init__(self, model: nn.Module, decay: float, warm_up: bool = False):
        super().__init__(model, use_buffers=True)
        self.decay, self.warm_up = decay, warm_up
        without_recorders(self.module).requires_grad_(False)
        # A small step would be lost in the few digits of half precision.
        self.module._apply(lambda tensor: tensor.float() if tensor.dtype in HALF else tensor)
        # The average begins with the model's weights. The count stays on the host, also with another default device.
        self.n_averaged = torch.ones((), dtype=torch.int64, device="cpu")

    def _apply(self, function: Any, recurse: bool = True) -> AveragedModel:
        count = self.n_averaged
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        self.n_averaged = count
        return self

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the averages towards the weights of ``model``, and copy its integer buffers."""
        averages, values = ([*module.parameters(), *module.buffers()] for module in (self.module, model))
        pairs = list(zip(averages, values, strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        others = [pair for pair in pairs if not pair[0].is_floating_point()]
        # The count includes the beginning, so it is n + 1 after n updates.
        least = 9 / (9 + int(self.n_averaged)) if self.warm_up else 0.0
        if floating:
            targets = [value.to(average) for average, value in floating]
            torch._foreach_lerp_([average for average, _ in floating], targets, max(least, 1 - self.decay))
        if others:
            torch._foreach_copy_([average for average, _ in others], [value for _, value in others])
        self.n_averaged += 1
