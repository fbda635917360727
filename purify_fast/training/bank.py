"""The adversarial bank: images that were attacked once are kept in a file, and trained on again in later epochs.

Where a training attacks a model that stays as it is, each epoch draws its adversarial images from the same
distribution. A *variant* is one of them: an image, attacked by one of the training's attacks from one random start.
The bank keeps up to M variants of each image, and a step reads one in place of attacking, if there are enough. A share
rho of a step's adversarial images is attacked all the same, and takes the place of the oldest variants.

With x the image and x' the attacked one, a variant is

    q = round((x' - x) / s),   s = max |x' - x| / 127,   q in int8, s in float32

and is read as x + s q, projected onto the ball and the box of the attack. Before the projection no number is further
from x' than s / 2 <= eps / 254, in any of the norms; in "linf" the projection takes none away from x'. In "l2" and "l1"
it may, but takes the image as a whole no further: |x'' - x'|_2 <= sqrt(D) eps / 254 for D numbers.

A step trains on what the bank holds of it, also of the variants that it has just made. So it is a function of the
seed, the step and the bank, and a run that was killed reads what it wrote before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from .._files import lock_file
from .._tensors import per_image, text_hash
from .._validation import Count, Norm, Positive, Share, check_types
from ..attacks.ball import Ball, projected
from ..ops.dispatch.records import folder as cache_folder
from ..ops.philox import Stream, philox

logger = logging.getLogger("purify_fast")

#: Fewer images than these are gathered from several steps, since an attack on a few takes nearly as long as on many.
TOGETHER = 64
#: A part of the key: the version of the file's layout and of the rule that gives an image its draws.
FORMAT = 1


@dataclass(frozen=True)
class BankConfig:
    """The adversarial bank of a training.

    Args:
        variants: M, how many variants of an image are kept, over all attacks of the training; at least one for each. An
            attack without a random start makes the same image each time and keeps one.
        refresh: rho, the share of the adversarial images that is attacked although the bank has enough, by the attacks
            with a random start; the others would make the same image again. 1 is the training without a bank, to the
            bit.
        folder: where the file is kept, for later runs too; None: ``banks`` in the folder of caches (PURIFY_FAST_CACHE).
        gigabytes: the most that the folder's banks may take together, in units of 10^9 bytes. For a new bank those that
            were not used for the longest time are removed, but none that a run has open.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    variants: Count = 4
    refresh: Share = 0.05
    folder: Path | None = None
    gigabytes: Positive = 20.0

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def facts(self) -> dict[str, Any]:
        """M and rho, as a run's log, its checkpoint and the saved model state them."""
        return {"variants": self.variants, "refresh": self.refresh}


@dataclass(frozen=True)
class FrozenAttack:
    """An attack of a training on a model that stays as it is.

    Args:
        eps: radius of the ball in image units.
        random: whether the attack begins at a random point, so that it makes another image each time.
        share: the share of the batch that it attacks.
    """

    eps: float
    random: bool
    share: float


@dataclass(frozen=True)
class FrozenAttacks:
    """A training's attacks on a model that stays as it is.

    Args:
        attacks: all of them; a batch names each by its index.
        norm: norm of the ball.
        facts: everything else that decides which images the attacks make, such as the weights of the model, as JSON
            values.
    """

    attacks: tuple[FrozenAttack, ...]
    norm: Norm
    facts: dict[str, Any]


@dataclass(frozen=True)
class BankedImages:
    """The images of a bank.

    Args:
        count: number of images in the whole data set, by whose indices the bank is ordered.
        shape: shape of an image, (C, H, W).
        data: text that identifies the data set; it contains the digest.
        views: 2 if images are mirrored at random, which makes two images of one; else 1.
    """

    count: int
    shape: tuple[int, ...]
    data: str
    views: int = 1


