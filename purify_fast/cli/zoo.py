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
        from .. import zoo
        from ..evaluation.show.tables import color_is_welcome, terminal_table

        if self.name is not None:
            print(zoo.card(self.name))
            return
        cards = [zoo.card(name) for name in zoo.list()]
        protocols = list(dict.fromkeys(protocol for card in cards for protocol in card.attacked))
        body = []
        for card in cards:
            figures = [card.clean, *(card.attacked.get(protocol) for protocol in protocols)]
            shares = ["-" if it is None else f"{100 * it.share:.1f}{'' if it.reliable else ' ?'}" for it in figures]
            body.append([card.name, card.data, f"{card.norm} {card.eps:.3g}", *shares])
        head = ["name", "data", "attacks", "clean, %", *(f"{protocol}, %" for protocol in protocols)]
        print(terminal_table(head, body, color_is_welcome()))
        print("A number with ? is unreliable: the checks of its evaluation found a reason to doubt it.")
        print("`purify-fast zoo NAME` prints a model's card; `purify-fast evaluate zoo:NAME` attacks it.")
