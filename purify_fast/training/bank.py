"""The adversarial bank: a file of adversarial images, which later epochs of a training use again.

A training that never changes the attacked model has adversarial images of the same distribution in every epoch. A
*variant* of an image is the result of one of the training's attacks on it, from one random start. The bank stores up to
M variants of each image. While the bank lacks variants of an image for an attack, each step runs this attack on the
image; later steps read a variant. For a share rho of the adversarial images, the attack runs although the bank is full,
and its result replaces the oldest variant.

Let x be an image and x' the attacked image. The bank stores the variant as

    q = round((x' - x) / s),   s = max |x' - x| / 127,   q in int8, s in float32

and restores x + s q, projected onto the attack's ball and onto [0, 1]. Before the projection, the error of each pixel
value is at most s / 2 <= eps / 254, for every norm of the ball. In "linf" the projection cannot increase the error of
any value. In "l2" and "l1" it can increase the error of single values, but not the L2 norm of the whole error. This
norm is at most sqrt(D) eps / 254 for an image of D values.

A step trains on the restored variants, even if it has just made them, so its result depends only on the seed, the step
and the bank, also in a resumed run. If rho is 1, each step trains on the attacked images themselves.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._tensors import per_image, text_hash
from .._validation import Count, Norm, Share, check_types
from ..attacks.ball import Ball, projected
from ..ops.dispatch.records import folder as cache_folder
from ..ops.philox import Stream, philox

#: A step should replace about this number of old variants or more, because an attack on few images takes nearly as
#: long. If each step would replace fewer, every k-th step replaces k times as many.
TOGETHER = 64
#: Version of the file's layout and of the rule for random draws, on which the hash in the file's name depends.
FORMAT = 1


@dataclass(frozen=True)
class BankConfig:
    """The settings of a training's adversarial bank.

    Args:
        variants: M, the number of variants of an image that are stored, over all attacks of the training; at least 1
            for each attack. An attack without a random start makes the same image each time, so it has 1 variant.
        refresh: rho, the share of the adversarial images that is attacked again although the bank has enough variants.
            Only attacks with a random start run again; other attacks would make the same image again. With refresh 1,
            the training has exactly the results of a training without a bank.
        folder: folder of the bank's file, which later runs can use too. None means ``banks`` in the folder of caches
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
class FrozenAttack:
    """An attack of a training on a model that the training never changes.

    Args:
        eps: radius of the ball in image units.
        random: whether the attack begins at a random point, and so makes a different image each time.
        share: share of the batch's images that are attacked by this attack.
    """

    eps: float
    random: bool
    share: float


@dataclass(frozen=True)
class FrozenAttacks:
    """All attacks of a training, on a model that the training never changes.

    Args:
        attacks: the attacks; other functions refer to an attack by its index in this tuple.
        norm: norm of the ball.
        facts: everything else that decides which images the attacks make, such as the weights of the model, as JSON
            values.
    """

    attacks: tuple[FrozenAttack, ...]
    norm: Norm
    facts: dict[str, Any]


@dataclass(frozen=True)
class BankedImages:
    """A description of the images whose variants a bank stores.

    Args:
        count: number of images in the whole data set; the bank is ordered by their indices.
        shape: shape of an image, (C, H, W).
        data: text that identifies the data set; it contains a digest of images and labels.
        views: 2 if images are mirrored at random, because an image and its mirror image have variants of their own;
            otherwise 1.
    """

    count: int
    shape: tuple[int, ...]
    data: str
    views: int = 1


