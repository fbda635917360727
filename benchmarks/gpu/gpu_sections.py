"""The sections of the GPU check. Each section is a function that takes a `Context` and returns an `Outcome`.

Five sections measure CUDA graphs and kernels in detail. Each item begins with the constant that names the results file:

1. `CAPTURE_COST`: the time to capture a step in a CUDA graph, and the time that a replay of the graph saves.
2. `VERDICTS`: the correctness and the compile time of each kernel.
3. `STANDARD`: an evaluation with CUDA graphs and without, compared with the official AutoAttack.
4. `STEPS`: the time to launch the operators of a training step, and the computing time of the GPU, for each method.
5. `REPLAYS`: kernels replayed in CUDA graphs, compared with their references and with `torch.compile`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import __version__, _library, zoo
from purify_fast.attacks.gradient_copy import gradient_copy
from purify_fast.cli.installation import facts
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import racing, verify
from purify_fast.ops.dispatch.examples import tile, to
from purify_fast.ops.dispatch.op import Call
from purify_fast.ops.dispatch.registry import Op, use_backend
from purify_fast.speed import retain_freed_memory
from purify_fast.speed.graphs.cuda_capture import CudaCapture
from purify_fast.speed.graphs.step_graphs import StepGraphs
from purify_fast.speed.precision import float32_products

from .. import RESULTS
from ..robustness import contests
from ..speed import limits, pipelines, sheets, shipping, timing
from ..speed.ops import registry
from ..speed.pipelines.carso_inference import classifier
from ..speed.running import Budget, run_ops, run_pipelines
from .replays import Replays

ROOT = RESULTS.parents[1]
EVERY_OP = ("-m", "benchmarks.gpu.every_op")
#: The folder of the tests that pytest runs.
TESTS = ("tests/gpu",)
#: The files on which the results depend. A section runs again if one of these files has changed.
SOURCES = (
    "purify_fast/**/*.py",
    "kernels/*.py",
    "csrc/**/*",
    "benchmarks/**/*.py",
    "tests/**/*.py",
    "setup.py",
)
CAPTURE_COST, VERDICTS, STANDARD = "capture_cost.csv", "kernel_verdicts.csv", "standard.csv"
STEPS, REPLAYS = "training_steps.csv", "replays.csv"
#: The number of timed runs. The result is their median time.
RUNS = 20


PASSED, FAILED, NOT_AVAILABLE = "passed", "failed", "not available"


@dataclass(frozen=True)
class Context:
    """The inputs of a section.

    Attributes:
        out: folder for the results of the device.
        device: device that is checked.
        dry: True for a rehearsal on a CPU, in which all inputs are small and the numbers mean nothing.
        seconds: time limit of the section in seconds.
        data: folder with CIFAR-10, or path of an ``.npz`` file. If it is None, the current folder is used.
        started: start time of the section on the monotonic clock.
    """

    out: Path
    device: torch.device
    dry: bool
    seconds: float
    data: Path | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def budget(self) -> Budget:
        return Budget(self.left, resume=True, failed={})


@dataclass
class Outcome:
    state: str
    summary: str
    details: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    traceback: str = ""


def measured(context: Context, file: str, work: dict[str, Callable[[], dict | list[dict]]]) -> Outcome:
    """Measure the parts of a section that are missing in its results file. Write the file after each part.

    If a part fails, the other parts are still measured. A part that does not fit into the time limit is left out.

    Args:
        context: context of the section.
        file: name of the results file in the folder of the device.
        work: for each name in the column ``part``, the function that measures one row or several rows.
    """
    path, here = context.out / file, timing.environment(context.device)
    rows: list[dict] = list(sheets.rows_of(path))
    there = {row["part"] for row in rows}

    def run(part: str) -> None:
        made = work[part]()
        rows.extend({"part": part, **row, **here} for row in (made if isinstance(made, list) else [made]))
        sheets.write_csv(path, rows)

    budget = context.budget()
    with float32_products():
        budget.go([(part, partial(run, part)) for part in work if part not in there], "part")
    # Only the results of the section `verdicts` have the column "passed".
    wrong = {row["part"]: row["case"] for row in rows if str(row.get("passed")) == "False"}
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


def fingerprint(device: torch.device, dry: bool) -> dict:
    """Return the facts that identify the results of a section: version, hash of the sources, and machine."""
    sources = hashlib.blake2b(digest_size=16)
    for pattern in SOURCES:
        for path in sorted(path for path in ROOT.glob(pattern) if path.is_file()):
            sources.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    here = timing.environment(device)
    machine = {name: here[name] for name in ("device", "torch", "triton")}
    python = platform.python_version()
    return {"version": __version__, "sources": sources.hexdigest(), "python": python, "dry": dry, **machine}


def _capture(device: torch.device) -> Any:
    """Return the object that captures CUDA graphs on a device. On a CPU it is a replacement without real graphs."""
    return CudaCapture() if device.type == "cuda" else Replays()


def _with_kernels(device: torch.device) -> list[Op]:
    """Return the ops that have a kernel for a device."""
    return [op for op in REGISTRY.values() if op.kernel(device.type) != "reference"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


@dataclass(frozen=True, eq=False)
class _SignStep:
    """A step of an attack: it computes the gradient with respect to the images, and adds the sign of the gradient."""

    model: nn.Module

    def __call__(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            point = state["point"].detach().requires_grad_()
            loss = F.cross_entropy(self.model(point).float(), state["label"], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
        return {"point": (point.detach() + gradient.sign() / 255).clamp(0, 1)}


def _one_capture(context: Context, images: int, precision: Any) -> dict:
    """Measure the time to capture a step, and the time of the step with and without a CUDA graph."""
    torch.manual_seed(0)
    model = (PreActResNet18(width=4).eval() if context.dry else classifier()).to(context.device)
    x = torch.rand(images, 3, 32, 32, device=context.device)
    source = gradient_copy(model, x[:16], precision)
    step, runs = _SignStep(source), 2 if context.dry else RUNS
    state = {"point": x, "label": torch.arange(images, device=context.device) % 10}
    capture = _capture(context.device)
    graphs = StepGraphs("always", capture=capture)
    for _ in range(3):
        step(state)
    eager = [capture.timed(lambda: step(state), context.device) for _ in range(runs)]
    began = capture.now(context.device)
    loop = graphs.begin(step, state)
    captured = capture.now(context.device) - began
    replayed = [capture.timed(loop.take, context.device) for _ in range(runs)]
    on_device = timing.seconds([loop.take] * runs, context.device) / runs
    launching, whole = (statistics.median(column) for column in zip(*eager, strict=True))
    graph = statistics.median(seconds for _, seconds in replayed)
    saved = whole - graph
    times = {"capture": captured, "eager_host": launching, "eager": whole, "graph": graph, "device": on_device}
    return {
        "images": images,
        "precision": precision if source is not model or precision == "float32" else "no copy",
        "captured": loop.replays,
        **{f"{name}_ms": _ms(seconds) for name, seconds in times.items()},
        "pays_after": f"{captured / saved:.0f}" if saved > 0 else "never",
        "refusal": graphs.refusal or "",
    }


def capture_cost(context: Context) -> Outcome:
    """Measure the times to launch and run a gradient step, to capture it in a CUDA graph, and to replay the graph."""
    sizes = (2, 4) if context.dry else (16, 64, 250)
    work = {
        f"{images} images, {precision}": partial(_one_capture, context, images, precision)
        for precision in ("float32", "bfloat16")
        for images in sizes
    }
    return measured(context, CAPTURE_COST, work)


def verdicts(context: Context) -> Outcome:
    """Compare every kernel with its definition in float64. Most of the measured time is compilation."""

    def one(op: Op) -> dict:
        verdict = verify.verdict_of(op, Call(context.device))
        return {"op": op.name, **asdict(verdict), "passed": verdict.passed}

    return measured(context, VERDICTS, {op.name: partial(one, op) for op in _with_kernels(context.device)})


def _subject(context: Context) -> contests.Subject:
    """Return a ResNet-18 of the zoo and 1,000 images of CIFAR-10. In a rehearsal, return a small random model."""
    if context.dry:
        torch.manual_seed(0)
        model, x = PreActResNet18(width=4).eval(), torch.rand(6, 3, 32, 32)
        return contests.Subject(model, x, model(x).argmax(1), 0.01)
    name = str(context.data) if context.data is not None and context.data.is_file() else "cifar10"
    data = load_dataset(name, context.data if name == "cifar10" else None)
    x, y = to_float(data.x_test[:1000]).to(context.device), data.y_test[:1000].to(context.device)
    return contests.Subject(zoo.load("cifar10-pgd-at-w16").eval().to(context.device), x, y, 8 / 255)


def _compared(attack: str, seconds: float, robust: np.ndarray, without_graphs: np.ndarray) -> dict:
    """Return a row of the results file. It counts the images whose outcome differs without CUDA graphs."""
    other = int((robust != without_graphs).sum())
    row = {"attack": attack, "seconds": f"{seconds:.2f}", "robust": int(robust.sum()), "images": len(robust)}
    return row | {"other_than_off": other}


def _evaluated(context: Context, subject: contests.Subject, mode: Any) -> list[dict]:
    """Evaluate a model. Return a row for each attack, with the difference from the evaluation without CUDA graphs."""
    folder = context.out / "gpu_check" / "standard"
    protocol = "fast" if context.dry else "standard"
    config = EvaluateConfig(protocol=protocol, batch_size=contests.BATCH, cuda_graphs=mode, probes=False)
    how: dict[str, Any] = {"eps": subject.eps, "config": config, "out": folder / mode, "progress": False}
    report = evaluate(subject.model, subject.x, subject.y, **how)
    robust = {row.attack: np.asarray(row.robust) for row in report.rows}
    np.savez(folder / f"{mode}.npz", allow_pickle=False, **robust)
    off = np.load(folder / "off.npz")
    return [_compared(row.attack, row.seconds, robust[row.attack], off[row.attack]) for row in report.rows]


def _official(context: Context, subject: contests.Subject) -> list[dict]:
    """Run the official AutoAttack. Return a row with the difference from our attacks without CUDA graphs."""
    began = time.perf_counter()
    images = contests.official("standard")(subject, contests.QUICK if context.dry else contests.Amount())
    seconds = time.perf_counter() - began
    with torch.no_grad():
        robust = torch.cat([subject.model(part).argmax(1) for part in images.split(contests.BATCH)]) == subject.y
    off = np.load(context.out / "gpu_check" / "standard" / "off.npz")
    left = np.logical_and.reduce([off[name] for name in off.files])
    return [_compared("AutoAttack", seconds, robust.cpu().numpy(), left)]


def standard(context: Context) -> Outcome:
    """Attack a model by the protocol `standard` with CUDA graphs "off", "auto" and "always", and by AutoAttack.

    The results are compared image by image.
    """
    subject = _subject(context)
    work = {f"graphs {mode}": partial(_evaluated, context, subject, mode) for mode in ("off", "auto", "always")}
    work["AutoAttack"] = partial(_official, context, subject)
    return measured(context, STANDARD, work)


def _device_seconds(run: Callable[[], object]) -> float:
    """Run a function. Return the GPU's computing time in seconds, or 0 if PyTorch's profiler records none."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def _one_step(context: Context, pipeline: str, case: str, contestant: str) -> dict:
    """Measure the time to launch a training step, the time of the whole step, and the GPU's computing time."""
    chosen = pipelines.registry()[pipeline](context.dry)[case].contestants[contestant]
    job, runs = chosen.make(context.device, context.dry), 1 if context.dry else RUNS
    for _ in range(1 if context.dry else 5):
        job.run()
    capture = _capture(context.device)
    times = [capture.timed(job.run, context.device) for _ in range(runs)]
    launching, whole = (statistics.median(column) for column in zip(*times, strict=True))
    computing = 0.0 if context.dry else _device_seconds(job.run)
    times = {"host_ms": _ms(launching), "all_ms": _ms(whole), "device_ms": _ms(computing) if computing else ""}
    return {"pipeline": pipeline, "case": case, "contestant": contestant, **times}


