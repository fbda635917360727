"""The benchmarks of speed and robustness, and the pages made from them."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

from purify_fast._files import FolderInUse

from .gpu import gpu_check, instructions, roofline
from .options import Unfit, add_device
from .pages import fill
from .robustness import contests, pack_zoo
from .robustness.broken import run_broken
from .robustness.studies import diffusion_picture, run_study
from .robustness.studies.cifar10 import robust_networks
from .robustness.truth import run_truth
from .speed import convolutions, gradient_memory, pipelines, running
from .speed.ops import registry

_ops = SimpleNamespace(main=running.ops_command, arguments=partial(running.arguments, known=list(registry("cuda"))))
_pipelines = partial(running.arguments, known=list(pipelines.registry()))
#: The commands, each with a line of help. A module has the function ``main``, whose result is printed, except a bool,
#: which says whether it succeeded. It may have a function ``arguments`` that adds options to a parser.
COMMANDS: dict[str, tuple[Any, str]] = {
    "ops": (_ops, "the ops against their references"),
    "pipelines": (
        SimpleNamespace(main=running.pipelines_command, arguments=_pipelines),
        "whole predictions and training steps, against a plain implementation",
    ),
    "convolutions": (convolutions, "the layers of AToP's generator, ours against PyTorch's"),
    "evaluation": (contests, "our attacks against the official AutoAttack, by strength and time"),
    "broken": (run_broken, "the reports on rebuilt defences that were broken, and on honest models"),
    "truth": (run_truth, "the images that each protocol misses, by exact answers"),
    "study": (run_study, "studies of robustness, which train and attack models"),
    "robust_networks": (robust_networks, "train a robust network for the contest of attacks"),
    "gpu_check": (gpu_check, "the checks that need a GPU, in three resumable commands of nine minutes"),
    "instructions": (instructions, "the GPU kernels' machine code, counted without a GPU"),
    "memory": (gradient_memory, "memory of the gradient through a diffusion process"),
    "diffusion_picture": (diffusion_picture, "an image, noised, denoised step by step and purified"),
    "roofline": (roofline, "a counted model of the time of an attack's step on an H100"),
    "ship": (
        SimpleNamespace(main=fill.ship, arguments=add_device),
        "let what purify-fast tune found on this machine ship with the package",
    ),
    "zoo": (pack_zoo, "pack trained models into the zoo, and write their cards"),
    "report": (fill, "write the tables and pictures again from the results files"),
}
#: Modules whose function ``check`` refuses options that would stop the command later, and the types of its errors.
CHECKED, REFUSALS = (run_study, pack_zoo), (ValueError, FileNotFoundError, ModuleNotFoundError)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        own = commands.add_parser(name, help=text)
        if hasattr(module, "arguments"):
            module.arguments(own)
    chosen = parser.parse_args(arguments)
    module, _ = COMMANDS[chosen.command]
    try:
        if module in CHECKED:
            module.check(chosen)
    except REFUSALS as error:
        parser.error(str(error))
    try:
        result = module.main(chosen)
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
