"""Run studies of what makes a defence robust: ``python -m benchmarks study NAME``.

A study is a list of jobs. Each job trains or attacks a model, and writes ``result.json`` into its folder. A finished
job is not run again, so a stopped study can be resumed. The settings of a job are saved in ``job.json`` in the same
folder. If the folder of a job already exists with other settings, the study does not start.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from purify_fast._files import write_text
from purify_fast.speed import retain_freed_memory

from ...prose import rendered

RESULT, ASKED = "result.json", "job.json"


def folder_of(root: Path, name: str, seed: int) -> Path:
    """Return the folder with the models and the results of a row's job."""
    return root / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"


def result_of(root: Path, name: str, seed: int) -> dict[str, Any]:
    """Return the result of a row's job."""
    return json.loads((folder_of(root, name, seed) / RESULT).read_text())


#: The type of the function of a job: ``work(job, folder, root)`` returns numbers for the table.
Work = Callable[["Job", Path, Path], dict]


@dataclass(frozen=True)
class Job:
    """A training or an attack in a study.

    Attributes:
        name: name of the row of the table.
        seed: seed of the training and of the attacks.
        work: function ``work(job, folder, root)`` that returns numbers for the table.
        needs: names of the rows with the same seed whose jobs must be finished before this job.
        settings: settings of ``work``.
    """

    name: str
    seed: int
    work: Work
    needs: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)

    def folder(self, root: Path, name: str | None = None) -> Path:
        """Return the folder of this job, or that of another row with the same seed."""
        return folder_of(root, name or self.name, self.seed)

    def ready(self, root: Path) -> bool:
        """Tell whether all jobs that this job needs are finished."""
        return all((self.folder(root, need) / RESULT).is_file() for need in self.needs)

    def done(self, root: Path) -> bool:
        """Tell whether this job is finished."""
        return (self.folder(root) / RESULT).is_file()

    def result(self, root: Path, name: str | None = None) -> dict:
        """Return the result of this job, or that of another row with the same seed.

        Raises:
            FileNotFoundError: the job is not finished.
        """
        return result_of(root, name or self.name, self.seed)

    def asked(self) -> dict:
        """Return the settings as JSON values. An existing folder is used again only if it has the same settings.

        The folder of the data and the device are left out, because a study may be resumed with another folder or
        device.
        """
        settings = {name: value for name, value in self.settings.items() if name not in ("data", "device")}
        plain = json.dumps({"work": self.work.__name__, "needs": self.needs, **settings}, default=vars)
        return json.loads(plain)


def _run(job: Job, root: Path) -> None:
    began, folder = time.monotonic(), job.folder(root)
    write_text(folder / ASKED, json.dumps(job.asked(), indent=1) + "\n")
    result = job.work(job, folder, root)
    result |= {"name": job.name, "seed": job.seed, "minutes": round((time.monotonic() - began) / 60, 2)}
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")


def _check(jobs: Sequence[Job], root: Path) -> None:
    """Raise ValueError if the folder of a job in ``root`` has other settings."""
    for job in jobs:
        path, now = job.folder(root) / ASKED, job.asked()
        if path.is_file() and (there := json.loads(path.read_text())) != now:
            raise ValueError(
                f"the folder {path.parent} has results of {job.name!r} with other settings ({there}, not {now}): give "
                "another folder, or remove this folder"
            )


def run(jobs: Sequence[Job], root: Path) -> list[dict]:
    """Run the unfinished jobs one after the other, and return all results in the order of ``jobs``."""
    _check(jobs, root)
    retain_freed_memory()
    # Small models are not faster with more threads.
    torch.set_num_threads(1)
    began = time.monotonic()
    waiting = [job for job in jobs if not job.done(root)]
    total = len(waiting)
    while waiting:
        job = next(job for job in waiting if job.ready(root))
        waiting.remove(job)
        minutes = (time.monotonic() - began) / 60
        print(f"[{minutes:5.1f} min] {total - len(waiting)}/{total} {job.name}, seed {job.seed}", file=sys.stderr)
        _run(job, root)
    return [job.result(root) for job in jobs]


@functools.cache
def settings_of(study: str) -> dict[str, Any]:
    """Return a study's part of settings.yaml, such as numbers of epochs and images, or the rows of the table."""
    return yaml.safe_load(Path(__file__).with_name("settings.yaml").read_text())[study]


def write_page(folder: Path, name: str, **values: Any) -> Path:
    """Fill the template of a page, write the page, and return its path.

    Args:
        folder: folder of the page.
        name: name of the page and of its template.
        values: variables of the template.
    """
    text = rendered(Path(__file__).with_name("pages") / f"{name}.md.jinja", **values)
    write_text(folder / f"{name}.md", text)
    return folder / f"{name}.md"
