"""All checks that need a GPU, in three commands of at most nine minutes each.

``tests`` measures what a capture costs, verifies every kernel, and runs the tests of the device; ``ops`` evaluates a
model with graphs and without, times training steps, and races the kernels; ``pipelines`` has the ops in detail, the
sanitizer and the pipelines. The five measurements of `gpu_sections` come before everything else. ``tests ops`` does
both on one machine, which compiles their kernels once. Each command consists of sections, each in its own process and
within a time limit.

A section ends as passed, failed, or not available (a tool is missing). At its end, findings are written to
``DIR/gpu_check/<section>.json``, its output to ``<section>.log``, a summary of all to ``DIR/gpu_check.md``; figures and
tables go to DIR itself, row by row. A second run repeats sections that failed, were left out, or were done by another
version, by other sources or on another device. A killed run is resumed: written rows are not measured again, and passed
tests are not run again.

Every command finally writes DIR's chapter of docs/performance.md, and the races that ship with the package. In a
rehearsal both are written only into DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from purify_fast._files import folder_lock, write_text
from purify_fast.ops.dispatch import racing, records

from .. import RESULTS, options
from ..options import Unfit
from ..pages import fill, performance
from ..prose import rendered
from ..speed import sheets, shipping
from ..speed.running import device_class
from .gpu_sections import FAILED, SECTIONS, Context, Outcome, fingerprint

#: Seconds beyond its limit after which a section is killed, on a GPU and in the rehearsal.
GRACE = (20.0, 5.0)
#: The commands, each with its sections.
PARTS = {
    part: [name for name, section in SECTIONS.items() if section.part == part] for part in ("tests", "ops", "pipelines")
}
#: The seconds that each command may take, on a GPU and in the rehearsal.
TOTALS = {"tests": (540, 140), "ops": (540, 95), "pipelines": (540, 65)}


def _rehearse(out: Path) -> None:
    """Set up few elements, short runs, and a separate folder of verdicts and races."""
    os.environ["PURIFY_FAST_CACHE"] = str(out / "gpu_check" / "cache")
    racing.ELEMENTS["cpu"] = {"small": 2**10, "medium": 2**17}
    racing.RUN = 1e-5


def _end_with(parent: int) -> None:
    """End this group of processes once its parent is gone: a killed parent could not end it."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def _work(name: str, context: Context, path: Path, parent: int) -> None:
    """Run a section in this process, which leads a process group, and write its outcome."""
    os.setsid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if context.dry:
        _rehearse(context.out)
    with (context.out / "gpu_check" / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        outcome = SECTIONS[name].run(dataclasses.replace(context, started=time.monotonic()))
    except Exception as error:
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        outcome = Outcome(FAILED, summary, traceback=traceback.format_exc())
    write_text(path, json.dumps(dataclasses.asdict(outcome)))


def run_section(name: str, context: Context) -> dict:
    """Run a section, and return its outcome, with a traceback; a section that exceeds its time is killed."""
    began, grace = time.monotonic(), GRACE[context.dry]
    path = context.out / "gpu_check" / f"{name}.outcome"
    path.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(name, context, path, os.getpid()))
    process.start()
    assert process.pid is not None
    try:
        process.join(context.seconds + grace)
        late = process.is_alive()
    finally:
        # The processes that it started must not outlive it. It may have had no time to lead a group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if path.is_file():
        outcome = json.loads(path.read_text())
    else:
        why = f"its process ended with exit status {process.exitcode}"
        why = f"ended {grace:.0f} s after its limit of {context.seconds:.0f} s" if late else why
        outcome = dataclasses.asdict(Outcome(FAILED, why))
    return {"section": name, **outcome, "seconds": round(time.monotonic() - began, 1)}


