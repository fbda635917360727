"""What the check of a GPU does: its sections, each a function of a `Context`.

Five measurements come first, each in a file of its own: what decides whether graphs and kernels gain anything.

1. `CAPTURE_COST`: what a capture costs, and what a replay saves of a step.
2. `VERDICTS`: whether each kernel is right, and how long it takes to compile. The tests of the device stand beside it.
3. `STANDARD`: an evaluation with graphs and without, against the official AutoAttack.
4. `STEPS`: a training step of each method: how long the host launches, how long the device computes.
5. `REPLAYS`: kernels replayed in CUDA graphs, against their references and `torch.compile`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import __version__, _library, zoo
from purify_fast.attacks.engine.gradient_copy import gradient_copy
from purify_fast.cli.installation import facts
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import evaluate
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import tune, verify
from purify_fast.ops.dispatch.examples import tile, to
from purify_fast.ops.dispatch.op import Call
from purify_fast.ops.dispatch.registry import use_backend
from purify_fast.speed import retain_freed_memory
from purify_fast.speed.graphs.cuda_capture import CudaCapture
from purify_fast.speed.graphs.step_graphs import StepGraphs
from purify_fast.speed.precision import float32_products

from . import evaluation, limits, measure, pipelines, report, shipping
from .launches import Replays
from .ops import registry
from .pipelines.carso_inference import ResNet18
from .running import Budget, run_ops, run_pipelines

ROOT = Path(__file__).parents[1]
EVERY_OP = ("-m", "benchmarks.every_op")
#: What pytest runs.
TESTS = ("tests/gpu",)
#: What the results depend on.
SOURCES = ("purify_fast/**/*.py", "kernels/*.py", "csrc/**/*", "benchmarks/**/*.py", "tests/gpu/*.py",
           "tests/conftest.py", "tests/cuda_launches.py", "tests/training/torch_functions.py", "setup.py")  # fmt: skip
CAPTURE_COST, VERDICTS, STANDARD = "capture_cost.csv", "kernel_verdicts.csv", "standard.csv"
STEPS, REPLAYS = "training_steps.csv", "replays.csv"
#: Runs of what is timed, of which the median counts.
RUNS = 20


PASSED, FAILED, NOT_AVAILABLE = "passed", "failed", "not available"


@dataclass(frozen=True)
class Context:
    """What a section is given.

    Attributes:
        out: the folder of the device's results.
        device: what is checked.
        dry: whether this rehearses on a CPU, where everything is small and no number means anything.
        seconds: how long the section may take.
        tell: is told the share that is done, and of what.
        data: where CIFAR-10 is: a folder, or an ``.npz`` file; None for the current folder.
        started: when it began, on the monotonic clock.
    """

    out: Path
    device: torch.device
    dry: bool
    seconds: float
    tell: Callable[[float, str], None]
    data: Path | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)


@dataclass
class Outcome:
    state: str
    summary: str
    details: dict = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def measured(context: Context, file: str, work: dict[str, Callable[[], list[dict]]]) -> tuple[list[dict], Outcome]:
    """Measure what a file lacks, one part after the other, and write the file after each of them.

    Args:
        context: of the section.
        file: in the folder of the device.
        work: by the name of a part, which its rows have in the column ``part``, what measures it.

    Returns:
        All rows, and what became of the parts: those that fail end no other, those that the time does not suffice for
        are left out.
    """
    path, errors, left_out = context.out / file, {}, []
    here = measure.environment(context.device)
    rows: list[dict] = list(report.rows_of(path))
    there = {row["part"] for row in rows}
    for index, (part, run) in enumerate(work.items()):
        if part in there:
            continue
        if context.left < 0:
            left_out.append(part)
            continue
        context.tell(index / len(work), part)
        try:
            rows += [{"part": part, **row, **here} for row in run()]
        except Exception as error:
            errors[part] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        report.write_csv(path, rows)
    done = len({row["part"] for row in rows})
    summary = f"{done} of {len(work)} parts measured, {len(errors)} with an error, {len(left_out)} left out"
    return rows, Outcome(PASSED if done and not errors else FAILED, summary, {"errors": errors}, left_out)


def fingerprint(device: torch.device, dry: bool) -> dict:
    """What a section's results are of."""
    sources = hashlib.blake2b(digest_size=16)
    for pattern in SOURCES:
        for path in sorted(path for path in ROOT.glob(pattern) if path.is_file()):
            sources.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    here = measure.environment(device)
    machine = {name: here[name] for name in ("device", "torch", "triton")}
    python = platform.python_version()
    return {"version": __version__, "sources": sources.hexdigest(), "python": python, "dry": dry, **machine}


