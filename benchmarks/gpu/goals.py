"""Measure what this package promises on a GPU, one part after the other: PGD, training steps, and predictions.

The goals are PGD-10 on a frozen copy, a step of ARREST, and a prediction and a training step through CARSO. Our forms
run without and with cuDNN's race, which times all algorithms of a convolution. Beside them are the expert's forms (see
`benchmarks.speed.pipelines.expert`). Two more parts end a training that fills the card, and make a copy in float32.
Every part has a process of its own, so that an error on the card ends one part only.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import sys
import traceback
import warnings
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from purify_fast import frozen_copy
from purify_fast._validation import in_one_line
from purify_fast.attacks import pgd
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs import step_graphs
from purify_fast.speed.graphs.step_loop import CAPTURE_STEPS
from purify_fast.speed.precision import float32_products, raced_convolutions
from purify_fast.training import FitConfig, fit

from .. import RESULTS
from ..speed import pipelines, timing
from ..speed.pipelines import EXPERT, Job, arrest_step, carso_inference, carso_training, expert, pgd_forms, random_batch
from . import in_use

TESTS = RESULTS.parents[1] / "tests"
#: The number of timed runs.
RUNS = 9
#: The largest relative L2 distance between the results of two forms of a goal.
TOLERANCE = 0.05
#: The largest number of seconds of a part. The first is for a GPU, the second for a rehearsal.
MOST_SECONDS = (60.0, 600.0)
#: The pipelines that are goals: the module, the case, and the number of images in a batch.
PIPELINES: dict[str, tuple[ModuleType, str, int]] = {
    "ARREST step": (arrest_step, "all attacked", 128),
    "CARSO pipeline": (carso_training, "pipeline step", 256),
    "CARSO prediction": (carso_inference, "prediction", 256),
}
PGD, PGD_IMAGES = "PGD-10", 256
UNRACED, RACED = "ours, race off", "ours, race on"


def pgd_job(form: str, device: torch.device, quick: bool) -> Job:
    """Return PGD-10 on a PreActResNet-18 as a user of this package calls it, or as an expert writes it."""
    network = in_use.network("ResNet-18", quick).to(device)
    batch = random_batch(device, 8 if quick else PGD_IMAGES, 32, 1)
    how = {"eps": in_use.EPS, "alpha": in_use.ALPHA, "steps": in_use.STEPS}
    if form.startswith(EXPERT):
        loss = expert.loss_of(expert.FrozenCopy(network).model)
        step = expert.ascent(loss, device, "compiled" in form and not quick, constant=True)
        run = partial(expert.attack, step, batch.x, batch.y, **how)
    else:
        run = partial(pgd, frozen_copy(network, batch.x), batch.x, batch.y, random_start=False, **how)
    return pgd_forms.job(run, network, batch.x, batch.y)


def _job(goal: str, form: str, device: torch.device, quick: bool) -> tuple[Job, bool]:
    """Return the job of a goal in a form, and True if this package replays it as a CUDA graph."""
    ours = not form.startswith(EXPERT)
    if goal == PGD:
        return pgd_job(form, device, quick), ours
    module, case, images = PIPELINES[goal]
    # A rehearsal has the contestants of a machine with a GPU.
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        contestants = module.cases(quick)[case].contestants
    captured = ours and "ours, captured" in contestants
    name = "ours, captured" if captured else "ours" if ours else form
    with mock.patch.object(module, "BATCH", images):
        return contestants[name].make(device, quick), captured


def measure(goal: str, form: str, device: torch.device, quick: bool) -> tuple[dict, Tensor]:
    """Time a goal in a form. Return a row, and numbers that must agree with those of the other forms."""
    spent, log = list[float](), StepGraphs.log

    def logged(graphs: StepGraphs, what: str, seconds: float, size: int) -> None:
        spent.append(seconds)
        log(graphs, what, seconds, size)

    race = "off" if form == UNRACED else "on"
    with (
        float32_products(tf32=form.startswith(EXPERT)),
        raced_convolutions(race, device),
        # Otherwise the captures of training steps would race in both forms.
        mock.patch.object(pipelines, "StepGraphs", partial(StepGraphs, cudnn_benchmark="off")),
        mock.patch.object(StepGraphs, "log", logged),
        in_use.replays() as seen,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        begin = timing.now(device)
        job, captured = _job(goal, form, device, quick)
        # The runs change the weights of a training, so the numbers are computed before. They need no graphs.
        with mock.patch.object(StepGraphs, "may_capture", lambda graphs, device: False):
            result = job.result().detach().double().cpu()
        # A step of an attack is captured in the second run.
        for _ in range(3):
            job.run()
        ready = timing.now(device) - begin
        times = [timing.seconds([job.run], device) for _ in range(2 if quick else RUNS)]
    images = PGD_IMAGES if goal == PGD else PIPELINES[goal][2]
    numbers = {"goal": goal, "images": "few" if quick else images, "ms": f"{1e3 * statistics.median(times):.2f}"}
    numbers |= {"ready_s": f"{ready:.2f}", "captures_s": " ".join(f"{seconds:.3f}" for seconds in spent)}
    return in_use.row(form, device, seen, said, captured=captured, **numbers), result


def fit_on_full_card(device: torch.device, quick: bool) -> tuple[dict, None]:
    """Train by `fit` on batches that fill 70 % of the memory, capture whole steps, and validate after the capture."""
    count, epochs, error = in_use.filling(device, quick), CAPTURE_STEPS + 3, ""
    task = in_use.classifier_task(device, quick, in_use.FEW_STEPS)
    task.graphs = graphs = StepGraphs("step")
    x = torch.randint(0, 256, (2 * count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    config = FitConfig(epochs, count, validation_share=0.5, validation_every=epochs, cuda_graphs="step")
    with in_use.replays() as seen, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        begin = timing.now(device)
        try:
            fit(task, x, torch.arange(len(x)) % 10, config, progress=False)
        except Exception as raised:
            error = in_one_line(raised)
        whole = timing.now(device) - begin
    numbers = {"images": count, "whole_s": f"{whole:.1f}", "ended": not error, "error": error}
    numbers |= {"graphs_dropped": graphs.mode == "off", "captures": graphs.captures}
    row = in_use.row("fit at 70 % of the memory", device, seen, said, **numbers)
    return row | ({"verdict": "failed"} if error else {}), None


def frozen_in_float32(device: torch.device, quick: bool) -> tuple[dict, None]:
    """Make a frozen copy in float32 while products are in TF32. A warning says that the copy took a simpler form."""
    network, x = in_use.network("ResNet-18", quick).to(device), random_batch(device, 8, 32, 1).x
    with float32_products(tf32=True), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        copied: Any = frozen_copy(network, x, dtype=torch.float32)
    numbers = {"images": len(x), "chosen": copied.about, "folded": copied.folded}
    row = in_use.row("frozen_copy in float32, TF32 on", device, [], said, captured=False, **numbers)
    return row | ({"verdict": "failed"} if said else {}), None


def _forms(*forms: str) -> dict[str, Any]:
    return {f"{goal}, {form}": partial(measure, goal, form) for form in forms for goal in (PGD, *PIPELINES)}


#: The parts, the most important first. The compiled forms take longest.
PARTS = {
    **_forms(UNRACED, RACED),
    "frozen_copy in float32": frozen_in_float32,
    "fit on a full card": fit_on_full_card,
    **_forms(EXPERT, f"{EXPERT}, compiled"),
}


def _work(pipe: Any, part: str, device_type: str, quick: bool) -> None:
    """Measure a part in this process, and send its row and its numbers, or the traceback of an error."""
    logging.basicConfig(level=logging.INFO)
    if quick and (TESTS / "captures.py").is_file():
        # Stand-ins for CUDA graphs.
        sys.path.insert(0, str(TESTS))
        from captures import Rerun

        step_graphs.CudaCapture = Rerun
    try:
        row, result = PARTS[part](torch.device(device_type), quick)
        pipe.send((row, None if result is None else result.numpy(), ""))
    except Exception:
        pipe.send(({}, None, traceback.format_exc()))


def row_of(part: str, device: torch.device, quick: bool, seconds: float, results: dict[str, Tensor]) -> dict:
    """Measure a part in a process of its own, and return its row.

    Args:
        part: name of the part.
        device: device that is measured.
        quick: True for small inputs, and for stand-ins for CUDA graphs.
        seconds: time limit. The process is killed at this limit, or at `MOST_SECONDS`.
        results: numbers of the first form of each goal. Another form with other numbers is wrong.

    Raises:
        TimeoutError: the part did not end in time.
        RuntimeError: the part has failed.
    """
    # A server imports PyTorch once, and its forks are the processes. It must not use CUDA.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(["__main__", __name__])
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, part, device.type, quick), daemon=True)
    process.start()
    theirs.close()
    limit = max(0.0, min(MOST_SECONDS[quick], seconds))
    try:
        if not pipe.poll(limit):
            raise TimeoutError(f"it did not end within {limit:.0f} s")
        row, numbers, error = pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of the part ended with exit status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise RuntimeError(error)
    if numbers is not None:
        result = torch.from_numpy(numbers)
        first = results.setdefault(row["goal"], result)
        distance = float((result - first).norm() / first.norm())
        row |= {"distance": f"{distance:.1e}", "verdict": row["verdict"] if distance <= TOLERANCE else "wrong"}
    return row


def profiled(device: torch.device, quick: bool) -> list[dict]:
    """Return the number and the time of each kernel in a run of PGD-10 by this package."""
    cuda, activity = device.type == "cuda", torch.profiler.ProfilerActivity
    job = pgd_job(RACED, device, quick)
    for _ in range(3):
        job.run()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
        job.run()
        timing.now(device)
    column = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [event for event in profile.key_averages() if event.device_type.name.lower() == device.type]
    found.sort(key=lambda event: -getattr(event, column))
    return [{"kernel": event.key, "count": event.count, "us": f"{getattr(event, column):.1f}"} for event in found]
