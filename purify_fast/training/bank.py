"""The adversarial bank: an array of adversarial images on disk, which later epochs of a training use again.

A *variant* of an image is the result of one of the training's attacks on it. The bank stores up to M variants of each
image. A share rho of the adversarial images is attacked although the bank is full, and replaces the oldest variants.
Let x be an image and x' the attacked image. The bank stores

    q = round((x' - x) / s),   s = max |x' - x| / 127,   q in int8, s in float32

and restores x + s q, projected onto the attack's ball and onto [0, 1]. Before the projection, the error of each value
is at most s / 2 <= eps / 254, for every norm. In "linf" the projection cannot increase the error of any value. In "l2"
and "l1" it cannot increase the L2 norm of the whole error, which is at most sqrt(D) eps / 254 for D values.

A step trains on restored variants, even if it has just made them, so its result depends only on the seed, the step and
the bank, also in a resumed run. If rho is 1, each step trains on the attacked images themselves.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic
from .._hashes import text_hash
from .._tensors import per_image
from .._validation import Count, Norm, Share, check_types
from ..attacks.ball import Ball, projected
from ..ops.dispatch.records import folder as cache_folder
from ..ops.philox import Stream, philox
from .distributed import from_first

#: A step should replace about this number of old variants or more, because an attack on few images takes nearly as
#: long. If each step would replace fewer, every k-th step replaces k times as many.
TOGETHER = 64


@dataclass(frozen=True)
class BankConfig:
    """The settings of a training's adversarial bank.

    Args:
        variants: M, the number of stored variants of an image, over all attacks of the training; at least 1 for each
            attack. An attack without a random start has 1 variant.
        refresh: rho, the share of the adversarial images that is attacked again although the bank has enough variants,
            by attacks with a random start. With 1, the results are exactly those without a bank.
        folder: folder of the bank's file, also for later runs. None: ``banks`` in the folder of caches
            (PURIFY_FAST_CACHE).

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    variants: Count = 4
    refresh: Share = 0.05
    folder: Path | None = None

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def facts(self) -> dict[str, Any]:
        """M and rho, which are written into the run's log, the checkpoint and the saved model."""
        return {"variants": self.variants, "refresh": self.refresh}


@dataclass(frozen=True)
class FrozenAttacks:
    """The attacks of a training on a model that the training never changes, in the order of their variants.

    ``eps`` and ``random`` have the radius of each attack, and whether it has a random start. ``share`` is the share of
    a batch that the attacks with a random start attack. ``facts`` are all else that decides which images they make.
    """

    eps: tuple[float, ...]
    random: tuple[bool, ...]
    share: float
    norm: Norm
    facts: dict[str, Any]


