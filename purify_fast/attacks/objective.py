"""The loss that an attack maximizes, averaged over the draws of a random model, and its gradient.

All draws of an image are computed in one batch (expectation over transformation, Athalye et al., ICML 2018), or in
separate passes if the model draws once for a whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from .._tensors import per_image
from ..ops.attack_loss import FEWEST_CLASSES as FEWEST_CLASSES, KINDS, OP
from ..protocols import Classifier, SharesDraws, supports
from ..speed.graphs.step_loop import State
from .attacked_model import gradient_to, logits_of, logits_of_draws

#: Loss: the losses that need only the true labels. ApgdLoss: all losses, including the targeted losses, which also take
#: a target class for each image.
Loss = Literal["ce", "margin", "scaled_margin", "dlr"]
ApgdLoss = Literal["ce", "margin", "scaled_margin", "dlr", "dlr_targeted", "margin_targeted"]

#: A function of logits ``[B, classes]`` and of the caller's y that returns the loss of each image, ``[B]``.
LossFunction: TypeAlias = Callable[[Tensor, Any], Tensor]

LOSSES = ("ce", "margin", "scaled_margin", "dlr")
TARGETED = ("dlr_targeted", "margin_targeted")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} l_j - l_y, [B]; it is positive if the image is misclassified. Carlini & Wagner, S&P 2017."""
    true = logits.gather(1, y[:, None])[:, 0]
    # `one_hot` is avoided, because it checks the values of the labels and so waits for the GPU.
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def check_classes(loss: str, classes: int) -> None:
    """Refuse a loss that needs more than ``classes`` classes, with ValueError."""
    least = FEWEST_CLASSES.get(loss, 2)
    if classes < least:
        instead = ": use the loss 'margin'" if classes > 1 else ""
        raise ValueError(f"the loss {loss!r} needs at least {least} classes, got a model with {classes}{instead}")


def usable_loss(loss: ApgdLoss, num_classes: int) -> ApgdLoss:
    """The loss itself, or "margin" if the loss needs more than ``num_classes`` classes."""
    return "margin" if 0 < num_classes < FEWEST_CLASSES.get(loss, 2) else loss


# -- the loss that an attack maximizes, averaged over the draws of a random model, and its gradient --------------------

#: The names of the counts of `faults`.
FAULTS = ("nonfinite", "zero", "exempt")


def faults(grad: Tensor, fooled: Tensor | None = None) -> Tensor:
    """Tell which gradients are non-finite, which are zero, and which are zero but ``fooled``, bool ``[3, B]``."""
    # The largest element of a row is NaN if any element is.
    peak = torch.linalg.vector_norm(grad.detach().flatten(1), ord=torch.inf, dim=1)
    zero = peak == 0
    exempt = torch.zeros_like(zero) if fooled is None else zero & fooled
    return torch.stack([~(peak < torch.inf), zero & ~exempt, exempt])


# -- counts the gradients that an attack could not use, and the images that it did not move ----------------------------

#: The largest allowed shares of non-finite gradients, of zero gradients, and of unmoved images. If an attack exceeds
#: such a limit, it had no usable gradients, and its result says nothing about the defence.
MAX_NONFINITE, MAX_ZERO, MAX_UNMOVED = 0.0, 0.05, 0.01


@dataclass
class GradientHealth:
    """The counts that show whether an attack had usable gradients.

    A gradient is non-finite if any of its elements is, and zero if all are zero. For some losses, zeros at
    misclassified images are not counted at all. An image is unmoved if the clean image is classified correctly and the
    run ends at its first point. The counts remain on the device until a property is read.

    Args:
        counts: a dict from the names that `count` accepts to numbers or tensors of shape []; empty at first.
    """

    counts: dict[str, Tensor | int] = field(default_factory=dict)

    def add(self, **amounts: Tensor | int) -> None:
        """Add numbers to the counts, by the names of `count`. ``gradients`` is the number of images times steps."""
        for name, amount in amounts.items():
            self.counts[name] = self.counts.get(name, 0) + amount

    def see_gradient(self, grad: Tensor, fooled: Tensor | None = None) -> None:
        """Count the gradients [B, ...] of one step; zeros at the images ``fooled`` are left out."""
        nonfinite, zero, exempt = faults(grad, fooled).sum(1)
        self.add(gradients=len(grad) - exempt, nonfinite=nonfinite, zero=zero)

    def see_move(self, start: Tensor, end: Tensor, correct: Tensor) -> None:
        """Count the images where ``correct``, bool [B], is True, and those of them whose point did not move."""
        still = (start == end).flatten(1).all(1)
        self.add(images=correct.sum(), unmoved=(still & correct).sum())

    def count(self, name: str) -> int:
        """The count called ``gradients``, ``nonfinite``, ``zero``, ``images`` or ``unmoved``."""
        return int(self.counts.get(name, 0))

    @property
    def nonfinite(self) -> float:
        """Share of gradients with a non-finite element."""
        return self.count("nonfinite") / max(1, self.count("gradients"))

    @property
    def zero(self) -> float:
        """Share of gradients that are zero everywhere."""
        return self.count("zero") / max(1, self.count("gradients"))

    @property
    def unmoved(self) -> float:
        """Share of the correctly classified images whose last point in a run equals the first point."""
        return self.count("unmoved") / max(1, self.count("images"))

    @property
    def reliable(self) -> bool:
        """True if no share is above its limit, so that the attack's result says something about the defence."""
        return self.nonfinite <= MAX_NONFINITE and self.zero <= MAX_ZERO and self.unmoved <= MAX_UNMOVED


