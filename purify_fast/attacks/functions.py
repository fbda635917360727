"""Runs an attack on one batch without an evaluation, as the functions of the attacks do."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .._compiler import outside_graphs
from ..protocols import Classifier
from .attacked_model import called_directly
from .base import Attack
from .context import AttackContext, LossFunction, Radius, drawn_seed
from .losses import LOSSES
from .search import GradientHealth


# torch.compile cannot trace how options and context are divided. Compilation begins again inside the attack.
@functools.partial(outside_graphs, recursive=False)
def run_alone(
    attack: type[Attack],
    model: Classifier,
    x: Tensor,
    y: Any = None,
    eps: Radius | None = None,
    *,
    targeted: Tensor | None = None,
    mode: str = "eval",
    generator: torch.Generator | None = None,
    health: GradientHealth | None = None,
    **options: Any,
) -> Tensor:
    """Run an attack with the arguments of `purify_fast.attacks.pgd`.

    If attack and context have an option of the same name, it sets the attack's field; but ``eps`` and ``norm`` of an
    attack in a ball set the context's fields, because only the context's eps may be a tensor.
    """
    own = {each.name for each in fields(attack)} - ({"eps", "norm"} if attack.norms else set())
    loss = options.get("loss", "ce")
    if mode not in ("eval", "keep") or (mode == "keep" and attack.kind not in ("pgd", "fgsm")):
        raise ValueError(f'mode must be "eval", or "keep" for PGD and FGSM, got {mode!r}')
    if targeted is not None:
        if "loss" not in own or loss not in LOSSES:
            raise ValueError(f"targeted needs a loss among {', '.join(LOSSES)}, got {loss!r}")
        options.pop("loss", None)
        options["loss_function"], y = _towards(loss), targeted
    elif callable(loss) and "loss" in own:
        del options["loss"]
        options["loss_function"] = loss if y is not None else lambda logits, _: loss(logits, None)
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
    elif y is None:
        raise TypeError("y is missing: give labels, int64 [B], or a function as loss, or targeted")
    if eps is not None:
        options["eps"] = eps
    elif attack.norms:
        raise TypeError(f"eps is missing: {attack.__name__} needs a radius in image units, such as eps=8 / 255")
    if options.get("seed") is None:
        options["seed"] = drawn_seed(generator)
    chosen = attack(**{name: options.pop(name) for name in own & options.keys()})
    context = AttackContext.from_options(**options, keep_mode=mode == "keep", counts_health=health is not None)
    with called_directly():
        result = chosen.search(model, x, y, context)
    if health is not None and result.health is not None:
        health.add(**result.health.counts)
    return result.images


@functools.cache
def _towards(loss: str) -> LossFunction:
    """The loss that grows as the logits come nearer to a target class."""
    return lambda logits, target: -LOSSES[loss](logits, target)
