"""Tests of a model before it is judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from ..._tensors import repeat_batch
from ..._validation import check_literal
from ...attacks.attacked_model import WritesToItsInput, checked_logits, frozen, logits_of
from ...attacks.shared_draws import ALIKE
from ...defences.stochastic import WithAggregation
from ...ops.aggregate import aggregate
from ...protocols import Classifier, SampleLogits, supports
from ...speed.agreement import differ

#: The number of images on which a model is tested before it is attacked.
SAMPLE = 8
#: The test for shared draws: calls with two copies of each image, and permutations of the calls.
CALLS, PERMUTED = 12, 4999


@contextlib.contextmanager
def strays_frozen(model: Classifier, stack: contextlib.ExitStack) -> Iterator[list[nn.Module]]:
    """A context of trial predictions, with a list of the modules in training mode that run and are no part of a model.

    PyTorch itself tells which modules run, so nothing need be known of how a model holds them. Those that a module runs
    are frozen on ``stack`` before they run, like the module itself. Those of a function are left as they are.
    """
    own = set(map(id, model.modules())) if isinstance(model, nn.Module) else set[int]()
    strays = list[nn.Module]()

    def before(part: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling() or not part.training or id(part) in own:
            return
        own.update(map(id, part.modules()))
        # A module from torch.export keeps its mode, and refuses `eval` by a method of its own.
        if "eval" not in vars(part):
            strays.append(part)
            if isinstance(model, nn.Module):
                stack.enter_context(frozen(part))

    handle = register_module_forward_pre_hook(before)
    try:
        yield strays
    finally:
        handle.remove()


@torch.no_grad()
def check_model(model: Classifier, some: Tensor) -> int:
    """Check a model's outputs on several images and on a single image, and return its number of classes."""
    classes = checked_logits(model(some), len(some)).shape[1]
    check_classes(checked_logits(model(some[:1]), 1), classes)
    return classes


def check_classes(logits: Tensor, classes: int) -> Tensor:
    """Return logits ``[B, classes]``; ValueError for another number of classes than in the first call."""
    if logits.shape[1] != classes:
        raise ValueError(f"the model must return {classes} logits for each image, got {logits.shape[1]}")
    return logits


def check_leaves_images(model: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Refuse a model that writes to its input in any way; the model is called on copies, with and without gradients."""
    for recorded in (False, True):
        images = x.detach().clone().requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            try:
                logits_of(model, images)
            except Exception as error:
                # A model that fails only while gradients are recorded can be evaluated, so the error is ignored.
                if not recorded or isinstance(error, WritesToItsInput):
                    raise
        if not torch.equal(images.detach(), x.detach()):
            raise WritesToItsInput


def predicts_otherwise(model: Classifier, x: Tensor, most: int) -> bool:
    """Return True if two predictions of the same images ``x`` differ, in passes of at most ``most`` images."""
    return any(differ(model(part.clone()), model(part.clone())) for part in x.split(most))


def draws_elsewhere(model: Classifier, x: Tensor, most: int) -> bool:
    """Return True if two predictions differ on images, on noisy images, or on means of two images.

    Some defences draw only for images that are not on the grid of 8 bits, or of whose class they are not sure.
    """
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x) - 0.5
    tried = (x, (x + noise / 16).clamp(0, 1), (x + x.roll(1, 0).flip(-1)) / 2)
    return any(predicts_otherwise(model, images, most) for images in tried)


@torch.no_grad()
def images_share_draws(model: Classifier, x: Tensor) -> bool:
    """Return True if two copies of an image in one call are more alike than copies in different calls.

    Their logits then have a random part in common, alone or beside draws of each image. The covariance of the copies
    over the calls is compared with that after the calls of the second copies were permuted. A model with separate draws
    shows more than 999 in 1,000 permutations once in a thousand tests.
    """
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        calls = torch.stack([logits_of(model, repeat_batch(x, 2)).double().cpu() for _ in range(CALLS)])
    # Nothing that is added to all logits of an image decides. Logits count alike, whatever their size, and those that
    # never change, or are infinite, say nothing.
    behind = (calls - calls.amax(2, keepdim=True)).view(CALLS, 2, -1).numpy()
    behind = behind[..., np.isfinite(behind).all((0, 1))]
    first, second = np.moveaxis(behind / np.maximum(behind.std((0, 1)), 1e-12), 1, 0)
    once = np.abs(first - second).max(initial=0) < ALIKE * np.abs(first - first[0]).max(initial=0)
    together = (first - first.mean(0)) @ (second - second.mean(0)).T
    orders = np.random.default_rng(0).permuted(np.tile(np.arange(CALLS), (PERMUTED, 1)), axis=1)
    permuted = together[np.arange(CALLS), orders].sum(1)
    return bool(once or (permuted >= np.trace(together)).sum() < 0.001 * PERMUTED)


# -- other aggregations of a defence's samples, from which an attacker may take gradients ------------------------------

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
