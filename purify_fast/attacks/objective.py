"""The loss that an attack maximizes, averaged over the draws of a random model, and its gradient.

All draws of an image are computed in one batch (expectation over transformation, Athalye et al., ICML 2018), or in
separate passes if the model draws once for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocols import Classifier, SharesDraws, supports
from ..speed.graphs.step_loop import CapturesSteps, State, begin_steps
from .attacked_model import gradient_to, logits_of_draws
from .context import LossFunction
from .losses import LOSSES, TARGETED


class Gradient(NamedTuple):
    """The gradient of the loss with respect to images, and the score of these images."""

    #: The gradient, summed over the draws, shape of the images; zero if there is no gradient.
    image: Tensor
    #: The mean loss over the draws, ``[B]``.
    loss: Tensor
    #: The share of the draws that are misclassified, ``[B]``.
    wrong: Tensor

    @property
    def score(self) -> Tensor:
        """The score of points, ``[2, B]``: the share of misclassified draws, and the loss, which decides a tie."""
        return torch.stack([self.wrong, self.loss])


@dataclass(frozen=True)
class Objective:
    """The loss that an attack maximizes: a name, or a function, for which no draw counts as misclassified."""

    model: Classifier
    loss: str | LossFunction = "ce"
    eot_iter: int = 1
    max_forward_batch: int | None = None
    #: A comparison of objectives ignores `graphs`, because graphs change the result by rounding errors only.
    graphs: CapturesSteps | None = field(default=None, compare=False)
    apart: bool = False

    def gradient(self, x: Tensor, y: Tensor) -> Gradient:
        """The gradient with respect to ``x [B, ...]``, and the score; y is ``[B]``, or with targets ``[B, 2]``."""
        image, loss, wrong = self._over_passes(self._differentiate, x, y)
        return Gradient(image, self._mean(loss), self._mean(wrong))

    def direction(self, x: Tensor, y: Tensor) -> Tensor:
        """Only the gradient, `Gradient.image`, for a step that compares no points and needs no score."""
        return self._over_passes(partial(self._differentiate, scored=False), x, y)[0]

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the score of images by fresh draws, see `Gradient.score`."""
        loss, wrong = self._over_passes(self._judge, x, y)
        return torch.stack([self._mean(wrong), self._mean(loss)])

    @torch.no_grad()
    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        """Only the loss, ``[B]``, for a search that does not need the number of misclassified draws."""
        return self._mean(self._over_passes(partial(self._judge, counted=False), x, y)[0])

    def _mean(self, total: Tensor) -> Tensor:
        """The mean over the draws, from their sum."""
        return total / self.eot_iter if self.eot_iter > 1 else total

    def _over_passes(self, one_pass: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Add up what ``one_pass(x, y, draws)`` returns, over as many passes as all images and draws need."""
        images, draws = self._at_once(len(x))
        if images == len(x) and draws == self.eot_iter == 1:
            # In this frequent case the sums below would take about as long as the pass of a small model.
            return one_pass(x, y, 1)
        parts = []
        for a, b in zip(x.split(images), y.split(images), strict=True):
            passes = [one_pass(a, b, min(draws, self.eot_iter - first)) for first in range(0, self.eot_iter, draws)]
            parts.append([sum(column[1:], column[0]) for column in zip(*passes, strict=True)])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _at_once(self, images: int) -> tuple[int, int]:
        """The number of different images in one forward pass, and the number of draws of each image in this pass."""
        most = self.max_forward_batch or max(1, images * self.eot_iter)
        if self.apart:
            return _even(images, most), 1
        if supports(self.model, SharesDraws):
            # Draws of an image share work only within a pass, so a pass has as many draws of an image as possible.
            draws = min(self.eot_iter, most)
            return _even(images, max(1, most // draws)), draws
        images = _even(images, most)
        return images, min(self.eot_iter, max(1, most // images))

    def _differentiate(self, x: Tensor, y: Tensor, draws: int, scored: bool = True) -> tuple[Tensor, ...]:
        """Return sums over ``draws`` draws: the gradient, and with ``scored`` also what `_scored` returns."""
        # torch.compile decides whether gradients are recorded, so there is no check while it compiles.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            advice = "call it outside of torch.inference_mode(), which records none, or use torch.no_grad() instead"
            raise RuntimeError(f"the attack needs gradients: {advice}")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            losses, logits, labels = self._losses(leaf, y, draws)
            gradient = gradient_to(leaf, losses.sum())
        if gradient is None:
            gradient = torch.zeros_like(x)
        return (gradient, *self._scored(logits.detach(), labels, losses.detach(), draws)) if scored else (gradient,)

    def _judge(self, x: Tensor, y: Tensor, draws: int, counted: bool = True) -> tuple[Tensor, ...]:
        """Return sums over ``draws`` draws: the losses, and with ``counted`` the numbers of misclassified draws."""
        losses, logits, labels = self._losses(x, y, draws)
        return self._scored(logits, labels, losses, draws) if counted else (_summed(losses, draws),)

    def _losses(self, x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the logits and the label of every draw, ``[draws * B, ...]``."""
        logits = logits_of_draws(self.model, x, draws)
        if callable(self.loss):
            y = y.repeat(draws, *[1] * (y.dim() - 1)) if draws > 1 else y
            losses = self.loss(logits, y)
            if not isinstance(losses, Tensor):
                raise TypeError(f"the loss must return a tensor [B], for each image, got {type(losses).__name__}")
            if losses.numel() == len(logits) == 1:
                # The mean over one image is its loss.
                losses = losses.reshape(1)
            if losses.shape != logits.shape[:1]:
                wanted = f"the loss must be a value for each image, [B] = [{len(logits)}]"
                raise ValueError(f'{wanted}, got {list(losses.shape)}: give reduction="none"')
            return losses, logits, y
        columns = y.view(len(y), -1)
        labels = (columns.repeat(draws, 1) if draws > 1 else columns).unbind(1)
        return (LOSSES | TARGETED)[str(self.loss)](logits, *labels), logits, labels[0]

    def _scored(self, logits: Tensor, labels: Tensor, losses: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Sums over the draws, ``[B]``: the losses, and the number of misclassified draws.

        A draw with NaN among its logits counts as misclassified. With the loss "margin", so does a draw in which the
        true class is only one of several classes with an infinite logit, because the margin is then NaN.
        """
        if callable(self.loss):
            return _summed(losses, draws), torch.zeros_like(_summed(losses, draws))
        top, decided = logits.max(1)
        nameless = losses if self.loss == "margin" else top
        wrong = ((decided != labels) | nameless.isnan()).float()
        return _summed(losses, draws), _summed(wrong, draws)


def _summed(values: Tensor, draws: int) -> Tensor:
    """Sum values ``[draws * B]`` over the draws. The result is ``[B]``."""
    return values.view(draws, -1).sum(0) if draws > 1 else values


def _even(images: int, most: int) -> int:
    """Choose the number of images in a pass, at most ``most``, so that all passes have about the same size."""
    passes = -(-images // most)
    return -(-images // passes) if passes else most


@dataclass(frozen=True)
class ObjectiveStep:
    """The base of steps that compute an objective, and that a CUDA graph can capture.

    `Objective` itself is not callable, because Dynamo hashes callable objects before their fields are set.
    """

    objective: Objective

    @property
    def model(self) -> Classifier:
        """The model under attack."""
        return self.objective.model


class GradientStep(ObjectiveStep):
    """`Objective.gradient` as a step."""

    def __call__(self, state: State) -> State:
        """The gradient, the loss and the share of misclassified draws at ``point`` for the labels ``y``."""
        return self.objective.gradient(state["point"], state["y"])._asdict()


class Gradients:
    """Computes the gradients of one batch at successive points, with a CUDA graph if the objective has graphs."""

    def __init__(self, objective: Objective, like: Tensor, y: Tensor):
        wide = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros(len(like), device=like.device)
        state = {"point": like, "y": y, "image": torch.zeros_like(like), "loss": zeros.to(wide), "wrong": zeros}
        self._loop = begin_steps(objective.graphs, GradientStep(objective), state)

    def at(self, point: Tensor) -> Gradient:
        """`Objective.gradient` at a point, images ``[B, ...]``."""
        self._loop.put(point=point)
        self._loop.advance()
        return Gradient(**self._loop.values("image", "loss", "wrong"))
