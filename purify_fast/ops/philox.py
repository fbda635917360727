"""Draws random numbers by Philox4x32-10 (Salmon et al., SC 2011). A number depends only on its seed and its counter.

    key     = (low word of seed, high word of seed)
    counter = (element index / 4, draw index, sample index, stream)
    element i takes word i mod 4:  bits w;  uniform (w >> 8) 2^-24 in [0, 1)
    normal, by Box-Muller over the word pairs (0, 1) and (2, 3), u = ((w + 256) >> 8) 2^-24 in (0, 1]:
        sqrt(-2 ln u_0) cos(2 pi v_1)  and  sqrt(-2 ln u_0) sin(2 pi v_1),  v = (w >> 8) 2^-24

Only normal numbers differ between backends, by a few ulp at most. Numbers with equal counters would be correlated, so
every purpose has its own stream.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
from torch import Tensor

from .._tensors import check_form, check_one_device
from .dispatch.examples import ROWS, examples, stream as example_stream
from .dispatch.registry import define_op

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_KEY = (0x9E3779B9, 0xBB67AE85)


class Stream(enum.IntEnum):
    """The fourth word of the counter: the purpose of the numbers. Results depend on the values: never change them."""

    LATENT = 1
    TRANSFORM_NOISE = 2
    MASK = 3
    ATTACK_START = 4
    REPLAY_NOISE = 5
    AUGMENTATION = 6
    SQUARES = 7
    DIFFUSION = 9
    DIFFUSION_TRAINING = 10
    LOTS = 11
    SMOOTHING = 13


DISTRIBUTIONS = ("bits", "uniform", "normal")


def words(key: tuple[Any, Any], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Compute the 4 output words from 2 key and 4 counter words, each in an int64 tensor or an int."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        # A product of two 32-bit words may overflow int64, but its 64 bits are still correct.
        p0, p1 = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY[0]) & _MASK, (k1 + _KEY[1]) & _MASK
    return c0, c1, c2, c3


def reference(
    seed: Tensor, sample_ids: Tensor, numel: int, stream: int, distribution: int, draws: int = 1, first_draw: int = 0
) -> Tensor:
    """Compute the op's definition, [B, draws, numel]. The distribution is given by its index in `DISTRIBUTIONS`."""
    draw = first_draw + torch.arange(draws, device=sample_ids.device)
    return drawn(seed, sample_ids, draw[None], numel, stream=stream, distribution=distribution)


def drawn(seed: Tensor, sample_ids: Tensor, draw: Tensor, numel: int, *, stream: int, distribution: int) -> Tensor:
    """Compute the op's definition, [B, draws, numel], for the indices ``draw``, int64 [1, draws] or [B, draws]."""
    groups = (numel + 3) // 4
    element = torch.arange(groups, device=sample_ids.device)
    # A call has one seed. Every word of the counter is broadcast to [B, draws, groups].
    zero = torch.zeros((sample_ids.shape[0], draw.shape[1], groups), dtype=torch.int64, device=sample_ids.device)
    index, sample = (draw & _MASK)[..., None], (sample_ids & _MASK)[:, None, None]
    word = words((seed & _MASK, (seed >> 32) & _MASK), (zero + element, zero + index, zero + sample, zero + stream))
    if distribution == 0:
        out = torch.stack([w - ((w >> 31) << 32) for w in word], dim=-1).to(torch.int32)
    elif distribution == 1:
        out = torch.stack([(w >> 8).float() * 2.0**-24 for w in word], dim=-1)
    else:
        pair = []
        for a, b in ((word[0], word[1]), (word[2], word[3])):
            radius = torch.sqrt(-2.0 * torch.log(((a + 256) >> 8).float() * 2.0**-24))
            angle = (b >> 8).float() * (2.0 * math.pi * 2.0**-24)
            pair += [radius * torch.cos(angle), radius * torch.sin(angle)]
        out = torch.stack(pair, dim=-1)
    return out.flatten(-2)[..., :numel].contiguous()


