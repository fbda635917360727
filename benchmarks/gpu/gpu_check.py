"""Run all checks that need a GPU, in three calls for a rented card.

- ``correct`` verifies every kernel, runs the tests that need a GPU, and runs compute-sanitizer. All three run side by
  side. The call ends within 150 seconds.
- ``goals`` measures what this package promises, beside an expert's code. The call ends within seven minutes.
- ``measured`` measures speed: the limits of the card, forms of PGD, evaluations, trainings and loops of users,
  pipelines, and kernels against references. The call ends within nine minutes.

A call consists of sections. Each section has a separate process and a time limit, which includes the start of the
process and all preparation.

DIR is the folder for the results of the device. A section writes its findings to ``DIR/gpu_check/<section>.json`` and
its output to ``DIR/gpu_check/<section>.log``. After each row, everything that should leave the machine is in one file,
``<call>.tar.xz`` in the folder of ``--archives``, which is smaller than 16 MB. Where few files come back from a
machine, let only these files be in the folder that comes back.

With ``--resume``, a section keeps the rows that an earlier call has written, for example before it was killed.

A rehearsal runs every section on the CPU, without the packages that a rented card lacks. Its limits only end sections
that hang.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import logging
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from purify_fast import __version__
from purify_fast._files import folder_lock, write_text
from purify_fast.ops.dispatch import tuning

from .. import RESULTS, options
from ..prose import rendered
from ..speed import sheets, timing
from ..speed.running import device_class
from .gpu_sections import FAILED, SECTIONS, Context, Outcome, pack

#: A section must end this many seconds before it is killed. The first number is for a GPU, the other for a rehearsal.
GRACE = (10.0, 3.0)
#: The seconds at the end of a call in which the summary and the archive are written.
CLOSING = (15.0, 4.0)
#: Packages for which extras exist, and which a rented card's machine does not have.
LACKING = ("art", "attackbench", "foolbox", "matplotlib", "pyautoattack", "robustbench", "torchattacks", "tyro")


class Call(NamedTuple):
    """A call of the command.

    Attributes:
        seconds: time limits of the whole call. The first is for a GPU, the other for a rehearsal.
        together: True if the sections run side by side.
    """

    seconds: tuple[float, float]
    together: bool


CALLS = {"correct": Call((150, 3600), True), "goals": Call((420, 7200), False), "measured": Call((540, 14400), False)}
#: The command that tells the commit of this tree.
COMMIT = f"git -C '{RESULTS.parent}' describe --always --dirty --exclude='*'"


def _rehearse(out: Path) -> None:
    """Prepare this process for a rehearsal: use small tensors, short runs, and a separate cache folder."""
    os.environ["PURIFY_FAST_CACHE"] = str(out / "gpu_check" / "cache")
    # Inductor's C++ code is compiled without optimization, which takes half of the time.
    os.environ["AOT_INDUCTOR_DEBUG_COMPILE"] = "1"
    tuning.SIZES["cpu"], tuning.SECONDS = [2**10, 2**14], 1e-5
    timing.REHEARSAL = True


def lacking(out: Path) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which new processes of Python cannot import the packages `LACKING`."""
    folder = out / "gpu_check" / "lacking"
    folder.mkdir(parents=True, exist_ok=True)
    # Python imports this module when it starts. A module that is None counts as missing.
    text = f"import sys\n\nsys.modules.update(dict.fromkeys({LACKING!r}))\n"
    write_text(folder / "sitecustomize.py", text)
    before = os.environ.get("PYTHONPATH")
    return mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder), *([before] if before else [])]))


