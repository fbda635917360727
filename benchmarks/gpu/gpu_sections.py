"""The sections of the GPU check. Each section is a function that takes a `Context` and returns an `Outcome`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purify_fast import zoo
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.ops.dispatch import tuning, verify
from purify_fast.ops.dispatch.registry import Op
from purify_fast.speed.precision import float32_products

from .. import RESULTS
from ..robustness import contests
from ..speed import kernel_times, limits, race, sheets, timing
from ..speed.pipelines import pgd_forms
from ..speed.running import Budget, run_pipelines
from . import goals, in_use

ROOT = RESULTS.parents[1]
EVERY_OP = ("-m", "benchmarks.gpu.every_op")
#: The folder of the tests that pytest runs.
TESTS = ("tests/gpu",)
VERDICTS, STANDARD, PGD = "kernel_verdicts.csv", "standard.csv", "pgd.csv"
IN_USE, GOALS = "in_use.csv", "goals.csv"
#: The pipelines that are measured, the most important first. The form of AToP in plain PyTorch takes long on a GPU.
PIPELINES = ("arrest_step", "carso_training", "carso_inference", "diffusion", "atop_finetune")
#: The number of images that are attacked by `standard`.
IMAGES = 500
#: The largest size of an archive in bytes.
MOST_BYTES = 16_000_000
#: The endings of the files in an archive.
PACKED = (".csv", ".json", ".log", ".md", ".outcomes")


PASSED, FAILED, NOT_AVAILABLE = "passed", "failed", "not available"


@dataclass(frozen=True)
class Context:
    """The inputs of a section.

    Attributes:
        out: folder for the results of the device.
        device: device that is checked.
        rehearsal: True for a rehearsal on a CPU, in which all inputs are small and the numbers mean nothing.
        seconds: time limit of the section in seconds.
        data: folder with CIFAR-10, or path of an ``.npz`` file. If it is None, the current folder is used.
        archives: folder of the archives; None: `out`.
        started: start time of the section on the monotonic clock.
    """

    out: Path
    device: torch.device
    rehearsal: bool
    seconds: float
    data: Path | None = None
    archives: Path | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def budget(self, alike: bool = True) -> Budget:
        return Budget(self.left, resume=True, failed={}, alike=alike)


@dataclass
class Outcome:
    state: str
    summary: str
    details: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    traceback: str = ""


def pack(context: Context, call: str) -> tuple[Path, list[str]]:
    """Pack the results, summaries and logs of a folder into one archive of about `MOST_BYTES` at most.

    Args:
        context: context of the call. Of its folder for results, only the files directly in ``gpu_check`` are packed.
        call: name of the call, which becomes the name of the archive.

    Returns:
        The path of the archive, and the names of the files that were left out because they are the largest.
    """
    out, folder = context.out, context.archives or context.out
    path, left_out, room = folder / f"{call}.tar.xz", [], 4 * MOST_BYTES
    for place in (folder, out / "gpu_check"):
        place.mkdir(parents=True, exist_ok=True)
    found = [file for place in (out, out / "gpu_check") for file in place.iterdir() if file.suffix in PACKED]
    # Sections side by side pack at any time, and the machine may be taken meanwhile.
    unfinished = out / "gpu_check" / f"{call}.{os.getpid()}.{threading.get_ident()}.unfinished"
    # A fast preset is enough: most of the bytes are text, which shrinks to less than a quarter.
    with tarfile.open(unfinished, "w:xz", preset=1) as archive:
        for file in sorted(found, key=lambda file: file.stat().st_size):
            room -= file.stat().st_size
            if room < 0:
                left_out.append(str(file.relative_to(out)))
            else:
                archive.add(file, f"{out.name}/{file.relative_to(out)}")
    shutil.move(unfinished, path)
    return path, left_out


def measured(
    context: Context, file: str, work: dict[str, Callable[[], dict | list[dict]]], alike: bool = True
) -> Outcome:
    """Measure the parts of a section that are missing in its results file. Write the file after each part, and pack it.

    Args:
        context: context of the section.
        file: name of the results file in the folder of the device.
        work: for each name in the column ``part``, the function that measures one row or several rows.
        alike: whether the parts take about as long as each other, see `Budget`.
    """
    (call,) = {section.call for section in SECTIONS.values() if file in section.files}
    path, here = context.out / file, timing.environment(context.device)
    before = sheets.rows_of(path)
    incomplete = {row["part"] for row in before if row.get("verdict") == "left out"}
    rows: list[dict] = [row for row in before if row["part"] not in incomplete]
    there = {row["part"] for row in rows}

    def run(part: str) -> None:
        made = work[part]()
        rows.extend({"part": part, **row, **here} for row in (made if isinstance(made, list) else [made]))
        sheets.write_csv(path, rows)
        pack(context, call)

    budget = context.budget(alike)
    with float32_products():
        budget.go([(part, partial(run, part)) for part in work if part not in there], "part")
    # Only kernels have the column "passed", and only forms of PGD and of use the column "verdict".
    wrong = {row["part"]: row["case"] for row in rows if str(row.get("passed")) == "False"}
    judged = {f"{row['part']}, {row['form']}": row["verdict"] for row in rows if "verdict" in row}
    wrong |= {name: verdict for name, verdict in judged.items() if verdict in ("wrong", "failed")}
    budget.left_out += [name for name, verdict in judged.items() if verdict == "left out"]
    return outcome_of(budget, f"{len({row['part'] for row in rows})} of {len(work)} parts measured", bool(rows), wrong)


def outcome_of(budget: Budget, summary: str, some: bool, wrong: dict[str, str]) -> Outcome:
    """Return the outcome of a section.

    Args:
        budget: budget after the run. It has the errors, and the names of the parts that were left out.
        summary: beginning of the summary.
        some: True if at least one row was measured. A section without rows has failed.
        wrong: messages about wrong results, by the name of the part. A section with wrong results has failed.
    """
    failed = budget.failed or {}
    errors = failed | wrong
    summary += f", {len(wrong)} wrong, {len(failed)} with an error, {len(budget.left_out)} left out"
    return Outcome(PASSED if some and not errors else FAILED, summary, {"errors": errors}, budget.left_out)


def verdicts(context: Context) -> Outcome:
    """Compare every kernel with its definition in float64. Most of the measured time is compilation."""

    def one(op: Op) -> dict:
        verdict = verify.verdict_of(op, context.device)
        return {"op": op.name, **asdict(verdict), "passed": verdict.passed}

    return measured(context, VERDICTS, {op.name: partial(one, op) for op in tuning.with_kernel(context.device)})


def _subject(context: Context) -> contests.Subject:
    """Return a ResNet-18 of the zoo and the first `IMAGES` images of CIFAR-10, or in a rehearsal a random model."""
    if context.rehearsal:
        torch.manual_seed(0)
        model, x = PreActResNet18(width=4).eval(), torch.rand(4, 3, 16, 16)
        return contests.Subject(model, x, model(x).argmax(1), 0.01)
    place = context.data
    data = load_dataset(place) if place is not None and place.is_file() else load_dataset("cifar10", place)
    x, y = to_float(data.x_test[:IMAGES]).to(context.device), data.y_test[:IMAGES].to(context.device)
    return contests.Subject(zoo.load("cifar10-pgd-at-w16").eval().to(context.device), x, y, 8 / 255)


def _evaluated(context: Context, subject: contests.Subject, mode: Any) -> list[dict]:
    """Evaluate a model. Return a row for each attack, with the difference from the evaluation without CUDA graphs."""
    folder = context.out / "gpu_check" / "standard"
    protocol = "fast" if context.rehearsal else "standard"
    how: dict[str, Any] = {"protocol": protocol, "batch_size": contests.BATCH, "probes": False}
    how |= {"eps": subject.eps, "out": folder / mode, "progress": False, "config": EvaluateConfig(cuda_graphs=mode)}
    report = evaluate(subject.model, subject.x, subject.y, **how)
    robust = {row.attack: np.asarray(row.robust) for row in report.rows}
    np.savez(folder / f"{mode}.npz", allow_pickle=False, **robust)
    off = np.load(folder / "off.npz")
    return [
        {
            "attack": row.attack,
            "seconds": f"{row.seconds:.2f}",
            "robust": int(robust[row.attack].sum()),
            "images": len(robust[row.attack]),
            "other_than_off": int((robust[row.attack] != off[row.attack]).sum()),
        }
        for row in report.rows
    ]


def standard(context: Context) -> Outcome:
    """Attack a model by the protocol `standard` with CUDA graphs "off" and "auto", and compare image by image."""
    subject = _subject(context)
    work = {f"graphs {mode}": partial(_evaluated, context, subject, mode) for mode in ("off", "auto")}
    return measured(context, STANDARD, work)


def used(context: Context) -> Outcome:
    """Train by `fit`, attack frozen copies in a loop of a user, and train on a batch that fills the card."""
    work = {name: partial(part, context.device, context.rehearsal) for name, part in in_use.PARTS.items()}
    return measured(context, IN_USE, work)


def _forms_of_pgd(context: Context, count: int) -> list[dict]:
    """Time PGD in all forms, each in a separate process. Return a row for each form."""
    name, steps = f"{count} images", pgd_forms.STEPS
    case = pgd_forms.cases(context.rehearsal)[name]
    rows = []
    for row in race.race("pgd_forms", name, case, context.device, context.rehearsal, context.left):
        seconds = float(row["ms"] or "nan") / 1e3
        rates = {"images_per_s": f"{count / seconds:.0f}", "TFLOP_per_s": f"{float(row['GFLOP']) / seconds / 1e3:.1f}"}
        rates = rates if row["ms"] else dict.fromkeys(rates, "")
        rows.append({"form": row["contestant"], "images": count, "steps": steps, "ms": row["ms"], **rates})
        rows[-1]["verdict"] = row["verdict"]
    return rows


def forms_of_pgd(context: Context) -> Outcome:
    """Time PGD as a user writes it, as an expert writes it, and by this package (see `pgd_forms`)."""
    counts = pgd_forms.sizes(context.rehearsal)
    return measured(context, PGD, {f"{count} images": partial(_forms_of_pgd, context, count) for count in counts})


def reached_goals(context: Context) -> Outcome:
    """Measure the goals by this package, by an expert and plainly, each in a process of its own (see `goals`)."""
    results: dict[str, Tensor] = {}
    goals.compile_all(context)
    work = {part: partial(goals.row_of, part, context, results) for part in goals.PARTS}
    return measured(context, GOALS, work, alike=False)


def measured_limits(context: Context) -> Outcome:
    rows = limits.run(context.device, context.rehearsal, context.out)
    return Outcome(PASSED, "; ".join(f"{row['limit']} {float(row['median']):,.0f} {row['unit']}" for row in rows))


def tests(context: Context) -> Outcome:
    """Run tests/gpu."""
    path = context.out / "gpu_check" / "tests.outcomes"
    path.unlink(missing_ok=True)
    # Some processors are left for the sections beside this one.
    workers = min(12, 3 * (os.cpu_count() or 1) // 4) if importlib.util.find_spec("xdist") else 0
    for mark, share, several in (("not large", 0.8, workers > 1), ("large", 1.0, False)):
        environ = {
            **os.environ,
            "PURIFY_FAST_TEST_DEVICE": context.device.type,
            "PURIFY_FAST_TEST_OUTCOMES": str(path),
            "PURIFY_FAST_TEST_SECONDS": str(max(1.0, share * context.left)),
            "PURIFY_FAST_TEST_STRIDE": "8" if context.rehearsal else "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", *TESTS, "-v", "-p", "no:cacheprovider", "--show-capture=no"]
        command += ["-m", mark, *(["-n", str(workers)] if several else [])]
        status = subprocess.run(command, cwd=ROOT, env=environ).returncode
        # Pytest ends with status 0 if all tests passed, with 1 if some tests failed, and with 5 if it found no test.
        if status not in (0, 1, 5):
            raise RuntimeError(f"pytest ended with exit status {status}; its output is in {path.with_suffix('.log')}")
    outcomes = {line["test"]: line for line in map(json.loads, path.read_text().splitlines())}
    why: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}, "left out": {}}
    for test, line in outcomes.items():
        why["left out" if "left out" in line["why"] else line["outcome"]][test] = line["why"]
    summary = ", ".join(f"{len(some)} {state}" for state, some in why.items())
    good = why["passed"] and not why["failed"] and not why["left out"]
    return Outcome(PASSED if good else FAILED, summary, why, list(why["left out"]))


def sanitizer(context: Context) -> Outcome:
    """Run every op once, and then again under compute-sanitizer, which checks the kernels' memory accesses."""
    script = [sys.executable, *EVERY_OP, "--device", context.device.type]
    # Give every tensor a separate allocation, so that the tool finds accesses beyond a tensor.
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def run(command: list[str]) -> subprocess.CompletedProcess:
        timeout = max(1.0, context.left)
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)
        print(done.stdout, done.stderr, sep="\n")
        return done

    alone = run(script)
    alone.check_returncode()
    if context.device.type != "cuda":
        ran = alone.stdout.strip()
        return Outcome(NOT_AVAILABLE, f"compute-sanitizer needs a CUDA device. Without the tool these ran: {ran}")
    homes = [f"{os.environ.get(name, '/usr/local/cuda')}/bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *homes]))
    if tool is None:
        return Outcome(NOT_AVAILABLE, "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin or CUDA_PATH/bin")
    tiny = [sys.executable, "-c", "import torch; print(torch.arange(9, device='cuda').sum().item())"]
    # Do not report errors of the CUDA API: PyTorch may ask for features that the driver does not support.
    commands = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    commands = {kind: [tool, "--tool", kind, "--error-exitcode", "9", *more] for kind, more in commands.items()}
    clean = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "SUMMARY: 0 hazards"}
    control = run([*commands["memcheck"], *tiny])
    if control.returncode or clean["memcheck"] not in control.stdout:
        return Outcome(NOT_AVAILABLE, "compute-sanitizer does not work on this device", {"said": control.stdout})
    said, left_out, state = {}, [], PASSED
    with ThreadPoolExecutor() as pool:
        started = {kind: pool.submit(run, [*command, *script]) for kind, command in commands.items()}
    for kind, future in started.items():
        try:
            done = future.result()
        except subprocess.TimeoutExpired as error:
            left_out.append(f"{kind}: it took longer than {error.timeout:.0f} s")
            continue
        said[kind] = (done.stdout.strip() or "silent").splitlines()[-1].strip("= ")
        if done.returncode or clean[kind] not in done.stdout:
            state = FAILED
    words = [f"{kind}: {line}" for kind, line in said.items()]
    return Outcome(state if said else FAILED, "; ".join(words) or "no tool ended in time", said, left_out)


