"""Other aggregations of a defence's samples, from which an attacker may take gradients.

The gradient of the defence's own aggregation may be saturated, or may depend on a single sample.
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._validation import check_literal
from ...defences.modes import WithAggregation
from ...ops.aggregate import aggregate
from ...protocols import SampleLogits, supports

#: ``lse``, ``mean``, ``mean_sigmoid`` and ``peel`` are methods of `purify_fast.ops.aggregate`. ``margins``: for each
#: class, its logit minus the largest other logit, averaged over the samples. ``one_sample``: only the first sample.
Head = Literal["lse", "mean", "mean_sigmoid", "peel", "margins", "one_sample"]
HEADS: tuple[Head, ...] = get_args(Head)


def head_logits(samples: Tensor, head: Head) -> Tensor:
    """Aggregate the logits of samples, ``[B, K, classes]`` -> ``[B, classes]``, by a method of `HEADS`."""
    if head == "one_sample":
        return samples[:, 0]
    if head == "margins":
        two = samples.topk(2, -1)
        best = F.one_hot(two.indices[..., 0], samples.shape[-1]).bool()
        return (samples - torch.where(best, two.values[..., 1:], two.values[..., :1])).mean(1)
    return aggregate(samples, head)


class AttackersHead(WithAggregation):
    """A defence with another aggregation of its samples, for the argument ``gradients_from`` of an attack.

    The unchanged defence judges the points.

    Args:
        defence: a defence with ``sample_logits(x) -> [B, K, classes]``, and optionally ``draw_sample_logits``.
        head: how the samples are aggregated, a name of `HEADS`.

    Raises:
        TypeError: a defence without ``sample_logits``.
        ValueError: an unknown head.
    """

    def __init__(self, defence: SampleLogits, head: Head):
        check_literal("head", head, Head)
        if not supports(defence, SampleLogits):
            raise TypeError(f"defence must have a method sample_logits(x), got {type(defence).__name__}")
        super().__init__(defence, head)  # type: ignore[arg-type]

    def aggregate(self, logits: Tensor) -> Tensor:
        return head_logits(logits, cast(Head, self.aggregation))
