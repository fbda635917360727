"""The benchmarks of speed and robustness, and the pages made from them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from purify_fast._files import FolderInUse

from .gpu import gpu_check, instructions, roofline
from .pages import fill
from .robustness import contests, pack_zoo
from .robustness.broken import run_broken as broken
from .robustness.studies import Unfit, diffusion_picture
from .robustness.studies import run_study as studies
from .robustness.studies.cifar10 import robust_networks
from .robustness.truth import run_truth as truth
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


COMMANDS = {
    "ops": Command(
        "the ops against their references", running.ops_command, partial(running.arguments, known=registry("cuda"))
    ),
    "pipelines": Command(
        "what users run end to end, against a plain implementation",
        running.pipelines_command,
        partial(running.arguments, known=pipelines.registry()),
    ),
    "convolutions": Command(
        "the layers of AToP's generator, ours against PyTorch's", convolutions.main, convolutions.arguments
    ),
    "evaluation": Command(
        "our attacks against the official AutoAttack: strength and time", contests.main, contests.arguments
    ),
    "broken": Command(
        "defences that were broken, and honest models: what reports say of them", broken.main, broken.arguments
    ),
    "truth": Command(
        "how many images that fall each protocol misses, against exact answers", truth.main, truth.arguments
    ),
    "study": Command(
        "what makes a defence robust: trains and attacks models", studies.main, studies.arguments, studies.check
    ),
    "robust_networks": Command(
        "train a robust network for the contest of attacks", robust_networks.main, robust_networks.arguments
    ),
    "gpu_check": Command(
        "what only a GPU can tell: three commands of nine minutes, resumably", gpu_check.main, gpu_check.arguments
    ),
    "instructions": Command("the GPU kernels' machine code, counted without a GPU", instructions.main),
    "memory": Command(
        "memory of the gradient through a diffusion process", gradient_memory.main, gradient_memory.arguments
    ),
    "diffusion_picture": Command("an image, noised, denoised step by step and purified", diffusion_picture.main),
    "roofline": Command("how long steps should take on an H100: a model, counted", roofline.main, roofline.arguments),
    "ship": Command(
        "let what purify-fast tune found on this machine ship with the package", fill.ship, fill.ship_arguments
    ),
    "zoo": Command(
        "pack trained models into the zoo, and write their cards", pack_zoo.main, pack_zoo.arguments, pack_zoo.check
    ),
    "report": Command("the tables and pictures again, from the CSV files", fill.main, fill.arguments),
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
