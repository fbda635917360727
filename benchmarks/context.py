"""What a section of the check of a GPU is given, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import report

PASSED, FAILED, NOT_AVAILABLE = "passed", "failed", "not available"


@dataclass(frozen=True)
class Context:
    """What a section is given.

    Attributes:
        out: the folder of the device's results.
        device: what is checked.
        dry: whether this rehearses on a CPU, where everything is small and no number means anything.
        seconds: how long the section may take.
        tell: is told the share that is done, and of what.
        data: where CIFAR-10 is: a folder, or an ``.npz`` file; None for the current folder.
        started: when it began, on the monotonic clock.
    """

    out: Path
    device: torch.device
    dry: bool
    seconds: float
    tell: Callable[[float, str], None]
    data: Path | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)


@dataclass
class Outcome:
    state: str
    summary: str
    details: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def measured(context: Context, file: str, work: dict[str, Callable[[], list[dict]]]) -> tuple[list[dict], Outcome]:
    """Measure what a file lacks, one part after the other, and write the file after each of them.

    Args:
        context: of the section.
        file: in the folder of the device.
        work: by the name of a part, which its rows have in the column ``part``, what measures it.

    Returns:
        All rows, and what became of the parts: those that fail end no other, those that the time does not suffice for
        are left out.
    """
    path, errors, left_out = context.out / file, {}, []
    rows: list[dict] = list(report.rows_of(path))
    there = {row["part"] for row in rows}
    for index, (part, measure) in enumerate(work.items()):
        if part in there:
            continue
        if context.left < 0:
            left_out.append(part)
            continue
        context.tell(index / len(work), part)
        try:
            rows += [{"part": part, **row} for row in measure()]
        except Exception as error:
            errors[part] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        report.write_csv(path, rows)
    done = len({row["part"] for row in rows})
    summary = f"{done} of {len(work)} parts measured, {len(errors)} with an error, {len(left_out)} left out"
    return rows, Outcome(PASSED if done and not errors else FAILED, summary, {"errors": errors}, left_out)
