"""``purify-fast recipe``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tyro

from .command import Command


@dataclass(frozen=True)
class ShowRecipe(Command):
    """List the published trainings, or print one: every number with its source and how well it is known."""

    called: ClassVar[str] = "recipe"

    name: tyro.conf.Positional[str | None] = None
    """Which recipe to print, such as atop/cifar_rt2; the names of all by default."""

    def run(self) -> None:
        from ..methods.recipes import RECIPES, recipe

        if self.name is not None:
            print(recipe(self.name))
            return
        width = max(map(len, RECIPES))
        for name, made in RECIPES.items():
            print(f"{name.ljust(width)}  {made.title}")
        print("`purify-fast recipe NAME` prints one; `purify-fast train METHOD --recipe NAME` trains by it.")