def quantized(x: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Round the changes that an attack made to images to int8, for the bank."""
    difference = (attacked.detach() - x).flatten(1).float()
    scale = difference.abs().amax(1) / 127
    steps = difference / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def restored(x: Tensor, steps: Tensor, scale: Tensor, ball: Ball) -> Tensor:
    """Restore attacked images from q and s, and project them onto the ball and onto [0, 1]."""
    return projected(x, x + steps.view(x.shape).to(x.dtype) * per_image(scale, x), ball)


class AdversarialBank:
    """Stores variants of images in an array on disk. The first process of a run locks its folder.

    ``shape`` is [N, C, H, W] of the images, ``data`` identifies them; ``views`` is 2 if they are mirrored at random.
    """

    def __init__(
        self,
        config: BankConfig,
        attacks: FrozenAttacks | None,
        *,
        shape: tuple[int, ...],
        data: str,
        views: int,
        batch_size: int,
    ):
        if attacks is None:
            frozen = "attacks on a frozen classifier, as of CARSO or AToP with attack_target='classifier'"
            raise ValueError(f"bank must be None for this training; a bank needs {frozen}")
        self.config, self.attacks, self.views = config, attacks, views
        self.slots = _slots(config.variants, attacks.random)
        self.made = self.read = 0
        head = [("number", "<u4"), ("draw", "<i8"), ("scale", "<f4")]
        kind = np.dtype([*head, ("steps", "i1", (math.prod(shape[1:]),))])
        size = (shape[0] * views, self.slots[-1].stop)
        facts = [attacks.facts, attacks.norm, attacks.eps, data, shape, views, size, kind.descr]
        folder = cache_folder() / "banks" if config.folder is None else Path(config.folder)
        self.path = folder / text_hash(json.dumps(facts, sort_keys=True)).hexdigest() / "variants.npy"
        from_first(lambda: _reserve(self.path, kind, size))
        self._map = np.lib.format.open_memmap(self.path, "r+")
        # Indexing a memory map takes several times as long as indexing an array.
        self.records: np.ndarray = np.asarray(self._map)
        anew = config.refresh * batch_size * attacks.share
        most = int(1 / config.refresh + 1e-9) if 0 < config.refresh < 1 else 1
        self.period = max(1, min(math.ceil(TOGETHER / max(anew, 1e-9)), most))

    @property
    def facts(self) -> dict[str, Any]:
        """M, rho, and this process's counts ``made`` and ``read``. The log of the run records them."""
        return {**self.config.facts, "made": self.made, "read": self.read}

    def at_step(self, step: int, seed: int, sample_ids: Tensor, mirrored: Tensor | None = None) -> BankedStep:
        """Return the object through which one training step uses the bank."""
        entries = sample_ids.cpu() * self.views
        return BankedStep(self, step, seed, entries if mirrored is None else entries + mirrored.cpu())

    def find(self, entry: int, kind: int, seed: int, draw: float) -> tuple[np.void | None, bool]:
        """Return a variant by ``draw`` in [0, 1), or None if a place is empty; and whether this step made it before."""
        records = self.records[entry, self.slots[kind]]
        filled = records["number"] > 0
        own = filled & (records["draw"] == seed)
        if own.any():
            return records[own.argmax()], True
        return (records[min(int(draw * len(records)), len(records) - 1)] if filled.all() else None), False

    def keep(self, entry: int, kind: int, seed: int, steps: np.ndarray, scale: float) -> None:
        """Write a variant into an empty place of its image, or over the image's oldest variant."""
        records = self.records[entry, self.slots[kind]]
        numbers = records["number"]
        if not np.isfinite(scale) or ((numbers > 0) & (records["draw"] == seed)).any():
            return
        place, number = numbers.argmin(), numbers.max() + 1
        # If the process is killed in between, the place counts as empty.
        numbers[place] = 0
        records["draw"][place], records["scale"][place], records["steps"][place] = seed, scale, steps
        numbers[place] = number

    def flush(self) -> None:
        """Write the variants to the disk. A power failure loses others; a process that is killed loses none."""
        self._map.flush()


@dataclass(frozen=True)
class BankedStep:
    """Returns the adversarial images of one training step, from the bank or from an attack."""

    bank: AdversarialBank
    step: int
    seed: int
    entries: Tensor

    def images(self, x: Tensor, rows: slice, kinds: Tensor, make: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Return adversarial images for a part of the batch; ``make`` attacks those at indices, or all for None."""
        bank, n, kind = self.bank, len(x), kinds.tolist()
        at = self.entries[rows].tolist()
        # Each image has two numbers: the first decides if it is attacked again, and the second which variant is read.
        draws = philox(torch.tensor([self.seed], device="cpu"), self.entries[rows], 2, stream=Stream.BANK)[:, 0].numpy()
        found = [bank.find(at[i], kind[i], self.seed, draws[i, 1]) for i in range(n)]
        missing, own = (np.array(each) for each in zip(*((record is None, own) for record, own in found), strict=True))
        anew = draws[:, 0] < (bank.config.refresh * bank.period if self.step % bank.period == 0 else 0.0)
        # An attack without a random start would make the same image again.
        random = np.array([bank.attacks.random[k] for k in kind])
        due = missing | (anew & random & ~own) | (bank.config.refresh == 1)
        # Also attack the images again that this step attacked before the run was resumed. So the attacked batch has
        # its earlier size, on which the last bits of the model's output may depend.
        due |= own & due.any()
        again = np.flatnonzero(due)
        index = None if due.all() else torch.from_numpy(again).to(x.device)
        bank.made, bank.read = bank.made + len(again), bank.read + n - len(again)
        steps, scale = np.zeros((n, x[0].numel()), np.int8), np.zeros(n, np.float32)
        for i in np.flatnonzero(~due):
            steps[i], scale[i] = found[i][0]["steps"], found[i][0]["scale"]  # type: ignore[index]
        if len(again):
            made = make(index)
            steps[again], scale[again] = (e.cpu().numpy() for e in quantized(x if index is None else x[index], made))
            for i in again:
                bank.keep(at[i], kind[i], self.seed, steps[i], scale[i])
            if bank.config.refresh == 1:
                return made
        eps = torch.tensor(bank.attacks.eps, device="cpu")[kinds]
        ball = Ball(eps.to(x.device), bank.attacks.norm)
        return restored(x, torch.from_numpy(steps).to(x.device), torch.from_numpy(scale).to(x.device), ball)


def _slots(variants: int, random: tuple[bool, ...]) -> list[slice]:
    """Return the places of each attack in an image's entry; raise ValueError if there are fewer places than attacks."""
    if variants < len(random):
        raise ValueError(f"variants must be at least {len(random)}, one for each attack, got {variants}")
    # Each attack without a random start gets 1 place. The others share all other places, and the first may get 1 more.
    left, others, counts = variants - random.count(False), random.count(True), list[int]()
    for one in random:
        counts.append(-(-left // others) if one else 1)
        left, others = left - counts[-1] * one, others - one
    return [slice(end - count, end) for count, end in zip(counts, accumulate(counts), strict=True)]


def _reserve(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Create a bank's file in its full size, unless it exists: on a disk that fills up later, a write would kill us."""
    if path.exists():
        return
    with atomic(path) as new:
        np.lib.format.open_memmap(new, "w+", kind, shape)
        if (allocate := getattr(os, "posix_fallocate", None)) is not None:
            with new.open("r+b") as file:
                allocate(file.fileno(), 0, new.stat().st_size)