def done(path: Path, mark: dict) -> dict | None:
    """Read the result of a section, if it has the same fingerprint."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("fingerprint") == mark else None


def table(results: dict[str, dict | None]) -> list[str]:
    """A line for each section."""
    body = [
        [name, result["state"], f"{result['seconds']:.0f}", result["summary"].replace("\n", " ")]
        if result
        else [name, "not run", "", ""]
        for name, result in results.items()
    ]
    return sheets.table(["section", "state", "seconds", ""], body)


def page(results: dict[str, dict | None], mark: dict) -> str:
    """The report: the table, the omissions, the failures."""
    there = {name: result for name, result in results.items() if result is not None}
    template, today = Path(__file__).with_name("gpu_check.md.jinja"), datetime.date.today().isoformat()
    return rendered(template, mark=mark, today=today, table=table(results), results=there)


def conclude(out: Path, dry: bool) -> list[Path]:
    """Write the chapter, and in the folder of all results the page and the races that ship.

    Args:
        out: the folder of the device.
        dry: whether this was a rehearsal, which changes nothing outside ``out``.

    Returns:
        A list of the written files.
    """
    written = [out / "chapter.md", out / "races.json"]
    write_text(written[0], "\n".join(performance.chapter(out)) + "\n")
    write_text(written[1], json.dumps([shipping.shipped(out)], indent=1) + "\n")
    if not dry and out.parent == RESULTS.resolve():
        fill.publish()
    return written


def why_no_device() -> str:
    """The reason why PyTorch finds no CUDA device, in its own words, with the version that it was built for."""
    built = f"this PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this PyTorch has no CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).strip().splitlines()[0].rstrip('.')}; {built}"
    return f"the driver names {torch.cuda.device_count()} devices; {built}"


def _begin(name: str, out: Path, mark: dict, redo: bool) -> None:
    """Record that a section was begun, and remove its outdated results."""
    begun = out / "gpu_check" / f"{name}.begun"
    if redo or not begun.exists() or json.loads(begun.read_text()) != mark:
        for file in SECTIONS[name].files:
            (out / file).unlink(missing_ok=True)
        for path in (out / "gpu_check").glob(f"{name}.outcomes*"):
            path.unlink()
        shutil.rmtree(out / "gpu_check" / name, ignore_errors=True)
        write_text(begun, json.dumps(mark))


def complete(result: dict | None) -> bool:
    """Tell whether a section is complete."""
    return result is not None and result["state"] != FAILED and not result["left_out"]


def run(out: Path, device: torch.device, chosen: argparse.Namespace) -> bool:
    """Run the unfinished chosen sections; tell whether all of them passed or are not available."""
    (out / "gpu_check").mkdir(parents=True, exist_ok=True)
    mark, began, dry = fingerprint(device, chosen.dry), time.monotonic(), chosen.dry
    total = chosen.total or sum(TOTALS[part][dry] for part in chosen.parts or PARTS)
    paths = {name: out / "gpu_check" / f"{name}.json" for name in SECTIONS}
    results = {name: done(path, mark) for name, path in paths.items()}
    asked = chosen.only or [name for part in chosen.parts or PARTS for name in PARTS[part]]
    wanted = [name for name in SECTIONS if name in asked and (chosen.redo or not complete(results[name]))]
    for name in (progress := tqdm(wanted, unit="section", file=sys.stderr)):
        progress.set_description(name)
        left = total - (time.monotonic() - began) - GRACE[dry]
        limit = min(chosen.seconds or SECTIONS[name].limits[dry], left)
        if limit < 5:
            progress.write(f"{name}: left out, the {total:.0f} s for all are over", file=sys.stderr)
            continue
        _begin(name, out, mark, chosen.redo)
        built = done(paths["extension"], mark)
        if built and built["details"].get("path"):
            os.environ["PURIFY_FAST_EXTENSION"] = built["details"]["path"]
        results[name] = run_section(name, Context(out, device, dry, limit, chosen.data)) | {
            "fingerprint": mark,
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
        }
        write_text(paths[name], json.dumps(results[name], indent=1) + "\n")
        write_text(out / "gpu_check.md", page(results, mark))
    write_text(out / "gpu_check.md", page(results, mark))
    print("\n".join(table(results)))
    for path in (out / "gpu_check.md", *conclude(out, dry)):
        print(path)
    return all((result := results[name]) is not None and result["state"] != FAILED for name in asked)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks gpu_check``."""
    parts, sections = ", ".join(PARTS), ", ".join(SECTIONS)
    which = f"which of {parts}; all in turn by default"
    parser.add_argument("parts", nargs="*", metavar="part", type=options.one_of(PARTS), help=which)
    parser.add_argument(
        "--dry",
        action="store_true",
        help="rehearse every section on the CPU; no numbers",
    )
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device> by default")
    only = f"which; all by default: {sections}"
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], metavar="section", help=only)
    parser.add_argument("--redo", action="store_true", help="repeat finished sections")
    parser.add_argument("--seconds", type=options.seconds, help="time limit of each section; its own by default")
    parser.add_argument(
        "--total", type=options.seconds, help="time limit of all sections; 540 seconds for each command by default"
    )
    parser.add_argument(
        "--data", type=Path, help="folder with CIFAR-10, or an .npz file; the current folder by default"
    )


def main(chosen: argparse.Namespace) -> bool:
    """``python -m benchmarks gpu_check``; tell whether everything requested passed."""
    if not chosen.dry and not torch.cuda.is_available():
        raise Unfit(f"no CUDA device is available: {why_no_device()}; --dry rehearses everything on the CPU")
    device = torch.device("cpu" if chosen.dry else "cuda")
    # The path is absolute, because pytest runs in another folder.
    out = options.out_of(chosen, chosen.dry, device_class(device)).resolve()
    lacking = records.missing_compiler()
    if lacking is not None and not chosen.dry:
        print(f"WARNING: {lacking}", file=sys.stderr)
    with folder_lock(out):
        return run(out, device, chosen)
