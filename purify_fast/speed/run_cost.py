"""Predict the cost of a run: its time, its memory, and its numbers of operators, bytes and FLOP."""

from __future__ import annotations

from dataclasses import dataclass

from .counting import GPUS, Cost


@dataclass(frozen=True)
class Forecast:
    """The predicted cost of a run.

    Args:
        what: description of the run, for the title of the table.
        cost: cost of the whole run, in all processes together.
        memory: peak of memory in bytes: that of the process on a CPU, or that of tensors on a GPU.
        seconds: time on the CPU of this machine, from a short measurement; None for a GPU, whose time is computed from
            the cost.
        gpu: name of a GPU in `purify_fast.speed.counting.GPUS`; None: the CPU of this machine.
        gpus: number of GPUs that share the work.
        precision: precision of the products on a GPU, "bfloat16" or "tf32".
    """

    what: str
    cost: Cost
    memory: float
    seconds: float | None = None
    gpu: str | None = None
    gpus: int = 1
    precision: str = "tf32"

    @property
    def time(self) -> float:
        """The seconds of the whole run."""
        return self._limit()[1] if self.seconds is None else self.seconds

    def _limit(self) -> tuple[str, float]:
        """The name and the seconds of the slowest part of the work on GPUs."""
        assert self.gpu is not None
        gpu = GPUS[self.gpu]
        limit, seconds = self.cost.limit(gpu, gpu.bfloat16 if self.precision == "bfloat16" else gpu.tf32)
        return limit, seconds / self.gpus

    def to_text(self) -> str:
        """A small table, and a sentence that says how its numbers were obtained."""
        rows = {"products": f"{amount(self.cost.flop)} FLOP", "bytes moved": amount(self.cost.bytes)}
        time = in_words(self.time)
        if self.seconds is None:
            rows["operators launched"] = amount(self.cost.launches)
            time += f", limited by {self._limit()[0]}"
        rows |= {"memory at the peak": f"{self.memory / 1e9:.2f} GB", "time": time}
        width = max(map(len, rows))
        basis = "The time and the memory were measured on a few steps here, and extrapolated linearly"
        if self.seconds is None:
            others = "" if self.gpus == 1 else f", with the work shared evenly by {self.gpus} GPUs"
            basis = (
                f"The operations were counted here. The time is computed for {self.gpu}{others}: it is the longest of "
                f"launching, moving bytes and products ({self.precision}). It has not been measured"
            )
        lines = [f"{name.ljust(width)}  {value}" for name, value in rows.items()]
        return "\n".join([f"{self.what}:", *lines, f"({basis}.)"])


def amount(value: float) -> str:
    """A number with three digits and a word, such as "230 thousand"."""
    words = ("", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion", " sextillion")
    # Numbers from 999,500 on are written as 1 million.
    power = next((i for i in range(len(words)) if value < 999.5 * 1000**i), len(words) - 1)
    return f"{value / 1000**power:.3g}{words[power]}"


def in_words(seconds: float) -> str:
    """A time as a text, in seconds, minutes or hours."""
    if seconds < 1:
        return "under a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
