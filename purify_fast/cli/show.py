"""The short commands ``purify-fast recipe``, ``zoo``, ``info`` and ``tune``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import tyro

from .._files import usable_device
from .command import Command


@dataclass(frozen=True)
class ShowRecipe(Command):
    """List the recipes, which are the settings of published trainings and purifiers, or print a recipe.

    A printed recipe has all values, and the differences between this package and the publication.

    Args:
        name: Name of the recipe to print, such as atop/cifar_rt2. Default: the names of all recipes are listed.
    """

    called: ClassVar[str] = "recipe"
    example: ClassVar[str] = "carso/cifar10"

    name: tyro.conf.Positional[str | None] = None

    def run(self) -> None:
        from ..methods.recipes import all_recipes, recipe

        if self.name is not None:
            print(recipe(self.name))
            return
        width = max(map(len, all_recipes()))
        for name, published in all_recipes().items():
            print(f"{name.ljust(width)}  {published.title}")
        print("`purify-fast recipe NAME` prints a recipe. `purify-fast train METHOD --recipe NAME` trains with one.")


@dataclass(frozen=True)
class Zoo(Command):
    """List the trained models of the zoo, or print the description of a model.

    Args:
        name: Name of the model to describe. Default: a table of all models.
    """

    called: ClassVar[str] = "zoo"
    example: ClassVar[str] = "digits-pgd-at"

    name: tyro.conf.Positional[str | None] = None

    def run(self) -> None:
        from .. import zoo
        from ..judge.show.text import terminal_table

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
        print(terminal_table(head, body))
        print("A number with ? is unreliable: the checks of its evaluation found a reason to doubt it.")
        print("Protocols ran on different numbers of images, so compare numbers within a column.")
        print("`purify-fast zoo NAME` describes a model, and `purify-fast evaluate zoo:NAME` attacks it.")


@dataclass(frozen=True)
class Info(Command):
    """Print the versions, the build, and how many ops are computed by kernels.

    Args:
        all: Print also the environment, and for each op its implementation and the reason.
    """

    called: ClassVar[str] = "info"
    example: ClassVar[str] = "--all"

    all: bool = False

    def run(self) -> None:
        from .installation import info

        print(info(self.all))


@dataclass(frozen=True)
class Tune(Command):
    """Time the kernels on this machine against PyTorch, in some minutes. Later runs use the faster of the two.

    Every kernel is verified first. The smallest size from which on each kernel is faster is saved for this device and
    these versions, in the folder that `info --all` names. Run this command on a machine that does nothing else.

    Args:
        device: Device whose kernels are timed: cpu or cuda. auto: a GPU if there is any.
        ops: Names of the ops to time, as `info --all` lists them. Default: all ops that have a kernel for this device.
    """

    called: ClassVar[str] = "tune"
    example: ClassVar[str] = "--device cpu"

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ops: tuple[str, ...] = ()

    def run(self) -> None:
        import torch

        from ..judge.show.text import terminal_table
        from ..ops.dispatch.records import file_of
        from ..ops.dispatch.registry import sizes_here
        from ..ops.dispatch.tuning import SIZES, tune

        device = torch.device(usable_device(self.device))
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        speedups, failed = tune(device, self.ops)
        sizes, body = SIZES[device.type], []
        for (op, variant), speedup in speedups.items():
            smallest = sizes_here(op, device)[0][variant]
            cells = (f"{speedup[size]:.2f}" if size in speedup else "-" for size in sizes)
            body.append([op, variant, *cells, "never" if smallest is None else f"{smallest:,}"])
        print("How many times as fast as PyTorch each kernel is, by the number of elements:")
        print(terminal_table(["op", "variant", *(f"{size:,}" for size in sizes), "kernel runs from"], body))
        for name, why in failed.items():
            print(f"not timed: {name}: {why}")
        print(f"The last column is saved in {file_of(device)}")
