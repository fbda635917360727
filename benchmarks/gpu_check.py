"""Everything that only a GPU can tell, in three commands of at most nine minutes each.

``tests`` measures what a capture costs, verifies every kernel, and runs the tests of the device; ``ops`` evaluates a
model with graphs and without, times training steps, and races the kernels; ``pipelines`` has the ops in detail, the
sanitizer and the pipelines. The five measurements of `first` come before everything else. ``tests ops`` does both on
one machine, which compiles their kernels once. Each is made of sections, each in a process of its own and within a
time limit.

A section ends as passed, failed, or not available (a tool that is not here). What it found is written when it ends, to
``DIR/gpu_check/<section>.json``, its output to ``<section>.log``, a summary of all to ``DIR/gpu_check.md``; figures and
tables go to DIR itself, row by row. A second run does what is not done: what failed, was left out, or was done by
another version, by other sources or on another device. One that was killed goes on where it was: rows that are written
are not measured again, and tests that passed are not run again.

Every command ends by writing what it changes: DIR's chapter of docs/performance.md, and the races that ship with the
package. In a rehearsal both are written into DIR alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from purify_fast import __version__, _library
from purify_fast._files import write_text
from purify_fast._lock import folder_lock
from purify_fast.cli.installation import facts
from purify_fast.ops import REGISTRY, _compiler, _racing
from purify_fast.ops._tune import known_rows, tune
from purify_fast.speed import retain_freed_memory
from purify_fast.speed.cuda_capture import CudaCapture

from . import RESULTS, first, limits, pages, performance, pipelines, report, shipping
from .context import FAILED, NOT_AVAILABLE, PASSED, Context, Outcome
from .measure import environment
from .ops import registry
from .running import Budget, folder, run_ops, run_pipelines

ROOT = Path(__file__).parents[1]
#: Seconds beyond its limit until a section is ended, on a GPU and in the rehearsal.
GRACE = (20.0, 5.0)
#: By section: the limit in seconds, on a GPU and in the rehearsal on a CPU.
LIMITS = {
    "captures": (50, 20),
    "verdicts": (70, 20),
    "extension": (90, 110),
    "tests": (230, 110),
    "standard": (220, 40),
    "steps": (35, 20),
    "limits": (10, 10),
    "replays": (45, 20),
    "races": (130, 40),
    "ops": (120, 15),
    "sanitizer": (110, 20),
    "pipelines": (250, 45),
}
#: The commands, each with its sections.
PARTS = {
    "tests": ("captures", "verdicts", "extension", "tests"),
    "ops": ("standard", "steps", "limits", "replays", "races"),
    "pipelines": ("ops", "sanitizer", "pipelines"),
}
#: The seconds that each command may take, on a GPU and in the rehearsal.
TOTALS = {"tests": (540, 140), "ops": (540, 95), "pipelines": (540, 65)}
#: The rows that each section makes, in the folder of the device.
FILES = {
    "captures": [first.CAPTURE_COST],
    "verdicts": [first.VERDICTS],
    "standard": [first.STANDARD],
    "steps": [first.STEPS],
    "replays": [first.REPLAYS],
    "races": [shipping.FILE],
    "ops": [report.ROWS],
    "pipelines": [report.PIPELINES],
}
EVERY_OP = ("-m", "benchmarks.every_op")
#: What pytest runs.
TESTS = ("tests/gpu",)
#: What the results depend on.
SOURCES = ("purify_fast/**/*.py", "kernels/*.py", "csrc/**/*", "benchmarks/**/*.py", "tests/gpu/*.py",
           "tests/conftest.py", "tests/cuda_launches.py", "tests/training/torch_functions.py", "setup.py")  # fmt: skip


def tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


# -- the sections -----------------------------------------------------------------------------------------------------


def extension(context: Context) -> Outcome:
    """The one that is loaded, else one built aside; it has the kernels of the CPU."""
    path = Path(_library.path) if _library.loaded() and _library.path else None
    how = "loaded"
    if path is None:
        how, path = "built", _build(context)
    found = facts(path)
    summary = f"{how}: torch {found.get('torch', 'unknown')}"
    return Outcome(PASSED, summary, {"path": str(path), "how": how, **found})


def _build(context: Context) -> Path:
    place = ROOT / "build" / "gpu_check" / f"cpu-{platform.python_version()}-{torch.__version__}"
    environ = {**os.environ, "PURIFY_FAST_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(place), "--build-temp", str(place / "tmp")]
    context.tell(0.1, "building")
    run = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=context.left)
    print(run.stdout, run.stderr, sep="\n")
    built = sorted(place.glob("purify_fast/_C*.so"))
    if run.returncode or not built:
        raise RuntimeError(f"the build failed, exit status {run.returncode}:\n{tail(run.stdout + run.stderr)}")
    return built[0]


def measured_limits(context: Context) -> Outcome:
    rows = limits.run(context.device, context.dry, context.out)
    return Outcome(PASSED, "; ".join(f"{row['limit']} {float(row['median']):,.0f} {row['unit']}" for row in rows))


@dataclass
class Cases:
    """Tests by outcome: names, and for the others than passed why."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def read(self, path: Path) -> None:
        for case in xml.parse(path).getroot().iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            bad, skipped = case.find("failure"), case.find("skipped")
            bad = case.find("error") if bad is None else bad
            if bad is not None:
                self.failed[name] = f"{bad.get('message')}\n{tail(bad.text or '', 15)}"
            elif skipped is not None:
                self.skipped[name] = skipped.get("message") or ""
            else:
                self.passed.append(name)


