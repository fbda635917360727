"""What a long run will take, told before it: time, memory, and what it asks of the device."""

from __future__ import annotations

from dataclasses import dataclass

from .counting import GPUS, Cost


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Args:
        what: the run, for the table's title.
        cost: of the whole run, of all processes together.
        memory: bytes at its peak: on a CPU of the process, on a GPU of tensors.
        seconds: on this machine's CPU, by a probe; None for a GPU, whose time follows from the cost.
        gpu: a name of `purify_fast.speed.counting.GPUS`; None: this CPU.
        gpus: how many share the work.
        precision: of the products on a GPU, "bfloat16" or "tf32".
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
        if self.seconds is not None:
            return self.seconds
        assert self.gpu is not None
        gpu = GPUS[self.gpu]
        return self.cost.seconds(gpu, gpu.bfloat16 if self.precision == "bfloat16" else gpu.tf32) / self.gpus

    def to_text(self) -> str:
        """A small table, and a sentence on what it rests on."""
        rows = {
            "FLOP of products": f"{self.cost.flop:.3g}",
            "bytes moved": f"{self.cost.bytes:.3g}",
            "operators launched": f"{self.cost.launches:.3g}",
            "memory at the peak": f"{self.memory / 1e9:.2f} GB",
            "time": in_words(self.time),
        }
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


def in_words(seconds: float) -> str:
    """A time that a person can plan with."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
