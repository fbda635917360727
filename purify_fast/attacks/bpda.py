"""BPDA (Athalye, Carlini & Wagner, ICML 2018, section 4): around a purifier whose gradient is missing or useless.

    forward: classifier(purify(x));   backward: as if purify were h,   h(x) = x unless another substitute is given

The classifier's gradient is taken at the purified image and handed to x, which is sensible as far as purify(x) is about
x. A purifier with a usable gradient is attacked harder through that gradient; against one, BPDA is a check on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.aggregate import METHODS, UNSAFE, aggregate


def classifier_of(defence: Any) -> nn.Module:
    """What a defence classifies with: its ``frozen_classifier``, an accelerated copy perhaps, or its ``classifier``."""
    return getattr(defence, "frozen_classifier", None) or defence.classifier


class Bpda(nn.Module):
    """A purifier and a classifier as something that any gradient attack can run on; EOT is the attack's.

    Args:
        purify: images ``[B, ...]`` to purified ones of the same shape, or to K draws of each, ``[B, K, ...]``; never
            differentiated. A module or its bound method is frozen along with this one (`frozen`).
        classifier: purified images to logits ``[B, classes]``.
        substitute: differentiable, images to what has one purified image's shape; only its gradient is used. None: the
            identity.
        method: how the logits of K draws are aggregated: of `purify_fast.ops.aggregate`, or a function of them,
            ``[B, K, classes] -> [B, classes]``.

    The forward pass is exactly the defence's. With the identity, the gradient at x is exactly the classifier's at
    purify(x), summed over the draws.

    Raises:
        ValueError: an unknown method; in the forward pass, a substitute of another shape.
    """

    def __init__(
        self,
        purify: Callable[[Tensor], Tensor],
        classifier: Callable[[Tensor], Tensor],
        substitute: Callable[[Tensor], Tensor] | None = None,
        method: str | Callable[[Tensor], Tensor] = "lse",
    ):
        super().__init__()
        if isinstance(method, str) and method not in (*METHODS, *UNSAFE):
            raise ValueError(f"method must be one of {', '.join(METHODS + UNSAFE)}, got {method!r}")
        self.purify, self.classifier, self.substitute, self.method = purify, classifier, substitute, method
        owners = (getattr(part, "__self__", None) for part in (purify, classifier, substitute))
        self.owners = nn.ModuleList([owner for owner in owners if isinstance(owner, nn.Module)])

    @classmethod
    def of(cls, defence: Any, method: str | None = None) -> Bpda:
        """Of a defence with ``purify(x)`` and a ``classifier``, as `purify_fast.Carso`; method: None for its own."""
        chosen = getattr(defence, "combine", "lse") if method is None else method
        return cls(defence.purify, classifier_of(defence), method=chosen)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, ...]`` to logits ``[B, classes]``."""
        with torch.no_grad():
            purified = self.purify(x).detach()
        smooth = x if self.substitute is None else self.substitute(x)
        several = purified.dim() == smooth.dim() + 1
        one = purified[:, 0] if several else purified
        if one.shape != smooth.shape:
            raise ValueError(
                f"purify gave {list(purified.shape)}, its substitute (the identity, unless given) {list(smooth.shape)}:"
                " they must agree, but for K draws [B, K, ...]"
            )
        change = (smooth - smooth.detach()).to(purified.dtype)  # zero, with the substitute's gradient
        if not several:
            return self.classifier(purified + change)
        logits = self.classifier((purified + change[:, None]).flatten(0, 1).contiguous())
        logits = logits.unflatten(0, purified.shape[:2])
        return aggregate(logits, self.method) if isinstance(self.method, str) else self.method(logits)
