"""The forecast of a long run: time, memory, and the work that it asks of the device."""

from __future__ import annotations

from dataclasses import dataclass

from .counting import GPUS, Cost


@dataclass(frozen=True)
class Forecast:
    """The cost of a run.

    Args:
        what: the run, for the table's title.
        cost: cost of the whole run, of all processes together.
        memory: bytes at its peak: on a CPU of the process, on a GPU of tensors.
        seconds: on this machine's CPU, by a probe; None for a GPU, whose time follows from the cost.
        gpu: a name of `purify_fast.speed.counting.GPUS`; None: this CPU.
        gpus: how many share the work.
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
        """Seconds of the whole run."""
        return self._limit()[1] if self.seconds is None else self.seconds

    def _limit(self) -> tuple[str, float]:
        """The slowest part of the GPUs' work, in a word, and its seconds."""
        assert self.gpu is not None
        gpu = GPUS[self.gpu]
        limit, seconds = self.cost.limit(gpu, gpu.bfloat16 if self.precision == "bfloat16" else gpu.tf32)
        return limit, seconds / self.gpus

    def to_text(self) -> str:
        """A small table, and a sentence on what it rests on."""
        rows = {"products": f"{amount(self.cost.flop)} FLOP", "bytes moved": amount(self.cost.bytes)}
        time = in_words(self.time)
        if self.seconds is None:
            rows["operators launched"] = amount(self.cost.launches)
            time += f", limited by {self._limit()[0]}"
        rows |= {"memory at the peak": f"{self.memory / 1e9:.2f} GB", "time": time}
        width = max(map(len, rows))
        basis = "the time and the memory are measured on a few steps here, and continued in a straight line"
        if self.seconds is None:
            others = "" if self.gpus == 1 else f", shared evenly by {self.gpus}"
            basis = (
                f"counted here and modelled for {self.gpu}{others}: the longest of launching, moving bytes and "
                f"products ({self.precision}). No such time has been measured"
            )
        lines = [f"{name.ljust(width)}  {value}" for name, value in rows.items()]
        return "\n".join([f"{self.what}:", *lines, f"({basis}.)"])


def amount(value: float) -> str:
    """A large number in words, such as "230 thousand"; three digits of it."""
    words = ("", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion", " sextillion")
    # Numbers from 999,500 on are written as 1 million.
    power = next((i for i in range(len(words)) if value < 999.5 * 1000**i), len(words) - 1)
    return f"{value / 1000**power:.3g}{words[power]}"


def in_words(seconds: float) -> str:
    """A time that a person can plan with."""
    if seconds < 1:
        return "under a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
