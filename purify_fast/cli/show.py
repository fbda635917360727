"""The short commands ``purify-fast recipe``, ``zoo``, ``info`` and ``tune``."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
import tyro

from .. import _library
from .._places import usable_device
from .._templates import render
from .._version import __version__
from ..judge.show.text import terminal_table
from ..ops import REGISTRY
from ..ops.dispatch import records
from ..ops.dispatch.choices import in_words
from ..ops.dispatch.registry import Op, forced_backends, sizes_here
from ..ops.dispatch.verify import known_verdict
from .command import Command


@dataclass(frozen=True)
class ShowRecipe(Command):
    """List the recipes, which are the settings of published trainings and purifiers, or print a recipe.

    A printed recipe has the source of each number, and a grade that says how certain the number is.

    Args:
        name: Name of the recipe to print, such as atop/cifar_rt2. Default: the names of all recipes are listed.
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
            "`purify-fast recipe NAME` prints a recipe. `purify-fast train METHOD --recipe NAME` trains with a recipe, "
            "if it is a training."
        )


@dataclass(frozen=True)
class Zoo(Command):
    """List the trained models of the zoo, or print the description of a model.

    Args:
        name: Name of the model to describe. Default: a table of all models.
    """

    called: ClassVar[str] = "zoo"

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

    all: bool = False

    def run(self) -> None:

        print(info(self.all))


@dataclass(frozen=True)
class Tune(Command):
    """Time the kernels on this machine against PyTorch, in some minutes. Later runs use the faster of the two.

    Every kernel is verified first. The smallest size from which on each kernel is faster is saved for this device and
    these versions, in the folder that `info` names. Run this command on a machine that does nothing else.

    Args:
        device: Device whose kernels are timed: cpu or cuda. auto: a GPU if there is any.
        ops: Names of the ops to time, as `info` lists them. Default: all ops that have a kernel for this device.
    """

    called: ClassVar[str] = "tune"

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


# -- makes the text of ``purify-fast info``: versions, the build of the extension, and the backend of each op ----------

#: The words for a kernel that failed its verification.
WRONG = "WRONG here"


def _devices() -> dict[str, torch.device]:
    devices = {"cpu": torch.device("cpu")}
    if torch.cuda.is_available():
        devices["cuda"] = torch.device("cuda", torch.cuda.current_device())
    return devices


def _state(op: Op, kind: str) -> tuple[str, str, str]:
    """Three texts: the backends of an op in eager calls, those in compiled graphs, and why. No kernel is verified."""
    try:
        forced = op.forced(kind)
    except RuntimeError as error:
        return "nothing", "nothing", str(error)
    if forced is not None:
        return forced, forced, "forced"
    if op.kernel(kind) == "reference":
        missing = "there is no kernel" if _library.loaded() else "the extension is not loaded"
        return "reference", "reference", missing
    present = _devices().get(kind)
    verdict = None if present is None else known_verdict(op, present)
    if verdict is not None and not verdict.passed:
        return "reference", "reference", f"the {op.kernel(kind)} kernel is {WRONG}: {verdict.words()}; please report it"
    device = torch.device(kind) if present is None else present
    sizes, why = sizes_here(op.name, device)
    eager = in_words(op, op.kernel(kind), sizes)
    graph = in_words(op, op.kernel(kind), dict.fromkeys(op.in_graphs.get(kind, ()), 0))
    return eager, graph, f"{why}; {verdict.words() if verdict else 'verified at first use'}"


def info(everything: bool) -> str:
    """The text of the command ``info``: versions, devices, how many ops kernels compute, and wrong kernels."""
    states = {kind: {name: _state(op, kind) for name, op in REGISTRY.items()} for kind in ("cpu", "cuda")}
    body = [
        (name if kind == "cpu" else "", kind, ", ".join(exists), *states[kind][name])
        for name, op in REGISTRY.items()
        for kind, exists in op.available.items()
    ]
    return render(
        __package__,
        "info.txt.jinja",
        all=everything,
        version=__version__,
        folder=Path(__file__).parents[1],
        python=platform.python_version(),
        torch=torch,
        triton=records.triton_version() or "not installed",
        processor=records.processor(),
        gpus=[torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())],
        library=_library,
        states={kind: states[kind] for kind in _devices()},
        wrong=WRONG,
        forced=forced_backends(),
        verdicts=records.folder(),
        environment=[f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith("PURIFY_FAST_")],
        table=terminal_table(["op", "device", "available", "eager", "in graphs", "why"], body),
    )
