"""Run all checks that need a GPU, in two calls for a rented card.

- ``correct`` verifies every kernel, runs the tests that need a GPU, and runs compute-sanitizer. All three run side by
  side. The call ends within 150 seconds.
- ``measured`` measures speed: the limits of the card, CUDA graphs, kernels against references, forms of PGD, the
  longest kernels of its step, evaluations, and pipelines. The call ends within nine minutes.

A call consists of sections. Each section has a separate process and a time limit, which includes the start of the
process and all preparation.

DIR is the folder for the results of the device. A section writes its findings to ``DIR/gpu_check/<section>.json`` and
its output to ``DIR/gpu_check/<section>.log``. At the end of a call, everything that should leave the machine is in one
file, ``DIR/<call>.tar.xz``, which is smaller than 16 MB.

A second run skips the sections that are complete. A section is complete if it did not fail, left out nothing, and was
run with the same versions, sources and device. If a section was killed, the next run keeps the rows that the section
has written and the tests that have passed.

After the races, a call also writes into DIR the device's chapter of docs/performance.md, and ``races.json``, which says
for each op when the package uses the kernel and when the reference. If DIR is in benchmarks/results, the documentation
and the package are updated too. A rehearsal never updates them.
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
import shutil
import signal
import tarfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from purify_fast._files import folder_lock, write_text
from purify_fast.ops.dispatch import racing

from .. import RESULTS, options
from ..pages import fill, performance
from ..prose import rendered
from ..speed import sheets, shipping
from ..speed.running import device_class
from .gpu_sections import FAILED, SECTIONS, Context, Outcome, fingerprint

#: A section must end this many seconds before it is killed. The first number is for a GPU, the other for a rehearsal.
GRACE = (10.0, 3.0)
#: The seconds at the end of a call in which the summary and the archive are written.
CLOSING = (15.0, 4.0)
#: The largest size of an archive in bytes.
MOST_BYTES = 16_000_000
#: The endings of the files in an archive.
PACKED = (".csv", ".json", ".log", ".md", ".outcomes")


class Call(NamedTuple):
    """A call of the command.

    Attributes:
        seconds: time limits of the whole call. The first is for a GPU, the other for a rehearsal.
        together: True if the sections run side by side.
    """

    seconds: tuple[float, float]
    together: bool


CALLS = {"correct": Call((150, 240), True), "measured": Call((540, 1450), False)}
_packing = threading.Lock()


def _rehearse(out: Path) -> None:
    """Prepare this process for a rehearsal: use small tensors, short runs, and a separate cache folder."""
    os.environ["PURIFY_FAST_CACHE"] = str(out / "gpu_check" / "cache")
    # Inductor's C++ code is compiled without optimization, which takes half of the time.
    os.environ["AOT_INDUCTOR_DEBUG_COMPILE"] = "1"
    racing.ELEMENTS["cpu"] = {"small": 2**10, "medium": 2**17}
    racing.RUN = 1e-5


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


def done(path: Path, mark: dict) -> dict | None:
    """Read the result of a section. Return None if there is no result, or if its fingerprint differs from ``mark``."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("fingerprint") == mark else None


def table(results: dict[str, dict | None]) -> list[str]:
    """Return a table with the outcome of each section. ``results`` has None for a section that has not run."""
    body = [
        [name, result["state"], f"{result['seconds']:.0f}", result["summary"].replace("\n", " ")]
        if result
        else [name, "not run", "", ""]
        for name, result in results.items()
    ]
    return sheets.table(["section", "state", "seconds", ""], body)


def page(results: dict[str, dict | None], mark: dict) -> str:
    """Return the report as Markdown: the table of the sections, the omitted work, and the failures."""
    template, today = Path(__file__).with_name("gpu_check.md.jinja"), datetime.date.today().isoformat()
    return rendered(template, mark=mark, today=today, table=table(results), results=results)


