"""Image folders: decoded once, in several processes, into a cache of uint8 arrays; then read whole or streamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .._files import atomic, content_hash, write_text
from .._process import end_with_parent
from .streaming import StreamedImages

SUFFIXES = (".jpg", ".jpeg", ".png")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel
CACHE = ".purify_fast"
FORMAT = 1  # of the cache
CHUNK = 32  # images a process decodes at a time
NAMED = 10  # undecodable files an error names
FORM = (
    "train/<class>/*.jpg|png and val/ or test/ in the same form, or tiny-imagenet-200's val/images and "
    "val/val_annotations.txt"
)


@dataclass(frozen=True)
class Split:
    """Image files and their labels, int64 [N]."""

    files: list[Path]
    labels: Tensor


def read_folder(
    folder: Path,
    image_size: tuple[int, int] | None,
    memory: int | None,
    stream: bool,
    cache: Path | None,
    workers: int | None,
) -> tuple[dict[str, Tensor | StreamedImages], dict[str, Tensor], int]:
    """Images of an image folder, from its cache, which is written first where it is missing or the files changed.

    Args:
        folder: the classes are the folders in ``train``, sorted; the held-out images are ``val``'s, else ``test``'s.
        image_size, memory, stream, cache, workers: as for `purify_fast.data.load`.

    Returns:
        Images (RGB ``[N, 3, H, W]``) and labels (int64 ``[N]``) by ``train`` and ``test``, and the number of classes.

    Raises:
        FileNotFoundError: the folder lacks a part of the form.
        ValueError: a class without images or not in ``train``, labels that do not fit, images that cannot be decoded
            (all are tried, the first `NAMED` are named) or, without ``image_size``, that differ in size.
        OSError: the cache cannot be written, or its disk has too little space.
    """
    splits, classes = _listed(folder)
    source = _fingerprint(folder, splits, classes)
    size = "native" if image_size is None else f"{image_size[0]}x{image_size[1]}"
    place = (folder / CACHE if cache is None else cache / folder.resolve().name) / size
    images = _opened(place, source, splits)
    if images is None:
        with _locked(place):
            images = _opened(place, source, splits)  # another process may have written it meanwhile
            if images is None:
                _write(place, source, splits, image_size, _cpus() if workers is None else workers, folder.name)
                images = _opened(place, source, splits)
                assert images is not None
    labels = {part: split.labels for part, split in splits.items()}
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
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            free = min(free, int(Path(limit).read_text()))
    return free


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- what there is


def _images_in(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if not path.name.startswith("."))


def _classes_in(folder: Path) -> list[str]:
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


def _by_class(folder: Path, classes: list[str], every: bool) -> Split:
    unknown = sorted(set(_classes_in(folder)) - set(classes))
    if unknown:
        raise ValueError(f"{folder} holds the classes {', '.join(unknown[:NAMED])}, which train lacks")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images_in(folder / name) if (folder / name).is_dir() else []
        if every and not found:
            raise ValueError(f"{folder / name} holds no image ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(SUFFIXES)}) in a folder of its class")
    return Split(files, torch.tensor(labels))


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
    content = hashlib.blake2b(json.dumps([FORMAT, classes]).encode(), digest_size=16)
    for part, split in splits.items():
        for path, label in zip(split.files, split.labels.tolist(), strict=True):
            facts = path.stat()
            name = path.relative_to(folder).as_posix()
            content.update(json.dumps([part, name, facts.st_size, facts.st_mtime_ns, label]).encode())
    return content.hexdigest()


# ---- the cache: <place>/x_train-<source>.npy, x_test-<source>.npy, and set.json, which is written last


def _array(place: Path, part: str, source: str) -> Path:
    return place / f"x_{part}-{source[:16]}.npy"


def _opened(place: Path, source: str, splits: dict[str, Split]) -> dict[str, StreamedImages] | None:
    """The cached images of exactly these files, None if there are none."""
    try:
        facts = json.loads((place / "set.json").read_text())
        if facts["source"] != source:
            return None
        images = {part: StreamedImages(_array(place, part, source), facts["digests"][part]) for part in splits}
    except (OSError, ValueError, KeyError):
        return None
    whole = all(len(images[part]) == len(split.files) for part, split in splits.items())
    return images if whole else None


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """One process writes a cache, the others wait for it; the lock ends with the process."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = open(place / ".lock", "w")  # noqa: SIM115  # closed below
    except OSError as error:
        raise OSError(f"decoded images cannot be kept in {place} ({error}): give another folder as cache") from error
    with file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(
    place: Path, source: str, splits: dict[str, Split], image_size: tuple[int, int] | None, workers: int, name: str
) -> None:
    (place / "set.json").unlink(missing_ok=True)
    for old in [*place.glob("x_*.npy"), *place.glob(".x_*.npy")]:  # of other files, or of a killed process
        old.unlink()
    size = _first_size(splits["train"].files) if image_size is None else image_size
    needed = sum(len(split.files) for split in splits.values()) * 3 * size[0] * size[1]
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{place} has {free} bytes free, the decoded images need {needed}: give another folder as cache")
    digests = {}
    for part, split in splits.items():
        with atomic(_array(place, part, source)) as temporary:
            digests[part] = _decode(split.files, size, image_size is None, temporary, workers, f"decode {name} {part}")
    write_text(place / "set.json", json.dumps({"source": source, "digests": digests}))