def _capture(device: torch.device) -> Any:
    """What captures on a device; on a CPU a stand-in."""
    return CudaCapture() if device.type == "cuda" else Replays()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"


@dataclass(frozen=True, eq=False)
class _SignStep:
    """A step of an attack: the gradient to the images, and a step by its sign."""

    model: nn.Module

    def __call__(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.enable_grad():
            point = state["point"].detach().requires_grad_()
            loss = F.cross_entropy(self.model(point).float(), state["label"], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
        return {"point": (point.detach() + gradient.sign() / 255).clamp(0, 1)}


def _one_capture(context: Context, images: int, precision: Any) -> list[dict]:
    """What the capture of one step costs, and what a step takes with and without it."""
    torch.manual_seed(0)
    model = (PreActResNet18(width=4) if context.dry else ResNet18()).eval().to(context.device)
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
    loop = graphs.begin(step, state, 10_000)
    captured = capture.now(context.device) - began
    replayed = [capture.timed(loop.take, context.device) for _ in range(runs)]
    on_device = measure.seconds([loop.take] * runs, context.device) / runs
    launching, whole = (statistics.median(column) for column in zip(*eager, strict=True))
    graph = statistics.median(seconds for _, seconds in replayed)
    saved = whole - graph
    return [{
        "images": images, "precision": precision if source is not model or precision == "float32" else "no copy",
        "captured": loop.replays, "capture_ms": _ms(captured), "eager_host_ms": _ms(launching),
        "eager_ms": _ms(whole), "graph_ms": _ms(graph), "device_ms": _ms(on_device),
        "pays_after": f"{captured / saved:.0f}" if saved > 0 else "never", "refusal": graphs.refusal or "",
    }]  # fmt: skip


def capture_cost(context: Context) -> Outcome:
    """Milliseconds of a capture; of a gradient step launched, replayed, and on the device alone."""
    sizes = (2, 4) if context.dry else (16, 64, 250)
    work = {
        f"{images} images, {precision}": partial(_one_capture, context, images, precision)
        for precision in ("float32", "bfloat16")
        for images in sizes
    }
    with float32_products():
        return measured(context, CAPTURE_COST, work)[1]


def _one_verdict(context: Context, name: str) -> list[dict]:
    """The verdict on an op, made now or kept, and how long its kernels took to compile."""
    compiling, compile_ = [0.0], verify._compile

    def timed(*given: Any) -> None:
        began = time.perf_counter()
        compile_(*given)
        compiling[0] += time.perf_counter() - began

    with mock.patch.object(verify, "_compile", timed):
        verdict = verify.verdict_of(REGISTRY[name], Call(context.device))
    made = asdict(verdict) | {"compile_seconds": f"{compiling[0]:.2f}"}
    return [{"op": name, **made}]


def verdicts(context: Context) -> Outcome:
    """Every kernel against the definition in float64."""
    names = [name for name, op in REGISTRY.items() if op.kernel(context.device.type) != "reference"]
    work = {name: partial(_one_verdict, context, name) for name in names}
    rows, outcome = measured(context, VERDICTS, work)
    wrong = {row["op"]: row["case"] for row in rows if str(row["passed"]) != "True"}
    outcome.summary += f"; {len(wrong)} wrong, {sum(float(row['compile_seconds']) for row in rows):.0f} s of compiling"
    outcome.details["errors"].update(wrong)
    outcome.state = outcome.state if not wrong else "failed"
    return outcome


def _subject(context: Context) -> evaluation.Subject:
    """A ResNet-18 of the zoo with 1,000 images of CIFAR-10; in a rehearsal a small model with random images."""
    if context.dry:
        torch.manual_seed(0)
        model, x = PreActResNet18(width=4).eval(), torch.rand(6, 3, 32, 32)
        return evaluation.Subject(model, x, model(x).argmax(1), 0.01)
    name = str(context.data) if context.data is not None and context.data.is_file() else "cifar10"
    data = load_dataset(name, context.data if name == "cifar10" else None)
    x, y = to_float(data.x_test[:1000]).to(context.device), data.y_test[:1000].to(context.device)
    return evaluation.Subject(zoo.load("cifar10-pgd-at-w16").eval().to(context.device), x, y, 8 / 255)


def _evaluated(context: Context, subject: evaluation.Subject, mode: Any) -> list[dict]:
    """The rows of an evaluation, and whether its robust images are those of the one without graphs."""
    folder = context.out / "gpu_check" / "standard"
    report = evaluate(
        subject.model, subject.x, subject.y, eps=subject.eps, protocol="fast" if context.dry else "standard",
        batch_size=evaluation.BATCH, cuda_graphs=mode, out=folder / mode, progress=False, probes=False,
    )  # fmt: skip
    robust = {row.attack: np.asarray(row.robust) for row in report.rows}
    np.savez(folder / f"{mode}.npz", allow_pickle=False, **robust)
    reference = np.load(folder / "off.npz")
    return [
        {
            "attack": row.attack,
            "seconds": f"{row.seconds:.2f}",
            "robust": int(robust[row.attack].sum()),
            "images": len(subject.y),
            "other_than_off": int((robust[row.attack] != reference[row.attack]).sum()),
        }
        for row in report.rows
    ]


def _official(context: Context, subject: evaluation.Subject) -> list[dict]:
    """The official AutoAttack on the same images, judged by the model itself."""
    began = time.perf_counter()
    amount = evaluation.QUICK if context.dry else evaluation.Amount()
    images = evaluation.official("standard")(subject, amount)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        robust = torch.cat([subject.model(part).argmax(1) for part in images.split(evaluation.BATCH)]) == subject.y
    off = np.load(context.out / "gpu_check" / "standard" / "off.npz")
    left = np.logical_and.reduce([off[name] for name in off.files])
    other = int((robust.cpu().numpy() != left).sum())
    return [{"attack": "AutoAttack", "seconds": f"{seconds:.2f}", "robust": int(robust.sum()), "images": len(robust),
             "other_than_off": other}]  # fmt: skip


def standard(context: Context) -> Outcome:
    """The protocol `standard` with graphs off, auto and always, and AutoAttack; robust images, one by one."""
    subject = _subject(context)
    work = {f"graphs {mode}": partial(_evaluated, context, subject, mode) for mode in ("off", "auto", "always")}
    work["AutoAttack"] = partial(_official, context, subject)
    with float32_products():
        return measured(context, STANDARD, work)[1]


def _device_seconds(run: Callable[[], object], device: torch.device) -> float | None:
    """Seconds that the device computes, by PyTorch's profiler; None where it cannot tell."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    total = sum(event.self_device_time_total for event in profile.key_averages())
    return total / 1e6 or None


def _one_step(context: Context, pipeline: str, case: str, contestant: str) -> list[dict]:
    """Launching, all of it, and what the device computes, of a training step."""
    chosen = pipelines.registry()[pipeline](context.dry)[case].contestants[contestant]
    job, runs = chosen.make(context.device, context.dry), 1 if context.dry else RUNS
    for _ in range(1 if context.dry else 5):
        job.run()
    capture = _capture(context.device)
    times = [capture.timed(job.run, context.device) for _ in range(runs)]
    launching, whole = (statistics.median(column) for column in zip(*times, strict=True))
    computing = _device_seconds(job.run, context.device)
    return [{"pipeline": pipeline, "case": case, "contestant": contestant, "host_ms": _ms(launching),
             "all_ms": _ms(whole), "device_ms": "" if computing is None else _ms(computing)}]  # fmt: skip


def training_steps(context: Context) -> Outcome:
    """A step of each method's training: host against device."""
    chosen = [
        (pipeline, name, contestant)
        for pipeline in ("arrest_step", "carso_training", "atop_finetune")
        for name, case in pipelines.registry()[pipeline](context.dry).items()
        for contestant in ("ours", "ours, captured")
        if contestant in case.contestants
    ]
    work = {
        f"{pipeline}, {case}: {contestant}": partial(_one_step, context, pipeline, case, contestant)
        for pipeline, case, contestant in chosen
    }
    with float32_products():
        return measured(context, STEPS, work)[1]


def _one_replay(context: Context, race: tune.Race, copied: float) -> list[dict]:
    """A kernel, its reference and what `torch.compile` makes of that, each replayed."""
    op = REGISTRY[race.op]
    arguments = to(tile(race.example.make(race.dtype, 0), race.times), context.device)
    row = tune.run_race(race, context.device)[0]
    torch._dynamo.reset()
    compiled = torch.compile(op.reference, fullgraph=True, dynamic=False)
    calls = {"reference": lambda: op.reference(*arguments), "compile": lambda: compiled(*arguments),
             "kernel": lambda: op.handle(*arguments)}  # fmt: skip
    if context.dry:
        del calls["compile"]  # which takes a minute for all of them
    capture = _capture(context.device)
    with torch.no_grad(), use_backend("reference"):
        replays = [tune.replayed(call, context.device, capture) for call in calls.values()]
        times = dict(zip(calls, tune.fastest(replays, context.device), strict=True))
    share = 1e6 * row.megabytes / times["kernel"] / copied if copied else 0.0
    return [{"op": race.op, "example": race.example.name, "variant": race.example.variant, "dtype": row.dtype,
             "elements": row.elements, "megabytes": row.megabytes,
             **{f"{name}_us": f"{1e6 * seconds:.2f}" for name, seconds in times.items()},
             "share_of_copy": f"{share:.3f}" if share else ""}]  # fmt: skip


def replays(context: Context) -> Outcome:
    """Each kernel on large tensors, in bfloat16 where there is one, by variant and layout."""
    copied = limits.read(context.out).get((measure.environment(context.device)["device"], limits.COPY), 0.0)
    size, work = "small" if context.dry else "large", {}
    for op in (op for op in REGISTRY.values() if op.kernel(context.device.type) != "reference"):
        for race in tune.races_of(op, context.device, (torch.bfloat16,)) or tune.races_of(op, context.device):
            if race.size == size:
                work[race.words()] = partial(_one_replay, context, race, copied)
    return measured(context, REPLAYS, work)[1]


def tail(text: str, lines: int = 30) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def extension(context: Context) -> Outcome:
    """The one that is loaded, else one built aside; it has the kernels of the CPU."""
    path = Path(_library.path) if _library.loaded() and _library.path else None
    how = "loaded"
    if path is None:
        how, path = "built", _build(context)
    known = facts(path)
    summary = f"{how}: torch {known.get('torch', 'unknown')}"
    return Outcome(PASSED, summary, {"path": str(path), "how": how, **known})


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
    cases = Cases(passed=before.read_text().splitlines() if before.exists() else [])
    rounds = [("kernels", ["-m", "not large"], 0.8), ("large tensors", ["-m", "large"], 1.0)]
    for index, (name, arguments, share) in enumerate(rounds):
        context.tell(index / len(rounds), name)
        seconds = share * context.left
        cores = min(6, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 1
        cores = 1 if "large" in arguments else cores
        _pytest(context, cases, name, arguments, cores, seconds)
    late = [test for test, why in cases.skipped.items() if "left out" in why]
    skipped = len(cases.skipped) - len(late)
    summary = f"{len(cases.passed)} passed, {len(cases.failed)} failed, {skipped} skipped, {len(late)} left out"
    good = cases.passed and not cases.failed and not late
    return Outcome(PASSED if good else FAILED, summary, dataclasses.asdict(cases), late)


def _passed(context: Context) -> Path:
    """The file of the tests that passed, with these sources on this device."""
    mark = json.dumps(fingerprint(context.device, context.dry), sort_keys=True)
    return context.out / "gpu_check" / f"tests-{hashlib.blake2b(mark.encode(), digest_size=6).hexdigest()}.passed"


def _pytest(context: Context, cases: Cases, name: str, arguments: list[str], cores: int, seconds: float) -> None:
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
    cases.read(path)


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
    """`purify-fast tune`, whose file is kept with the results."""
    retain_freed_memory()
    device = context.device
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    capture = CudaCapture() if device.type == "cuda" else None
    tuned = tune.tune(device, seconds=0.9 * context.left, capture=capture, tell=context.tell)
    shipping.take(device, context.out)
    raced = [tune.known_rows(op, device) for op in REGISTRY.values() if op.kernel(device.type) != "reference"]
    ratios = [row.ratio for rows in raced for row in rows]
    ahead = sum(ratio > 1 for ratio in ratios)
    summary = (
        f"{len(ratios)} races, {ahead} won by the kernel, {len(tuned.changes)} calls served by another than before"
    )
    problems = {**tuned.failed, **tuned.wrong}
    details = {"errors": problems, "changes": [dataclasses.asdict(one) for one in tuned.changes]}
    state = PASSED if ratios and not problems else FAILED
    return Outcome(state, f"{summary}, {len(problems)} with a problem", details, tuned.left_out)


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


@dataclass(frozen=True)
class Section:
    """A part of the check, which runs in a process of its own.

    Attributes:
        part: the command that it belongs to.
        run: does it.
        limits: the seconds that it may take, on a GPU and in the rehearsal on a CPU.
        files: the rows that it makes, in the folder of the device.
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
    "ops": Section("pipelines", ops, (120, 15), (report.ROWS,)),
    "sanitizer": Section("pipelines", sanitizer, (110, 20)),
    "pipelines": Section("pipelines", raced_pipelines, (250, 45), (report.PIPELINES,)),
}
