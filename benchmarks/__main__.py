"""Measure the package's speed and robustness, and write the pages of the results."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from purify_fast._files import FolderInUse

from .gpu import gpu_check, gpu_lease
from .pages import fill
from .robustness import answer, contests, errors, pack_zoo
from .robustness.broken import run_broken
from .robustness.studies import papers_questions
from .robustness.truth import run_truth
from .speed import kernel_times, running
from .speed.elsewhere import measuring as elsewhere

#: For each command, a module and the help text. The module's ``main`` runs the command: a text or a path that it
#: returns is printed, and False means failure. Its ``arguments`` adds options to a parser.
COMMANDS: dict[str, tuple[Any, str]] = {
    "ops": (running.OPS, "measure the speed of the ops, compared with their references in PyTorch"),
    "kernels": (
        kernel_times,
        "time the kernels as purify-fast tune does; the flags of the ops follow from these times",
    ),
    "pipelines": (running.PIPELINES, "measure whole predictions and training steps, compared with plain code"),
    "elsewhere": (elsewhere, "measure loops of other papers and packages: theirs, an expert's, and with this package"),
    "evaluation": (contests, "compare our attacks with the official AutoAttack, by strength and time"),
    "answer": (answer, "measure what the robust accuracy of a network costs, beside AutoAttack as an expert runs it"),
    "errors": (errors, "compare the printed errors of random models with the spread of their numbers"),
    "broken": (run_broken, "evaluate rebuilt defences that were broken, and models that are robust as claimed"),
    "truth": (run_truth, "count the adversarial examples that each protocol misses, on exactly solved networks"),
    "study": (papers_questions, "train and attack small models for the questions that the papers leave open"),
    "gpu_check": (gpu_check, "run the checks that need a GPU, in calls of 150 s, of 200 s and of nine minutes"),
    "gpu_lease": (gpu_lease, "run the most important of these checks in 13 minutes"),
    "zoo": (pack_zoo, "pack trained models into the zoo, and write their cards"),
    "report": (fill, "write all tables and pictures again from the results files"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        module.arguments(commands.add_parser(name, help=text))
    chosen = parser.parse_args(arguments)
    module, _ = COMMANDS[chosen.command]
    result = module.main(chosen)
    if isinstance(result, bool):
        sys.exit(not result)
    if result is not None:
        print(result)


if __name__ == "__main__":
    try:
        main()
    except FolderInUse as error:
        sys.exit(f"python -m benchmarks: {error}")
