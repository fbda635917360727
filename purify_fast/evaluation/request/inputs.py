"""Checks and converts the arguments of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._validation import Norm
from ...attacks import Attack, AutoAttack
from ...attacks.arguments import check_eps
from ...attacks.original_autoattack import implementation
from ...training.batches import as_tensor, check_range, read_batch
from .config import EvaluateConfig
from .specs import AttackFunction, AttackSpec, as_specs

#: The allowed dtypes of labels.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def images_and_labels(x: Tensor | Iterable[Any], y: Tensor | None) -> tuple[Tensor, Tensor, list[str]]:
    """Check and convert images and labels like `collect`; without ``y``, x is an iterable of batches."""
    if y is not None:
        return collect(x, y)
    if isinstance(x, (Tensor, np.ndarray)) or not isinstance(x, Iterable):
        raise TypeError(f"without y, x must be an iterable of batches (images, labels), got {type(x).__name__}")
    images, labels = list[Tensor](), list[Tensor]()
    for i, batch in enumerate(x):
        part, of_part, _ = read_batch(batch, f"batch {i}")
        images.append(part)
        labels.append(of_part)
    kinds = list(dict.fromkeys((str(part.dtype), *part.shape[1:]) for part in images))
    if len(kinds) != 1:
        raise ValueError(f"x must yield batches of one dtype and one size [C, H, W], at least one, got {kinds}")
    return collect(torch.cat(images), torch.cat(labels))


def collect(x: Any, y: Any) -> tuple[Tensor, Tensor, list[str]]:
    """Check and convert images and labels."""
    x, y = as_tensor("x", x), as_tensor("y", y)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}")
    if y.shape != (len(x),) or y.dtype not in INTEGERS:
        raise ValueError(f"y must be integer labels [N] = [{len(x)}], got {y.dtype} {list(y.shape)}")
    # Tensors made in inference mode cannot take part in gradients.
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y.to(torch.int64), []
    if not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating point, got {x.dtype}: if x is in 0..255, give x.byte()")
    x = x.float()
    least, most = (float(value) for value in x.detach().aminmax())
    check_range("x", least, most)
    x, notes = x.clone() if x.is_inference() else x.detach(), list[str]()
    if least < 0 or most > 1:
        beyond = max(-least, most - 1)
        notes.append(f"values of the images outside [0, 1] by rounding, by at most {beyond:.1g}, were clamped")
        x = x.clamp(0, 1)
    return x, y.to(torch.int64), notes


def read_attacks(
    config: EvaluateConfig,
    attacks: Sequence[Attack | AttackSpec | AttackFunction] | None,
    norm: Norm,
    eps: float,
    pixels: int,
) -> tuple[EvaluateConfig, list[AttackSpec]]:
    """Return the config with the protocol that runs (None if attacks are given), and the attacks' specifications."""
    if config.protocol is not None and attacks is not None:
        raise ValueError(f"protocol and attacks exclude each other, got protocol={config.protocol!r} and attacks")
    if config.protocol is None and attacks is None:
        config = replace(config, protocol="standard")
    given = [] if attacks is None else as_specs(attacks)
    if config.protocol in ("official", "authors") or any(isinstance(spec.resolved, AutoAttack) for spec in given):
        # If the package is missing, its error is raised here, before any work.
        implementation()
    if eps == 0 and (given or config.protocol or config.probes):
        raise ValueError("eps must be above 0, got 0; for the accuracy on clean images only, give attacks=[]")
    # A ball that contains every image is refused, also for an attack with a radius of its own.
    check_eps(eps, norm, pixels=pixels)
    for attack in (spec.resolved for spec in given):
        own: Any = attack
        if attack.norms and own.eps is not None:
            check_eps(own.eps, own.norm or norm, pixels=pixels)
    return config, given
