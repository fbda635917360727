"""The commands that show something: ``purify-fast demo``, ``recipe``, ``report``, ``zoo`` and ``info``."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from .command import Command
from .run_file import report_file


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


@dataclass(frozen=True)
class ShowRecipe(Command):
    """List the published trainings and purifiers, or print one: every number with its source, and how sure it is.

    Args:
        name: Which recipe to print, such as atop/cifar_rt2; the names of all by default.
    """

    called: ClassVar[str] = "recipe"

    name: tyro.conf.Positional[str | None] = None

    def run(self) -> None:
        from ..methods.recipes import RECIPES, recipe

        if self.name is not None:
            print(recipe(self.name))
            return
        width = max(map(len, RECIPES))
        for name, published in RECIPES.items():
            print(f"{name.ljust(width)}  {published.title}")
        print(
            "`purify-fast recipe NAME` prints it; `purify-fast train METHOD --recipe NAME` trains by those that train."
        )


@dataclass(frozen=True)
class ShowReport(Command):
    """Open the HTML page of an evaluation in a browser.

    Args:
        folder: The folder of a report, or of a run that was evaluated.
        open: Whether to open the page; otherwise its path is printed alone.
    """

    called: ClassVar[str] = "report"

    folder: tyro.conf.Positional[Path] = Path("runs/carso/evaluation")
    open: bool = True

    def run(self) -> None:
        page = report_file(self.folder, "report.html")
        print(page)
        if self.open:
            webbrowser.open(page.resolve().as_uri())


@dataclass(frozen=True)
class Zoo(Command):
    """List the trained models that come with the package, or print the card of one.

    Args:
        name: Which model's card to print; all models in a table by default.
    """

    called: ClassVar[str] = "zoo"

    name: tyro.conf.Positional[str | None] = None

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


@dataclass(frozen=True)
class Info(Command):
    """Print versions, the build, and how many ops kernels serve; --all adds the kernel of each op, and why it serves.

    Args:
        all: Whether to print everything: the build, the environment, and for each op who serves it and why.
    """

    called: ClassVar[str] = "info"

    all: bool = False

    def run(self) -> None:
        from .installation import info

        print(info(self.all))
