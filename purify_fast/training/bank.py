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
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import atomic
from .._settings import text_hash
from .._tensors import per_image
from .._validation import Count, Share, check_types
from ..attacks.base import Ball, projected
from ..data import mirrored
from ..ops.dispatch.records import folder as cache_folder
from ..ops.philox import Stream, philox
from .distributed import from_first
from .sources import InMemory, Source
from .task import Batch, Task

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


def quantized(x: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Round the changes that an attack made to images to int8, for the bank."""
    difference = (attacked.detach() - x).flatten(1).float()
    scale = difference.abs().amax(1) / 127
    steps = difference / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def restored(x: Tensor, steps: Tensor, scale: Tensor, ball: Ball) -> Tensor:
    """Restore attacked images from q and s, and project them onto the ball and onto [0, 1]."""
    return projected(x, x + steps.view(x.shape).to(x.dtype) * per_image(scale, x), ball)


class AdversarialBank(InMemory):
    """Takes the place of a source, and also returns stored variants of its images. A run locks the bank's folder."""

    def __init__(self, source: Source, bank: BankConfig, task: Task):
        if not isinstance(source, InMemory) or source.config.accumulate or source.config.padding:
            raise ValueError("bank needs x as a tensor, without accumulate and padding")
        if (attacks := getattr(task, "frozen_attacks", lambda: None)()) is None:
            frozen = "attacks on a frozen classifier, as of CARSO or AToP with attack_target='classifier'"
            raise ValueError(f"bank must be None for this training; a bank needs {frozen}")
        if bank.variants < (least := len(attacks.random)):
            raise ValueError(f"variants must be at least {least}, one for each attack, got {bank.variants}")
        # The bank takes the place of the source, and has all its attributes.
        vars(self).update(vars(source))
        self.attacks, self.refresh, self.views = attacks, bank.refresh, 1 + self.config.flip
        # Each attack without a random start has 1 place in an image's entry. The others share all other places.
        fixed, drawn = ([k for k, random in enumerate(attacks.random) if random == which] for which in (False, True))
        #: The attack of each place.
        self.places = np.array(sorted([*fixed, *islice(cycle(drawn), bank.variants - len(fixed))]))
        kind = np.dtype([("number", "<u4"), ("draw", "<i8"), ("scale", "<f4"), ("steps", "i1", (self.x[0].numel(),))])
        size = (len(self.x) * self.views, len(self.places))
        # The description has a digest of the images and of the labels, on which the attacks depend.
        facts = [attacks.facts, attacks.norm, attacks.eps, self.description, self.x.shape, self.views, size, kind.descr]
        folder = cache_folder() / "banks" if bank.folder is None else Path(bank.folder)
        path = folder / text_hash(json.dumps(facts, sort_keys=True)).hexdigest() / "variants.npy"
        from_first(lambda: _reserve(path, kind, size))
        self.folder, self._map = path.parent, np.lib.format.open_memmap(path, "r+")
        # Indexing a memory map takes several times as long as indexing an array.
        self.records: np.ndarray = np.asarray(self._map)
        anew = bank.refresh * self.batch_size * attacks.share
        most = int(1 / bank.refresh + 1e-9) if 0 < bank.refresh < 1 else 1
        self.period = max(1, min(math.ceil(TOGETHER / max(anew, 1e-9)), most))
        settings: Any = {"variants": bank.variants, "refresh": bank.refresh}
        self.facts, self.counts = {"bank": settings}, {"bank": {**settings, "made": 0, "read": 0}}

    def flush(self) -> None:
        self._map.flush()

    def adversarial(self, batch: Batch, rows: slice, make: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Return adversarial images for rows of a batch, as `PurifierTask.adversarial` does, from the bank if it can.

        A validation attacks its images itself.
        """
        if batch.whole:
            return make(None)
        x, ids, rho = batch.x[rows], batch.sample_ids[rows], self.refresh
        entries = (ids * self.views + (mirrored(self.config.seed, ids, batch.epoch) if self.views > 1 else 0)).cpu()
        # Each image has two numbers: the first decides if it is attacked again, and the second which variant is read.
        draws = philox(torch.tensor([batch.seed], device="cpu"), entries, 2, stream=Stream.BANK)[:, 0].numpy()
        at, kind = entries.numpy(), np.arange(len(x)) * len(self.attacks.random) // len(x)
        allowed = self.places == kind[:, None]
        numbers, count = np.where(allowed, self.records["number"][at], 0), allowed.sum(1)
        # A step that is taken again finds the variants that it made before.
        before = (numbers > 0) & (self.records["draw"][at] == batch.seed)
        own = before.any(1)
        place = np.where(own, before.argmax(1), allowed.argmax(1) + (draws[:, 1] * count).astype(int))
        anew = draws[:, 0] < (rho * self.period if batch.step % self.period == 0 else 0.0)
        # An attack without a random start would make the same image again.
        due = ~own & (((numbers > 0).sum(1) < count) | (anew & np.array(self.attacks.random)[kind])) | (rho == 1)
        # Also attack the images again that this step attacked before the run was resumed. So the attacked batch has
        # its earlier size, on which the last bits of the model's output may depend.
        due |= own & due.any()
        self.counts["bank"]["made"] += int(due.sum())
        self.counts["bank"]["read"] += int((~due).sum())
        steps, scale = (self.records[name][at, place] for name in ("steps", "scale"))
        if due.any():
            index = torch.from_numpy(np.flatnonzero(due)).to(x.device)
            made = make(None if due.all() else index)
            steps[due], scale[due] = (part.cpu().numpy() for part in quantized(x[index], made))
            new = due & ~own & np.isfinite(scale)
            oldest = np.where(allowed, numbers, np.inf).argmin(1)
            self.keep((at[new], oldest[new]), batch.seed, steps[new], scale[new], numbers.max(1)[new] + 1)
            if rho == 1:
                return made
        ball = Ball(torch.tensor(self.attacks.eps, device="cpu")[kind].to(x.device), self.attacks.norm)
        return restored(x, torch.from_numpy(steps).to(x.device), torch.from_numpy(scale).to(x.device), ball)

    def keep(self, places: Any, seed: int, steps: np.ndarray, scale: np.ndarray, numbers: np.ndarray) -> None:
        """Write variants into places of the records, which are empty or have the oldest variants of their images."""
        # If the process is killed in between, the places count as empty.
        self.records["number"][places] = 0
        for name, value in (("draw", seed), ("scale", scale), ("steps", steps), ("number", numbers)):
            self.records[name][places] = value


def _reserve(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Create a bank's file in its full size, unless it exists: on a disk that fills up later, a write would kill us."""
    if path.exists():
        return
    with atomic(path) as new:
        np.lib.format.open_memmap(new, "w+", kind, shape)
        if (allocate := getattr(os, "posix_fallocate", None)) is not None:
            with new.open("r+b") as file:
                allocate(file.fileno(), 0, new.stat().st_size)
