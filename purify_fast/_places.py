"""Checks of folders, devices and the shapes of stored tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def check_folder(name: str, path: str | Path | None) -> None:
    """Raise a ValueError if the path of a folder, or one of its parents, is a file."""
    if path is None:
        return
    for place in (Path(path), *Path(path).parents):
        # `exists` comes first: a folder that is created between the calls would otherwise be taken for a file.
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{name} must be a folder, got {path}: {place} is a file")
            return


#: The files by which `what_is` knows a folder, and what they show. A finished work has all files of an unfinished one.
CHECKPOINT, MODEL, REPORT = "checkpoint.safetensors", "model.safetensors", "report.json"
KINDS = {
    REPORT: "holds a report",
    "certificates.json": "holds certificates",
    MODEL: "holds a model",
    CHECKPOINT: "holds an unfinished training, which `purify-fast train --resume {}` continues",
    "log.jsonl": "holds a training without a checkpoint so far, which `purify-fast train --resume {}` begins anew",
    "rows": "holds an unfinished evaluation, which the same command continues",
    "train": "holds images for --data",
}


def what_is(folder: str | Path) -> str:
    """Say what a folder holds, as the end of a sentence that begins with the folder."""
    place = Path(folder)
    if not place.exists():
        return "does not exist"
    if not place.is_dir():
        return "is a file"
    found = (text for name, text in KINDS.items() if (place / name).exists())
    return next(found, "holds no file of a training or an evaluation").format(place)


def usable_device(name: str) -> str:
    """Check the name of a device, and replace "auto" by "cuda" or "cpu"."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: give auto, cpu, cuda or cuda:N") from error
    return name


def check_shapes(what: str, shapes: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise an error if tensors are missing, unknown or have a wrong shape."""
    missing = [f"{name} is missing" for name in sorted(wanted.keys() - shapes.keys())]
    unknown = [f"{name} is unknown" for name in sorted(shapes.keys() - wanted.keys())]
    other = [
        f"{name} is {list(shapes[name])}, must be {list(wanted[name])}"
        for name in sorted(wanted.keys() & shapes.keys())
        if tuple(shapes[name]) != tuple(wanted[name])
    ]
    first = [problem for problems in (missing, unknown, other) for problem in problems[:3]]
    if first:
        count = len(missing + unknown + other) - len(first)
        raise ValueError(f"{what}: {'; '.join(first)}{f', and {count} more' if count else ''}")
