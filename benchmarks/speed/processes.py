"""Measure an evaluation on two processes, and count how many times faster eight processes are.

The batches of an evaluation and their seconds are recorded in a single process, which plays the first process of a
team. A simulation then hands out these batches by the package's own team, with a process per thread and a clock that
only counts the recorded seconds. Everything that the first process does alone is recorded too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from purify_fast import zoo
from purify_fast._files import write_text
from purify_fast.data import balanced_subset, load_dataset
from purify_fast.evaluation import evaluate, runner
from purify_fast.evaluation.run import team
from purify_fast.evaluation.run.progress import Progress
from purify_fast.evaluation.run.team import Result, Task, Team

from .. import options
from ..kept import machines, rows_of
from . import sheets, timing

#: The results file, and the judged models of the zoo, each with its number of images.
FILE, MODELS = "processes.json", {"digits-pgd-at": 500, "cifar10-pgd-at-w16": 200}
#: The measured and the simulated numbers of processes, and how often an evaluation is measured.
MEASURED, SIMULATED, TIMES = (1, 2), (4, 8), 3

Trace = dict[str, Any]


class Recorder(Team):
    """Plays the first of several processes, of which the others never take a batch, and records what it does.

    Args:
        world: the number of processes.
        together: not used.
        evenly: not used; the images of each attack are divided evenly.

    Attributes:
        trace: for each list of batches, the seconds before it, its tasks and the batches that were needed; the seconds
            of each batch; and the seconds after the last batch.
    """

    def __init__(self, world: int, together: bool = True, evenly: bool = True):
        super().__init__(together=False)
        self.world, self.shares, self.store = world, world, dist.HashStore()
        self.signs: Any = SimpleNamespace(start=lambda: None, over=threading.Event(), give_and_read=lambda: 0, signs={})
        self.trace: Trace = {"lists": [], "seconds": {}}
        self.last = time.perf_counter()
        Recorder.made = self

    made: Recorder

    def _pause(self) -> float:
        last, self.last = self.last, time.perf_counter()
        return self.last - last

    def publish(self, tasks: Sequence[Task]) -> None:
        shown = [[task.attack, task.run, [name for _, name in task.batches]] for task in tasks]
        self.trace["lists"].append({"before": self._pause(), "tasks": shown, "needed": []})
        super().publish(tasks)

    def obtain(
        self, place: str, read: Callable[[], Result], make: Callable[[Task, int], object], progress: Progress
    ) -> Result | None:
        self.trace["lists"][-1]["needed"].append(place)
        return super().obtain(place, read, make, progress)

    @contextlib.contextmanager
    def _making(self, task: Task, number: int, progress: Progress) -> Iterator[None]:
        self._pause()
        with super()._making(task, number, progress):
            yield
        self.trace["seconds"][task.place(dict(task.batches)[number])] = self._pause()

    def end(self, report: Callable[[], str]) -> None:
        self.trace["after"] = self._pause()


class Clock:
    """A clock for threads of which only one runs at a time. Time passes only while all of them sleep."""

    def __init__(self) -> None:
        self.now, self.sleepers, self.numbers = 0.0, list[tuple[float, int]](), iter(range(2**62))
        self.turn, self.current, self.errors = threading.Condition(), -1, list[BaseException]()

    def enter(self, seconds: float = 0.0) -> int:
        """Register a sleep, and return its number."""
        number = next(self.numbers)
        heapq.heappush(self.sleepers, (self.now + seconds, number))
        return number

    def wake(self) -> None:
        """Let the time pass until the first sleeper wakes."""
        if self.sleepers:
            self.now, self.current = heapq.heappop(self.sleepers)
            self.turn.notify_all()

    def sleep(self, seconds: float) -> None:
        """Sleep, while other threads run."""
        with self.turn:
            number = self.enter(seconds)
            self.wake()
            self.turn.wait_for(lambda: self.current == number)
        if self.errors:
            raise RuntimeError("another thread has failed") from self.errors[0]

    def monotonic(self) -> float:
        return self.now

    def run(self, works: Sequence[Callable[[], object]]) -> None:
        """Run each function in a thread until all have ended, and raise the first error."""

        def whole(work: Callable[[], object], number: int) -> None:
            with self.turn:
                self.turn.wait_for(lambda: self.current == number)
            try:
                work()
            except BaseException as error:
                self.errors.append(error)
            finally:
                with self.turn:
                    self.wake()

        threads = [threading.Thread(target=whole, args=(work, self.enter()), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        with self.turn:
            self.wake()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


class _Simulated(Team):
    def __init__(self, rank: int, world: int, store: dist.Store):
        super().__init__(together=False)
        self.rank, self.world, self.store = rank, world, store
        self.signs: Any = SimpleNamespace(is_silent=lambda other: False)


def simulated(trace: Trace, processes: int) -> float:
    """Return the seconds that a number of processes take for a recorded evaluation.

    A batch that was predicted for a later attack, and was then not needed, takes the mean time of its attack's batches.

    Args:
        trace: what `Recorder` has recorded.
        processes: the number of processes.
    """
    clock, store, progress, seconds = Clock(), dist.HashStore(), Progress(), trace["seconds"]
    means: dict[str, float] = {}
    for attack in {place.split()[0] for place in seconds}:
        means[attack] = statistics.mean(each for place, each in seconds.items() if place.split()[0] == attack)
    ended = []

    def make(task: Task, number: int) -> None:
        place = task.place(dict(task.batches)[number])
        clock.sleep(seconds.get(place, means.get(str(task.attack), 0.0)))

    def first(folder: str) -> None:
        made = _Simulated(0, processes, store)
        for each in trace["lists"]:
            clock.sleep(each["before"])
            tasks = [
                Task(attack, run, b"", list(enumerate(names)), f"{folder}/{attack} {run}", False)
                for attack, run, names in each["tasks"]
            ]
            made.publish(tasks)
            for place in each["needed"]:
                made.obtain(place, bool, make, progress)
            made.withdraw(tasks[0].folder)
        clock.sleep(trace["after"])
        made.wait_for_idle()
        store.set("ended", "")
        ended.append(clock.now)

    def other(rank: int) -> None:
        for task, number in _Simulated(rank, processes, store).batches(progress):
            make(task, number)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(team, "time", clock):
        clock.run([lambda: first(folder), *(lambda rank=rank: other(rank) for rank in range(1, processes))])  # type: ignore[misc]
    return ended[0]


def evaluated(model: str, images: int, folder: str) -> None:
    """Evaluate a model of the zoo by the protocol ``standard``.

    Args:
        model: name of the model.
        images: number of images.
        folder: folder of the images, if the package does not contain them.
    """
    card = zoo.card(model)
    data = load_dataset(card.data, folder)
    subset = balanced_subset(data.x_test, data.y_test, images, 0, num_classes=data.num_classes)
    evaluate(zoo.load(model), subset.x, subset.y, eps=card.eps, protocol="standard", progress=False)


def recorded(model: str, images: int, folder: str, processes: int) -> Trace:
    """Evaluate in this process with the batches of several processes, and return what `Recorder` has recorded."""
    with mock.patch.object(runner, "Team", functools.partial(Recorder, processes)):
        evaluated(model, images, folder)
    trace, places = Recorder.made.trace, dict[str, str]()
    for each in trace["lists"]:
        for task in each["tasks"]:
            # Short names take less space in the file.
            task[2] = [places.setdefault(name, str(len(places))) for name in task[2]]

    def short(place: str) -> str:
        attack, run, name = place.split()
        return f"{attack} {run} {places[name]}"

    for each in trace["lists"]:
        each["needed"] = list(map(short, each["needed"]))
        each["before"] = round(each["before"], 4)
    trace["seconds"] = {short(place): round(each, 4) for place, each in trace["seconds"].items()}
    return trace


def measured(model: str, images: int, folder: str, processes: int) -> float:
    """Return the seconds of an evaluation by a number of new processes, without the time in which they start."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, "-m", __name__, model, str(images), folder]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


