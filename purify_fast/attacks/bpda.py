"""BPDA (Athalye, Carlini & Wagner, ICML 2018, section 4): a gradient for purifiers without a useful one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .._validation import check_literal
from ..ops.aggregate import aggregate
from ..protocols import Aggregates, Purifier, is_purifier, supports

#: The methods of `purify_fast.ops.aggregate`.
Aggregation = Literal["lse", "peel", "mean", "mean_sigmoid", "vote", "peel_reference"]


def classifier_of(defence: Any) -> nn.Module:
    """The classifier of a defence: its ``frozen_classifier``, which may be a copy, or ``classifier``."""
    return getattr(defence, "frozen_classifier", defence.classifier)


class BpdaModel(nn.Module):
    """A model that consists of a purifier and a classifier, and gives any gradient attack the gradient of BPDA.

    The forward pass is that of the defence. The gradient at x is the classifier's gradient at purify(x), summed over
    the draws. If the purifier has a useful gradient, an attack with it is stronger.

    Args:
        purify: a function from images ``[B, ...]`` to purified images of the same shape, or to K draws of each,
            ``[B, K, ...]``. It is never differentiated.
        classifier: purified images to logits ``[B, classes]``.
        aggregation: how the logits of K draws are aggregated: a method of `purify_fast.ops.aggregate`, or a function
            ``[B, K, classes] -> [B, classes]``.
        modules: the modules of which ``purify`` and ``classifier`` are methods; an attack puts them into evaluation
            mode.

    Raises:
        ValueError: an unknown aggregation; in the forward pass, purified images of another shape.
    """

    #: An evaluation does not compare such gradients with small steps.
    approximates_gradients = True

    def __init__(
        self,
        purify: Callable[[Tensor], Tensor],
        classifier: Callable[[Tensor], Tensor],
        aggregation: str | Callable[[Tensor], Tensor] = "lse",
        modules: Sequence[nn.Module] = (),
    ):
        super().__init__()
        if isinstance(aggregation, str):
            check_literal("aggregation", aggregation, Aggregation)
        self.purify, self.classifier, self.aggregation = purify, classifier, aggregation
        self.owners = nn.ModuleList(modules)

    @classmethod
    def of(cls, defence: Purifier, aggregation: str | Callable[[Tensor], Tensor] | None = None) -> BpdaModel:
        """Make the model of a defence that purifies images before it classifies them, as `purify_fast.Carso` does.

        Args:
            defence: a defence with ``purify(x)`` and ``classifier``.
            aggregation: how the logits of several draws are aggregated; None: as the defence does, or else "lse".

        Raises:
            TypeError: the defence has no ``purify(x)`` or no ``classifier``.
        """
        if not is_purifier(defence):
            raise TypeError(f"BPDA needs a defence with purify(x) and classifier, got {type(defence).__qualname__}")
        own = cast(Aggregates, defence).aggregate if supports(defence, Aggregates) else "lse"
        modules = [defence] if isinstance(defence, nn.Module) else []
        chosen = own if aggregation is None else aggregation
        return cls(defence.purify, classifier_of(defence), aggregation=chosen, modules=modules)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, ...]`` to logits ``[B, classes]``."""
        with torch.no_grad():
            purified = self.purify(x).detach()
        several = purified.dim() == x.dim() + 1
        if (purified[:, 0] if several else purified).shape != x.shape:
            needs = f"images of the shape of x, {list(x.shape)}, or K draws of each, [B, K, ...]"
            raise ValueError(f"purify must return {needs}, got {list(purified.shape)}")
        # The value of `change` is zero, and its gradient with respect to x is 1.
        change = (x - x.detach()).to(purified.dtype)
        if not several:
            return self.classifier(purified + change)
        logits = self.classifier((purified + change[:, None]).flatten(0, 1).contiguous())
        logits = logits.unflatten(0, purified.shape[:2])
        return aggregate(logits, self.aggregation) if isinstance(self.aggregation, str) else self.aggregation(logits)
