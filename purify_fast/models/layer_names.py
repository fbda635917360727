"""Names of a classifier's layers whose outputs can be its representation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .representation import outputs_of


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
