"""Studies of what makes a defence robust, over seeds, with controls. ``python -m benchmarks study NAME``.

A study is a list of jobs that train and attack a model each. Jobs run side by side; a finished job leaves
``result.json`` and is not run again, so a stopped study can be resumed. A job's settings are in ``job.json`` beside
it: a folder that was begun with other settings is refused.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from purify_fast._files import write_text
from purify_fast._process import end_workers, worker_pool
from purify_fast.speed import retain_freed_memory

from ...prose import rendered

RESULT, ASKED = "result.json", "job.json"


def folder_of(root: Path, name: str, seed: int) -> Path:
    """The folder of a study's row, with its models and results."""
    return root / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"


def result_of(root: Path, name: str, seed: int) -> dict[str, Any]:
    """The result of a row's job; FileNotFoundError if it is not done."""
    return json.loads((folder_of(root, name, seed) / RESULT).read_text())


#: The function that does a job: ``work(job, folder, root)`` returns numbers for the table.
Work = Callable[["Job", Path, Path], dict]


@dataclass(frozen=True)
class Job:
    """A model of a study.

    Attributes:
        name: the row of the table. seed: seed of its training and of the attacks.
        work: ``work(job, folder, root)`` -> numbers for the table; importable, since it runs in another process.
        needs: rows whose folders it reads: with the same seed by name, with another seed as ``(name, seed)``.
        settings: settings of ``work``.
        threads: 1, since for small models a second thread only spins; 0 for an equal share of torch's own number.
    """

    name: str
    seed: int
    work: Work
    needs: tuple[str | tuple[str, int], ...] = ()
    settings: dict = field(default_factory=dict)
    threads: int = 1

    def folder(self, root: Path, name: str | None = None) -> Path:
        """This job's folder, or that of another row of the same seed."""
        return folder_of(root, name or self.name, self.seed)

    def needed(self) -> list[tuple[str, int]]:
        """Names and seeds of the rows that it needs."""
        return [(need, self.seed) if isinstance(need, str) else need for need in self.needs]

    def ready(self, root: Path) -> bool:
        """Tell whether all rows that it needs are done."""
        return all((folder_of(root, *need) / RESULT).is_file() for need in self.needed())

    def done(self, root: Path) -> bool:
        """Tell whether this job has ended."""
        return (self.folder(root) / RESULT).is_file()

    def result(self, root: Path, name: str | None = None) -> dict:
        """The result of this job, or of another row with the same seed; FileNotFoundError if it is not done."""
        return result_of(root, name or self.name, self.seed)

    def asked(self) -> dict:
        """The settings, as in JSON, that must be equal for its folder to be used again; the device does not count."""
        settings = {name: value for name, value in self.settings.items() if name not in ("data", "device")}
        plain = json.dumps({"work": self.work.__name__, "needs": self.needs, **settings}, default=vars)
        return json.loads(plain)


def _run(job: Job, root: Path, share: int) -> None:
    torch.set_num_threads(job.threads or share)
    retain_freed_memory()
    began = time.monotonic()
    write_text(job.folder(root) / ASKED, json.dumps(job.asked(), indent=1) + "\n")
    result = job.work(job, job.folder(root), root)
    result |= {"name": job.name, "seed": job.seed, "minutes": round((time.monotonic() - began) / 60, 2)}
    write_text(job.folder(root) / RESULT, json.dumps(result, indent=1) + "\n")


def _check(jobs: Sequence[Job], root: Path) -> None:
    """Raise ValueError if a job cannot be run, or if ``root`` holds folders with other settings."""
    if not jobs:
        raise ValueError("a study must have at least one job, got none")
    if len({job.folder(root) for job in jobs}) < len(jobs):
        raise ValueError("jobs must have different folders, got several jobs with the same name and seed")
    needs = {(job.name, job.seed): job.needed() for job in jobs}
    if missing := {need for wanted in needs.values() for need in wanted} - needs.keys():
        raise ValueError(f"the study has no job for these rows and seeds, which other jobs need: {sorted(missing)}")
    # This raises CycleError, which is a ValueError, if jobs need each other.
    TopologicalSorter(needs).prepare()
    for job in jobs:
        path, now = job.folder(root) / ASKED, job.asked()
        there = json.loads(path.read_text()) if path.is_file() else now
        changes = "; ".join(
            f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(there.keys() | now.keys())
            if there.get(key) != now.get(key)
        )
        if changes:
            raise ValueError(
                f"{path.parent} holds {job.name!r} with other settings ({changes}): give another folder, or "
                "remove this one"
            )