def _first_size(files: list[Path]) -> tuple[int, int]:
    """(H, W) of the first image that can be decoded."""
    for path in files:
        image = _image(path, None)
        if not isinstance(image, str):
            return image.shape[1], image.shape[2]
    raise ValueError(f"none of the {len(files)} training images can be decoded; the first: {_image(files[0], None)}")


def _decode(files: list[Path], size: tuple[int, int], native: bool, out: Path, workers: int, title: str) -> str:
    """Write ``[N, 3, H, W]`` to an ``.npy`` file, return its digest; all of it passes through in chunks."""
    shape = (len(files), 3, *size)
    content = content_hash(torch.uint8, shape)
    failed: list[str] = []
    bar = tqdm(total=len(files), unit="img", desc=title, mininterval=0.1 if sys.stderr.isatty() else 10)
    with bar, out.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        decoded = _decoded(files, None if native else size, workers)
        with contextlib.closing(decoded):
            for path, image in zip(files, decoded, strict=True):
                bar.update()
                if isinstance(image, str):
                    failed.append(image)
                elif image.shape != shape[1:]:
                    got = " x ".join(map(str, image.shape[1:]))
                    raise ValueError(f"{path} has {got} pixels, others {size[0]} x {size[1]}: give image_size=(H, W)")
                elif not failed:
                    pixels = image.tobytes()
                    file.write(pixels)
                    content.update(pixels)
    if failed:
        more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        raise ValueError(
            f"{len(failed)} of {len(files)} images cannot be decoded, replace or remove them: "
            + "; ".join(failed[:NAMED])
            + more
        )
    return content.hexdigest()


def _decoded(files: list[Path], size: tuple[int, int] | None, workers: int) -> Generator[np.ndarray | str, None, None]:
    """Every file's image or what is wrong with it, in order; a bounded number wait."""
    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    workers = min(workers, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield from _decode_chunk(chunk, size)
        return
    # fork where it is usual: a spawned process would import the caller's script again; these touch only Pillow
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting: deque[Future[list[np.ndarray | str]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(_decode_chunk, chunk, size))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _decode_chunk(files: list[Path], size: tuple[int, int] | None) -> list[np.ndarray | str]:
    return [_image(path, size) for path in files]


def _image(path: Path, size: tuple[int, int] | None) -> np.ndarray | str:
    """RGB uint8 [3, H, W], or a sentence that names the file and says what is wrong with it.

    Resized (bilinear, antialiased) until it just covers ``size``, then cropped at the centre, as torchvision's Resize
    and CenterCrop do for squares. Transparency and a camera's note on orientation are ignored.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode not in MODES:
                return f"{path}: its mode is {file.mode}, not one of {', '.join(MODES)}"
            image = file.convert("RGB")
    except Exception as error:  # a broken file can raise anything
        return f"{path}: {error}"
    if size is not None:
        height, width = size
        if height * image.width < width * image.height:  # the width decides
            scaled = width, image.height * width // image.width
        else:
            scaled = image.width * height // image.height, height
        if scaled != image.size:
            image = image.resize(scaled, Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
