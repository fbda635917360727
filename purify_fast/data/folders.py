"""Image folders: decoded once, in several processes, into a cache of uint8 arrays; then read whole or streamed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import make_dataset

from .._files import atomic, write_text
from .._fingerprint import text_hash
from .decoding import NAMED, Undecodable, decode, first_size, named
from .streaming import StreamedImages

logger = logging.getLogger("purify_fast")

SUFFIXES = (".jpg", ".jpeg", ".png")
CACHE = ".purify_fast"
#: Version of the cache; another one is decoded anew.
FORMAT = 1
FORM = (
    "train/<class>/*.jpg|png and val/ or test/ in the same form, or tiny-imagenet-200's val/images and "
    "val/val_annotations.txt"
)


@dataclass(frozen=True)
class Split:
    """Image files and their labels.

    Args:
        files: N paths.
        labels: int64 ``[N]``.
    """

    files: list[Path]
    labels: Tensor


def read_folder(
    folder: Path,
    image_size: tuple[int, int] | None,
    *,
    memory: int | None,
    stream: bool,
    cache: Path | None,
    workers: int | None,
    on_bad_image: str = "refuse",
    follow_links: bool = False,
) -> tuple[dict[str, Tensor | StreamedImages], dict[str, Tensor], int]:
    """Images of an image folder, from its cache, which is written first where it is missing or the files changed.

    Args:
        folder: the classes are the folders in ``train``, sorted; the held-out images are ``val``'s, else ``test``'s.
        image_size: (H, W) to resize and crop to, None for the images' own, which must all be the same.
        memory: bytes the decoded images may take before they are streamed; None for half of what is available.
        stream: whether they are streamed in any case.
        cache: the folder to keep decoded images in; None for one in ``folder``.
        workers: processes that decode, 0 for none but this; None for one per CPU.
        on_bad_image: whether images that cannot be decoded are refused or left out; those that are left out are named.
        follow_links: whether symbolic links may lead out of the folder.

    Returns:
        Images (RGB ``[N, 3, H, W]``) and labels (int64 ``[N]``) by ``train`` and ``test``, and the number of classes.

    Raises:
        FileNotFoundError: the folder lacks a part of the form.
        ValueError: a class without images or not in ``train``, labels that do not fit, images that cannot be decoded
            (all are tried, the first `NAMED` are named) or, without ``image_size``, that differ in size.
        OSError: the cache cannot be written, or its disk has too little space.
    """
    splits, classes = _listed(folder)
    for split in splits.values():
        _check_links(folder, split.files, follow_links)
    source = _fingerprint(folder, splits, classes)
    size = "native" if image_size is None else f"{image_size[0]}x{image_size[1]}"
    place = (folder / CACHE if cache is None else cache / folder.resolve().name) / size
    found = _opened(place, source, splits)
    if found is None:
        with _locked(place):
            # another process may have written it meanwhile
            found = _opened(place, source, splits)
            if found is None:
                workers = _cpus() if workers is None else workers
                decoding = {"image_size": image_size, "workers": workers, "name": folder.name}
                _write(place, source, splits, skip=on_bad_image == "skip", **decoding)  # type: ignore[arg-type]
                found = _opened(place, source, splits)
                assert found is not None
    images, skipped = found
    left_out = [text for part in skipped.values() for text in part.values()]
    if left_out and on_bad_image == "refuse":
        raise Undecodable(f"{len(left_out)} images of {folder} cannot be decoded: {named(left_out)}")
    if left_out:
        logger.warning("%d images of %s are left out: %s", len(left_out), folder, named(left_out))
    labels = {}
    for part, split in splits.items():
        kept = torch.ones(len(split.files), dtype=torch.bool)
        kept[[int(number) for number in skipped.get(part, {})]] = False
        labels[part] = split.labels[kept]
    return _held(images, _available() // 2 if memory is None else memory, stream), labels, len(classes)


def _held(images: dict[str, StreamedImages], memory: int, stream: bool) -> dict[str, Tensor | StreamedImages]:
    """Tensors while they fit into ``memory`` bytes, the held-out images first, since evaluation wants them whole."""
    out: dict[str, Tensor | StreamedImages] = {}
    for part in ("test", "train"):
        needed = images[part].shape.numel()
        if stream or needed > memory:
            out[part] = images[part]
        else:
            out[part] = images[part][:]
            memory -= needed
    return out


def _available() -> int:
    """Bytes that can still be taken: what Linux calls available, within the control group's limit; elsewhere 8 GiB."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 * 2**30
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        # there may be no such group, or "max" in its file
        with contextlib.suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()))
    return free


def _cpus() -> int:
    # Linux tells the CPUs that this process may use
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# ---- what there is


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _classes_in(folder: Path) -> list[str]:
    # torchvision's find_classes would take a hidden folder, such as an editor's, for a class
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _listed(folder: Path) -> tuple[dict[str, Split], list[str]]:
    """The two splits, and the names of the classes."""
    held_out = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None or not (folder / "train").is_dir():
        lacks = "train/" if held_out is not None else "val/ and test/"
        raise FileNotFoundError(f"{folder} is no image folder: it lacks {lacks}; it must hold {FORM}")
    classes = _classes_in(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} must hold a folder for each of at least 2 classes, got {classes}")
    if (folder / "wnids.txt").is_file():
        listed = sorted((folder / "wnids.txt").read_text().split())
        if listed != classes:
            differ = sorted(set(listed) ^ set(classes))
            raise ValueError(f"{folder / 'wnids.txt'} and the folders in train differ in {', '.join(differ[:NAMED])}")
    annotations = held_out / "val_annotations.txt"
    test = _annotated(annotations, classes) if annotations.is_file() else _by_class(held_out, classes, every=False)
    return {"train": _by_class(folder / "train", classes, every=True), "test": test}, classes


