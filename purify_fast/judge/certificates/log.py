"""`Log`: a line for each image, in the format of Cohen et al.'s code (locuslab/smoothing) and of papers after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._files import write_text

#: The columns of a file, in the order of the fields of `Log`. Files of other programs end after the first six.
COLUMNS = ("idx", "label", "predict", "radius", "correct", "time", "tested", "right", "draws")
PUBLIC = 6


@dataclass(frozen=True, eq=False)
class Log:
    """The certified images of a data set, each array ``[N]``.

    Attributes:
        index: the image's index in the data set.
        label: its label; -1 if it is unknown.
        predicted: the class that is proved; -1 where the classifier abstains.
        radius: the L2 radius of the predicted class, which may be wrong; 0 where the classifier abstains.
        correct: whether the predicted class is the label.
        seconds: the time of the image's draws.
        tested: the class of which draws are counted; in files of other programs, the predicted class.
        right: the draws with this class; 0 in files of other programs.
        draws: all draws; 0 in files of other programs.
    """

    index: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]
    seconds: NDArray[np.float64]
    tested: NDArray[np.int64]
    right: NDArray[np.int64]
    draws: NDArray[np.int64]

    @property
    def acr(self) -> float:
        """The average certified radius, in which an image with a wrong class or none counts 0."""
        if (self.label < 0).any():
            raise ValueError("acr needs the labels of all images")
        return float((self.radius * self.correct).mean())

    def accuracy_at(self, radii: Any) -> NDArray[np.float64]:
        """The certified accuracy at radii: the shares of images with the right class and at least this radius."""
        return np.asarray((self.correct & (self.radius >= np.asarray(radii)[:, None])).mean(1))

    def write(self, path: str | Path) -> None:
        """Write the lines to a file, atomically. Radii have all digits of float64."""
        times = [f"{s // 3600:.0f}:{s % 3600 // 60:02.0f}:{s % 60:09.6f}" for s in self.seconds.tolist()]
        columns = [getattr(self, field.name).tolist() for field in fields(self)]
        columns[4:6] = [list(map(int, columns[4])), times]
        lines = ["\t".join(COLUMNS), *("\t".join(map(str, line)) for line in zip(*columns, strict=True))]
        write_text(Path(path), "\n".join(lines) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Log:
        """Read a file, with the counts or without.

        Raises:
            ValueError: the file has other columns, or a value that is not allowed.
        """
        head, *lines = (line.split("\t") for line in Path(path).read_text(encoding="utf-8").splitlines())
        if tuple(head) not in (COLUMNS, COLUMNS[:PUBLIC]) or any(len(line) != len(head) for line in lines) or not lines:
            raise ValueError(f"{path} must have lines with the columns {', '.join(COLUMNS)}, or the first {PUBLIC}")
        texts = [*zip(*lines, strict=True)]
        try:
            index, label, predicted, radius, correct, seconds, *counts = map(np.array, map(_column, head, texts))
        except ValueError as error:
            raise ValueError(f"{path} has a value that is not allowed: {error}") from error
        counts = counts or [predicted, np.zeros_like(index), np.zeros_like(index)]
        return cls(
            index, label, predicted, radius, correct == 1, seconds, **dict(zip(COLUMNS[PUBLIC:], counts, strict=True))
        )


def _column(name: str, texts: Sequence[str]) -> list[Any]:
    if name == "time":
        return [sum(float(part) * 60**place for place, part in enumerate(text.split(":")[::-1])) for text in texts]
    return [*map(float if name == "radius" else int, texts)]