def quantized(x: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Round the steps from images to attacked images to int8, for the bank.

    Args:
        x: the images ``[B, ...]``.
        attacked: the same after the attack.

    Returns:
        q, int8 ``[B, D]``, and s, float32 ``[B]``.
    """
    difference = (attacked.detach() - x).flatten(1).float()
    scale = difference.abs().amax(1) / 127
    steps = difference / torch.where(scale > 0, scale, 1.0)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def restored(x: Tensor, steps: Tensor, scale: Tensor, ball: Ball) -> Tensor:
    """Restore attacked images from their int8 steps, within the ball and the box.

    Args:
        x: the images ``[B, ...]``.
        steps: q, int8 ``[B, D]``.
        scale: s, ``[B]``.
        ball: the ball of the attack.
    """
    return projected(x, x + steps.view(x.shape).to(x.dtype) * per_image(scale, x), ball)


class AdversarialBank:
    """Variants of images in a file, which many processes may use at the same time.

    The file has a record for each place. A record holds its own checksum, over its place too: one that is cut off, torn
    by a kill or by another process that wrote it at the same time, or damaged, counts as missing, and is made again. So
    no process waits for another one. On one machine they see at once what the others wrote. No other run removes the
    file while this object lives.

    Attributes:
        path: the file, whose name is a key over model, data, attacks and layout.
        made: images that this process attacked.
        read: images that it read in place of attacking.
        damaged: damaged records that were made again.

    Args:
        config: M, rho, and where the file is.
        attacks: the attacks on the images; None, of a training without such attacks, is refused.
        images: which images.
        batch_size: images of a step, of all processes together.

    Raises:
        ValueError: no attacks, fewer variants than attacks, or more bytes than the limit leaves beside the banks in
            use.
        OSError: the file cannot be made or locked; on a full disk before any work.
    """

    def __init__(self, config: BankConfig, attacks: FrozenAttacks | None, images: BankedImages, batch_size: int):
        if attacks is None:
            raise ValueError(
                "bank needs a training that attacks a frozen classifier (CARSO or AToP with "
                "attack_target='classifier'); this training attacks a model that it changes, or attacks nothing"
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
        self.bytes = math.prod(shape) * kind.itemsize
        with _opened(self.path, self.bytes, round(config.gigabytes * 1e9)) as file:
            # the map keeps its own descriptor, and with it the lock
            self._map = np.memmap(file, dtype=kind, mode="r+", shape=shape)
        # an index of a map takes several times as long as one of an array
        self.records: np.ndarray = np.asarray(self._map)
        self._random = np.array([one.random for one in attacks.attacks])
        adversarial = batch_size * sum(one.share for one in attacks.attacks if one.random)
        self.period = 1
        if 0 < config.refresh < 1:
            wanted = math.ceil(TOGETHER / max(config.refresh * adversarial, 1e-9))
            self.period = max(1, min(wanted, int(1 / config.refresh + 1e-9)))

    @property
    def facts(self) -> dict[str, Any]:
        """A row of the run's log: M and rho, and the images that this process made, read and found damaged so far."""
        return {**self.config.facts, "made": self.made, "read": self.read, "damaged": self.damaged}

    def at_step(self, step: int, seed: int, sample_ids: Tensor, mirrored: Tensor | None = None) -> BankedStep:
        """The bank as one step uses it.

        Args:
            step: its number in the run.
            seed: seed of the step's draws.
            sample_ids: indices of the batch's images, int64 ``[B]``.
            mirrored: which images are mirrored, bool ``[B]``; None for none.
        """
        entries = sample_ids.cpu() * self.images.views
        return BankedStep(self, step, seed, entries if mirrored is None else entries + mirrored.cpu())

    def find(self, entries: np.ndarray, kinds: np.ndarray, seed: int, draws: np.ndarray) -> Found:
        """Read one variant of each image; if this very step made a variant before, read that.

        Args:
            entries: places of the images in the bank, int ``[A]``.
            kinds: index of each image's attack, ``[A]``.
            seed: seed of the step.
            draws: uniform numbers, which choose among the variants, ``[A]``.

        Returns:
            The variants. An image is not found while places of the image and its attack are empty: they are to be
            filled.
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
        """Write variants, each in an empty place or in that of the oldest.

        Args:
            entries: places of the images in the bank, int ``[A]``.
            kinds: index of each image's attack, ``[A]``.
            seed: seed of the step that made the variants.
            steps: q, int8 ``[A, D]``.
            scale: s, float32 ``[A]``. A variant whose scale is not finite is not kept.
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
        """The records of an image in some places, and which of them hold a variant."""
        # a copy: another process may write there at any moment
        records = self.records[entry, places].copy()
        heads = zip(records["number"].tolist(), records["check"].tolist(), strict=True)
        whole = [
            number > 0 and check == _record_checksum(records[i], (entry, places.start + i))
            for i, (number, check) in enumerate(heads)
        ]
        return records, whole

    def flush(self) -> None:
        """Force the variants onto the disk, which only a power failure makes necessary; a kill loses nothing.

        The file counts as used at this moment.
        """
        self._map.flush()
        # a person may have removed it
        with contextlib.suppress(OSError):
            os.utime(self.path)


@dataclass
class Found:
    """Variants that were read.

    Args:
        steps: q, int8 ``[A, D]``.
        scale: s, float32 ``[A]``.
        found: True for images with a variant, bool ``[A]``.
        made_by_this_step: True for variants that this very step made before, bool ``[A]``.
    """

    steps: np.ndarray
    scale: np.ndarray
    found: np.ndarray
    made_by_this_step: np.ndarray


@dataclass(frozen=True)
class BankedStep:
    """The bank as one step uses it.

    Args:
        bank: the bank.
        step: its number in the run.
        seed: seed of the step's draws.
        entries: where the bank has the images of the batch, int64 ``[B]`` on the CPU.
    """

    bank: AdversarialBank
    step: int
    seed: int
    entries: Tensor

    def images(self, x: Tensor, rows: slice, kinds: Tensor, make: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Adversarial images of some of the batch.

        Args:
            x: the images to attack, ``[A, C, H, W]``.
            rows: which of the batch they are.
            kinds: the index of each image's attack, int64 ``[A]`` on the CPU, rising.
            make: attacks those of the images whose indices it is given, int64 on x's device; all for None.

        Returns:
            Images, shape and dtype of x's.
        """
        bank, entries = self.bank, self.entries[rows]
        at, kind = entries.numpy(), kinds.numpy()
        if bank.config.refresh == 1:
            made = make(None)
            bank.keep(at, kind, self.seed, *(each.cpu().numpy() for each in quantized(x, made)))
            bank.made += len(x)
            return made
        # the first number decides whether an image is attacked again, the second which variant is read
        draws = philox(torch.tensor([self.seed]), entries, 2, stream=Stream.BANK)[:, 0].numpy()
        found = bank.find(at, kind, self.seed, draws[:, 1])
        anew = draws[:, 0] < (bank.config.refresh * bank.period if self.step % bank.period == 0 else 0.0)
        # an attack without a random start would make the same image again
        anew &= bank._random[kind]
        due = ~found.found | (anew & ~found.made_by_this_step)
        if due.any():
            # Include what the step made before it was killed: a model's last bits may depend on the size of the batch.
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
    """The places of each attack in an image's entry; ValueError if they are too few."""
    every = attacks.attacks
    if variants < len(every):
        raise ValueError(f"variants must be at least {len(every)}, one for each attack of the training, got {variants}")
    random = sum(one.random for one in every)
    counts, place, seen = [], 0, 0
    for one in every:
        # share the places out; the first attacks get one more if the places do not come out even
        share = (variants - (len(every) - random) + random - 1 - seen) // random if one.random else 1
        seen += one.random
        counts.append(slice(place, place + share))
        place += share
    return counts


def _record_checksum(record: Any, place: tuple[int, int]) -> int:
    """The checksum of a record without its first field, and of its place."""
    return zlib.crc32(record.tobytes()[4:], zlib.crc32(f"{place[0]} {place[1]}".encode()))


def _opened(path: Path, size: int, limit: int) -> BinaryIO:
    """The file of a bank, with its whole size, locked against its removal for as long as it is open."""
    if size > limit:
        raise ValueError(
            f"the adversarial bank needs {size / 1e9:.3g} GB, more than its limit of {limit / 1e9:.3g} GB: keep fewer "
            "variants or raise the limit (gigabytes)"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # one run at a time: two new banks must not take the same room
    with FileLock(path.parent / ".lock"):
        _remove_unused(path, size, limit)
        file = os.fdopen(_allocated(path, size), "r+b")
        lock_file(file.fileno(), shared=True)
    return file


def _remove_unused(path: Path, size: int, limit: int) -> None:
    """Remove the banks beside ``path`` that were not used for the longest time, as many as its size asks for."""
    facts = {other: _size_and_use(other) for other in path.parent.glob("*.bank") if other != path}
    others = sorted(facts, key=lambda other: facts[other][1])
    sizes = {other: facts[other][0] for other in others}
    in_use = sum(sizes[other] for other in others if not _is_unused(other))
    if size + in_use > limit:
        raise ValueError(
            f"the adversarial bank needs {size / 1e9:.3g} GB, and other runs use {in_use / 1e9:.3g} GB of banks in "
            f"{path.parent}, together more than the limit of {limit / 1e9:.3g} GB: raise the limit (gigabytes), give "
            "another folder or wait for these runs"
        )
    total = size + sum(sizes.values())
    for other in others:
        if total <= limit:
            break
        # nobody can begin to use it meanwhile, because that needs the lock of the folder
        if _is_unused(other):
            with contextlib.suppress(OSError):
                other.unlink()
                total -= sizes[other]
                logger.warning("the adversarial bank %s was not used for the longest time and is removed", other)


def _is_unused(path: Path) -> bool:
    """Tell whether no run has a bank open."""
    try:
        with path.open("r+b") as file:
            return lock_file(file.fileno(), shared=False)
    except OSError:
        # another process removed it, or it belongs to another user
        return not path.exists()


def _allocated(path: Path, size: int) -> int:
    """A descriptor of a bank's file, which is made if it is missing, and has its whole size."""
    new = not path.exists()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    try:
        if (allocate := getattr(os, "posix_fallocate", None)) is not None:
            # A disk that fills up later would end the process: it writes to memory, and gets no error.
            allocate(handle, 0, size)
        else:
            os.truncate(handle, size)
    except OSError as error:
        os.close(handle)
        if new:
            path.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: no room for a bank of {size / 1e9:.3g} GB", str(path)) from error
    os.utime(path)
    return handle


def _size_and_use(path: Path) -> tuple[int, float]:
    """The bytes of a file, and the time of its last use; zeros if another process removed it."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0.0
    return facts.st_size, facts.st_mtime