def arguments(parser: argparse.ArgumentParser) -> None:
    options.add_names(parser, MODELS, "--only", "models that are evaluated")
    parser.add_argument("--data", default="data", help="folder of CIFAR-10; default: data")
    options.add_out(parser, "/cpu")
    parser.add_argument("--times", type=int, default=TIMES, help=f"repetitions of each evaluation; default: {TIMES}")


def main(chosen: argparse.Namespace) -> str:
    """Run ``python -m benchmarks processes``, and return the table."""
    path = options.out_of(chosen, chosen.quick, "cpu") / FILE
    torch.set_num_threads(1)
    for model in chosen.only:
        of = (model, 24 if chosen.quick else MODELS[model], chosen.data)
        seconds: dict[str, list[float]] = {str(processes): [] for processes in MEASURED}
        for _ in range(chosen.times):
            for processes in MEASURED:
                seconds[str(processes)].append(round(measured(*of, processes), 2))
        traces = {str(processes): recorded(*of, processes) for processes in SIMULATED}
        row = {"model": model, "images": of[1], "measured": seconds, "traces": traces}
        rows = {one["model"]: one for one in rows_of(path)}
        rows[model] = row | timing.environment(torch.device("cpu"))
        write_text(path, json.dumps([rows[name] for name in MODELS if name in rows]) + "\n")
    return "\n".join(table(path.parent.parent))


def table(results: Path) -> list[str]:
    """Return the table of docs/judge_reference.md.

    Args:
        results: the folder ``benchmarks/results``.
    """
    body, rows = [], rows_of(results / "cpu" / FILE)
    for row in rows:
        seconds = {(name, "measured"): statistics.median(each) for name, each in row["measured"].items()}
        seconds |= {(name, "counted"): simulated(trace, int(name)) for name, trace in row["traces"].items()}
        alone = seconds["1", "measured"]
        body += [
            [f"`{row['model']}`", str(row["images"]), *form, f"{each:.0f}", f"{alone / each:.2f}"]
            for form, each in seconds.items()
        ]
    head = ["model", "images", "processes", "", "seconds", "times as fast as one"]
    return [f"Measured on {machines(rows)} per process.", "", *sheets.table(head, body)]


if __name__ == "__main__":
    from purify_fast.training.distributed import torchrun_group

    torch.set_num_threads(1)
    with torchrun_group():
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        evaluated(sys.argv[1], int(sys.argv[2]), sys.argv[3])
        if os.environ["RANK"] == "0":
            print(time.perf_counter() - began)