def tests(context: Context) -> Outcome:
    """tests/gpu: the small tensors side by side, then large ones one at a time; none that has passed already."""
    before = _passed(context)
    Path(f"{before}.known").write_text(before.read_text() if before.exists() else "")
    found = Cases(passed=before.read_text().splitlines() if before.exists() else [])
    rounds = [("kernels", ["-m", "not large"], 0.8), ("large tensors", ["-m", "large"], 1.0)]
    for index, (name, arguments, share) in enumerate(rounds):
        context.tell(index / len(rounds), name)
        seconds = share * context.left
        cores = min(6, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 1
        cores = 1 if "large" in arguments else cores
        _pytest(context, found, name, arguments, cores, seconds)
    late = [test for test, why in found.skipped.items() if "left out" in why]
    skipped = len(found.skipped) - len(late)
    summary = f"{len(found.passed)} passed, {len(found.failed)} failed, {skipped} skipped, {len(late)} left out"
    good = found.passed and not found.failed and not late
    return Outcome(PASSED if good else FAILED, summary, dataclasses.asdict(found), late)


def _passed(context: Context) -> Path:
    """The file of the tests that passed, with these sources on this device."""
    mark = json.dumps(fingerprint(context.device, context.dry), sort_keys=True)
    return context.out / "gpu_check" / f"tests-{hashlib.blake2b(mark.encode(), digest_size=6).hexdigest()}.passed"


def _pytest(context: Context, found: Cases, name: str, arguments: list[str], cores: int, seconds: float) -> None:
    path = context.out / "gpu_check" / "tests.xml"
    path.unlink(missing_ok=True)
    environ = {
        **os.environ,
        "PURIFY_FAST_TEST_DEVICE": context.device.type,
        "PURIFY_FAST_TEST_PASSED": str(_passed(context)),
        "PURIFY_FAST_TEST_SECONDS": str(max(1.0, seconds)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", *TESTS, "-v", f"--junitxml={path}", "-p", "no:cacheprovider"]
    if cores > 1:
        command += ["-n", str(cores)]
    command += ["--show-capture=no", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last: list[str] = []
        for line in process.stdout:
            print(line, end="", flush=True)
            last = [*last, line][-30:]
            share = re.search(r"\[ *(\d+)%\]", line)
            if share:
                context.tell(int(share[1]) / 100, name)
    if not path.exists():
        raise RuntimeError(f"pytest ended with exit status {process.returncode} and no report:\n{''.join(last)}")
    found.read(path)


def sanitizer(context: Context) -> Outcome:
    """compute-sanitizer over every op once; without it, the ops alone, which is no check of memory."""
    script = [sys.executable, *EVERY_OP, "--device", context.device.type]
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor in an allocation of its own

    def run(command: list[str]) -> subprocess.CompletedProcess:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=max(1.0, context.left)
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{' '.join(command)} took longer than {error.timeout:.0f} s") from None
        print(done.stdout, done.stderr, sep="\n")
        return done

    context.tell(0.1, "the ops without it")
    alone = run(script)
    if alone.returncode:
        raise RuntimeError(f"exit status {alone.returncode} without the sanitizer:\n{tail(alone.stderr)}")
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    tool = shutil.which("compute-sanitizer") or next(
        (str(p) for home in (*homes, Path("/usr/local/cuda/bin")) if (p := home / "compute-sanitizer").exists()), None
    )
    if context.device.type != "cuda":
        return Outcome(NOT_AVAILABLE, f"compute-sanitizer needs a CUDA device; {alone.stdout.strip()} without it")
    if tool is None:
        return Outcome(NOT_AVAILABLE, "compute-sanitizer is neither on the PATH nor below CUDA_HOME")
    tiny = [sys.executable, "-c", "import torch; print(torch.arange(9, device='cuda').sum().item())"]
    # PyTorch asks the driver for what it may not support: those errors are not the kernels'
    kinds = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    clean = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "SUMMARY: 0 hazards"}
    commands = {kind: [tool, "--tool", kind, "--error-exitcode", "9", *more] for kind, more in kinds.items()}
    control = run([*commands["memcheck"], *tiny])
    if control.returncode or clean["memcheck"] not in control.stdout:
        said = tail(control.stdout + control.stderr, 8)
        return Outcome(NOT_AVAILABLE, "compute-sanitizer does not work on this device", {"said": said})
    said, left_out, state = {}, [], PASSED
    for index, (kind, command) in enumerate(commands.items()):
        context.tell(0.3 + 0.3 * index, kind)
        try:
            done = run([*command, *script])
        except TimeoutError as error:
            left_out.append(f"{kind}: {error}")
            continue
        said[kind] = tail(done.stdout, 12)
        if done.returncode or clean[kind] not in done.stdout:
            state = FAILED
    words = [f"{kind}: {(text or 'silent').splitlines()[-1].strip('= ')}" for kind, text in said.items()]
    return Outcome(state if said else FAILED, "; ".join(words) or "no tool ended in time", said, left_out)


def races(context: Context) -> Outcome:
    """`purify-fast tune`, whose file is kept with the results; in a rehearsal, few elements and a folder of its own."""
    retain_freed_memory()
    device = context.device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    known = limits.read(context.out)
    if not known:
        limits.run(device, context.dry, context.out)
        known = limits.read(context.out)
    copied = known.get((environment(device)["device"], limits.COPY), 0.0)
    capture = CudaCapture() if device.type == "cuda" else None
    found = tune(device, seconds=0.9 * context.left, capture=capture, tell=context.tell)
    shipping.take(device, context.out)
    raced = {name: known_rows(op, device) for name, op in REGISTRY.items() if op.kernel(device.type) != "reference"}
    rows = [
        {"op": op, **dataclasses.asdict(row), "ratio": f"{row.ratio:.3f}", "copy_GB_per_s": f"{copied / 1e9:.1f}",
         "share_of_copy": f"{1e12 * row.megabytes / row.kernel_us / copied:.3f}" if copied else ""}
        for op, each in raced.items()
        for row in each
    ]  # fmt: skip
    report.write_csv(context.out / "raced.csv", rows)
    ahead = sum(float(row["ratio"]) > 1 for row in rows)
    summary = f"{len(rows)} races, {ahead} won by the kernel, {len(found.changes)} calls served by another than before"
    problems = {**found.failed, **found.wrong}
    details = {"errors": problems, "changes": [dataclasses.asdict(one) for one in found.changes]}
    state = PASSED if rows and not problems else FAILED
    return Outcome(state, f"{summary}, {len(problems)} with a problem", details, found.left_out)


def ops(context: Context) -> Outcome:
    """`python -m benchmarks ops`."""
    retain_freed_memory()
    budget = Budget(context.left, True, {}, tell=context.tell)
    run_ops(list(registry(context.device.type)), context.device, context.dry, context.out, budget)
    rows = report.rows_of(context.out / report.ROWS)
    wrong = [" ".join(row[k] for k in ("op", "variant", "shape", "dtype")) for row in rows if row["verdict"] == "wrong"]
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("best", "level", "behind")}
    summary = f"{len(rows)} rows: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}, {len(wrong)} wrong"
    return _measured(budget, bool(rows), summary, wrong)


def raced_pipelines(context: Context) -> Outcome:
    """`python -m benchmarks pipelines`."""
    budget = Budget(context.left, True, {}, tell=context.tell)
    run_pipelines(list(pipelines.registry()), context.device, context.dry, context.out, budget)
    rows = report.rows_of(context.out / report.PIPELINES)
    wrong = [f"{row['pipeline']} {row['case']}: {row['contestant']}" for row in rows if row["verdict"] == "wrong"]
    cases = {(row["pipeline"], row["case"]) for row in rows}
    return _measured(budget, bool(rows), f"{len(cases)} cases, {len(rows)} contestants, {len(wrong)} wrong", wrong)


def _measured(budget: Budget, some: bool, summary: str, wrong: list[str]) -> Outcome:
    """Passed if there are some rows, and none with an error or a wrong result."""
    assert budget.failed is not None
    summary += f", {len(budget.failed)} with an error, {len(budget.left_out)} left out"
    state = PASSED if some and not wrong and not budget.failed else FAILED
    return Outcome(state, summary, {"wrong": wrong, "errors": budget.failed}, budget.left_out)


SECTIONS: dict[str, Callable[[Context], Outcome]] = {
    "captures": first.capture_cost,
    "verdicts": first.verdicts,
    "extension": extension,
    "tests": tests,
    "standard": first.standard,
    "steps": first.training_steps,
    "limits": measured_limits,
    "replays": first.replays,
    "races": races,
    "ops": ops,
    "sanitizer": sanitizer,
    "pipelines": raced_pipelines,
}


# -- running them -----------------------------------------------------------------------------------------------------


def fingerprint(device: torch.device, dry: bool) -> dict:
    """What a section's results are of."""
    sources = hashlib.blake2b(digest_size=16)
    for pattern in SOURCES:
        for path in sorted(path for path in ROOT.glob(pattern) if path.is_file()):
            sources.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    here = environment(device)
    kept = {name: here[name] for name in ("device", "torch", "triton")}
    python = platform.python_version()
    return {"version": __version__, "sources": sources.hexdigest(), "python": python, "dry": dry, **kept}


def _rehearse(out: Path) -> None:
    """Few elements, short runs, and a folder of verdicts and races of its own."""
    os.environ["PURIFY_FAST_CACHE"] = str(out / "gpu_check" / "cache")
    _racing.ELEMENTS["cpu"] = {"small": 2**10, "medium": 2**17}
    _racing.RUN = 1e-5


def _end_with(parent: int) -> None:
    """End this group of processes once its parent is gone, which would be killed without a chance to do so."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def _work(pipe, name: str, context: tuple, parent: int) -> None:
    """A section's process, with the processes that it starts in a group of their own."""
    os.setsid()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    out, device, dry, seconds, data = context
    if dry:
        _rehearse(out)
    with (out / "gpu_check" / f"{name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    tell = lambda share, what: pipe.send(("tell", share, what))  # noqa: E731
    try:
        outcome = SECTIONS[name](Context(out, device, dry, seconds, tell, data))
        pipe.send(("done", dataclasses.asdict(outcome), ""))
    except Exception as error:
        summary = f"{type(error).__name__}: {error}".splitlines()[0]
        pipe.send(("done", dataclasses.asdict(Outcome(FAILED, summary)), traceback.format_exc()))


def run_section(name: str, out: Path, device: torch.device, dry: bool, seconds: float, tell, data: Path | None) -> dict:
    """The outcome, with its traceback; a section that does not end in time is ended."""
    began, grace = time.monotonic(), GRACE[dry]
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, name, (out, device, dry, seconds, data), os.getpid()))
    process.start()
    theirs.close()
    outcome, trace = None, ""
    try:
        while outcome is None and time.monotonic() - began < seconds + grace:
            if mine.poll(0.5):
                kind, *rest = mine.recv()
                if kind == "tell":
                    tell(*rest)
                else:
                    outcome, trace = rest
    except EOFError:
        process.join()
        outcome = dataclasses.asdict(Outcome(FAILED, f"its process ended with exit status {process.exitcode}"))
    finally:
        assert process.pid is not None
        if outcome is not None:
            process.join(grace)
        with contextlib.suppress(ProcessLookupError):  # what it started must not outlive it either
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may have had no time to lead a group
        process.join()
    if outcome is None:
        outcome = dataclasses.asdict(Outcome(FAILED, f"ended {grace:.0f} s after its limit of {seconds:.0f} s"))
    return {"section": name, **outcome, "traceback": trace, "seconds": round(time.monotonic() - began, 1)}


def done(path: Path, mark: dict) -> dict | None:
    """What a section wrote, if it was of the same."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("fingerprint") == mark else None


def table(results: dict[str, dict | None]) -> str:
    lines = ["| section | state | seconds | |", "|---|---|---|---|"]
    for name, result in results.items():
        cells = (result["state"], f"{result['seconds']:.0f}", result["summary"]) if result else ("not run", "", "")
        lines.append(f"| {name} | " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines)


def page(results: dict[str, dict | None], mark: dict) -> str:
    """The report: the table, what was left out, what failed."""
    kind = "Rehearsal on a CPU" if mark["dry"] else "GPU check"
    on = f"{mark['device']}, torch {mark['torch']}, triton {mark['triton']}, Python {mark['python']}"
    lines = [f"# {kind}", "", f"purify_fast {mark['version']} on {on}; {datetime.date.today().isoformat()}.", ""]
    lines += [table(results)]
    for name, result in results.items():
        if result is None:
            continue
        if result["left_out"]:
            lines += ["", f"## {name}: left out", "", *(f"- {one}" for one in result["left_out"])]
        errors = {**result["details"].get("errors", {}), **result["details"].get("failed", {})}
        if result["traceback"]:
            errors["section"] = result["traceback"]
        for what, text in errors.items():
            lines += ["", f"## {name}: {what} failed", "", "```", text.strip(), "```"]
    return "\n".join(lines) + "\n"


def conclude(out: Path, dry: bool) -> list[Path]:
    """Write what the results change: the chapter, and in the folder of all results the page and the races that ship.

    Args:
        out: the folder of the device.
        dry: whether this was a rehearsal, which changes nothing outside of ``out``.

    Returns:
        What was written.
    """
    written = [out / "chapter.md", out / "races.json"]
    write_text(written[0], "\n".join(performance.chapter(out)) + "\n")
    write_text(written[1], json.dumps([shipping.shipped(out)], indent=1) + "\n")
    if not dry and out.parent == RESULTS.resolve():
        pages.publish()
    return written


def why_no_device() -> str:
    """Why PyTorch finds no CUDA device, in its own words and with what it was built for."""
    built = f"this PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this PyTorch has no CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).strip().splitlines()[0].rstrip('.')}; {built}"
    return f"the driver names {torch.cuda.device_count()} devices; {built}"


def main(out: Path, device: torch.device, dry: bool, only: list[str], redo: bool, seconds: float | None,
         total: float, data: Path | None = None) -> bool:  # fmt: skip
    """Run what is not done of the sections; whether all that were asked for passed, or are not available.

    Args:
        only: sections; all if empty. redo: those that are done, too. seconds: a section's limit in place of its own.
        total: seconds for all of them. data: where CIFAR-10 is.
    """
    out = out.resolve()  # pytest runs in another folder
    lacking = _compiler.missing()
    if lacking is not None and not dry:
        print(f"WARNING: {lacking}", file=sys.stderr)
    with folder_lock(out):
        return _run(out, device, dry, only=only, redo=redo, seconds=seconds, total=total, data=data)


def _begin(name: str, out: Path, mark: dict, redo: bool) -> None:
    """Remember that a section was begun; what it has so far, of others or to be done again, is removed."""
    begun = out / "gpu_check" / f"{name}.begun"
    if redo or not begun.exists() or json.loads(begun.read_text()) != mark:
        for file in FILES.get(name, []):
            (out / file).unlink(missing_ok=True)
        for path in (out / "gpu_check").glob(f"{name}-*.passed*"):
            path.unlink()
        shutil.rmtree(out / "gpu_check" / name, ignore_errors=True)
        write_text(begun, json.dumps(mark))


def _run(out: Path, device: torch.device, dry: bool, *, only: list[str], redo: bool, seconds: float | None,
         total: float, data: Path | None) -> bool:  # fmt: skip
    (out / "gpu_check").mkdir(parents=True, exist_ok=True)
    mark, began = fingerprint(device, dry), time.monotonic()
    paths = {name: out / "gpu_check" / f"{name}.json" for name in SECTIONS}
    results = {name: done(path, mark) for name, path in paths.items()}
    chosen = only or list(SECTIONS)

    def complete(name: str) -> bool:
        result = results[name]
        return result is not None and result["state"] != FAILED and not result["left_out"]

    wanted = [name for name in SECTIONS if name in chosen and (redo or not complete(name))]
    with tqdm(total=len(wanted), unit="section", file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}") as progress:
        for index, name in enumerate(wanted):

            def tell(share: float, what: str, index=index, name=name) -> None:
                progress.n = index + max(0.0, min(1.0, share))
                progress.set_description(f"{name}: {what}"[:60], refresh=True)

            tell(0.0, "")
            limit = min(seconds or LIMITS[name][dry], total - (time.monotonic() - began) - GRACE[dry])
            if limit < 5:
                progress.write(f"{name}: left out, the {total:.0f} s for all are over", file=sys.stderr)
                continue
            _begin(name, out, mark, redo)
            built = done(paths["extension"], mark)
            if built and built["details"].get("path"):
                os.environ["PURIFY_FAST_EXTENSION"] = built["details"]["path"]
            result = {**run_section(name, out, device, dry, limit, tell, data), "fingerprint": mark}
            result["date"] = datetime.datetime.now().isoformat(timespec="seconds")
            write_text(paths[name], json.dumps(result, indent=1) + "\n")
            results[name] = result
            write_text(out / "gpu_check.md", page(results, mark))
        progress.n = len(wanted)
        progress.set_description("done", refresh=True)
    write_text(out / "gpu_check.md", page(results, mark))
    print(table(results))
    for path in (out / "gpu_check.md", *conclude(out, dry)):
        print(path)
    return all((result := results[name]) is not None and result["state"] != FAILED for name in chosen)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks gpu_check``."""
    parts, sections = ", ".join(PARTS), ", ".join(SECTIONS)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"which of {parts}; all in turn by default")
    parser.add_argument("--dry", action="store_true", help="rehearse every section on the CPU, small: no numbers")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/<device> by default")
    only = f"which; all by default: {sections}"
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], metavar="section", help=only)
    parser.add_argument("--redo", action="store_true", help="also what is done already")
    parser.add_argument("--seconds", type=float, help="the limit of each section in place of its own")
    parser.add_argument("--total", type=float, help="seconds for all of them; 540 for each of the three by default")
    parser.add_argument(
        "--data", type=Path, help="folder with CIFAR-10, or an .npz file; the current folder by default"
    )


def check(chosen: argparse.Namespace) -> None:
    """ValueError for unknown parts, no time, or no device."""
    for name, value in (("--seconds", chosen.seconds), ("--total", chosen.total)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value:g}")
    if unknown := set(chosen.parts) - set(PARTS):
        raise ValueError(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not chosen.dry and not torch.cuda.is_available():
        raise ValueError(f"no CUDA device is available: {why_no_device()}; --dry rehearses everything on the CPU")


def command(chosen: argparse.Namespace) -> bool:
    """``python -m benchmarks gpu_check``; whether all passed that was asked for."""
    device, parts = torch.device("cpu" if chosen.dry else "cuda"), chosen.parts or list(PARTS)
    only = chosen.only or [name for part in parts for name in PARTS[part]]
    total = chosen.total or sum(TOTALS[part][chosen.dry] for part in parts)
    out = chosen.out or folder(device, chosen.dry)
    return main(out, device, chosen.dry, only, chosen.redo, chosen.seconds, total, chosen.data)