def _check_links(folder: Path, files: list[Path], follow: bool) -> None:
    """ValueError for a link that leads in a circle, and unless that is wanted for one that leads out of the folder."""
    root = folder.resolve()
    # one look for each folder, since there may be a million files
    real = {parent: parent.resolve() for parent in {path.parent for path in files}}
    links = {place for parent in real for place in (parent, *parent.parents) if place != folder and place.is_symlink()}
    for link in sorted(links):
        if link.is_relative_to(folder) and link.parent.resolve().is_relative_to(link.resolve()):
            raise ValueError(f"{link} is a link to a folder that it is in: its images would be read again and again")
    if follow:
        return
    for path in files:
        target = path.resolve() if path.is_symlink() else real[path.parent]
        if not target.is_relative_to(root):
            raise ValueError(
                f"{path} leads out of {folder}, to {target}, by a symbolic link: remove it, or allow it with "
                "follow_links (--follow-links)"
            )


def _by_class(folder: Path, classes: list[str], every: bool) -> Split:
    unknown = sorted(set(_classes_in(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds the classes {', '.join(unknown[:NAMED])}, which train lacks")
    found = make_dataset(folder, {name: i for i, name in enumerate(classes)}, None, _is_image, allow_empty=True)
    # by path within a class, whatever folders are in it: torchvision has the files of a folder before those inside it
    samples = sorted((label, Path(path)) for path, label in found)
    labels = torch.tensor([label for label, _ in samples], dtype=torch.int64)
    if every:
        empty = [name for label, name in enumerate(classes) if label not in labels]
        if empty:
            raise ValueError(f"{folder / empty[0]} holds no image ({', '.join(SUFFIXES)})")
    if not samples:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)}) in a folder of its class")
    return Split([path for _, path in samples], labels)


def _annotated(path: Path, classes: list[str]) -> Split:
    """tiny-imagenet-200's held-out images: lines of file name, class and a box, separated by tabs."""
    label = {name: i for i, name in enumerate(classes)}
    files: list[Path] = []
    labels: list[int] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in label:
            raise ValueError(f"{path}, line {number}: expected a file name, a tab and a class of train, got {line!r}")
        files.append(path.parent / "images" / fields[0])
        labels.append(label[fields[1]])
    if not files:
        raise ValueError(f"{path} names no image")
    return Split(files, torch.tensor(labels))


def _fingerprint(folder: Path, splits: dict[str, Split], classes: list[str]) -> str:
    """A hash of the files' names, sizes, times and labels."""
    content = text_hash(json.dumps([FORMAT, classes]))
    for part, split in splits.items():
        for path, label in zip(split.files, split.labels.tolist(), strict=True):
            facts = path.stat()
            name = path.relative_to(folder).as_posix()
            content.update(json.dumps([part, name, facts.st_size, facts.st_mtime_ns, label]).encode())
    return content.hexdigest()


# ---- the cache: <place>/x_train-<source>.npy, x_test-<source>.npy, and set.json, which is written last


def _array(place: Path, part: str, source: str) -> Path:
    return place / f"x_{part}-{source[:16]}.npy"


def _opened(
    place: Path, source: str, splits: dict[str, Split]
) -> tuple[dict[str, StreamedImages], dict[str, dict[str, str]]] | None:
    """The cached images of exactly these files, and what is wrong with those left out; None if there are none."""
    try:
        facts = json.loads((place / "set.json").read_text())
        if facts["source"] != source:
            return None
        images = {part: StreamedImages(_array(place, part, source), facts["digests"][part]) for part in splits}
    except (OSError, ValueError, KeyError):
        return None
    skipped: dict[str, dict[str, str]] = facts.get("skipped", {})
    whole = all(len(images[part]) + len(skipped.get(part, {})) == len(split.files) for part, split in splits.items())
    return (images, skipped) if whole else None


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process writes a cache, the others wait for it; the lock ends with the process."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        # closed below
        file = open(place / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise OSError(f"decoded images cannot be kept in {place} ({error}): give another folder as cache") from error
    with file:
        if sys.platform != "win32":
            # Windows has no such module
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(
    place: Path,
    source: str,
    splits: dict[str, Split],
    *,
    image_size: tuple[int, int] | None,
    workers: int,
    name: str,
    skip: bool,
) -> None:
    (place / "set.json").unlink(missing_ok=True)
    # those of other files, or of a killed process
    for old in [*place.glob("x_*.npy"), *place.glob(".x_*.npy")]:
        old.unlink()
    size = first_size(splits["train"].files) if image_size is None else image_size
    needed = sum(len(split.files) for split in splits.values()) * 3 * size[0] * size[1]
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{place} has {free} bytes free, the decoded images need {needed}: give another folder as cache")
    digests, skipped = {}, dict[str, dict[int, str]]()
    for part, split in splits.items():
        with atomic(_array(place, part, source)) as temporary:
            options = {"resize": image_size is not None, "out": temporary, "workers": workers}
            try:
                digests[part] = decode(split.files, size, title=f"decode {name} {part}", **options)  # type: ignore[arg-type]
            except Undecodable as error:
                good = [path for number, path in enumerate(split.files) if number not in error.failed]
                if not skip or not good:
                    raise
                skipped[part] = error.failed
                digests[part] = decode(good, size, title=f"decode {name} {part} again", **options)  # type: ignore[arg-type]
    facts = {"source": source, "digests": digests, "skipped": skipped}
    write_text(place / "set.json", json.dumps(facts))
