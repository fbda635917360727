"""WRN-28-10's 26 pre-encoders: one after the other, or same shapes together as grouped convolutions.

The grouped form is a contestant only, here to show what it would bring: the package runs them one after the other.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.methods.carso.networks import pre_encoder
from purify_fast.speed.folding.inference_copy import autocast_to

from . import Case, Contestant, Job

SHAPES = ((8, (160, 32, 32)), (9, (320, 16, 16)), (9, (640, 8, 8)))
BATCH = 4


def one_by_one(encoders: list[nn.Module], maps: list[Tensor]) -> list[Tensor]:
    return [encoder(x) for encoder, x in zip(encoders, maps, strict=True)]


def grouped(encoders: list[nn.Module], maps: list[Tensor]) -> list[Tensor]:
    """All of one shape; their weights stay where they are and are put together in every call, as training needs."""
    h = torch.cat(maps, 1)
    for blocks in zip(*(list(encoder)[:-1] for encoder in encoders), strict=True):
        convolutions, norms, _ = zip(*blocks, strict=True)

        def together(name: str, norms=norms) -> Tensor:
            return torch.cat([getattr(norm, name) for norm in norms])

        h = F.conv2d(h, torch.cat([convolution.weight for convolution in convolutions]), groups=len(blocks))
        h = F.batch_norm(h, *(together(name) for name in ("running_mean", "running_var", "weight", "bias")))
        h = F.leaky_relu(h, 0.2)
    return [part.flatten(1) for part in h.chunk(len(encoders), 1)]


def _make(form, dtype: torch.dtype, backward: bool, device: torch.device, quick: bool) -> Job:
    torch.manual_seed(0)
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    groups = []
    for count, shape in [(2, (8, 8, 8))] if quick else SHAPES:
        encoders = [pre_encoder(shape)[0].eval().to(device, memory_format=layout) for _ in range(count)]
        maps = [torch.rand(BATCH, *shape).to(device, dtype, memory_format=layout) for _ in range(count)]
        groups.append((encoders, maps))
    parameters = [p for encoders, _ in groups for encoder in encoders for p in encoder.parameters()]

    def run() -> Tensor:
        with torch.set_grad_enabled(backward), autocast_to(device, dtype):
            features = [part for encoders, maps in groups for part in form(encoders, maps)]
        if not backward:
            return torch.cat([part.flatten() for part in features]).float()
        gradients = torch.autograd.grad(sum(part.float().square().sum() for part in features), parameters)
        return torch.cat([gradient.flatten() for gradient in gradients])

    return Job(run, run)


def cases(quick: bool) -> dict[str, Case]:
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            forms = {"ours": one_by_one, "grouped": grouped}
            name = f"{str(dtype).removeprefix('torch.')}, {'forward and backward' if backward else 'forward'}"
            shape = "one shape twice" if quick else "8 x 160x32x32, 9 x 320x16x16, 9 x 640x8x8"
            made[name] = Case(
                f"{BATCH} images, {shape}",
                0.02,
                {label: Contestant(partial(_make, form, dtype, backward), True) for label, form in forms.items()},
                "3 B E" if backward else "B E",
            )
    return made