def forecast(call: str, rehearsal: bool = False) -> list[str]:
    """Return a table with the time limits of a call's sections, and the seconds that they take on a card."""
    own = {name: section for name, section in SECTIONS.items() if section.call == call}
    cards = [section.card for section in own.values()]
    kinds = {True: "estimated", False: "measured on an NVIDIA H200"}
    body = [[name, f"{it.limits[rehearsal]:g}", f"{it.card:g}", kinds[it.estimated]] for name, it in own.items()]
    whole = (max if CALLS[call].together else sum)(cards) + CLOSING[0]
    limits = f"{CALLS[call].seconds[0]:g} s on a card" + f", {CALLS[call].seconds[1]:g} s in this rehearsal" * rehearsal
    how = "side by side" if CALLS[call].together else "one after the other"
    said = f"gpu_check {call}: the sections run {how}, about {whole:g} s on a card. The limit is {limits}."
    return [said, *sheets.table(["section", "limit, s", "on a card, s", "source"], body)]


def conclude(out: Path, rehearsal: bool) -> list[Path]:
    """Write a device's chapter of docs/performance.md, and the device's choices between kernels and references.

    If ``out`` is in ``benchmarks/results``, the documentation and the package are updated too.

    Args:
        out: folder for the results of the device.
        rehearsal: True after a rehearsal, which changes nothing outside of ``out``.

    Returns:
        The paths of the two files in ``out``. Without races there are no files.
    """
    if not shipping.read(out):
        return []
    written = [out / "chapter.md", out / "races.json"]
    write_text(written[0], "\n".join(performance.chapter(out)) + "\n")
    write_text(written[1], json.dumps([shipping.shipped(out)], indent=1) + "\n")
    if not rehearsal and out.parent == RESULTS.resolve():
        fill.publish()
    return written


def pack(out: Path, call: str) -> tuple[Path, list[str]]:
    """Pack the results, summaries and logs of a folder into one archive of at most `MOST_BYTES`.

    Args:
        out: folder of the results. Of its folders, only the files directly in ``gpu_check`` are packed.
        call: name of the call, which becomes the name of the archive.

    Returns:
        The path of the archive, and the names of the files that were left out because they are the largest.
    """
    path = out / f"{call}.tar.xz"
    found = [file for folder in (out, out / "gpu_check") for file in folder.iterdir() if file.suffix in PACKED]
    files = sorted(found, key=lambda file: file.stat().st_size)
    # A text shrinks to less than a quarter, and a larger file would take too long to compress.
    left_out = [str(file.relative_to(out)) for file in files if file.stat().st_size > 4 * MOST_BYTES]
    files = files[: len(files) - len(left_out)]
    while True:
        # A fast preset is enough: most of the bytes are text.
        with tarfile.open(path, "w:xz", preset=1) as archive:
            for file in files:
                archive.add(file, f"{out.name}/{file.relative_to(out)}")
        if path.stat().st_size < MOST_BYTES or not files:
            return path, left_out
        left_out.append(str(files.pop().relative_to(out)))


def _begin(name: str, out: Path, mark: dict) -> None:
    """Record that a section has begun, and remove its outdated results."""
    begun = out / "gpu_check" / f"{name}.begun"
    if not begun.exists() or json.loads(begun.read_text()) != mark:
        for file in SECTIONS[name].files:
            (out / file).unlink(missing_ok=True)
        for path in (out / "gpu_check").glob(f"{name}.outcomes*"):
            path.unlink()
        shutil.rmtree(out / "gpu_check" / name, ignore_errors=True)
        write_text(begun, json.dumps(mark))


def complete(result: dict | None) -> bool:
    """Tell whether a section has run without a failure, and has left out nothing."""
    return result is not None and result["state"] != FAILED and not result["left_out"]