def training_steps(context: Context) -> Outcome:
    """Measure a training step of each method: launch time on the host, and computing time on the device."""
    work = {
        f"{pipeline}, {name}: {contestant}": partial(_one_step, context, pipeline, name, contestant)
        for pipeline in ("arrest_step", "carso_training", "atop_finetune")
        for name, case in pipelines.registry()[pipeline](context.dry).items()
        for contestant in ("ours", "ours, captured")
        if contestant in case.contestants
    }
    return measured(context, STEPS, work)


def _one_replay(context: Context, race: racing.Race) -> dict:
    """Time the replays of a kernel, of its reference, and of the reference under `torch.compile`."""
    op = REGISTRY[race.op]
    arguments = to(tile(race.example.make(race.dtype, 0), race.times), context.device)
    torch._dynamo.reset()
    compiled = torch.compile(op.reference, fullgraph=True, dynamic=False)
    calls = {
        "reference": lambda: op.reference(*arguments),
        "compile": lambda: compiled(*arguments),
        "kernel": lambda: op.handle(*arguments),
    }
    if context.dry:
        # Leave out torch.compile in a rehearsal, because compilation would take a minute.
        del calls["compile"]
    capture = _capture(context.device)
    with torch.no_grad(), use_backend("reference"):
        replays = [racing.replayed(call, context.device, capture) for call in calls.values()]
        times = dict(zip(calls, racing.fastest(replays, context.device), strict=True))
    named = dict(zip(("op", "example", "variant", "dtype", "size"), (race.op, *race.key), strict=True))
    return named | {f"{name}_us": f"{1e6 * seconds:.2f}" for name, seconds in times.items()}


