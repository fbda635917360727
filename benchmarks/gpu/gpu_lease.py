"""Run the most important parts of `gpu_check` on a GPU that is lent for 17 minutes.

The stages run one after the other, and end within 150, 420, 240 and 100 seconds. A section that reaches its limit is
killed, and the next section begins. Rows are written and packed as soon as they are measured. Where a command may take
ten minutes at most, name the stages of two commands: ``correct goals`` and ``measured in_use``.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

from .. import options
from . import goals, gpu_check

#: The stages: for each, a call of `gpu_check`, its seconds, and its sections.
STAGES: dict[str, tuple[str, float, list[str]]] = {
    "correct": ("correct", 150, ["verdicts", "sanitizer", "tests"]),
    "goals": ("goals", 420, ["goals"]),
    "measured": ("measured", 240, ["limits", "pgd"]),
    "in_use": ("measured", 100, ["in_use"]),
}
#: The contestants of a race compile side by side, and share the processors.
COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "3"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks gpu_lease``."""
    options.add_names(parser, STAGES, "stages", "stages to run, one after the other")
    parser.add_argument("--rehearse", action="store_true", help="run small inputs on the CPU; the numbers mean nothing")
    options.add_out(parser, "/<device>", quick=False)
    gpu_check.add_archives(parser)
    parser.set_defaults(resume=False, data=None)


def main(chosen: argparse.Namespace) -> bool:
    """Run ``python -m benchmarks gpu_lease``. Return True if all sections have run, and none failed."""
    good = True
    with mock.patch.dict(os.environ, COMPILERS):
        for stage in chosen.stages:
            call, seconds, only = STAGES[stage]
            if "goals" in only:
                print("assumed ends, in seconds:", *(f"{end:5d}  {part}" for part, end in goals.plan()), sep="\n")
            # The limits of a rehearsal only end sections that hang.
            chosen.calls, chosen.only, chosen.seconds = [call], only, None if chosen.rehearse else seconds
            good = gpu_check.main(chosen) and good
    return good
