"""Whether a model changes as its gradients say: small steps in random directions, measured and promised."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attacks import margin
from ..subject import Subject
from .answers import quiet

#: Lengths of the small steps, in image units: a model that rounds its input needs the larger one.
SMALL = (1e-3, 8e-3)
DIRECTIONS = 4


def cosine(subject: Subject, y: Tensor, *points: Tensor) -> float | None:
    """Cosine between the changes of the margin that gradients promise and those that are measured.

    Args:
        subject: the model with its images.
        y: labels, int64 ``[B]``.
        points: images ``[B, C, H, W]``: the clean ones, and others near them.

    Returns:
        The smallest over the points; None where something was not finite, or there was no gradient.
    """
    found = [_at(subject, point, y) for point in points]
    known = [value for value in found if value is not None]
    return min(known) if len(known) == len(found) else None


def _at(subject: Subject, x: Tensor, y: Tensor) -> float | None:
    found: list[float] = []
    for length in SMALL:
        promised, measured = zip(*(_changes(subject, x, y, length, seed) for seed in range(DIRECTIONS)), strict=True)
        a, b = torch.cat(promised).double(), torch.cat(measured).double()
        if not bool(a.isfinite().all() and b.isfinite().all()) or float(a.norm()) == 0:
            return None
        found.append(float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30)))
    return max(found)


def _changes(subject: Subject, x: Tensor, y: Tensor, length: float, seed: int) -> tuple[Tensor, Tensor]:
    """Promised and measured changes of every image's margin along one random direction of signs."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
    direction = length * signs
    with subject.variant(quiet(subject)):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            value = _margin(subject, leaf, y)
            gradient = None
            if value.requires_grad:
                gradient = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0]
        ahead, behind = _margin(subject, x + direction, y), _margin(subject, x - direction, y)
    promised = torch.zeros_like(ahead) if gradient is None else (gradient * direction).flatten(1).sum(1)
    return promised, (ahead - behind) / 2


def _margin(subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    # a random model without fixed noise draws from the global generator
    torch.manual_seed(subject.seed)
    return margin(subject.model(x).float(), y)
