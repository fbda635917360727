"""Studies: what makes a defence robust, over seeds, with controls. ``python -m benchmarks study NAME``.

A study is a list of jobs that train and attack one model each. Jobs run side by side; a finished one leaves
``result.json`` and is not run again, so a study that was stopped goes on where it was. What a job was asked to do
stands in ``job.json`` beside it: a folder that was begun with other settings is refused.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, ClassVar

import jinja2
import torch
import yaml

from purify_fast._files import write_text
from purify_fast._process import end_workers, worker_pool
from purify_fast.speed import retain_freed_memory

RESULT, ASKED = "result.json", "job.json"


class Unfit(ValueError):
    """What is there does not fit what was asked for."""


def folder_of(root: Path, name: str, seed: int) -> Path:
    """Where a row of a study keeps what it trained and found."""
    return root / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"


def result_of(root: Path, name: str, seed: int) -> dict[str, Any]:
    """What a row's job found; FileNotFoundError if it is not done."""
    return json.loads((folder_of(root, name, seed) / RESULT).read_text())


#: ``work(job, folder, root)`` -> numbers for the table.
Work = Callable[["Job", Path, Path], dict]


@dataclass(frozen=True)
class Job:
    """One model of a study.

    Attributes:
        name: the row of the table. seed: of its training and of the attacks.
        work: ``work(job, folder, root)`` -> numbers for the table; importable, since it runs in another process.
        needs: rows whose folders it reads: of the same seed by their names, of another one as ``(name, seed)``.
        settings: for ``work``.
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
        """Names and seeds of what it needs."""
        return [(need, self.seed) if isinstance(need, str) else need for need in self.needs]

    def ready(self, root: Path) -> bool:
        """Whether all that it needs has ended."""
        return all((folder_of(root, *need) / RESULT).is_file() for need in self.needed())

    def done(self, root: Path) -> bool:
        """Whether this job has ended."""
        return (self.folder(root) / RESULT).is_file()

    def result(self, root: Path, name: str | None = None) -> dict:
        """What this job found, or that of another row of the same seed; FileNotFoundError if it is not done."""
        return result_of(root, name or self.name, self.seed)

    def asked(self) -> dict:
        """What must be equal for its folder to be used again, as JSON has it; where it runs is no part of it."""
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
    """That the jobs can all be run, and that what ``root`` holds of them is theirs; ValueError otherwise."""
    if not jobs:
        raise ValueError("the study has no job")
    if len({job.folder(root) for job in jobs}) < len(jobs):
        raise ValueError("jobs need names of their own")
    names = {(job.name, job.seed) for job in jobs}
    for job in jobs:
        for need, seed in job.needed():
            if (need, seed) not in names:
                raise ValueError(f"{job.name} needs {need!r} of seed {seed}, which the study has not")
    try:
        TopologicalSorter({(job.name, job.seed): job.needed() for job in jobs}).prepare()
    except CycleError as error:
        raise ValueError(f"these jobs need each other: {', '.join(name for name, _ in error.args[1])}") from error
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
                f"{path.parent} holds {job.name!r} with other settings ({changes}): give another folder, or remove it"
            )


def run(
    jobs: Sequence[Job], root: Path, workers: int = 2, after_each: Callable[[], object] = lambda: None
) -> list[dict]:
    """Run the jobs that are not done, and return all results in the order of ``jobs``. Interrupted, it ends at once.

    Args:
        jobs: what is to be done.
        root: where their folders are.
        workers: jobs side by side.
        after_each: called when a job has ended.

    Raises:
        ValueError: before any work, no job, jobs of one name, a need that no job fills, jobs that need each other, or
            a folder with a job of other settings. Else what a job raised, after those that were running have ended.
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
    """How much a study trains and attacks, or which rows it has: its part of settings.yaml."""
    return yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())[study]


def positive(text: str) -> int:
    """A number of the command line that must be at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


class Study:
    """A study, as the command line sees it.

    Attributes:
        name: of the study, of its part of settings.yaml and of its page.
        dataset: what it trains and attacks on.
        workers: jobs side by side, where the command line does not say.
        amounts: how much of everything there can be.
        uses_autoattack: whether the package with the official AutoAttack must be there.
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
        """Options of this study alone."""
        parser.add_argument("--data", default="data", help="the folder that holds the images; data by default")

    def check(self, chosen: argparse.Namespace, results: Path) -> None:
        """ValueError or FileNotFoundError for options that would stop the study, or its table, later."""
        self.jobs(chosen)

    def variant(self, chosen: argparse.Namespace) -> str:
        """What the folder of the runs is called behind the study's name, so that different budgets lie apart."""
        return "" if chosen.amount == "default" else f"-{chosen.amount}"

    def is_whole(self, chosen: argparse.Namespace) -> bool:
        """Whether the table is the one that is committed."""
        return not self.variant(chosen)

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """All trainings and attacks."""
        raise NotImplementedError

    def begin(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """What there is to do before the jobs, such as to take over results that are in ``folder``."""

    def after_each(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """What there is to do when a job has ended."""

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """The page of tables, and the results behind it in ``folder``, from what the jobs left in ``root``."""
        raise NotImplementedError


def write_page(folder: Path, name: str, **values: Any) -> Path:
    """``name.md`` in ``folder``, from its template and the values that stand there."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("pages")), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["paragraph"] = lambda text: " ".join(text.split())
    text = environment.get_template(f"{name}.md.jinja").render(values)
    write_text(folder / f"{name}.md", re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return folder / f"{name}.md"


def over_seeds(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds, in percent points; one seed has no error."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"
