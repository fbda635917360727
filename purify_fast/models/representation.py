"""The internal representation of a classifier: outputs of modules named by path, read by forward hooks.

The hooks are registered once, because registering them anew would make `torch.compile` start over. A dry run compares
each output's version counter at the time when it was read with the one after the pass. So only a layer whose output is
overwritten in place later (``x += shortcut``, in-place activations) is cloned.
"""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import first_tensor


class _Recorder:
    """The forward hook of one layer. It is a class and not a closure, so that the model can be copied and pickled."""

    def __init__(self, owner: Representation, index: int):
        self.owner, self.index = owner, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        owner = self.owner
        outputs = owner.traced if torch.compiler.is_compiling() else owner.outputs.get(threading.get_ident())
        if outputs is not None:
            outputs[self.index] = output.clone() if owner.overwritten[self.index] else output


def without_recorders(model: nn.Module) -> nn.Module:
    """``model`` without the hooks that `Representation` gave it, in place; other hooks stay.

    Args:
        model: usually a copy of a model that is read by a `Representation`.
    """
    for module in model.modules():
        # PyTorch has no public way to list a module's hooks, and the handles belong to the model that was copied.
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _Recorder)]:
            del module._forward_hooks[key]
    return model


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, ``model`` is in evaluation mode; afterwards each module is in the mode in which it was.

    Args:
        model: any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def count_classes(classify: Callable[[], Any], image_shape: Sequence[int], batch: int) -> int:
    """The number of logits that a classifier gives each of ``batch`` images.

    Raises:
        ValueError: it fails, or gives something else than logits of at least two classes.
    """
    want = f"the classifier must map images [B, {', '.join(map(str, image_shape))}] to logits [B, C]"
    try:
        logits = classify()
    except (RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{want}: {error}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != batch:
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        holds_logits = isinstance(getattr(logits, "logits", None), Tensor)
        wrap = ": wrap it in a module that returns the object's .logits" if holds_logits else ""
        raise ValueError(f"{want}, it gave {got} for B = {batch}{wrap}")
    if logits.shape[1] < 2:
        raise ValueError(
            "the classifier must have a logit for each of two classes at least, got a single one: for one logit z "
            "of the second class give a module that returns torch.cat([-z, z], 1) / 2"
        )
    return logits.shape[1]


def _instead(name: str, modules: Iterable[str]) -> str:
    """Suggest layers in place of an unknown name: the paths that end in it, or those with an end that is near to it."""
    depth = name.count(".") + 1
    ends = {path: ".".join(path.split(".")[-depth:]) for path in modules if path}
    if whole := [path for path, end in ends.items() if end == name]:
        return f"give its full path: {' or '.join(whole[:5])}"
    close = difflib.get_close_matches(name, {*ends, *ends.values()}, 4)
    near = [path for path, end in ends.items() if path in close or end in close] or list(ends)
    return f"near: {', '.join(near[:5])}"


class Representation:
    """Reads the outputs of ``layers`` in one forward pass of ``model``; several threads may read at once.

    Args:
        model: any module from ``[B, *image_shape]`` to logits; it stays the owner of its weights.
        layers: module paths, as in ``model.named_modules()``; the order is kept.
        image_shape: (C, H, W) of the images, for the dry run.

    Attributes:
        outputs: the outputs that the hooks have read in the passes that are under way, by thread. Other threads may use
            the classifier meanwhile, for example to classify purified images: their outputs are not read.
        traced: the outputs that the hooks have read while a graph is traced; None at other times.
        shapes: per layer, the shape of its output without the batch.
        overwritten: per layer, whether it is cloned because the model overwrites it later.
        num_classes: size of the model's logits.

    Raises:
        ValueError: an unknown, repeated, unused or re-used layer; an output that is not a tensor [B, C, H, W],
            [B, T, D] or [B, F].
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], image_shape: tuple[int, int, int]):
        modules = dict(model.named_modules(remove_duplicate=False))
        if isinstance(layers, str):
            raise ValueError(f"layers must be a list of module paths, got the text {layers!r}: write [{layers!r}]")
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers must name at least one module, each once, got {list(layers)}")
        for name in layers:
            if name not in modules or name == "":
                raise ValueError(f"layers: the classifier has no module {name!r}; {_instead(name, modules)}")
        self.model, self.layers = model, tuple(layers)
        self.traced: list[Tensor | None] | None = None
        self.outputs: dict[int, list[Tensor | None]] = {}
        self.overwritten = [False] * len(layers)
        self.shapes, self.num_classes = self._dry_run(image_shape)
        for index, name in enumerate(layers):
            modules[name].register_forward_hook(_Recorder(self, index))

    def _dry_run(self, image_shape: tuple[int, int, int]) -> tuple[list[tuple[int, ...]], int]:
        seen: list[list[tuple[Tensor, int]]] = [[] for _ in self.layers]

        def see(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            version = output._version if isinstance(output, Tensor) else -1
            seen[index].append((output, version))

        first = first_tensor(self.model)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        handles = [modules[name].register_forward_hook(partial(see, i)) for i, name in enumerate(self.layers)]
        try:
            # Two images, because a BatchNorm that a user's model keeps in training mode refuses a single one.
            images = torch.full((2, *image_shape), 0.5, device=first.device, dtype=first.dtype)
            with evaluation_mode(self.model), torch.no_grad():
                classes = count_classes(lambda: self.model(images), image_shape, 2)
        finally:
            for handle in handles:
                handle.remove()
        shapes = []
        for index, (name, outputs) in enumerate(zip(self.layers, seen, strict=True)):
            if len(outputs) != 1:
                raise ValueError(f"layers: {name!r} runs {len(outputs)} times in one forward pass, it must run once")
            output, version = outputs[0]
            if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4) or output.shape[0] != 2:
                got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"layers: the output of {name!r} must be [B, C, H, W], [B, T, D] or [B, F], for B = 2 it was {got}"
                )
            self.overwritten[index] = output._version != version
            shapes.append(tuple(output.shape[1:]))
        return shapes, classes

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The layers' outputs in the order of ``layers``; differentiable.

        Args:
            x: images ``[B, C, H, W]``.
        """
        return self.with_logits(x)[1]

    def with_logits(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The model's logits, and the layers' outputs, of one pass.

        Args:
            x: images ``[B, C, H, W]``.
        """
        outputs: list[Any] = [None] * len(self.layers)
        if torch.compiler.is_compiling():
            self.traced = outputs
            logits = self.model(x)
            self.traced = None
            return logits, outputs
        thread = threading.get_ident()
        self.outputs[thread] = outputs
        try:
            return self.model(x), outputs
        finally:
            # clear it also after an error: the outputs would keep their memory and their graph
            del self.outputs[thread]

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, in which no pass is under way."""
        return {**vars(self), "outputs": {}}
