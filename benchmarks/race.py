"""Pipelines raced: every contestant in a process of its own, one awake at a time, in turn, in one run.

The allocator's thresholds are a process's own and cannot be put back, hence the processes. Between two runs nothing
works for a moment, so that the threads of the process that just worked have stopped spinning. For a GPU all contestants
get ready at the same time, which is mostly compilation; then they are timed in turn like the others.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import statistics
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from purify_fast._files import write_text
from purify_fast.ops import REGISTRY, pin_kernels
from purify_fast.ops.dispatch import cache, races
from purify_fast.speed import retain_freed_memory
from purify_fast.speed.precision import float32_products

from . import report
from .launches import Flops
from .limits import operands
from .measure import environment, quantile
from .pipelines import Case, Job, registry


@dataclass(frozen=True)
class Effort:
    runs: int = 5
    warm: int = 1
    pause: float = 0.2  # seconds
    matrix: int = 4096  # rows of the matrices whose product gives the rate; 32 times its convolution.s images


QUICK = Effort(runs=2, warm=1, pause=0.0, matrix=128)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(call, device: torch.device) -> float:
    """Seconds of one call."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _matrix_rate(device: torch.device, size: int) -> float:
    """bfloat16 FLOP/s of a large matrix product or a 3 x 3 convolution, whichever is faster: the best of a few runs."""
    a = operands(device, size, size)
    out = torch.empty_like(a)
    channels, side = min(size, 256), 16
    x = operands(device, max(1, size // 32), channels, side, side)
    weight = operands(device, channels, channels, 3, 3)
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    best = 0.0
    with torch.no_grad():
        for _ in range(3):
            best = max(best, 2 * size**3 / _clock(lambda: torch.mm(a, a, out=out), device))
            work = 2 * 9 * channels**2 * side**2 * len(x)
            best = max(best, work / _clock(lambda: torch.conv2d(x, weight, padding=1), device))
    return best


def _flops(job: Job) -> int:
    with Flops() as counter:
        job.run()
    return counter.total


def _work(pipe, pipeline: str, case: str, contestant: str, device_type: str, quick: bool, threads: int) -> None:
    """A contestant's process: makes its job, then answers one command after the other."""
    stack = contextlib.ExitStack()
    try:
        torch.set_num_threads(threads)
        device, effort = torch.device(device_type), QUICK if quick else Effort()
        chosen = registry()[pipeline](quick)[case].contestants[contestant]
        if chosen.raised:
            retain_freed_memory()
        stack.enter_context(float32_products(tf32=chosen.tf32))
        job = chosen.make(device, quick)
        commands = {
            "result": lambda: job.result().double().cpu().numpy(),
            "warm": lambda: [job.run() for _ in range(effort.warm)] and None,
            "time": lambda: _clock(job.run, device),
            "flops": lambda: _flops(job),
            "rate": lambda: _matrix_rate(device, effort.matrix),
            "warm parts": lambda: [part() for part in job.parts.values()] and None,
            "parts": lambda: {name: _clock(part, device) for name, part in job.parts.items()},
        }
        while (command := pipe.recv()) is not None:
            pipe.send((True, commands[command]()))
    except Exception:
        pipe.send((False, traceback.format_exc()))
    finally:
        stack.close()


class _Process:
    def __init__(self, *task):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *task), daemon=True)
        self.process.start()
        theirs.close()

    def order(self, command: str) -> None:
        """Have it work on a command, whose answer `answer` waits for."""
        with contextlib.suppress(OSError):  # it has ended already, as the answer will tell
            self.pipe.send(command)

    def answer(self, command: str, seconds: float = math.inf):
        """RuntimeError with the other side's traceback, or its exit status; TimeoutError if there is none in time."""
        try:
            if seconds < math.inf and not self.pipe.poll(max(0.0, seconds)):
                raise TimeoutError(command)
            done, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            done, answer = False, f"exit status {self.process.exitcode}"
        if not done:
            raise RuntimeError(f"{command!r} failed in a contestant's process: {answer}")
        return answer

    def ask(self, command: str):
        self.order(command)
        return self.answer(command)

    def end(self, at_once: bool = False) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.pipe.send(None)
        if at_once:
            self.process.kill()
        self.process.join()


