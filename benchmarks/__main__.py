"""The benchmarks of speed and robustness, and the pages made from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from purify_fast._files import FolderInUse

from .gpu import gpu_check, instructions, roofline
from .options import Unfit
from .pages import fill
from .robustness import contests, pack_zoo
from .robustness.broken import run_broken
from .robustness.studies import diffusion_picture, run_study
from .robustness.studies.cifar10 import robust_networks
from .robustness.truth import run_truth
from .speed import convolutions, gradient_memory, pipelines, running
from .speed.ops import registry


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        help: one line.
        run: runs the command. Its result is printed, except a bool, which says whether it succeeded.
        arguments: adds its options to a parser.
        check: raises ValueError, FileNotFoundError or ModuleNotFoundError for options that would stop it later.
    """

    help: str
    run: Callable[[argparse.Namespace], object]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    check: Callable[[argparse.Namespace], None] = lambda chosen: None


def _of(module: ModuleType, help: str, checked: bool = False) -> Command:
    """The command of a module: its ``main``, its ``arguments`` if it has options, and if ``checked`` its ``check``."""
    own = {"arguments": module.arguments} if "arguments" in vars(module) else {}
    return Command(help, module.main, **own, **({"check": module.check} if checked else {}))


COMMANDS = {
    "ops": Command(
        "the ops against their references", running.ops_command, partial(running.arguments, known=registry("cuda"))
    ),
    "pipelines": Command(
        "what users run end to end, against a plain implementation",
        running.pipelines_command,
        partial(running.arguments, known=pipelines.registry()),
    ),
    "convolutions": _of(convolutions, "the layers of AToP's generator, ours against PyTorch's"),
    "evaluation": _of(contests, "our attacks against the official AutoAttack: strength and time"),
    "broken": _of(run_broken, "defences that were broken, and honest models: what reports say of them"),
    "truth": _of(run_truth, "how many images that fall each protocol misses, against exact answers"),
    "study": _of(run_study, "what makes a defence robust: trains and attacks models", checked=True),
    "robust_networks": _of(robust_networks, "train a robust network for the contest of attacks"),
    "gpu_check": _of(gpu_check, "what only a GPU can tell: three commands of nine minutes, resumably"),
    "instructions": _of(instructions, "the GPU kernels' machine code, counted without a GPU"),
    "memory": _of(gradient_memory, "memory of the gradient through a diffusion process"),
    "diffusion_picture": _of(diffusion_picture, "an image, noised, denoised step by step and purified"),
    "roofline": _of(roofline, "how long steps should take on an H100: a model, counted"),
    "ship": Command(
        "let what purify-fast tune found on this machine ship with the package", fill.ship, fill.ship_arguments
    ),
    "zoo": _of(pack_zoo, "pack trained models into the zoo, and write their cards", checked=True),
    "report": _of(fill, "the tables and pictures again, from the CSV files"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help))
    chosen = parser.parse_args(arguments)
    command = COMMANDS[chosen.command]
    try:
        command.check(chosen)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        parser.error(str(error))
    try:
        result = command.run(chosen)
    except Unfit as error:
        parser.error(str(error))
    if isinstance(result, bool):
        sys.exit(not result)
    if result is not None:
        print(result)


if __name__ == "__main__":
    try:
        main()
    except FolderInUse as error:
        sys.exit(f"python -m benchmarks: {error}")
