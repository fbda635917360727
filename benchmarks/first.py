"""What is measured first on a GPU, each in a file of its own: what decides whether graphs and kernels gain anything.

1. `CAPTURE_COST`: what a capture costs, and what a replay saves of a step.
2. `VERDICTS`: whether each kernel is right, and how long it takes to compile. The tests of the device stand beside it.
3. `STANDARD`: an evaluation with graphs and without, against the official AutoAttack.
4. `STEPS`: a training step of each method: how long the host launches, how long the device computes.
5. `REPLAYS`: kernels replayed in CUDA graphs, against their references and `torch.compile`.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import zoo
from purify_fast.attacks.engine.gradient_copy import gradient_copy
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import evaluate
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.ops import REGISTRY
from purify_fast.ops.dispatch import timing, verify
from purify_fast.ops.dispatch.examples import tile, to
from purify_fast.ops.dispatch.op import Call
from purify_fast.ops.dispatch.registry import use_backend
from purify_fast.speed.graphs.cuda_capture import CudaCapture
from purify_fast.speed.graphs.step_graphs import StepGraphs
from purify_fast.speed.precision import float32_products

from . import evaluation, limits, measure, pipelines
from .context import Context, Outcome, measured
from .launches import Replays
from .pipelines.resnet18 import ResNet18

CAPTURE_COST, VERDICTS, STANDARD = "capture_cost.csv", "kernel_verdicts.csv", "standard.csv"
STEPS, REPLAYS = "training_steps.csv", "replays.csv"
#: Runs of what is timed, of which the median counts.
RUNS = 20


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
        **measure.environment(context.device),
    }]  # fmt: skip


def capture_cost(context: Context) -> Outcome:
    """Milliseconds of a capture; of a gradient step launched, replayed, and on the device alone."""
    sizes = (2, 4) if context.dry else (16, 64, 250)
    work: dict[str, Callable[[], list[dict]]] = {
        f"{images} images, {precision}": lambda images=images, precision=precision: _one_capture(
            context, images, precision
        )
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
    return [{"op": name, **made, **measure.environment(context.device)}]


def verdicts(context: Context) -> Outcome:
    """Every kernel against the definition in float64."""
    names = [name for name, op in REGISTRY.items() if op.kernel(context.device.type) != "reference"]
    work = {name: lambda name=name: _one_verdict(context, name) for name in names}
    rows, outcome = measured(context, VERDICTS, work)
    wrong = {row["op"]: row["case"] for row in rows if str(row["passed"]) != "True"}
    outcome.summary += f"; {len(wrong)} wrong, {sum(float(row['compile_seconds']) for row in rows):.0f} s of compiling"
    outcome.details["errors"].update(wrong)
    outcome.state = outcome.state if not wrong else "failed"
    return outcome


class Counted:
    """Captures by another one, and counts.

    Attributes:
        captures: so far.
        replays: so far, of all of them.
    """

    def __init__(self, inner: Any):
        self.inner, self.captures, self.replays = inner, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """See `CudaCapture.record`."""
        replay = self.inner.record(run, device)
        self.captures += 1

        def counted() -> None:
            self.replays += 1
            replay()

        return counted


@contextlib.contextmanager
def _counted(device: torch.device) -> Iterator[Counted]:
    """Within the block, evaluations capture by what counts."""
    counts = Counted(_capture(device))
    runner = importlib.import_module("purify_fast.evaluation.runner")
    with mock.patch.object(runner, "StepGraphs", lambda mode: StepGraphs(mode, capture=counts)):
        yield counts


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
    with _counted(context.device) as counts:
        report = evaluate(
            subject.model, subject.x, subject.y, eps=subject.eps, protocol="fast" if context.dry else "standard",
            batch_size=evaluation.BATCH, cuda_graphs=mode, out=folder / mode, progress=False, probes=False,
        )  # fmt: skip
    robust = {row.attack: np.asarray(row.robust) for row in report.rows}
    np.savez(folder / f"{mode}.npz", allow_pickle=False, **robust)
    reference = np.load(folder / "off.npz")
    replays = {"captures": counts.captures, "replays": counts.replays,
               "replays_per_capture": f"{counts.replays / max(1, counts.captures):.0f}"}  # fmt: skip
    return [
        {"attack": row.attack, "seconds": f"{row.seconds:.2f}", "robust": int(robust[row.attack].sum()),
         "images": len(subject.y), "other_than_off": int((robust[row.attack] != reference[row.attack]).sum()),
         **replays, **measure.environment(context.device)}
        for row in report.rows
    ]  # fmt: skip


def _official(context: Context, subject: evaluation.Subject) -> list[dict]:
    """The official AutoAttack on the same images, judged by the model itself."""
    began = time.perf_counter()
    amount = evaluation.QUICK if context.dry else evaluation.Amount()
    found = evaluation.official("standard")(subject, amount)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        robust = torch.cat([subject.model(part).argmax(1) for part in found.split(evaluation.BATCH)]) == subject.y
    off = np.load(context.out / "gpu_check" / "standard" / "off.npz")
    left = np.logical_and.reduce([off[name] for name in off.files])
    other = int((robust.cpu().numpy() != left).sum())
    return [{"attack": "AutoAttack", "seconds": f"{seconds:.2f}", "robust": int(robust.sum()), "images": len(robust),
             "other_than_off": other, **measure.environment(context.device)}]  # fmt: skip


def standard(context: Context) -> Outcome:
    """The protocol `standard` with graphs off, auto and always, and AutoAttack; robust images, one by one."""
    subject = _subject(context)
    work: dict[str, Callable[[], list[dict]]] = {
        f"graphs {mode}": lambda mode=mode: _evaluated(context, subject, mode) for mode in ("off", "auto", "always")
    }
    work["AutoAttack"] = lambda: _official(context, subject)
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
    times = [_timed(job.run, context.device) for _ in range(runs)]
    launching, whole = (statistics.median(column) for column in zip(*times, strict=True))
    computing = _device_seconds(job.run, context.device)
    return [{"pipeline": pipeline, "case": case, "contestant": contestant, "host_ms": _ms(launching),
             "all_ms": _ms(whole), "device_ms": "" if computing is None else _ms(computing),
             **measure.environment(context.device)}]  # fmt: skip


def _timed(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until everything was launched, and until it was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    launched = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched, time.perf_counter() - began


def training_steps(context: Context) -> Outcome:
    """A step of each method's training: host against device."""
    work: dict[str, Callable[[], list[dict]]] = {}
    for pipeline in ("arrest_step", "carso_training", "atop_finetune"):
        for case, made in pipelines.registry()[pipeline](context.dry).items():
            for contestant in ("ours", "ours, captured"):
                if contestant in made.contestants:
                    work[f"{pipeline}, {case}: {contestant}"] = (
                        lambda pipeline=pipeline, case=case, contestant=contestant: _one_step(
                            context, pipeline, case, contestant
                        )
                    )
    with float32_products():
        return measured(context, STEPS, work)[1]