def race(
    pipeline: str,
    name: str,
    case: Case,
    device: torch.device,
    quick: bool,
    tell=lambda text: None,
    seconds: float = math.inf,
) -> list[dict]:
    """The rows of one case, a contestant each; one whose result is not the first's has no number.

    Nor has one that is not ready within ``seconds``: it is left out, unless it is the first or ours.
    """
    effort, threads, end = QUICK if quick else Effort(), torch.get_num_threads(), time.monotonic() + seconds
    together = device.type == "cuda"
    if together:  # no thread of the others' spins
        effort = replace(effort, pause=0.02)
    processes: dict[str, _Process] = {}
    right, times, rates = {}, {}, []
    shares: dict[str, list[float]] = {}

    def prepare(label: str) -> None:
        processes[label] = _Process(pipeline, name, label, device.type, quick, threads)
        for command in ("result", "warm"):
            processes[label].order(command)

    try:
        truth = None
        needed = {next(iter(case.contestants)), "ours"}
        # within a time limit, those without which there is no race come before the others
        order = sorted(case.contestants, key=lambda label: seconds < math.inf and label not in needed)
        for label in order if together else ():
            prepare(label)
        for label in order:
            tell(f"{name}: {label}, result")
            if not together and (label in needed or time.monotonic() < end):
                prepare(label)
            if label not in processes:
                continue
            left = math.inf if label in needed else end - time.monotonic()
            try:
                result = torch.from_numpy(processes[label].answer("result", left))
                processes[label].answer("warm", left)
            except TimeoutError:
                processes.pop(label).end(at_once=True)
                continue
            truth = result if truth is None else truth
            distance = float((result - truth).norm() / truth.norm())
            right[label], times[label] = distance <= case.tolerance, []
        flops = processes["ours"].ask("flops")
        processes["ours"].ask("warm parts")
        for turn in range(effort.runs):
            tell(f"{name}: round {turn + 1} of {effort.runs}")
            for label, process in processes.items():
                time.sleep(effort.pause)
                times[label].append(process.ask("time"))
                if label == "ours":  # beside the whole they are part of: the machine's speed changes in between
                    for part, seconds in process.ask("parts").items():
                        shares.setdefault(part, []).append(seconds / times[label][-1])
            time.sleep(effort.pause)
            rates.append(processes["ours"].ask("rate"))
    finally:
        for process in processes.values():
            process.end(at_once=len(right) < len(processes))
    parts = " ".join(f"{part}:{statistics.median(each):.3f}" for part, each in shares.items())
    rate, first = max(rates), statistics.median(times[next(iter(times))])
    rows = []
    for label in case.contestants:
        spent = times.get(label, [math.nan])
        median = statistics.median(spent)
        numbers = {
            "ms": f"{1e3 * median:.2f}",
            "p20": f"{1e3 * quantile(spent, 1):.2f}",
            "p80": f"{1e3 * quantile(spent, 4):.2f}",
            "speed_up": f"{first / median:.2f}",
            "share_of_matrix_rate": f"{flops / median / rate:.3f}",
        }
        row = {"pipeline": pipeline, "case": name, "shape": case.shape, "contestant": label}
        row |= numbers if right.get(label) else dict.fromkeys(numbers, "")
        verdict = "left out" if label not in right else "right" if right[label] else "wrong"
        row |= {"verdict": verdict, "parts": parts if label == "ours" else ""}
        row |= {"GFLOP": f"{flops / 1e9:.1f}", "matrix_GFLOP_per_s": f"{rate / 1e9:.1f}", "runs": effort.runs}
        rows.append(row | environment(device))
    return rows


CPU = torch.device("cpu")
SERVED, SERVED_TABLE = "served.csv", "served.md"
#: Each pipeline runs in turn until so many pairs are there, and longer if it is short.
PAIRS, SECONDS = 11, 20.0


def read_races(path: Path) -> dict[str, Any]:
    """What a file of shipped races decides on this machine; ``git show REVISION:purify_fast/ops/races.json`` gives one.

    Raises:
        ValueError: the file holds no races of a CPU.
    """
    near = races.nearest(cache.machine(CPU), json.loads(path.read_text()))
    if near is None:
        raise ValueError(f"--before: {path} holds no races of a CPU")
    return {name: [near["ops"][name]] if name in near["ops"] else [] for name in REGISTRY}


def _compared(name: str, case: str, served: dict[str, dict[str, Any]], quick: bool) -> dict[str, Any]:
    """The row of one case: the median time of each, and the median ratio of the pairs with its quartiles."""
    torch.manual_seed(0)
    job = registry()[name](quick)[case].contestants["ours"].make(CPU, quick)
    times: dict[str, list[float]] = {when: [] for when in served}

    def run(when: str) -> float:
        with pin_kernels({"device": "cpu", "races": served[when], "wrong": []}):
            began = time.perf_counter()
            job.run()
            return time.perf_counter() - began

    order = list(served)
    for when in order:
        run(when)
    began = time.monotonic()
    while not times["now"] or (not quick and (len(times["now"]) < PAIRS or time.monotonic() - began < SECONDS)):
        for when in order:
            times[when].append(run(when))
        # who runs second finds the machine warmer
        order.reverse()
    ratios = [before / now for before, now in zip(times["before"], times["now"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "pipeline": name,
        "case": case,
        **{when: f"{1e3 * statistics.median(seconds):.1f}" for when, seconds in times.items()},
        "times as fast": f"{middle:.3f}",
        "lower quartile": f"{low:.3f}",
        "upper quartile": f"{high:.3f}",
        "pairs": len(ratios),
        **environment(CPU),
    }


def served_markdown(rows: list[dict]) -> str:
    """The page ``served.md`` of the rows in ``served.csv``."""
    first = rows[0]
    body = [
        [f"{row['pipeline']}: {row['case']}", row["before"], row["now"], row["times as fast"],
         f"{row['lower quartile']} to {row['upper quartile']}", row["pairs"]]
        for row in rows
    ]  # fmt: skip
    lines = [
        "# Pipelines, with the ops served as before and as now",
        "",
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, {first['date']}. Each pipeline ran in "
        "turn in one process with the ops served as an earlier file of races says and as today's say. Medians, and the "
        "median ratio of the pairs with its quartiles. Quartiles on both sides of 1: no difference. By `python -m "
        "benchmarks pipelines --before FILE`.",
        "",
        *report.table(["pipeline", "ms before", "ms now", "times as fast", "quartiles", "pairs"], body),
    ]
    return "\n".join(lines) + "\n"


def compare_served(path: Path, names: list[str], quick: bool, out: Path) -> str:
    """Measure the pipelines that serve ops, write ``served.csv`` and its page, and return the page."""
    retain_freed_memory()
    served = {"before": read_races(path), "now": {name: races.decisive(op, CPU) for name, op in REGISTRY.items()}}
    cases = [(name, case) for name in names if name != "pre_encoders" for case in registry()[name](quick)]
    rows: list[dict] = []
    for name, case in tqdm(cases, unit="pipeline", disable=None):
        rows.append(_compared(name, case, served, quick))
        report.write_csv(out / SERVED, rows)
        write_text(out / SERVED_TABLE, served_markdown(rows))
    return served_markdown(rows)
