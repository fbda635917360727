"""The loss that an attack maximizes, averaged over the draws of a random model, and its gradient.

All draws of an image are computed in one batch (expectation over transformation, Athalye et al., ICML 2018), or in
separate passes if the model draws once for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._classifier import Classifier, SharesDraws, supports
from ..ops.attack_loss import KINDS, OP
from ..speed.graphs.step_loop import State
from .attacked_model import gradient_to, logits_of, logits_of_draws
from .context import LossFunction
from .losses import FEWEST_CLASSES, check_classes


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
    """The loss that an attack maximizes: a name, or a function.

    With a function, or with ``toward``, by which y are target classes whose loss is lowered, no draw counts as
    misclassified.
    """

    model: Classifier
    loss: str | LossFunction = "ce"
    eot_iter: int = 1
    max_forward_batch: int | None = None
    #: A comparison of objectives ignores `graphs`, because graphs change the result by rounding errors only.
    graphs: Any = field(default=None, compare=False)
    apart: bool = False
    toward: bool = False

    def gradient(self, x: Tensor, y: Tensor) -> Gradient:
        """The gradient with respect to ``x [B, ...]``, and the score; y is ``[B]``, or with targets ``[B, 2]``."""
        if self.eot_iter == 1 and (self.max_forward_batch is None or len(x) <= self.max_forward_batch):
            return Gradient(*self._differentiate(x, y, 1))
        image, loss, wrong = self._over_passes(self._differentiate, x, y)
        return Gradient(image, self._mean(loss), self._mean(wrong))

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the score of images by fresh draws, see `Gradient.score`."""
        loss, wrong = self._over_passes(self._judge, x, y)
        return torch.stack([self._mean(wrong), self._mean(loss)])

    @torch.no_grad()
    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        """Only the loss, ``[B]``, for a search that does not need the number of misclassified draws."""
        return self._mean(self._over_passes(self._judge, x, y)[0])

    # -- one forward pass, with ``draws`` draws of each image ---------------------------------------------------------

    def _differentiate(self, x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, ...]:
        """Return the sums over the draws of the gradient, the losses and the misclassified draws."""
        if torch.compiler.is_compiling():
            return self._traced(x, y, draws)
        if torch.is_inference_mode_enabled():
            advice = "call it outside of torch.inference_mode(), which records none, or use torch.no_grad() instead"
            raise RuntimeError(f"the attack needs gradients: {advice}")
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self._differentiate(x, y, draws)
        leaf = x.detach().requires_grad_()
        # The forward pass.
        logits = logits_of(self.model, leaf) if draws == 1 else logits_of_draws(self.model, leaf, draws)
        if callable(self.loss):
            losses = self._own_losses(logits, y, draws)
            gradient, loss = gradient_to(leaf, losses.sum()), losses.detach()
            wrong = torch.zeros_like(loss)
        else:
            # The loss and its gradient with respect to the logits, then the backward pass from there.
            slopes, loss, wrong = self._losses(logits.detach(), y, draws)
            gradient = gradient_to(leaf, logits, slopes)
        if gradient is None:
            gradient = torch.zeros_like(x)
        return (gradient, loss, wrong) if draws == 1 else (gradient, _summed(loss, draws), _summed(wrong, draws))

    def _traced(self, x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, ...]:
        """Do the same in a form that the compiler traces as a single graph."""
        if callable(self.loss):

            def total_of(images: Tensor) -> tuple[Tensor, Tensor]:
                losses = self._own_losses(logits_of_draws(self.model, images, draws), y, draws)
                return losses.sum(), losses

            total, pull_back, loss = cast(Any, torch.func.vjp)(total_of, x, has_aux=True)
            loss = _summed(loss, draws)
            return pull_back(torch.ones_like(total))[0], loss, torch.zeros_like(loss)
        logits, pull_back = cast(Any, torch.func.vjp)(lambda images: logits_of_draws(self.model, images, draws), x)
        slopes, loss, wrong = self._losses(logits, y, draws)
        return pull_back(slopes)[0], _summed(loss, draws), _summed(wrong, draws)

    def _judge(self, x: Tensor, y: Tensor, draws: int) -> tuple[Tensor, ...]:
        """Return the sums over the draws of the losses and of the misclassified draws."""
        logits = logits_of_draws(self.model, x, draws)
        if callable(self.loss):
            loss = self._own_losses(logits, y, draws)
            return _summed(loss, draws), torch.zeros_like(_summed(loss, draws))
        _, loss, wrong = self._losses(logits, y, draws)
        return _summed(loss, draws), _summed(wrong, draws)

    def _losses(self, logits: Tensor, y: Tensor, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient with respect to the logits, the loss, and wrong, of all draws."""
        kind = str(self.loss)
        if kind in FEWEST_CLASSES:
            check_classes(kind, logits.shape[1])
        if draws > 1:
            y = y.repeat(draws, *[1] * (y.dim() - 1))
        slopes, loss, wrong = OP(logits, y, KINDS.index(kind), self.toward)
        return (slopes, loss, torch.zeros_like(wrong)) if self.toward else (slopes, loss, wrong)

    def _own_losses(self, logits: Tensor, y: Tensor, draws: int) -> Tensor:
        """The losses of all draws by a function of the user's own, ``[draws * B]``."""
        assert callable(self.loss)
        losses = self.loss(logits, y.repeat(draws, *[1] * (y.dim() - 1)) if draws > 1 else y)
        if not isinstance(losses, Tensor):
            raise TypeError(f"the loss must return a tensor [B], for each image, got {type(losses).__name__}")
        if losses.numel() == len(logits) == 1:
            # The mean over one image is its loss.
            losses = losses.reshape(1)
        if losses.shape != logits.shape[:1]:
            wanted = f"the loss must be a value for each image, [B] = [{len(logits)}]"
            raise ValueError(f'{wanted}, got {list(losses.shape)}: give reduction="none"')
        return losses

    # -- several draws, and parts of a batch --------------------------------------------------------------------------

    def _mean(self, total: Tensor) -> Tensor:
        """The mean over the draws, from their sum."""
        return total / self.eot_iter if self.eot_iter > 1 else total

    def _over_passes(self, one_pass: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Add up what ``one_pass(x, y, draws)`` returns, over as many passes as all images and draws need."""
        images, draws = self.at_once(len(x))
        parts = []
        for a, b in zip(x.split(images), y.split(images), strict=True):
            passes = [one_pass(a, b, min(draws, self.eot_iter - first)) for first in range(0, self.eot_iter, draws)]
            parts.append([sum(column[1:], column[0]) for column in zip(*passes, strict=True)])
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def at_once(self, images: int) -> tuple[int, int]:
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

    def may_be_compiled(self, state: State) -> bool:
        """Return False, because most searches change the number of images."""
        return False
