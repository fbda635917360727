"""Ways in which an attacker may aggregate a defence's samples to one prediction.

A defence decides by its aggregation of the samples. Its gradient may be saturated, or depend on a single sample. An
attacker may follow another aggregation: the points that it finds are tried on the unchanged defence.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._tensors import repeat_batch
from .._validation import check_literal
from ..ops.aggregate import aggregate
from ..protocols import DrawsSampleLogits, SampleLogits, supports

#: ``lse``, ``mean``, ``mean_sigmoid`` and ``peel`` are defined by `purify_fast.ops.aggregate`. ``margins``: for each
#: class, the mean over the samples of its logit minus the largest other logit. ``one_sample``: the first sample alone.
Head = Literal["lse", "mean", "mean_sigmoid", "peel", "margins", "one_sample"]
HEADS: tuple[Head, ...] = get_args(Head)


def head_logits(samples: Tensor, head: Head) -> Tensor:
    """The attacker's aggregation of the samples' logits, ``[B, K, classes]`` -> ``[B, classes]``, named in `HEADS`."""
    if head == "one_sample":
        return samples[:, 0]
    if head == "margins":
        return class_margins(samples).mean(1)
    return aggregate(samples, head)


def class_margins(logits: Tensor) -> Tensor:
    """The logit of every class minus the largest other logit, ``[..., classes]``; there are at least two classes."""
    two = logits.topk(2, -1)
    best = F.one_hot(two.indices[..., 0], logits.shape[-1]).bool()
    return logits - torch.where(best, two.values[..., 1:], two.values[..., :1])


class AttackersHead(nn.Module):
    """A defence with the attacker's aggregation; give it to an attack as ``gradients_from``.

    Args:
        defence: it has ``sample_logits(x) -> [B, K, classes]``; its ``draw_sample_logits`` is used if it has that too.
        head: how the samples are aggregated, a name of `HEADS`.

    Raises:
        TypeError: a defence without samples.
        ValueError: an unknown head.
    """

    def __init__(self, defence: SampleLogits, head: Head):
        super().__init__()
        check_literal("head", head, Head)
        if not supports(defence, SampleLogits):
            raise TypeError(f"defence must have sample_logits(x) for an attacker's head, got {type(defence).__name__}")
        self.defence, self.head = defence, head

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``.

        Args:
            x: images ``[B, C, H, W]``.
        """
        return head_logits(self.defence.sample_logits(x), self.head)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """``draws`` independent calls at once, ``[draws, B, classes]``; attacks with several draws use it.

        Args:
            x: images ``[B, C, H, W]``.
            draws: number of calls.
        """
        if not supports(self.defence, DrawsSampleLogits):
            return self(repeat_batch(x, draws)).unflatten(0, (draws, -1))
        samples = cast(DrawsSampleLogits, self.defence).draw_sample_logits(x, draws)
        return head_logits(samples.flatten(0, 1), self.head).unflatten(0, (draws, -1))