class _Run:
    """A run of one call: the sections that it runs, and their results so far."""

    def __init__(self, call: str, out: Path, device: torch.device, chosen: argparse.Namespace):
        self.call, self.rehearsal = call, chosen.rehearse
        self.ends = time.monotonic() + CALLS[call].seconds[self.rehearsal] - CLOSING[self.rehearsal]
        self.context = Context(out, device, self.rehearsal, 0.0, chosen.data)
        self.mark = fingerprint(device, self.rehearsal)
        own = [name for name, section in SECTIONS.items() if section.call == call]
        self.results = {name: done(self._path(name), self.mark) for name in own}
        self.asked = [name for name in own if name in chosen.only]

    def _path(self, name: str) -> Path:
        return self.context.out / "gpu_check" / f"{name}.json"

    def _one(self, name: str) -> None:
        limit = min(SECTIONS[name].limits[self.rehearsal], self.ends - time.monotonic())
        if limit < 2 * GRACE[self.rehearsal]:
            print(f"{name}: left out, because the time limit of the call is reached", flush=True)
            return
        _begin(name, self.context.out, self.mark)
        date = datetime.datetime.now().isoformat(timespec="seconds")
        result = run_section(name, dataclasses.replace(self.context, seconds=limit))
        self.results[name] = result | {"fingerprint": self.mark, "date": date}
        write_text(self._path(name), json.dumps(self.results[name], indent=1) + "\n")
        with _packing:
            # A machine may be taken at any time.
            pack(self.context.out, self.call)
        print(f"{name}: {result['state']} after {result['seconds']:.0f} s; {result['summary']}", flush=True)

    def go(self) -> bool:
        """Run the sections that are not complete. Return True if all asked sections have run, and none failed."""
        wanted, out = [name for name in self.asked if not complete(self.results[name])], self.context.out
        with ThreadPoolExecutor(max(1, len(wanted)) if CALLS[self.call].together else 1) as pool:
            try:
                list(pool.map(self._one, wanted))
            except BaseException:
                # Otherwise an interrupted run would wait until the sections end.
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
        written = [out / f"{self.call}.md"]
        write_text(written[0], page(self.results, self.mark))
        written += conclude(out, self.rehearsal)
        archive, left_out = pack(out, self.call)
        print("\n".join(table(self.results)), *written, sep="\n")
        print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB", *(f"without {name}" for name in left_out), sep="; ")
        return all((it := self.results[name]) is not None and it["state"] != FAILED for name in self.asked)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks gpu_check``."""
    options.add_names(parser, CALLS, "calls", "calls to make, one after the other")
    rehearse = "rehearse every section on the CPU; the numbers mean nothing"
    parser.add_argument("--rehearse", action="store_true", help=rehearse)
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results/<device>")
    options.add_names(parser, SECTIONS, "--only", "sections of these calls to run")
    add_data(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--data``."""
    data = "folder with CIFAR-10, or path of an .npz file; default: the current folder"
    parser.add_argument("--data", type=Path, help=data)


def device_of(chosen: argparse.Namespace) -> torch.device:
    """Return the GPU, or the CPU for a rehearsal.

    Raises:
        ValueError: no GPU is available, and this is no rehearsal.
    """
    if not chosen.rehearse and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: use --rehearse to rehearse everything on the CPU")
    return torch.device("cpu" if chosen.rehearse else "cuda")


def main(chosen: argparse.Namespace) -> bool:
    """Run ``python -m benchmarks gpu_check``. Return True if all chosen sections have run, and none failed."""
    device = device_of(chosen)
    # Make the path absolute, because pytest runs in another folder.
    out = options.out_of(chosen, chosen.rehearse, device_class(device)).resolve()
    good = True
    with folder_lock(out):
        (out / "gpu_check").mkdir(parents=True, exist_ok=True)
        for call in chosen.calls:
            print(*forecast(call, chosen.rehearse), sep="\n", flush=True)
            good = _Run(call, out, device, chosen).go() and good
    return good