def _arguments(distribution: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    # There are three draws. Begin at the index 2^32 - 2, so that the index of the third draw exceeds 32 bits.
    return *example_stream(seed), shape[-1], int(Stream.LATENT), DISTRIBUTIONS.index(distribution), 3, 2**32 - 2


OP = define_op(
    "philox",
    "(Tensor seed, Tensor sample_ids, SymInt numel, int stream, int distribution, SymInt draws=1, SymInt first_draw=0)"
    " -> Tensor",
    reference=reference,
    fake=lambda seed, ids, numel, stream, distribution, draws=1, *_: ids.new_empty(
        (ids.shape[0], draws, numel), dtype=torch.int32 if distribution == 0 else torch.float32
    ),
    examples=examples(
        _arguments,
        {
            (distribution, (ROWS, 3, numel)): "f" if (numel == 1024) == (distribution == "normal") else ""
            for distribution in DISTRIBUTIONS
            for numel in (130, 1024)
        },
        dtypes=(torch.float32,),
        exact=lambda distribution, _: distribution != "normal",
        slack=lambda distribution, _: 16.0 if distribution == "normal" else 0.0,
    ),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    in_graphs={"cuda": ("",)},
    # The size is the number of values that a call draws.
    size=lambda seed, ids, numel, stream, distribution, draws=1, *_: ids.numel() * draws * numel,
)


def philox_key(seed: int | Tensor, device: torch.device) -> Tensor:
    """The key of Philox for a seed, int64 ``[1]``; ValueError for a seed outside the range of int64."""
    if isinstance(seed, Tensor):
        return seed
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be in [-2^63, 2^63), got {seed}")
    # The tensor is made on the device, because a copy to the device would wait for the device.
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def check_stream(seed: Tensor, sample_ids: Tensor, batch: int | None = None, **others: Tensor) -> None:
    """Raise an error unless seed is int64 [1] and sample_ids int64 [B], on the device of the other tensors."""
    for name, value in (("seed", seed), ("sample_ids", sample_ids)):
        if not isinstance(value, Tensor):
            hint = f": write torch.tensor([{value}])" if isinstance(value, int) and name == "seed" else ""
            raise TypeError(f"{name} must be an int64 tensor, got {value!r}{hint}")
    check_form("seed", seed, torch.int64, "[1]", (1,))
    check_form("sample_ids", sample_ids, torch.int64, "[B]", (sample_ids.numel() if batch is None else batch,))
    check_one_device(**others, seed=seed, sample_ids=sample_ids)


def philox(
    seed: Tensor,
    sample_ids: Tensor,
    numel: int,
    *,
    stream: Stream,
    distribution: str = "uniform",
    draws: int = 1,
    first_draw: int = 0,
) -> Tensor:
    """Draw random numbers, which depend only on (seed, sample, draw, stream, element).

    Args:
        seed: int64 ``[1]``. It is a tensor because torch.compile would recompile for every new int.
        sample_ids: int64 ``[B]``, of which the low 32 bits are used. With global indices, numbers do not depend on
            batch splits and ranks.
        numel: number of elements per sample and draw, at least 0.
        stream: purpose of the numbers, a `Stream`.
        distribution: ``bits`` (int32), ``uniform`` (float32 in [0, 1)) or ``normal`` (float32).
        draws: number of draws per sample, at least 1.
        first_draw: index of the first draw, at least 0. The other draws have the next indices (their low 32 bits).

    Returns:
        ``[B, draws, numel]`` on the seed's device. There is no gradient.

    Raises:
        TypeError: seed or sample_ids is not a tensor.
        ValueError: a shape, dtype, device or distribution is wrong, or a count is too small or too large.
    """
    check_stream(seed, sample_ids)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    for name, value, least in (("numel", numel, 0), ("draws", draws, 1), ("first_draw", first_draw, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(value, int) and value >= 2**63:
            raise ValueError(f"{name} must be below 2^63, got {value}")
    return OP(seed, sample_ids, numel, int(stream), DISTRIBUTIONS.index(distribution), draws, first_draw)


# -- the random stream of a call: the given seed and ids, or new ones --------------------------------------------------


def default_stream(
    seed: Tensor | None, sample_ids: Tensor | None, batch: int, **others: Tensor
) -> tuple[Tensor, Tensor]:
    """Replace a missing seed by a new one from PyTorch's generator, and missing ids by 0 to B - 1; check given ones."""
    device = next(iter(others.values())).device
    if seed is None:
        seed = torch.randint(2**62, (1,), device=device)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    check_stream(seed, sample_ids, batch, **others)
    return seed, sample_ids
