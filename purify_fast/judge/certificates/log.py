"""Logs of certificates: a line for each image, in the format of Cohen et al.'s code (locuslab/smoothing)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._files import write_text

#: The index in the data set; the label, -1 if it is unknown; the proved class, -1 where the classifier abstains; its L2
#: radius, also of a wrong class; 1 if it is the label; and the time of the draws. Files of other programs end here. The
#: tested class, the draws with this class, and the draws that count.
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time", "tested", "right", "draws")
PUBLIC = 6


def write_log(path: str | Path, log: dict[str, NDArray[Any]]) -> None:
    """Write the columns ``[N]`` to a file, atomically. Radii have all digits of float64; times are in seconds."""
    times = [f"{s // 3600:.0f}:{s % 3600 // 60:02.0f}:{s % 60:09.6f}" for s in log["time"].tolist()]
    columns = [times if name == "time" else map(str, log[name].tolist()) for name in COLUMNS]
    write_text(Path(path), "\n".join(map("\t".join, [COLUMNS, *zip(*columns, strict=True)])) + "\n")


def read_log(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read a log of this package or of another program. Return the columns ``[N]`` by name; times are in seconds.

    Raises:
        ValueError: the file has other columns, or a value that is not allowed.
    """
    head, *lines = (line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines())
    if tuple(head) not in (COLUMNS, COLUMNS[:PUBLIC]) or any(len(line) != len(head) for line in lines) or not lines:
        raise ValueError(f"{path} must have lines with the columns {', '.join(COLUMNS)}, or the first {PUBLIC}")
    kinds: dict[str, Any] = {"radius": float, "time": _seconds}
    columns = zip(head, *lines, strict=True)
    try:
        return {name: np.array([*map(kinds.get(name, int), column)]) for name, *column in columns}
    except ValueError as error:
        raise ValueError(f"{path} has a value that is not allowed: {error}") from error


def _seconds(text: str) -> float:
    return sum(float(part) * 60**place for place, part in enumerate(reversed(text.split(":"))))