def replays(context: Context) -> Outcome:
    """Time replays of each kernel on large tensors, for every raced example, in bfloat16 if it is supported."""
    size, work = "small" if context.dry else "large", {}
    for op in _with_kernels(context.device):
        for race in racing.races_of(op, context.device, (torch.bfloat16,)) or racing.races_of(op, context.device):
            if race.size == size:
                work[race.words()] = partial(_one_replay, context, race)
    return measured(context, REPLAYS, work)


def extension(context: Context) -> Outcome:
    """Find the loaded extension, which has the CPU kernels. If none is loaded, build one in a separate folder."""
    loaded = _library.path if _library.loaded() else None
    path = Path(loaded) if loaded else _build(context)
    known = facts(path)
    summary = f"{'loaded' if loaded else 'built'}: torch {known.get('torch', 'unknown')}"
    return Outcome(PASSED, summary, {"path": str(path), **known})


def _build(context: Context) -> Path:
    place = ROOT / "build" / "gpu_check" / f"cpu-{platform.python_version()}-{torch.__version__}"
    environ = {**os.environ, "PURIFY_FAST_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(place), "--build-temp", str(place / "tmp")]
    subprocess.run(command, cwd=ROOT, env=environ, timeout=context.left, check=True)
    return next(place.glob("purify_fast/_C*.so"))


def measured_limits(context: Context) -> Outcome:
    rows = limits.run(context.device, context.dry, context.out)
    return Outcome(PASSED, "; ".join(f"{row['limit']} {float(row['median']):,.0f} {row['unit']}" for row in rows))


def tests(context: Context) -> Outcome:
    """Run tests/gpu, except the tests that passed in an earlier run.

    The tests with small tensors run in parallel. After them, the tests with large tensors run one by one.
    """
    path = context.out / "gpu_check" / "tests.outcomes"
    cores = min(6, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 0
    for mark, share, workers in (("not large", 0.8, cores), ("large", 1.0, 0)):
        environ = {
            **os.environ,
            "PURIFY_FAST_TEST_DEVICE": context.device.type,
            "PURIFY_FAST_TEST_OUTCOMES": str(path),
            "PURIFY_FAST_TEST_SECONDS": str(max(1.0, share * context.left)),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", *TESTS, "-v", "-p", "no:cacheprovider", "--show-capture=no"]
        command += ["-m", mark, *(["-n", str(workers)] if workers > 1 else [])]
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
    """Run every op once without compute-sanitizer, and then under this tool, which checks the kernels' memory accesses.

    If the tool is missing, only the first run takes place.
    """
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
    for kind, command in commands.items():
        try:
            done = run([*command, *script])
        except subprocess.TimeoutExpired as error:
            left_out.append(f"{kind}: it took longer than {error.timeout:.0f} s")
            continue
        said[kind] = (done.stdout.strip() or "silent").splitlines()[-1].strip("= ")
        if done.returncode or clean[kind] not in done.stdout:
            state = FAILED
    words = [f"{kind}: {line}" for kind, line in said.items()]
    return Outcome(state if said else FAILED, "; ".join(words) or "no tool ended in time", said, left_out)


def races(context: Context) -> Outcome:
    """Time all kernels and references, as `purify-fast tune` does. Copy the results into the folder of the device."""
    retain_freed_memory()
    device = context.device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    capture = CudaCapture() if device.type == "cuda" else None
    tuned = racing.tune(device, seconds=0.9 * context.left, capture=capture)
    shipping.take(device, context.out)
    ratios = [row.ratio for op in _with_kernels(device) for row in racing.known_rows(op, device)]
    problems = {**tuned.failed, **tuned.wrong}
    summary = (
        f"{len(ratios)} comparisons of kernel and reference, the kernel was faster in "
        f"{sum(ratio > 1 for ratio in ratios)}, {len(tuned.changes)} choices changed, {len(problems)} with a problem"
    )
    changes = [{**vars(one), "call": f"{one.call.style} {one.call.cell}"} for one in tuned.changes]
    details = {"errors": problems, "changes": changes}
    return Outcome(PASSED if ratios and not problems else FAILED, summary, details, tuned.left_out)


def ops(context: Context) -> Outcome:
    """Run `python -m benchmarks ops`."""
    retain_freed_memory()
    budget = context.budget()
    run_ops(list(registry(context.device.type)), context.device, context.dry, context.out, budget)
    return _judged(budget, context.out / sheets.ROWS, ("op", "variant", "shape", "dtype"))


def raced_pipelines(context: Context) -> Outcome:
    """Run `python -m benchmarks pipelines`."""
    budget = context.budget()
    run_pipelines(list(pipelines.registry()), context.device, context.dry, context.out, budget)
    return _judged(budget, context.out / sheets.PIPELINES, ("pipeline", "case", "contestant"))


def _judged(budget: Budget, path: Path, columns: tuple[str, ...]) -> Outcome:
    """Return the outcome for a results file: the number of rows with each verdict, and the names of wrong rows."""
    rows = sheets.rows_of(path)
    wrong = {" ".join(row[name] for name in columns): "wrong" for row in rows if row["verdict"] == "wrong"}
    counts = Counter(row["verdict"] for row in rows)
    summary = f"{len(rows)} rows: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}"
    return outcome_of(budget, summary, bool(rows), wrong)


@dataclass(frozen=True)
class Section:
    """A section of the check. It runs in a separate process.

    Attributes:
        part: name of the part of the check that the section belongs to.
        run: function that runs the section.
        limits: time limits in seconds. The first is for a GPU, the second for a rehearsal on a CPU.
        files: names of the results files that the section writes into the folder of the device.
    """

    part: str
    run: Callable[[Context], Outcome]
    limits: tuple[float, float]
    files: tuple[str, ...] = ()


SECTIONS = {
    "captures": Section("tests", capture_cost, (50, 20), (CAPTURE_COST,)),
    "verdicts": Section("tests", verdicts, (70, 20), (VERDICTS,)),
    "extension": Section("tests", extension, (90, 110)),
    "tests": Section("tests", tests, (230, 110)),
    "standard": Section("ops", standard, (220, 40), (STANDARD,)),
    "steps": Section("ops", training_steps, (35, 20), (STEPS,)),
    "limits": Section("ops", measured_limits, (10, 10)),
    "replays": Section("ops", replays, (45, 20), (REPLAYS,)),
    "races": Section("ops", races, (130, 40), (shipping.FILE,)),
    "ops": Section("pipelines", ops, (120, 22), (sheets.ROWS,)),
    "sanitizer": Section("pipelines", sanitizer, (110, 20)),
    "pipelines": Section("pipelines", raced_pipelines, (250, 45), (sheets.PIPELINES,)),
}
