"""Run the most important checks of `gpu_check` on a GPU that is lent for 13 minutes.

The stages run one after the other, and end within 150, 200, 240 and 100 seconds. A section that reaches its limit is
killed, and the next section begins. Rows are written as soon as they are measured, and ``--resume`` keeps them. Where a
command may take ten minutes at most, name the stages of two commands: ``correct goals`` and ``measured captures``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from unittest import mock

from purify_fast._files import write_text

from .. import RESULTS, options
from ..speed import timing
from .gpu_check import Call, Run, results_of, shared_arguments

#: The stages: the seconds of each, which include the packing of its results, and the limits of its sections.
STAGES: dict[str, tuple[Call, dict[str, float]]] = {
    "correct": (Call((150, 3600), True), {"verdicts": 135, "sanitizer": 135, "tests": 135}),
    "goals": (Call((200, 7200), False), {"goals": 185}),
    "measured": (Call((240, 7200), False), {"limits": 20, "pgd": 180, "profile": 25}),
    "captures": (Call((100, 7200), False), {"captures": 30, "in_use": 55}),
}
#: The limit of a section in a rehearsal, which only ends a section that hangs.
REHEARSED = 1800.0
#: The contestants of a race compile side by side, and share the processors.
COMPILERS = "3"


def commit() -> str:
    """Return the commit of this tree, or a text that says why it is unknown."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__} of git)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks gpu_lease``."""
    options.add_names(parser, STAGES, "stages", "stages to run, one after the other")
    shared_arguments(parser)


def main(chosen: argparse.Namespace) -> bool:
    """Run ``python -m benchmarks gpu_lease``. Return True if all sections have run, and none failed."""
    good = True
    with results_of(chosen) as (out, device), mock.patch.dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS=COMPILERS):
        where = {**timing.environment(device), "commit": commit(), "rehearsal": chosen.rehearse}
        print(f"{'rehearsal' if chosen.rehearse else 'lease'}: {where['device']}, commit {where['commit']}", flush=True)
        write_text(out / "lease.json", json.dumps(where, indent=1) + "\n")
        for name in chosen.stages:
            call, limits = STAGES[name]
            limits = dict.fromkeys(limits, REHEARSED) if chosen.rehearse else limits
            good = Run(f"lease_{name}", call, limits, out=out, device=device, chosen=chosen).go() and good
    return good
