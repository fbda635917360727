"""Describe the expected time and memory of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """The expected time and memory of a run.

    Args:
        what: description of the run, for the first line.
        seconds: time of the whole run.
        memory: largest memory in bytes: that of the process on a CPU, or that of tensors on a GPU.
    """

    what: str
    seconds: float
    memory: float

    def to_text(self) -> str:
        """A small table, and a sentence that says how its numbers were obtained."""
        return (
            f"{self.what}:\n"
            f"time                {in_words(self.seconds)}\n"
            f"memory at the peak  {self.memory / 1e9:.2f} GB\n"
            "(Both follow from a short trial on this machine.)"
        )


def in_words(seconds: float) -> str:
    """A time as a text, in seconds, minutes or hours."""
    if seconds < 1:
        return "under a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
