"""An attack through a diffusion purifier, whose gradient computes each step of the denoiser again (checkpoints)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import purify_fast

from ..pipelines import expert
from ..pipelines.diffusion import denoiser
from . import ALPHA, Batches, Dtype, Form, Row, network
from .attack_loops import stepped
from .expert_changes import WRITTEN, Frozen, cast

#: Steps of the process, and of the attack.
TIMES, STEPS = 4, 2
#: Share of the image's signal that the noise leaves at the beginning of the process.
KEPT = 0.9


class Purifier(nn.Module):
    """A purifier as in DiffPure (Nie et al., ICML 2022), with the steps of DDIM."""

    def __init__(self, denoise: nn.Module, classify: nn.Module):
        super().__init__()
        self.denoise, self.classify = denoise, classify

    def step(self, x: Tensor, now: float, after: float, time: int) -> Tensor:
        """Return the state after a step from one share of signal to another."""
        noise = self.denoise(x, torch.full((len(x),), float(time)))
        image = ((x - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-1, 1)
        return after**0.5 * image + (1 - after) ** 0.5 * noise

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.linspace(KEPT, 1, TIMES + 1).tolist()
        state = KEPT**0.5 * (2 * x - 1) + (1 - KEPT) ** 0.5 * torch.randn_like(x)
        for i in range(TIMES):
            time = 100 * (TIMES - i) // TIMES
            state = checkpoint(self.step, state, shares[i], shares[i + 1], time, use_reentrant=False)
        return self.classify((state + 1) / 2)


class FrozenDenoiser(nn.Module):
    """A denoiser under autocast, with frozen weights in channels_last."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model.requires_grad_(False).to(memory_format=expert.LAST), dtype

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with cast(self.dtype):
            return self.model(x, t).float()


def attacked(model: nn.Module, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack the purifier with its exact gradient."""
    model.eval()
    for x, y in batches:
        near = x
        for _ in range(STEPS):
            near = near.detach().requires_grad_()
            F.cross_entropy(model(near), y, reduction="sum").backward()
            near = stepped(near.detach(), near.grad, x, ALPHA)
        yield near


def attacked_by_expert(model: Purifier, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack a purifier whose networks are frozen."""
    model.classify = Frozen(model.classify, dtype)
    model.denoise = FrozenDenoiser(model.denoise, model.classify.dtype)
    return attacked(model, batches, dtype)


def attacked_with_our_lines(model: Purifier, batches: Batches, dtype: Dtype) -> Iterator[Tensor]:
    """Attack a purifier with an accelerated classifier, without gradients of weights."""
    purify_fast.accelerate(model.classify, dtype=dtype)
    with purify_fast.images_only(model):
        yield from attacked(model, batches, dtype)


def purifier(small: bool) -> nn.Module:
    """Return a purifier with random weights."""
    return Purifier(denoiser(4 if small else 32), network(small)).eval()


_THEIRS = Form(attacked, (attacked,))
_BY_EXPERT = Form(attacked_by_expert, (attacked, attacked_by_expert, FrozenDenoiser, cast, *WRITTEN))
_OURS = Form(attacked_with_our_lines, (attacked, attacked_with_our_lines))
_NAME = f"diffusion, {TIMES} steps with checkpoints"

ROWS = {_NAME: Row(4, _THEIRS, _BY_EXPERT, _OURS, False, purifier, lambda model: tuple(model.children()))}