def times_of_kernels(context: Context) -> Outcome:
    """Run `python -m benchmarks kernels`."""
    rows, problems = kernel_times.measure(context.device, context.out)
    faster = sum(float(row["kernel_us"]) < float(row["reference_us"]) for row in rows)
    summary = f"{len(rows)} comparisons of kernel and reference, the kernel was faster in {faster}"
    state = PASSED if rows and not problems else FAILED
    return Outcome(state, f"{summary}, {len(problems)} with a problem", {"errors": problems})


def raced_pipelines(context: Context) -> Outcome:
    """Run `python -m benchmarks pipelines` without the compiled plain forms."""
    budget = context.budget()
    run_pipelines(list(PIPELINES), context.device, context.rehearsal, context.out, budget)
    rows = sheets.rows_of(context.out / sheets.PIPELINES)
    wrong = {f"{row['pipeline']} {row['case']} {row['contestant']}": row["verdict"] for row in rows}
    wrong = {name: verdict for name, verdict in wrong.items() if verdict in ("wrong", "failed")}
    counts = Counter(row["verdict"] for row in rows)
    summary = f"{len(rows)} rows: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}"
    return outcome_of(budget, summary, bool(rows), wrong)


@dataclass(frozen=True)
class Section:
    """A section of the check. It runs in a separate process.

    Attributes:
        call: name of the call of the command that the section belongs to.
        run: function that runs the section.
        limits: time limits in seconds. The first is for a GPU, the second for a rehearsal on a CPU.
        files: names of the results files that the section writes into the folder of the device.
    """

    call: str
    run: Callable[[Context], Outcome]
    limits: tuple[float, float]
    files: tuple[str, ...] = ()


