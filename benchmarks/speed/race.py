"""Compare the speed of several implementations of a pipeline (a race). Each compared implementation is a contestant.

Every contestant has a separate process, because the thresholds of the memory allocator cannot be restored. They take
turns, with pauses in which threads stop spinning. In one thread on a CPU, a time is processor time.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import statistics
import sys
import time
import traceback
from dataclasses import dataclass

import torch

from purify_fast.speed import retain_freed_memory

from . import limits
from .flops import flop_of
from .pipelines import Case, registry
from .pipelines.expert import DTYPES
from .timing import allocated, environment, quantile, seconds


@dataclass(frozen=True)
class Effort:
    """The number of timed runs in a race, and the sizes of the products that measure the device's speed.

    Attributes:
        runs: number of runs of each contestant.
        slow_runs: number of runs of a contestant whose median is more than twice that of the fastest one.
        seconds: on a CPU, where the times vary more, a race has up to five times as many runs within these seconds.
        pause: seconds between two runs.
        matrix: rows of the square matrices whose product is timed. The number of images in the timed
            convolution is this number divided by 32.
    """

    runs: int = 9
    slow_runs: int = 3
    seconds: float = 90.0
    pause: float = 0.2
    matrix: int = 4096


QUICK = Effort(runs=2, slow_runs=2, seconds=0.0, pause=0.0, matrix=128)


def _matrix_rate(device: torch.device, size: int) -> float:
    """Return the highest FLOP/s in three matrix products and three 3 x 3 convolutions, all of them large."""
    # The expert computes in this dtype.
    dtype = DTYPES[device.type]
    product, times = limits.products(device, size, 3, dtype)
    channels, side = min(size, 256), 16
    x = limits.operands(device, max(1, size // 32), channels, side, side, dtype=dtype)
    weight = limits.operands(device, channels, channels, 3, 3, dtype=dtype)
    x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    convolved = 2 * 9 * channels**2 * side**2 * len(x)
    with torch.no_grad():
        convolutions = limits.times_of([lambda: torch.conv2d(x, weight, padding=1)], device, 3)
    return max(product / min(times), convolved / min(convolutions))


def _work(pipe, pipeline: str, case: str, contestant: str, device_type: str, quick: bool, threads: int) -> None:
    """Run a contestant's process: prepare its job, then execute commands and send their results."""
    torch.set_num_threads(threads)
    device, effort = torch.device(device_type), QUICK if quick else Effort()
    clock = time.process_time if threads == 1 and device.type == "cpu" else time.perf_counter
    chosen = registry()[pipeline](quick)[case].contestants[contestant]
    if chosen.raised:
        retain_freed_memory()
    try:
        with chosen.settings(device):
            job = chosen.make(device, quick)
            commands = {
                "result": lambda: job.result().double().cpu().numpy(),
                "time": lambda: seconds([job.run], device, clock),
                "flops": lambda: flop_of(job.run),
                "memory": lambda: allocated(job.run, device),
                "rate": lambda: _matrix_rate(device, effort.matrix),
            }
            while (command := pipe.recv()) is not None:
                pipe.send((True, commands[command]()))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def _is_preloaded(name: str) -> bool:
    return name == "__main__" or (name.startswith("benchmarks.") and not name.endswith("__main__"))


class Process:
    """A process that calls ``work`` with one end of a pipe and further arguments."""

    def __init__(self, *task, work=_work):
        # A server imports once what this process has imported of the benchmarks, and its forks are the processes. It
        # must not use CUDA.
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload([name for name in ("__main__", *sys.modules) if _is_preloaded(name)])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *task), daemon=True)
        self.process.start()
        theirs.close()

    def order(self, *commands: str | None) -> None:
        """Send a command. `answer` waits for the command's result."""
        # Ignore a process that has ended, because `answer` reports it.
        with contextlib.suppress(OSError):
            for command in commands:
                self.pipe.send(command)

    def answer(self, command: str, seconds: float = math.inf):
        """Return the result of a command."""
        try:
            if seconds < math.inf and not self.pipe.poll(max(0.0, seconds)):
                raise TimeoutError(f"the command {command!r} of a compared implementation was not finished in time")
            done, answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            done, answer = False, f"exit status {self.process.exitcode}"
        if not done:
            raise RuntimeError(f"the command {command!r} failed in the process of a compared implementation: {answer}")
        return answer

    def ask(self, command: str, seconds: float = math.inf):
        self.order(command)
        return self.answer(command, seconds)

    def end(self, at_once: bool = False) -> None:
        self.order(None)
        if at_once:
            self.process.kill()
        self.process.join()


