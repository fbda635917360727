"""Read the internal representation of a classifier: the outputs of layers that are given by name, by forward hooks.

They are registered once, because new hooks would make `torch.compile` compile again. In a first pass, the version
counter of an output tells whether it is later overwritten in place, such as by ``x += shortcut``, and must be cloned.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._settings import first_tensor

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
        for name in layers:
            if name not in modules or name == "":
                names = ", ".join(path for path in modules if path)[:400]
                raise ValueError(f"layers: the classifier has no module {name!r}, its modules are {names}")
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
                wanted = f"layers: the output of {name!r} must be [B, C, H, W], [B, T, D] or [B, F]"
                raise ValueError(f"{wanted}; for B = 2 it is {got}")
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
