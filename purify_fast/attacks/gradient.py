"""Gradient attacks: FGSM (Goodfellow et al., ICLR 2015) and PGD (Madry et al., ICLR 2018), with EOT draws in the batch.

In the l1 ball PGD takes SLIDE's sparse steps (Tramer & Boneh, NeurIPS 2019) and projects onto ball and box at once
(Croce & Hein, ICML 2021): see `purify_fast.ops.pgd_step`. SLIDE moves a constant share of the coordinates, the same
way each, so that what it adds cannot gather where it is worth most; ours moves ever fewer.

Models map images [B, C, H, W] in [lo, hi] to logits [B, classes]. They are attacked through a frozen view: evaluation
mode, gradients to the input only; the model comes back as it was. Randomised models are attacked through the mean of
the loss over ``eot`` draws (expectation over transformation, Athalye et al., ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..ops.pgd_step import NORMS, per_sample, pgd_step
from ..ops.philox import Stream, philox
from .frozen_model import frozen
from .health import GradientHealth
from .losses import LOSSES, TARGETED

Model = Callable[[Tensor], Tensor]
DENSITY = 0.1  # of PGD's first step in the l1 ball


def _check(
    x: Tensor,
    y: Tensor,
    norm: str,
    loss: str,
    steps: int,
    eot: int,
    chunk: int | None,
    losses: Collection[str] = tuple(LOSSES),
    norms: Collection[str] = NORMS,
) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, ...], got {x.dtype} {list(x.shape)}")
    if y.shape != (x.shape[0],) or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 [B] = [{x.shape[0]}], got {y.dtype} {list(y.shape)}")
    if norm not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, got {norm!r}")
    if loss not in losses:
        raise ValueError(f"loss must be one of {', '.join(losses)}, got {loss!r}")
    for name, value in (("steps", steps), ("eot", eot), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _not_negative(**sizes: float | Tensor | None) -> None:
    for name, value in sizes.items():
        if isinstance(value, (int, float)) and not value >= 0:  # a tensor's values are not read: that would be a sync
            raise ValueError(f"{name} must be at least 0, got {value}")


def input_gradient(
    model: Model, x: Tensor, y: Tensor, *, loss: str = "ce", eot: int = 1, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient to the input of the loss summed over ``eot`` draws, exact whatever ``chunk``.

    Args:
        model: images to logits; call within `frozen`.
        x, y: ``[B, ...]`` and int64 ``[B]``.
        loss: ``ce``, ``margin`` or ``dlr``.
        eot: draws, folded into the batch.
        chunk: images in one forward pass at most.

    Returns:
        The gradient, shape of x (zero where the logits do not depend on x), and the mean loss over the draws, ``[B]``.
    """
    gradient, value, _ = _gradient(model, x, y, loss, eot, chunk)
    return gradient, value


def _gradient(model: Model, x: Tensor, y: Tensor, loss: str, eot: int, chunk: int | None) -> tuple[Tensor, ...]:
    """Gradient, mean loss [B], and the share of the draws that are misclassified [B]; y as in `_losses`."""
    return _over_chunks(x, y, eot, chunk, lambda a, b, draws: _differentiate(model, a, b, loss, draws))


def _differentiate(model: Model, x: Tensor, y: Tensor, loss: str, draws: int) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = _draws(model, leaf, draws)
        each, wrong = _losses(logits, y, loss, draws)
        gradient = None
        if each.requires_grad:
            gradient = torch.autograd.grad(each.sum(), leaf, allow_unused=True)[0]
    return torch.zeros_like(x) if gradient is None else gradient, *_summed(draws, each, wrong)


def _draws(model: Model, x: Tensor, draws: int) -> Tensor:
    """Logits ``[draws * B, C]``; a model that shares work between its draws is asked for them at once."""
    if draws > 1 and draws_at_once(type(model)):  # the type's: a compiled module passes attributes on
        return model.draw_logits(x, draws).flatten(0, 1)  # type: ignore[attr-defined]
    return model(x.repeat(draws, *[1] * (x.dim() - 1)))


def draws_at_once(kind: type) -> bool:
    """Whether ``draw_logits`` speaks for ``forward``: a subclass's own ``forward`` is another function."""
    first = {name: i for i, base in reversed([*enumerate(kind.__mro__)]) for name in vars(base)}
    return "draw_logits" in first and first["draw_logits"] <= first.get("forward", len(kind.__mro__))


def _losses(logits: Tensor, y: Tensor, loss: str, draws: int) -> tuple[Tensor, Tensor]:
    """The loss of every draw, and whether it is misclassified; y: classes [B], or classes and targets [B, 2]."""
    classes = y.view(len(y), -1).repeat(draws, 1).unbind(1)
    return (LOSSES | TARGETED)[loss](logits, *classes), (logits.detach().argmax(1) != classes[0]).float()