#: A section of a rehearsal takes up to eight minutes on two free cores, and longer beside other work.
REHEARSED = 1800
#: On an NVIDIA H200 with 16 processors, the sections of "correct" took up to 68 s side by side, and those of "measured"
#: 9, 140 (estimated), 35, 50 (estimated), 115 (estimated) and 110 s.
SECTIONS = {
    "verdicts": Section("correct", verdicts, (140, REHEARSED), (VERDICTS,)),
    "sanitizer": Section("correct", sanitizer, (140, REHEARSED)),
    "tests": Section("correct", tests, (140, REHEARSED)),
    "goals": Section("goals", reached_goals, (405, REHEARSED), (GOALS,)),
    "limits": Section("measured", measured_limits, (25, REHEARSED)),
    "pgd": Section("measured", forms_of_pgd, (190, REHEARSED), (PGD,)),
    "standard": Section("measured", standard, (60, REHEARSED), (STANDARD,)),
    "in_use": Section("measured", used, (70, REHEARSED), (IN_USE,)),
    # This section carries most claims, so the sections after it get what it leaves, or a call of their own (--only).
    "pipelines": Section("measured", raced_pipelines, (400, REHEARSED), (sheets.PIPELINES,)),
    "kernels": Section("measured", times_of_kernels, (300, REHEARSED), (kernel_times.ROWS,)),
}