def _end_with(parent: int) -> None:
    """Kill this process group when the parent process has ended, even if the parent was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def _work(name: str, context: Context, path: Path, parent: int) -> None:
    """Run a section in this process, as the leader of a new process group, and write its outcome."""
    os.setsid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if context.rehearsal:
        _rehearse(context.out)
    with (context.out / "gpu_check" / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # The log says why a step was not captured or compiled.
    logging.basicConfig(level=logging.INFO)
    try:
        outcome = SECTIONS[name].run(context)
    except Exception as error:
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome = Outcome(FAILED, summary, traceback=traceback.format_exc())
    write_text(path, json.dumps(dataclasses.asdict(outcome)))


def run_section(name: str, context: Context) -> dict:
    """Run a section in a new process, and return its outcome. A section that exceeds its time limit is killed."""
    began = time.monotonic()
    path = context.out / "gpu_check" / f"{name}.outcome"
    path.unlink(missing_ok=True)
    soft = dataclasses.replace(context, seconds=context.seconds - GRACE[context.rehearsal], started=began)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, soft, path, os.getpid()))
    process.start()
    assert process.pid is not None
    try:
        process.join(context.seconds)
        late = process.is_alive()
    finally:
        # Kill the whole group, so that no process of the section survives. The group may not exist yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if path.is_file():
        outcome = json.loads(path.read_text())
    else:
        why = f"the section's process ended with exit status {process.exitcode}"
        why = f"was killed at its limit of {context.seconds:.0f} s" if late else why
        outcome = dataclasses.asdict(Outcome(FAILED, why))
    return {"section": name, **outcome, "seconds": round(time.monotonic() - began, 1)}


def table(results: dict[str, dict | None]) -> list[str]:
    """Return a table with the outcome of each section. ``results`` has None for a section that has not run."""
    body = [
        [name, result["state"], f"{result['seconds']:.0f}", result["summary"].replace("\n", " ")]
        if result
        else [name, "not run", "", ""]
        for name, result in results.items()
    ]
    return sheets.table(["section", "state", "seconds", ""], body)


def page(results: dict[str, dict | None], context: Context) -> str:
    """Return the report as Markdown: the table of the sections, the omitted work, and the failures."""
    here = timing.environment(context.device) | {"version": __version__, "python": platform.python_version()}
    template = Path(__file__).with_name("gpu_check.md.jinja")
    return rendered(template, rehearsal=context.rehearsal, here=here, table=table(results), results=results)


class _Run:
    """A run of one call: the sections that it runs, and their results so far."""

    def __init__(self, call: str, out: Path, device: torch.device, chosen: argparse.Namespace):
        self.call, self.rehearsal = call, chosen.rehearse
        self.ends = time.monotonic() + (chosen.seconds or CALLS[call].seconds[self.rehearsal]) - CLOSING[self.rehearsal]
        archives = out if chosen.archives is None else chosen.archives.resolve()
        self.context = Context(out, device, self.rehearsal, 0.0, chosen.data, archives)
        self.resume = chosen.resume
        self.results: dict[str, dict | None] = {name: None for name in chosen.only if SECTIONS[name].call == call}

    def _one(self, name: str) -> None:
        limit = min(SECTIONS[name].limits[self.rehearsal], self.ends - time.monotonic())
        if limit < 2 * GRACE[self.rehearsal]:
            print(f"{name}: left out, because the time limit of the call is reached", flush=True)
            return
        if not self.resume:
            for file in SECTIONS[name].files:
                (self.context.out / file).unlink(missing_ok=True)
            shutil.rmtree(self.context.out / "gpu_check" / name, ignore_errors=True)
        date = datetime.datetime.now().isoformat(timespec="seconds")
        context = dataclasses.replace(self.context, seconds=limit)
        result = run_section(name, context) | {"date": date}
        self.results[name] = result
        write_text(self.context.out / "gpu_check" / f"{name}.json", json.dumps(result, indent=1) + "\n")
        # A machine may be taken at any time.
        pack(context, self.call)
        print(f"{name}: {result['state']} after {result['seconds']:.0f} s; {result['summary']}", flush=True)

    def go(self) -> bool:
        """Run the sections. Return True if all have run, and none failed."""
        wanted, out = list(self.results), self.context.out
        with ThreadPoolExecutor(max(1, len(wanted)) if CALLS[self.call].together else 1) as pool:
            try:
                list(pool.map(self._one, wanted))
            except BaseException:
                # Otherwise an interrupted run would wait until the sections end.
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
        write_text(out / f"{self.call}.md", page(self.results, self.context))
        archive, left_out = pack(self.context, self.call)
        print("\n".join(table(self.results)), out / f"{self.call}.md", sep="\n")
        print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB", *(f"without {name}" for name in left_out), sep="; ")
        return all(result is not None and result["state"] != FAILED for result in self.results.values())


def add_archives(parser: argparse.ArgumentParser) -> None:
    text = "folder for the archive of each call, which has its rows so far; default: that of --out"
    parser.add_argument("--archives", type=Path, metavar="DIR", help=text)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks gpu_check``."""
    options.add_names(parser, CALLS, "calls", "calls to make, one after the other")
    rehearse = "rehearse every section on the CPU; the numbers mean nothing"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    options.add_out(parser, "/<device>", quick=False)
    add_archives(parser)
    options.add_names(parser, SECTIONS, "--only", "sections of these calls to run, in this order")
    parser.add_argument("--seconds", type=float, help="time limit of each call; default: that of the call")
    parser.add_argument("--resume", action="store_true", help="keep the rows that an earlier call has written")
    data = "folder with CIFAR-10, or path of an .npz file; default: the current folder"
    parser.add_argument("--data", type=Path, help=data)


def main(chosen: argparse.Namespace) -> bool:
    """Run ``python -m benchmarks gpu_check``. Return True if all chosen sections have run, and none failed."""
    if not chosen.rehearse and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: use --rehearse to rehearse everything on the CPU")
    device = torch.device("cpu" if chosen.rehearse else "cuda")
    # Make the path absolute, because pytest runs in another folder.
    out = options.out_of(chosen, chosen.rehearse, device_class(device)).resolve()
    if chosen.rehearse and out.is_relative_to(RESULTS):
        raise ValueError(f"--out of a rehearsal must not be in {RESULTS}, got {out}")
    print(f"{timing.environment(device)['device']}, commit {subprocess.getoutput(COMMIT)}", flush=True)
    good = True
    with folder_lock(out), lacking(out) if chosen.rehearse else contextlib.nullcontext():
        (out / "gpu_check").mkdir(parents=True, exist_ok=True)
        for call in chosen.calls:
            good = _Run(call, out, device, chosen).go() and good
    return good
