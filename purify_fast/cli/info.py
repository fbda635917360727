"""``purify-fast info``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .command import Command


@dataclass(frozen=True)
class Info(Command):
    """Print versions, the build, and which backend serves which op."""

    called: ClassVar[str] = "info"

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .installation import report

        print(report())