def race(
    pipeline: str, name: str, case: Case, device: torch.device, quick: bool, limit: float = math.inf
) -> list[dict]:
    """Time all contestants of a case, and return one row of the results file for each contestant.

    The row of a contestant whose result is wrong has no times. With a time limit, a contestant that is not ready after
    about three quarters of ``limit`` seconds is not timed, and its row has the verdict "left out".
    """
    effort, threads, began = QUICK if quick else Effort(), torch.get_num_threads(), time.monotonic()
    together = device.type == "cuda"
    # A short pause is enough on a GPU, because the other contestants have no spinning threads.
    pause = 0.02 if together else effort.pause
    processes: dict[str, Process] = {}
    verdicts, finished = dict.fromkeys(case.contestants, "left out"), False

    # The last part of the time is for the timed runs.
    spare = 0.0 if limit == math.inf else max(limit / 4, min(10.0, limit / 3))

    def left(spare: float = 0.0) -> float:
        return began + limit - spare - time.monotonic()

    def prepare(label: str) -> None:
        processes[label] = Process(pipeline, name, label, device.type, quick, threads)
        processes[label].order("result", "time")

    try:
        truth, first = None, next(iter(case.contestants))
        # Operations are counted, and the device's rate is measured, in the process of one contestant.
        counted = "ours" if "ours" in case.contestants else first
        needed = {first, counted}
        # If there is a time limit, prepare the contestants that are needed first, and those that compile last.
        order = list(case.contestants)
        if limit < math.inf:
            order.sort(key=lambda label: (label not in needed, "compile" in label))
        for label in order if together else ():
            prepare(label)
        for label in order:
            if not together:
                prepare(label)
            try:
                result = torch.from_numpy(processes[label].answer("result", left(spare)))
                processes[label].answer("time", left(spare))
            except (RuntimeError, TimeoutError) as error:
                if label in needed or limit == math.inf:
                    raise
                processes.pop(label).end(at_once=True)
                if isinstance(error, RuntimeError):
                    verdicts[label] = "failed"
                    print(f"{pipeline} {name}, {label}: {error}", file=sys.stderr)
                continue
            truth = result if truth is None else truth
            distance = float((result - truth).norm() / truth.norm())
            verdicts[label] = "right" if distance <= case.tolerance else "wrong"
        times: dict[str, list[float]] = {label: [] for label in processes}
        rates = []
        flops = processes[counted].ask("flops", left())
        least = -math.inf if together else time.monotonic() + effort.seconds
        slow: set[str] = set()
        for done in range(5 * effort.runs):
            if done >= effort.runs and time.monotonic() > least:
                break
            if done >= effort.slow_runs:
                medians = {label: statistics.median(each) for label, each in times.items()}
                slow |= {label for label, median in medians.items() if median > 2 * min(medians.values())}
            for label, process in processes.items():
                if label in slow:
                    continue
                time.sleep(pause)
                times[label].append(process.ask("time", left()))
            time.sleep(pause)
            rates.append(processes[counted].ask("rate", left()))
        most = {label: process.ask("memory", left()) for label, process in processes.items()}
        finished = True
    finally:
        for process in processes.values():
            process.end(at_once=not finished)
    rate, slowest = max(rates), statistics.median(times[first])
    rows = []
    for label in case.contestants:
        runs = times.get(label, [math.nan])
        median = statistics.median(runs)
        spent = {"ms": median, "p20": quantile(runs, 1), "p80": quantile(runs, 4)}
        numbers = {name: f"{1e3 * seconds:.2f}" for name, seconds in spent.items()}
        numbers |= {"speed_up": f"{slowest / median:.2f}", "share_of_matrix_rate": f"{flops / median / rate:.3f}"}
        row = {"pipeline": pipeline, "case": name, "shape": case.shape, "contestant": label}
        right = verdicts[label] == "right"
        row |= numbers if right else dict.fromkeys(numbers, "")
        row |= {"verdict": verdicts[label], "peak_MB": f"{most[label] / 1e6:.0f}" if right else ""}
        row |= {"GFLOP": f"{flops / 1e9:.1f}", "matrix_GFLOP_per_s": f"{rate / 1e9:.1f}"}
        rows.append(row | {"runs": len(times.get(label, []))} | environment(device))
    return rows
