"""``purify-fast zoo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tyro

from .command import Command


@dataclass(frozen=True)
class Zoo(Command):
    """List the trained models that come with the package, or print the card of one."""

    called: ClassVar[str] = "zoo"

    name: tyro.conf.Positional[str | None] = None
    """Which model's card to print; all models in a table by default."""

    def run(self) -> None:
        # PyTorch takes 1.8 seconds to import: --help does without it
        from .. import zoo
        from ..evaluation.tables import color_is_welcome, terminal_table

        if self.name is not None:
            print(zoo.card(self.name))
            return
        body = []
        for name in zoo.list():
            card = zoo.card(name)
            ball = f"{card.norm} {card.eps:.3g}"
            body.append([name, card.data, ball, f"{100 * card.clean.share:.1f}", f"{100 * card.lowest.share:.1f}"])
        print(terminal_table(["name", "data", "attacks", "clean, %", "attacked, %"], body, color_is_welcome()))
        print("`purify-fast zoo NAME` prints a model's card; `purify-fast evaluate zoo:NAME` attacks it.")