def _summed(draws: int, *each: Tensor) -> tuple[Tensor, ...]:
    return tuple(values.detach().view(draws, -1).sum(0) for values in each)


def _over_chunks(x: Tensor, y: Tensor, eot: int, chunk: int | None, run: Callable) -> tuple[Tensor, ...]:
    """``run(x, y, draws)`` in passes of ``chunk`` images at most: the sum of its first result, means of the rest."""
    size = len(x) if chunk is None else min(len(x), chunk)
    together = eot if chunk is None else min(eot, max(1, chunk // size))
    parts = []
    for a, b in zip(x.split(size), y.split(size), strict=True):
        done = [run(a, b, min(together, eot - first)) for first in range(0, eot, together)]
        gradient, *values = (sum(column[1:], column[0]) for column in zip(*done, strict=True))
        parts.append((gradient, *(value / eot for value in values)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def random_start(
    x: Tensor, eps: Tensor, norm: str, seed: int, sample_ids: Tensor | None, lo: float, hi: float
) -> Tensor:
    """A point drawn uniformly from the ball around each image, clamped to the box; a function of (seed, sample id)."""
    ids = torch.arange(x.shape[0], device=x.device) if sample_ids is None else sample_ids
    key = torch.full((1,), seed, dtype=torch.int64, device=x.device)  # made there: a copy would wait for the device
    size = x[0].numel()
    radius = eps.view(-1, *[1] * (x.dim() - 1))
    if norm == "linf":
        noise = 2 * philox(key, ids, size, stream=Stream.ATTACK_START)[:, 0] - 1
    else:
        if norm == "l2":
            noise = philox(key, ids, size, stream=Stream.ATTACK_START, distribution="normal")[:, 0]
        else:  # Laplace's distribution, by its inverse; the middles of the 2^24 steps, so that none is 0 or infinite
            middles = 2 * philox(key, ids, size, stream=Stream.ATTACK_START)[:, 0] - (1 - 2**-24)
            noise = -middles.sign() * torch.log1p(-middles.abs())
        shrink = philox(key, ids, 1, stream=Stream.ATTACK_START, first_draw=1)[:, 0] ** (1 / size)
        noise = noise / noise.norm(p=2 if norm == "l2" else 1, dim=1, keepdim=True) * shrink
    return (x + noise.view_as(x) * radius).clamp(lo, hi).to(x.dtype)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 40,
    alpha: float | Tensor | None = None,
    norm: str = "linf",
    loss: str = "ce",
    eot: int = 1,
    start: bool = True,
    keep_best: bool = False,
    density: float | None = None,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    chunk: int | None = None,
    health: GradientHealth | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Projected gradient ascent on the attack loss.

    Args:
        model: images ``[B, ...]`` to logits ``[B, C]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: ``[B, ...]`` in [lo, hi]; y: true labels, int64 ``[B]``.
        eps, alpha: radius and step in image units, numbers or ``[B]``. Without alpha the step falls geometrically from
            ``eps`` to ``eps / 100``, which is stronger than a constant one (`make demo` has both on its base).
        norm: ``linf``, ``l2`` or ``l1`` (customary on CIFAR-10: eps 8/255, 0.5 and 12). loss: ``ce``, ``margin`` or
            ``dlr``.
        eot: draws of a randomised model averaged per step, folded into the batch.
        start: whether to begin at a random point of the ball (Philox stream ATTACK_START, from ``seed`` and
            ``sample_ids``, int64 ``[B]``, default 0 .. B-1).
        keep_best: return, per image, the best iterate seen and not the last: misclassified in most draws, then of
            highest mean loss (one more forward pass, or two with EOT).
        density: of ``l1`` only: the share of the coordinates that a step moves, in (0, 1], at least one. Without it the
            share falls geometrically from 0.1 to 0.001.
        chunk: images given to the model in one forward pass at most; exact, bounds the memory. (A defence that makes S
            samples of an image in N passes computes on S N times as many.)
        health: counts gradients and movement.

    Returns:
        Adversarial images: shape and dtype of x, within eps of x (in half precision: up to its rounding) and within
        [lo, hi].

    Raises:
        ValueError: a wrong shape, dtype, name or count, or a negative eps or alpha.
    """
    _check(x, y, norm, loss, steps, eot, chunk)
    _not_negative(eps=eps, alpha=alpha)
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach()
    radius = per_sample("eps", eps, x)
    constant = None if alpha is None else per_sample("alpha", alpha, x)
    with frozen(model):
        adversarial = begin = random_start(x, radius, norm, seed, sample_ids, lo, hi) if start else x
        best, best_score = adversarial, torch.full((2, x.shape[0]), -torch.inf, device=x.device)
        for i in range(steps):
            gradient, value, wrong = _gradient(model, adversarial, y, loss, eot, chunk)
            if health is not None:
                # once an image is fooled, dlr is flat: 1, where the true class is third
                health.see_gradient(gradient, None if loss == "ce" else wrong == 1)
            if keep_best:
                best, best_score = _better(best, best_score, adversarial, torch.stack([wrong, value]))
            step = radius * _fall(i, steps) if constant is None else constant
            share = _share(norm, i, steps) if density is None else density
            adversarial = pgd_step(adversarial, gradient.to(x.dtype), x, step, radius, norm, lo, hi, share)
        if health is not None:
            with torch.no_grad():
                health.see_move(begin, adversarial, model(x).argmax(1) == y)
        if keep_best:
            score = _score(model, adversarial, y, loss, eot, chunk)
            if eot > 1:  # judged afresh: the highest of many noisy scores is high by luck
                best_score = _score(model, best, y, loss, eot, chunk)
            adversarial, _ = _better(best, best_score, adversarial, score)
    return adversarial


def _fall(i: int, steps: int) -> float:
    """From 1 at the first step to a hundredth at the last."""
    return 100.0 ** (-i / max(1, steps - 1))


def _share(norm: str, i: int, steps: int) -> float:
    """Of the coordinates that an l1 step moves; for others a constant: each new number would be compiled for."""
    return DENSITY * _fall(i, steps) if norm == "l1" else DENSITY


def _better(best: Tensor, best_score: Tensor, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Per image, the one misclassified in more of the draws, then the one of higher loss; scores [2, B]."""
    higher = (score[0] > best_score[0]) | ((score[0] == best_score[0]) & (score[1] > best_score[1]))
    return torch.where(higher.view(-1, *[1] * (x.dim() - 1)), x, best), torch.where(higher, score, best_score)


@torch.no_grad()
def _score(model: Model, x: Tensor, y: Tensor, loss: str, eot: int, chunk: int | None) -> Tensor:
    def run(a: Tensor, b: Tensor, draws: int) -> tuple[Tensor, ...]:
        logits = _draws(model, a, draws)
        return a, *_summed(draws, *_losses(logits, b, loss, draws))

    _, value, wrong = _over_chunks(x, y, eot, chunk, run)
    return torch.stack([wrong, value])


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    loss: str = "ce",
    eot: int = 1,
    chunk: int | None = None,
    health: GradientHealth | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """The fast gradient (sign) method: one step of length eps from the image itself. Arguments as in `pgd`."""
    return pgd(
        model,
        x,
        y,
        eps=eps,
        alpha=eps,
        steps=1,
        norm=norm,
        loss=loss,
        eot=eot,
        start=False,
        chunk=chunk,
        health=health,
        lo=lo,
        hi=hi,
    )


def pgd_and_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Tensor,
    alpha: float | Tensor,
    steps: int,
    norm: str = "linf",
    loss: str = "ce",
    seed: int = 0,
    sample_ids: Tensor | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """PGD from random starts on the first half of the images, FGSM on the second, sharing the first gradient pass.

    The same as one call of `pgd` for the first half and one of `fgsm` for the second, to the bit where the model's
    arithmetic does not depend on the size of the batch.

    Args:
        x, y: ``[2 B, ...]`` and int64 ``[2 B]``.
        eps: radius per image, ``[2 B]``. alpha: PGD's constant step, a number or ``[B]``. Others as in `pgd`.

    Returns:
        The adversarial images, shape and dtype of x.

    Raises:
        ValueError: an odd number of images, or as `pgd`.
    """
    _check(x, y, norm, loss, steps, 1, None)
    half = len(x) // 2
    if len(x) != 2 * half:
        raise ValueError(f"x must hold an even number of images, PGD's and FGSM's, got {len(x)}")
    _not_negative(eps=eps, alpha=alpha)
    if half == 0:
        return x.clone()
    x = x.detach()
    nat, labels, ids = x[:half], y[:half], None if sample_ids is None else sample_ids[:half]
    radius = per_sample("eps", eps, x)
    step = per_sample("alpha", alpha, nat)
    with frozen(model):
        begin = torch.cat([random_start(nat, radius[:half], norm, seed, ids, lo, hi), x[half:]])
        gradient, _, _ = _gradient(model, begin, y, loss, 1, None)
        both = torch.cat([step, radius[half:]])
        moved = pgd_step(begin, gradient.to(x.dtype), x, both, radius, norm, lo, hi, DENSITY)
        adversarial = moved[:half]
        for i in range(1, steps):
            gradient, _, _ = _gradient(model, adversarial, labels, loss, 1, None)
            share = _share(norm, i, steps)
            adversarial = pgd_step(adversarial, gradient.to(x.dtype), nat, step, radius[:half], norm, lo, hi, share)
    return torch.cat([adversarial, moved[half:]])
