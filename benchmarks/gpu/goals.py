"""Measure what this package promises on a GPU, one part after the other: PGD, and training steps of the methods.

The goals are PGD-10 on a frozen copy, and a training step of ARREST, of CARSO through the pipeline, and of AToP. Each
has six forms: ours with and without cuDNN's race, which times all algorithms of a convolution; ours compiled by the
option that a user sets; the expert's (see `benchmarks.speed.pipelines.expert`), also compiled; and plain PyTorch. Ours
with the race is what `fit` runs by default, once its attack steps are captured. Another part ends a training that fills
the card. Every part has a process of its own, so that an error on the card ends one part only.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from purify_fast import frozen_copy
from purify_fast.attacks import pgd
from purify_fast.speed import StepGraphs
from purify_fast.speed.graphs import graphed_loop as step_graphs
from purify_fast.speed.precision import float32_products, raced_convolutions

from .. import RESULTS
from ..speed import pipelines, race, timing
from ..speed.pipelines import EXPERT, Job, arrest_step, atop_finetune, carso_training, expert, pgd_forms, random_batch
from . import in_use

TESTS = RESULTS.parents[1] / "tests"
#: The number of timed runs.
RUNS = 9
#: The largest relative L2 distance between the results of two forms of a goal.
TOLERANCE = 0.05
#: The largest number of seconds of a part, and of the compilations before the parts. The first is for a GPU, the second
#: for a rehearsal.
MOST_SECONDS = (120.0, 600.0)
#: The pipelines that are goals: the module, the case, and the number of images in a batch.
PIPELINES: dict[str, tuple[ModuleType, str, int]] = {
    "ARREST step": (arrest_step, "all attacked", 128),
    "CARSO pipeline": (carso_training, "pipeline step", 256),
    "AToP step": (atop_finetune, "fine-tuning step", 4),
}
PGD, PGD_IMAGES = "PGD-10", 256
RACED, COMPILED, UNRACED, PLAIN = "ours, race on", "ours, compiled", "ours, race off", "plain"
#: The forms, the most important first, with the seconds that a part is assumed to take on an H200, after all have been
#: compiled before.
FORMS = {RACED: 8, EXPERT: 8, f"{EXPERT}, compiled": 12, COMPILED: 12, PLAIN: 8, UNRACED: 8}


def pgd_job(form: str, device: torch.device, quick: bool) -> Job:
    """Return PGD-10 on a PreActResNet-18 as a user of this package calls it, as an expert writes it, or plain."""
    network = in_use.network("ResNet-18", quick).to(device)
    batch = random_batch(device, 8 if quick else PGD_IMAGES, 32, 1)
    how = {"eps": in_use.EPS, "alpha": in_use.ALPHA, "steps": in_use.STEPS}
    if form == PLAIN:
        run = pgd_forms.plain_attack(copy.deepcopy(network), batch.x, batch.y)
    elif form.startswith(EXPERT):
        loss = expert.loss_of(expert.FrozenCopy(network).model)
        step = expert.ascent(loss, device, "compiled" in form and not quick, constant=True)
        run = partial(expert.attack, step, batch.x, batch.y, **how)
    else:
        copied: Any = frozen_copy(network, batch.x, compile=form == COMPILED)

        def run() -> Tensor:
            found = pgd(copied, batch.x, batch.y, random_start=False, **how)
            if form == COMPILED and copied.steps.refusal:
                raise RuntimeError(f"the step was not compiled: {copied.steps.refusal}")
            return found

    return pgd_forms.job(run, network, batch.x, batch.y)


def _job(goal: str, form: str, device: torch.device, quick: bool) -> Job:
    """Return the job of a goal in a form."""
    if goal == PGD:
        return pipelines.made(partial(pgd_job, form), device, quick)
    module, case, images = PIPELINES[goal]
    # A rehearsal has the contestants of a machine with a GPU.
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        contestants = module.cases(quick)[case].contestants
    # The first contestant is plain.
    names = {PLAIN: next(iter(contestants)), RACED: "ours, captured", UNRACED: "ours, captured"}
    with mock.patch.object(module, "BATCH", images):
        return contestants[names.get(form, form)].make(device, quick)


def measure(goal: str, form: str, device: torch.device, quick: bool) -> tuple[dict, Tensor]:
    """Time a goal in a form. Return a row, and numbers that must agree with those of the other forms."""
    ours = form in (RACED, COMPILED, UNRACED)
    with (
        float32_products(tf32=not ours),
        raced_convolutions("off" if form in (UNRACED, PLAIN) else "on", device),
        # Otherwise the captures in training steps would race in both forms.
        mock.patch.object(pipelines, "StepGraphs", partial(StepGraphs, cudnn_benchmark="off")),
        mock.patch.object(StepGraphs, "log", autospec=True) as log,
        in_use.replays() as seen,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        begin = timing.now(device)
        job = _job(goal, form, device, quick)
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
    captures = " ".join(f"{call.args[2]:.3f}" for call in log.call_args_list)
    numbers |= {"ready_s": f"{ready:.2f}", "captures_s": captures}
    # A training step whose attack is not captured raises an error.
    return in_use.row(form, device, seen, said, captured=goal == PGD and form in (RACED, UNRACED), **numbers), result


#: The parts, the most important first.
PARTS: dict[str, Callable[[torch.device, bool], tuple[dict, Tensor | None]]] = {
    **{f"{goal}, {form}": partial(measure, goal, form) for form in FORMS for goal in (PGD, *PIPELINES)},
    "fit on a full card": lambda device, quick: (in_use.full(device, quick), None),
}
#: The assumed seconds of the compilations, side by side, and of the part that has no form.
COMPILING, FULL_CARD = 120, 40


def plan() -> list[tuple[str, int]]:
    """Return the assumed end of each part of the section, in seconds after its start."""
    seconds = {"all compilations, side by side": COMPILING}
    seconds |= {part: FORMS.get(part.partition(", ")[2], FULL_CARD) for part in PARTS}
    return list(zip(seconds, itertools.accumulate(seconds.values()), strict=True))


def compile_all(context: Any) -> None:
    """Run the compiled parts once, side by side. Later the parts find the compiled code in Inductor's cache.

    Their times are worthless, and so are errors here, because each part runs again alone.
    """
    parts = [part for part in PARTS if part.endswith("compiled")]
    ends = time.monotonic() + min(MOST_SECONDS[context.rehearsal], context.left)
    processes = [race.Process(part, context.device.type, context.rehearsal, work=_work) for part in parts]
    for part, process in zip(parts, processes, strict=True):
        try:
            process.answer(part, ends - time.monotonic())
        except (RuntimeError, TimeoutError) as error:
            print(f"{part}, compiled for the first time: {error}", file=sys.stderr)
        finally:
            process.end(at_once=True)


def _work(pipe: Any, part: str, device_type: str, quick: bool) -> None:
    """Measure a part in this process, and send its row and its numbers, or the traceback of an error."""
    if quick and (TESTS / "captures.py").is_file():
        # Stand-ins for CUDA graphs.
        sys.path.insert(0, str(TESTS))
        from captures import Rerun

        step_graphs.CudaCapture = Rerun
    try:
        row, result = PARTS[part](torch.device(device_type), quick)
        pipe.send((True, (row, None if result is None else result.numpy())))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def row_of(part: str, context: Any, results: dict[str, Tensor]) -> dict:
    """Measure a part in a process of its own, and return its row.

    Args:
        part: name of the part.
        context: context of the section. The process is killed at its time limit, or after `MOST_SECONDS`.
        results: numbers of the first form of each goal. Another form with other numbers is wrong.

    Raises:
        TimeoutError: the part did not end in time.
        RuntimeError: the part has failed.
    """
    process = race.Process(part, context.device.type, context.rehearsal, work=_work)
    try:
        row, numbers = process.answer(part, min(MOST_SECONDS[context.rehearsal], context.left))
    finally:
        process.end(at_once=True)
    if numbers is not None:
        result = torch.from_numpy(numbers)
        first = results.setdefault(row["goal"], result)
        distance = float((result - first).norm() / first.norm())
        row |= {"distance": f"{distance:.1e}", "verdict": row["verdict"] if distance <= TOLERANCE else "wrong"}
    return row
