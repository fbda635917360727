"""Run all checks that need a GPU, in three parts of at most nine minutes each.

- ``tests`` measures the capture of CUDA graphs, verifies every kernel, and runs the tests that need a GPU.
- ``ops`` evaluates a model with CUDA graphs and without, times training steps, and compares kernels with references.
- ``pipelines`` measures the ops in detail, runs the sanitizer, and measures whole pipelines.

A run may have several parts, such as ``tests ops``. A kernel that several parts of a run need is compiled only once.

A part consists of sections. Each section has a separate process and a time limit. The outcome of a section is passed,
failed, or not available (if a tool is missing).

DIR is the folder for the results of the device. A section writes its findings to ``DIR/gpu_check/<section>.json`` and
its output to ``DIR/gpu_check/<section>.log``. Each row of a results file is written into DIR as soon as it is measured.
The file ``DIR/gpu_check.md`` has a summary of all sections.

A second run skips the sections that are complete. A section is complete if it did not fail, left out nothing, and was
run with the same versions, sources and device. If a section was killed, the next run keeps the rows that the section
has written and the tests that have passed.

At the end, every run writes two files into DIR: the device's chapter of docs/performance.md, and ``races.json``, which
says for each op when the package uses the kernel and when the reference. If DIR is in benchmarks/results, the
documentation and the package are updated too. A rehearsal never updates them.
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
from ..pages import fill, performance
from ..prose import rendered
from ..speed import sheets, shipping
from ..speed.running import device_class
from .gpu_sections import FAILED, SECTIONS, Context, Outcome, fingerprint

#: A section is killed this many seconds after its time limit. The first number is for a GPU, the other for a rehearsal.
GRACE = (20.0, 5.0)
#: The time limits of each part in seconds. The first number is for a GPU, the other for a rehearsal.
TOTALS = {"tests": (540, 140), "ops": (540, 95), "pipelines": (540, 65)}


def _rehearse(out: Path) -> None:
    """Prepare this process for a rehearsal: use small tensors, short runs, and a separate cache folder."""
    os.environ["PURIFY_FAST_CACHE"] = str(out / "gpu_check" / "cache")
    racing.ELEMENTS["cpu"] = {"small": 2**10, "medium": 2**17}
    racing.RUN = 1e-5


def _end_with(parent: int) -> None:
    """Wait until the parent process has ended, and then kill this process group.

    Otherwise the group would continue to run after its parent is killed.
    """
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def _work(name: str, context: Context, path: Path, parent: int) -> None:
    """Run a section in this process, as the leader of a new process group, and write its outcome."""
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
    """Run a section in a new process, and return its outcome. A section that exceeds its time limit is killed."""
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
        # Kill the whole group, so that no process of the section survives. The group may not exist yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    if path.is_file():
        outcome = json.loads(path.read_text())
    else:
        why = f"the section's process ended with exit status {process.exitcode}"
        why = f"was killed {grace:.0f} s after its limit of {context.seconds:.0f} s" if late else why
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


def conclude(out: Path, dry: bool) -> list[Path]:
    """Write a device's chapter of docs/performance.md, and the device's choices between kernels and references.

    If ``out`` is in ``benchmarks/results``, the documentation and the package are updated too.

    Args:
        out: folder for the results of the device.
        dry: True after a rehearsal, which changes nothing outside of ``out``.

    Returns:
        The paths of the two files in ``out``.
    """
    written = [out / "chapter.md", out / "races.json"]
    write_text(written[0], "\n".join(performance.chapter(out)) + "\n")
    write_text(written[1], json.dumps([shipping.shipped(out)], indent=1) + "\n")
    if not dry and out.parent == RESULTS.resolve():
        fill.publish()
    return written


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


def run(out: Path, device: torch.device, chosen: argparse.Namespace) -> bool:
    """Run the chosen sections that are not complete. Return True if all chosen sections have run, and none failed."""
    (out / "gpu_check").mkdir(parents=True, exist_ok=True)
    mark, began, dry = fingerprint(device, chosen.dry), time.monotonic(), chosen.dry
    total = sum(TOTALS[part][dry] for part in chosen.parts)
    paths = {name: out / "gpu_check" / f"{name}.json" for name in SECTIONS}
    results = {name: done(path, mark) for name, path in paths.items()}
    asked = [name for name, section in SECTIONS.items() if section.part in chosen.parts and name in chosen.only]
    wanted = [name for name in asked if not complete(results[name])]
    for name in (progress := tqdm(wanted, unit="section", file=sys.stderr)):
        progress.set_description(name)
        left = total - (time.monotonic() - began) - GRACE[dry]
        limit = min(SECTIONS[name].limits[dry], left)
        if limit < 5:
            text = f"{name}: left out, because the time limit of {total:.0f} s for all sections is reached"
            progress.write(text, file=sys.stderr)
            continue
        _begin(name, out, mark)
        built = results["extension"]
        if built and built["details"].get("path"):
            os.environ["PURIFY_FAST_EXTENSION"] = built["details"]["path"]
        date = datetime.datetime.now().isoformat(timespec="seconds")
        outcome = run_section(name, Context(out, device, dry, limit, chosen.data))
        results[name] = outcome | {"fingerprint": mark, "date": date}
        write_text(paths[name], json.dumps(results[name], indent=1) + "\n")
        write_text(out / "gpu_check.md", page(results, mark))
    write_text(out / "gpu_check.md", page(results, mark))
    print("\n".join(table(results)))
    for path in (out / "gpu_check.md", *conclude(out, dry)):
        print(path)
    return all((result := results[name]) is not None and result["state"] != FAILED for name in asked)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks gpu_check``."""
    options.add_names(parser, TOTALS, "parts", "parts to run, one after the other")
    dry = "rehearse every section on the CPU; the numbers mean nothing"
    parser.add_argument("--dry", action="store_true", help=dry)
    parser.add_argument("--out", type=Path, help="folder for the results; default: benchmarks/results/<device>")
    options.add_names(parser, SECTIONS, "--only", "sections of these parts to run")
    data = "folder with CIFAR-10, or path of an .npz file; default: the current folder"
    parser.add_argument("--data", type=Path, help=data)


def main(chosen: argparse.Namespace) -> bool:
    """Run ``python -m benchmarks gpu_check``. Return True if all chosen sections have run, and none failed."""
    if not chosen.dry and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available: use --dry to rehearse all sections on the CPU")
    device = torch.device("cpu" if chosen.dry else "cuda")
    # Make the path absolute, because pytest runs in another folder.
    out = options.out_of(chosen, chosen.dry, device_class(device)).resolve()
    lacking = records.missing_compiler()
    if lacking is not None and not chosen.dry:
        print(f"WARNING: {lacking}", file=sys.stderr)
    with folder_lock(out):
        return run(out, device, chosen)
