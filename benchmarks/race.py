"""Pipelines raced: every contestant in a process of its own, one awake at a time, in turn, in one run.

The allocator's thresholds are a process's own and cannot be put back, hence the processes. Between two runs nothing
works for a moment, so that the threads of the process that just worked have stopped spinning.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
import traceback
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from purify_fast.training import keep_memory

from .measure import environment
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
    a = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    channels, side = min(size, 256), 16
    x = torch.ones(max(1, size // 32), channels, side, side, dtype=torch.bfloat16, device=device)
    weight = torch.ones(channels, channels, 3, 3, dtype=torch.bfloat16, device=device)
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    best = 0.0
    with torch.no_grad():
        for _ in range(3):
            best = max(best, 2 * size**3 / _clock(lambda: torch.mm(a, a, out=out), device))
            work = 2 * 9 * channels**2 * side**2 * len(x)
            best = max(best, work / _clock(lambda: torch.conv2d(x, weight, padding=1), device))
    return best


def _flops(job: Job) -> int:
    with FlopCounterMode(display=False) as counter:
        job.run()
    return counter.get_total_flops()


def _work(pipe, pipeline: str, case: str, contestant: str, device_type: str, quick: bool, threads: int) -> None:
    """A contestant's process: makes its job, then answers one command after the other."""
    try:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        device, effort = torch.device(device_type), QUICK if quick else Effort()
        chosen = registry()[pipeline](quick)[case].contestants[contestant]
        if chosen.raised:
            keep_memory()
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


class _Process:
    def __init__(self, *task):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *task), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, command: str):
        """The answer; RuntimeError with the other side's traceback, or its exit status, if there is none."""
        try:
            self.pipe.send(command)
            done, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            done, answer = False, f"exit status {self.process.exitcode}"
        if not done:
            raise RuntimeError(f"{command!r} failed in a contestant's process: {answer}")
        return answer

    def end(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self.pipe.send(None)
        self.process.join()


def _quantile(times: list[float], fifths: int) -> float:
    return sorted(times)[fifths * (len(times) - 1) // 5]


def race(pipeline: str, name: str, case: Case, device: torch.device, quick: bool, tell=lambda text: None) -> list[dict]:
    """The rows of one case, a contestant each; one whose result is not the first's has no number."""
    effort, threads = QUICK if quick else Effort(), torch.get_num_threads()
    processes: dict[str, _Process] = {}
    right, times, rates = {}, {}, []
    shares: dict[str, list[float]] = {}
    try:
        truth = None
        for label in case.contestants:
            tell(f"{name}: {label}, result")
            processes[label] = _Process(pipeline, name, label, device.type, quick, threads)
            result = torch.from_numpy(processes[label].ask("result"))
            truth = result if truth is None else truth
            distance = float((result - truth).norm() / truth.norm())
            right[label], times[label] = distance <= case.tolerance, []
            processes[label].ask("warm")
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
            process.end()
    parts = " ".join(f"{part}:{statistics.median(each):.3f}" for part, each in shares.items())
    rate, first = max(rates), statistics.median(times[next(iter(times))])
    rows = []
    for label, spent in times.items():
        median = statistics.median(spent)
        numbers = {
            "ms": f"{1e3 * median:.2f}",
            "p20": f"{1e3 * _quantile(spent, 1):.2f}",
            "p80": f"{1e3 * _quantile(spent, 4):.2f}",
            "speed_up": f"{first / median:.2f}",
            "share_of_matrix_rate": f"{flops / median / rate:.3f}",
        }
        row = {"pipeline": pipeline, "case": name, "shape": case.shape, "contestant": label}
        row |= numbers if right[label] else dict.fromkeys(numbers, "")
        row |= {"verdict": "right" if right[label] else "wrong", "parts": parts if label == "ours" else ""}
        row |= {"GFLOP": f"{flops / 1e9:.1f}", "matrix_GFLOP_per_s": f"{rate / 1e9:.1f}", "runs": effort.runs}
        rows.append(row | environment(device))
    return rows