# -- the loss that an attack maximizes, averaged over the draws of a random model, and its gradient --------------------


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
            needs = f"the loss must be a value for each image, [B] = [{len(logits)}]"
            raise ValueError(f'{needs}, got {list(losses.shape)}: give reduction="none"')
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


# -- helpers that attacks share: they remember the best point of each image, and record faulty gradients ---------------


def better_of(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The better of two points per image, by wrong draws and then by loss, and its score ``[2, B]``."""
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(per_image(higher, x), x, best), torch.where(higher, score, best_score)


def after_point(objective: Objective, memory: State, point: Tensor, gradient: Gradient) -> State:
    """Return what one more point changes in a state that has the `Search.memory`, without waiting for the device."""
    new: State = {}
    if FAULTS[0] in memory:
        # At a misclassified image the gradient of dlr can be 0: the loss is constantly 1 if the true class has the
        # third highest logit. So a zero is no fault there.
        counts = faults(gradient.image, None if objective.loss == "ce" else gradient.wrong == 1).sum(1)
        new |= {name: memory[name] + count for name, count in zip(FAULTS, counts, strict=True)}
    if "best" in memory:
        new["best"], new["best_score"] = better_of(memory["best"], memory["best_score"], point, gradient.score)
    return new


class Search:
    """The best point of one run of an attack, and the counts of faulty gradients. No method waits for the device."""

    def __init__(self, objective: Objective, begin: Tensor, y: Tensor, keep_best: bool, health: GradientHealth | None):
        self.objective, self.begin, self.y, self.health, self.keep_best = objective, begin, y, health, keep_best
        self.points = 0
        self.memory: State = {}
        if health is not None:
            self.memory |= {name: begin.new_zeros((), dtype=torch.int64) for name in FAULTS}
        if keep_best:
            # The scores of a model in float64 are float64. The scores of a model in half precision are float32.
            wide = torch.promote_types(begin.dtype, torch.float32)
            score = torch.full((2, len(begin)), -torch.inf, dtype=wide, device=begin.device)
            self.memory |= {"best": begin, "best_score": score}

    def see(self, point: Tensor, gradient: Gradient) -> None:
        """Remember the points ``[B, ...]`` that are the best so far, and count the faulty gradients at all points."""
        self.recall(self.memory | after_point(self.objective, self.memory, point, gradient), 1)

    def recall(self, memory: State, points: int) -> None:
        """Store the memory after ``points`` further steps, which another object has taken."""
        self.memory, self.points = {name: memory[name] for name in self.memory}, self.points + points

    def result(self, x: Tensor, last: Tensor) -> Tensor:
        """The images that an attack returns: last points, or with ``keep_best`` the better of last and best."""
        if self.health is not None:
            nonfinite, zero, exempt = (self.memory[name] for name in FAULTS)
            self.health.add(gradients=self.points * len(self.begin) - exempt, nonfinite=nonfinite, zero=zero)
            with torch.no_grad():
                parts = x.split(self.objective.max_forward_batch or max(1, len(x)))
                correct = torch.cat([logits_of(self.objective.model, part) for part in parts]).argmax(1) == self.y
            self.health.see_move(self.begin, last, correct)
        if not self.keep_best:
            return last
        best, best_score = self.memory["best"], self.memory["best_score"]
        last_score = self.objective.score(last, self.y)
        if self.objective.eot_iter > 1:
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            best_score = self.objective.score(best, self.y)
        return better_of(best, best_score, last, last_score)[0]