def run(
    jobs: Sequence[Job], root: Path, workers: int = 2, after_each: Callable[[], object] = lambda: None
) -> list[dict]:
    """Run the unfinished jobs, and return all results in the order of ``jobs``. An interrupt ends it at once.

    Args:
        jobs: the jobs.
        root: the folder of their folders.
        workers: number of jobs side by side.
        after_each: called when a job has ended.

    Raises:
        ValueError: before any work, there is no job, jobs share a name, a needed job is missing, jobs need each other,
            or a folder has a job of other settings. The error of a job is raised after the running jobs have ended.
    """
    _check(jobs, root)
    began = time.monotonic()
    waiting = [job for job in jobs if not job.done(root)]
    running: dict[Future, Job] = {}
    total, share = len(waiting), max(1, torch.get_num_threads() // workers)
    with worker_pool(workers) as pool:
        while waiting or running:
            for job in list(waiting):
                if len(running) < workers and job.ready(root):
                    waiting.remove(job)
                    running[pool.submit(_run, job, root, share)] = job
            try:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:
                end_workers()
                raise
            for future in finished:
                job = running.pop(future)
                if future.exception() is not None:
                    print(f"{job.name}, seed {job.seed}, failed; it is in {job.folder(root)}", file=sys.stderr)
                future.result()
                after_each()
                left = len(waiting) + len(running)
                minutes = (time.monotonic() - began) / 60
                print(f"[{minutes:5.1f} min] {total - left}/{total} {job.name}, seed {job.seed}", file=sys.stderr)
    return [job.result(root) for job in jobs]


@functools.cache
def settings_of(study: str) -> dict[str, Any]:
    """A study's part of settings.yaml: amounts of training and attacks, or rows."""
    return yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())[study]


class Study:
    """A study for the command line.

    Attributes:
        name: name of the study, of its part of settings.yaml and of its page.
        dataset: data set of trainings and attacks.
        workers: default number of jobs side by side.
        amounts: names of the budgets.
        uses_autoattack: whether the package with the official AutoAttack is needed.
    """

    name: str
    dataset: str
    workers = 2
    amounts: ClassVar[dict[str, str]] = {
        "full": "the full budgets, days rather than an hour",
        "quick": "the same path in a minute or two, no numbers",
    }
    uses_autoattack = True

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of only this study."""
        parser.add_argument("--data", default="data", help="the folder that holds the images; data by default")

    def check(self, chosen: argparse.Namespace, results: Path) -> None:
        """Raise ValueError or FileNotFoundError for options that would stop the study, or its table, later."""
        self.jobs(chosen)

    def variant(self, chosen: argparse.Namespace) -> str:
        """The suffix of the runs' folder after the study's name, which separates different budgets."""
        return "" if chosen.amount == "default" else f"-{chosen.amount}"

    def is_whole(self, chosen: argparse.Namespace) -> bool:
        """Tell whether the table is the committed table."""
        return not self.variant(chosen)

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """All trainings and attacks."""
        raise NotImplementedError

    def begin(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """Prepare the jobs, for example take over results in ``folder``."""

    def after_each(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """Called when a job has ended."""

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """Write the page of tables and its results in ``folder``, from the jobs' folders in ``root``."""
        raise NotImplementedError


def write_page(folder: Path, name: str, functions: Sequence[Callable] = (), **values: Any) -> Path:
    """Write ``name.md`` in ``folder``, from its template, which sees these functions by their names, and the values."""
    text = rendered(Path(__file__).with_name("pages") / f"{name}.md.jinja", functions, **values)
    write_text(folder / f"{name}.md", text)
    return folder / f"{name}.md"


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, in percentage points; a single seed has no error."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"