def quantized(x: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Round the changes that an attack made to images to int8, for the bank.

    Args:
        x: the images ``[B, ...]``.
        attacked: the images after the attack.

    Returns:
        q, int8 ``[B, D]``, and s, float32 ``[B]``, as in the formula of this module.
    """
    difference = (attacked.detach() - x).flatten(1).float()
    scale = difference.abs().amax(1) / 127
    steps = difference / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def restored(x: Tensor, steps: Tensor, scale: Tensor, ball: Ball) -> Tensor:
    """Restore attacked images from q and s, and project them onto the ball and onto [0, 1].

    Args:
        x: the images ``[B, ...]``.
        steps: q, int8 ``[B, D]``.
        scale: s, ``[B]``.
        ball: the ball of the attack.
    """
    return projected(x, x + steps.view(x.shape).to(x.dtype) * per_image(scale, x), ball)


class AdversarialBank:
    """Stores variants of images in a file, which several processes may use at the same time.

    The file has M places for each image. A record has a checksum of its content and its place: if it is incomplete, or
    if two processes wrote it at once, it counts as missing, and its variant is made again. So no process waits for
    another, and a process sees immediately what the others on the same machine wrote.

    Attributes:
        path: the file. Its name is a hash over the model, the data, the attacks and the file's layout.
        made: number of images that this process attacked.
        read: number of images that this process read from the bank, in place of an attack.
        damaged: number of damaged records that were made again.

    Args:
        config: M, rho, and the folder of the file.
        attacks: the attacks of a training whose attacked classifier never changes. None, which stands for any other
            training, is refused.
        images: the images whose variants are stored.
        batch_size: images of a step, of all processes together.

    Raises:
        ValueError: there are no attacks, or there are fewer variants than attacks.
        OSError: the file cannot be created. A full disk raises this before any work.
    """

    def __init__(self, config: BankConfig, attacks: FrozenAttacks | None, images: BankedImages, batch_size: int):
        if attacks is None:
            raise ValueError(
                "bank must be None for this training, which attacks a model that it changes, or attacks nothing. A "
                "bank needs attacks on a frozen classifier: CARSO or AToP with attack_target='classifier'"
            )
        self.config, self.attacks, self.images = config, attacks, images
        self.slots = _slots(config.variants, attacks)
        self.made = self.read = self.damaged = 0
        size = math.prod(images.shape)
        head = [("check", "<u4"), ("number", "<u4"), ("draw", "<i8"), ("scale", "<f4")]
        kind = np.dtype([*head, ("steps", "i1", (size,))])
        places = self.slots[-1].stop
        of_attacks = [attacks.facts, attacks.norm, [one.eps for one in attacks.attacks], places]
        of_images = [images.count, list(images.shape), images.data, images.views]
        text = json.dumps([FORMAT, *of_attacks, *of_images], sort_keys=True)
        folder = cache_folder() / "banks" if config.folder is None else Path(config.folder)
        self.path = folder / f"{text_hash(text).hexdigest()}.bank"
        shape = (images.count * images.views, places)
        with os.fdopen(_allocated(self.path, math.prod(shape) * kind.itemsize), "r+b") as file:
            self._map = np.memmap(file, dtype=kind, mode="r+", shape=shape)
        # indexing a memory map takes several times as long as indexing an array
        self.records: np.ndarray = np.asarray(self._map)
        self._random = np.array([one.random for one in attacks.attacks])
        adversarial = batch_size * sum(one.share for one in attacks.attacks if one.random)
        self.period = 1
        if 0 < config.refresh < 1:
            wanted = math.ceil(TOGETHER / max(config.refresh * adversarial, 1e-9))
            self.period = max(1, min(wanted, int(1 / config.refresh + 1e-9)))

    @property
    def facts(self) -> dict[str, Any]:
        """M, rho, and this process's counts ``made``, ``read`` and ``damaged``. The log of the run records them."""
        return {**self.config.facts, "made": self.made, "read": self.read, "damaged": self.damaged}

    def at_step(self, step: int, seed: int, sample_ids: Tensor, mirrored: Tensor | None = None) -> BankedStep:
        """Return the object through which one training step uses the bank.

        Args:
            step: number of the step in the run.
            seed: seed of the step's draws.
            sample_ids: indices of the batch's images, int64 ``[B]``.
            mirrored: True for images that are mirrored, bool ``[B]``; None if no image is mirrored.
        """
        entries = sample_ids.cpu() * self.images.views
        return BankedStep(self, step, seed, entries if mirrored is None else entries + mirrored.cpu())

    def find(self, entries: np.ndarray, kinds: np.ndarray, seed: int, draws: np.ndarray) -> Found:
        """Read one variant of each image. Prefer a variant that the same step made before the run was resumed.

        Args:
            entries: index of each image's entry in the bank, int ``[A]``.
            kinds: index of each image's attack, ``[A]``.
            seed: seed of the step.
            draws: uniform random numbers that choose among the variants, ``[A]``.

        Returns:
            The variants. An image counts as found if this step made one of its variants, or if its entry has no empty
            place for its attack. Otherwise an attack must first fill an empty place.
        """
        steps = np.zeros((len(entries), self.records.dtype["steps"].shape[0]), np.int8)
        found = Found(steps, np.zeros(len(entries), np.float32), *np.zeros((2, len(entries)), bool))
        for image, (entry, kind) in enumerate(zip(entries.tolist(), kinds.tolist(), strict=True)):
            records, whole = self._variants(entry, self.slots[kind])
            own = [there and draw == seed for there, draw in zip(whole, records["draw"].tolist(), strict=True)]
            if any(own) or all(whole):
                count = len(whole)
                chosen = own.index(True) if any(own) else min(int(draws[image] * count), count - 1)
                found.steps[image], found.scale[image] = records["steps"][chosen], records["scale"][chosen]
                found.found[image], found.made_by_this_step[image] = True, any(own)
        return found

    def keep(self, entries: np.ndarray, kinds: np.ndarray, seed: int, steps: np.ndarray, scale: np.ndarray) -> None:
        """Write each variant into an empty or damaged place of its image, or over the image's oldest variant.

        A variant is not written if the bank has a variant of this image, attack and seed.

        Args:
            entries: index of each image's entry in the bank, int ``[A]``.
            kinds: index of each image's attack, ``[A]``.
            seed: seed of the step that made the variants.
            steps: q, int8 ``[A, D]``.
            scale: s, float32 ``[A]``. A variant whose scale is not finite is not written.
        """
        for i in np.flatnonzero(np.isfinite(scale)):
            entry, places = int(entries[i]), self.slots[kinds[i]]
            records, whole = self._variants(entry, places)
            if (records["draw"][whole] == seed).any():
                continue
            numbers = np.where(whole, records["number"], 0)
            place = int(numbers.argmin())
            self.damaged += bool(records["number"][place]) and not whole[place]
            at = entry, places.start + place
            record = np.zeros((), self.records.dtype)
            record["number"], record["draw"] = int(numbers.max()) + 1, seed
            record["scale"], record["steps"] = scale[i], steps[i]
            record["check"] = _record_checksum(record, at)
            self.records[at] = record

    def _variants(self, entry: int, places: slice) -> tuple[np.ndarray, list[bool]]:
        """Return the records at some places of an image's entry, and for each record True if it has a whole variant."""
        # the records are copied, because another process may overwrite them at any moment
        records = self.records[entry, places].copy()
        heads = zip(records["number"].tolist(), records["check"].tolist(), strict=True)
        whole = [
            number > 0 and check == _record_checksum(records[i], (entry, places.start + i))
            for i, (number, check) in enumerate(heads)
        ]
        return records, whole

    def flush(self) -> None:
        """Write the variants to the disk. A power failure loses others; a process that is killed loses none."""
        self._map.flush()


@dataclass
class Found:
    """The variants that `AdversarialBank.find` read for A images.

    Args:
        steps: q, int8 ``[A, D]``.
        scale: s, float32 ``[A]``.
        found: True for images for which a variant was read, bool ``[A]``.
        made_by_this_step: True for variants that the same step made before the run was resumed, bool ``[A]``.
    """

    steps: np.ndarray
    scale: np.ndarray
    found: np.ndarray
    made_by_this_step: np.ndarray


@dataclass(frozen=True)
class BankedStep:
    """Returns the adversarial images of one training step, from the bank or from an attack.

    Args:
        bank: the bank.
        step: number of the step in the run.
        seed: seed of the step's draws.
        entries: index of each image's entry in the bank, int64 ``[B]`` on the CPU.
    """

    bank: AdversarialBank
    step: int
    seed: int
    entries: Tensor

    def images(self, x: Tensor, rows: slice, kinds: Tensor, make: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Return adversarial images for a part of the batch.

        Args:
            x: the images of this part, ``[A, C, H, W]``.
            rows: positions of these images in the batch.
            kinds: index of each image's attack, int64 ``[A]`` on the CPU, in ascending order.
            make: function that attacks the images of ``x`` at the given indices, int64 on x's device. If it is called
                with None, it attacks all images.

        Returns:
            The adversarial images, with the shape and dtype of ``x``.
        """
        bank, entries = self.bank, self.entries[rows]
        at, kind = entries.numpy(), kinds.numpy()
        if bank.config.refresh == 1:
            made = make(None)
            bank.keep(at, kind, self.seed, *(each.cpu().numpy() for each in quantized(x, made)))
            bank.made += len(x)
            return made
        # each image has two numbers: the first decides if it is attacked again, and the second which variant is read
        draws = philox(torch.tensor([self.seed]), entries, 2, stream=Stream.BANK)[:, 0].numpy()
        found = bank.find(at, kind, self.seed, draws[:, 1])
        anew = draws[:, 0] < (bank.config.refresh * bank.period if self.step % bank.period == 0 else 0.0)
        # an attack without a random start would make the same image again
        anew &= bank._random[kind]
        due = ~found.found | (anew & ~found.made_by_this_step)
        if due.any():
            # Also attack the images again that this step attacked before the run was resumed. So the attacked batch has
            # its earlier size, on which the last bits of the model's output may depend.
            due |= found.made_by_this_step
            index = None if due.all() else torch.from_numpy(np.flatnonzero(due)).to(x.device)
            some = x if index is None else x[index]
            kept = (each.cpu().numpy() for each in quantized(some, make(index)))
            found.steps[due], found.scale[due] = kept
            bank.keep(at[due], kind[due], self.seed, found.steps[due], found.scale[due])
        bank.made += int(due.sum())
        bank.read += int((~due).sum())
        eps = torch.tensor([one.eps for one in bank.attacks.attacks])[kinds]
        steps, scale = torch.from_numpy(found.steps).to(x.device), torch.from_numpy(found.scale).to(x.device)
        return restored(x, steps, scale, Ball(eps.to(x.device), bank.attacks.norm))


def _slots(variants: int, attacks: FrozenAttacks) -> list[slice]:
    """Return the places of each attack in an image's entry; raise ValueError if there are fewer places than attacks."""
    every = attacks.attacks
    if variants < len(every):
        raise ValueError(f"variants must be at least {len(every)}, one for each attack of the training, got {variants}")
    random = sum(one.random for one in every)
    counts, place, seen = [], 0, 0
    for one in every:
        # Each attack without a random start gets 1 place. The attacks with a random start share all other places. If
        # these places do not divide evenly, the first attacks with a random start get 1 more.
        share = (variants - (len(every) - random) + random - 1 - seen) // random if one.random else 1
        seen += one.random
        counts.append(slice(place, place + share))
        place += share
    return counts


def _record_checksum(record: Any, place: tuple[int, int]) -> int:
    """Return the checksum of a record's place and of the record without its first field, which is the checksum."""
    return zlib.crc32(record.tobytes()[4:], zlib.crc32(f"{place[0]} {place[1]}".encode()))


def _allocated(path: Path, size: int) -> int:
    """Return a descriptor of a bank's file. The file is created if it is missing, and gets its full size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode, new = os.O_RDWR | getattr(os, "O_BINARY", 0), True
    try:
        handle = os.open(path, mode | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        handle, new = os.open(path, mode), False
    try:
        if (allocate := getattr(os, "posix_fallocate", None)) is not None:
            # The file is written through a memory map. If the disk filled up later, the process would be killed.
            allocate(handle, 0, size)
        else:
            os.truncate(handle, size)
    except OSError as error:
        os.close(handle)
        if new:
            path.unlink(missing_ok=True)
        advice = "Free space on this disk, pass another folder, or lower variants"
        message = f"{error.strerror}: no room for a bank of {size / 1e9:.3g} GB. {advice}"
        raise OSError(error.errno, message, str(path)) from error
    return handle
