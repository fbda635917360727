"""``purify-fast info``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .command import Command


@dataclass(frozen=True)
class Info(Command):
    """Print versions, what was built, and how many ops kernels serve; with --all which one serves which op, and why."""

    called: ClassVar[str] = "info"

    all: bool = False
    """Whether to print everything: the build, the environment, and for each op who serves it and why."""

    def run(self) -> None:
        from .installation import report, summary

        print(report() if self.all else summary())