def _one_replay(context: Context, race: timing.Race, copied: float) -> list[dict]:
    """A kernel, its reference and what `torch.compile` makes of that, each replayed."""
    op = REGISTRY[race.op]
    arguments = to(tile(race.example.make(race.dtype, 0), race.times), context.device)
    row = timing.run_race(race, context.device)[0]
    torch._dynamo.reset()
    compiled = torch.compile(op.reference, fullgraph=True, dynamic=False)
    calls = {"reference": lambda: op.reference(*arguments), "compile": lambda: compiled(*arguments),
             "kernel": lambda: op.handle(*arguments)}  # fmt: skip
    if context.dry:
        del calls["compile"]  # which takes a minute for all of them
    capture = _capture(context.device)
    with torch.no_grad(), use_backend("reference"):
        replays = [timing.replayed(call, context.device, capture) for call in calls.values()]
        times = dict(zip(calls, timing.fastest(replays, context.device), strict=True))
    share = 1e6 * row.megabytes / times["kernel"] / copied if copied else 0.0
    return [{"op": race.op, "example": race.example.name, "variant": race.example.variant, "dtype": row.dtype,
             "elements": row.elements, "megabytes": row.megabytes,
             **{f"{name}_us": f"{1e6 * seconds:.2f}" for name, seconds in times.items()},
             "share_of_copy": f"{share:.3f}" if share else "", **measure.environment(context.device)}]  # fmt: skip


def replays(context: Context) -> Outcome:
    """Each kernel on large tensors, in bfloat16 where there is one, by variant and layout."""
    copied = limits.read(context.out).get((measure.environment(context.device)["device"], limits.COPY), 0.0)
    size, work = "small" if context.dry else "large", {}
    for op in (op for op in REGISTRY.values() if op.kernel(context.device.type) != "reference"):
        for race in timing.races_of(op, context.device, (torch.bfloat16,)) or timing.races_of(op, context.device):
            if race.size == size:
                work[race.words()] = lambda race=race: _one_replay(context, race, copied)
    return measured(context, REPLAYS, work)[1]
