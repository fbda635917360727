"""``purify-fast demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .command import Command


@dataclass(frozen=True)
class Demo(Command):
    """Train and attack ten models on digits; prints a table, writes a report with pictures. Resumes where it was.

    Args:
        out: The folder for models, reports and pictures.
        quick: The same path in about a minute, with numbers that mean nothing; writes to OUT-quick.
        seed: Seed of everything random.
    """

    called: ClassVar[str] = "demo"

    out: Path = Path("runs/demo")
    quick: bool = False
    seed: int = 0

    def writes(self) -> Path:
        return self.out.with_name(self.out.name + "-quick") if self.quick else self.out

    def run(self) -> None:
        from .. import demo

        demo.run(self.out, self.quick, self.seed)
