"""The demonstration: from digits to defended and honestly attacked classifiers, in minutes on a CPU.

CARSO on an adversarially trained classifier and AToP on a standard one, each as published and fine-tuned through the
whole pipeline (ours), under the same attacks as what they stand on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

import torch

from .._files import write_text
from .._process import end_with_parent
from ..evaluation import Report, merge
from ..training import keep_memory
from . import atop, carso
from .common import BASE, EPS, QUICK, STANDARD, Budget, Place, digits

__all__ = ["EPS", "QUICK", "Budget", "Place", "run"]

#: The table's title, the method's module (MODELS, attack, model, conclusion) and the folder of its report.
METHODS = {"CARSO": (carso, "report_carso"), "AToP": (atop, "report_atop")}


def run(out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> dict[str, Report]:
    """Train, attack, report: ``report.md``, and a folder with JSON and PNG pictures for each method.

    Finished parts are reused. AToP is trained beside CARSO, on the core that small batches leave idle, and models are
    attacked there as soon as they are ready.

    Args:
        out: the folder; a quick run goes to ``out`` with ``-quick`` appended, since its numbers mean nothing.
        quick: the same path with tiny budgets.
        seed: of everything.

    Returns:
        The method's name to its report.
    """
    began = time.monotonic()

    def heading(text: str) -> None:
        print(f"\n[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    place = Place(out.with_name(out.name + "-quick") if quick else out, QUICK if quick else Budget(), seed)
    heading(
        f"digits: {len(digits().x_train)} images to train on, {place.budget.images} held out to attack, L-inf eps {EPS}"
    )
    heading("1/4 an adversarially trained classifier, the base; beside it a standard one, and AToP on that")
    beside = _Beside(place)
    with beside:
        beside(_train_atop)
        for name in atop.MODELS:
            beside(atop.attack, name)
        beside(carso.attack, STANDARD)
        place.train_classifier(BASE)
        beside(carso.attack, BASE)
        heading("2/4 CARSO's purifier on the base, as published: trained on attacks that see the classifier alone")
        carso.train(place, carso.PUBLISHED)
        beside(carso.attack, carso.PUBLISHED)
        heading("3/4 the same purifier fine-tuned through the whole pipeline (ours)")
        carso.train(place, carso.PIPELINE)
        heading("4/4 attacks, each with full knowledge of the model it attacks")
        carso.attack(place, carso.PIPELINE)
        beside.finish()

    pages, whole = [], {}
    for title, (method, folder) in METHODS.items():
        reports = {name: method.attack(place, name) for name in method.MODELS}  # rows that are kept
        whole[title] = report = merge(reports.values())
        findings = [f"- {line}" for line in method.conclusion(reports, place.budget)]
        print(f"\n{report.to_text(color=sys.stdout.isatty())}\n")
        print("\n".join(findings))
        report.save(place.out / folder, {name: method.model(place, name) for name in method.MODELS})
        pictures = [
            f"![{title}: {path.stem}]({folder}/{path.name})" for path in sorted((place.out / folder).glob("*.png"))
        ]
        table = (place.out / folder / "report.md").read_text()
        pages += [f"# {title}", "", *findings, "", table, *pictures, ""]
    notes = ["- The settings were chosen on these same images: differences of a point or two are not to be trusted."]
    if quick:
        notes.insert(0, "- QUICK RUN: hardly trained, hardly attacked; these numbers mean nothing.")
    print("\n".join(notes))
    write_text(place.out / "report.md", "\n".join([*notes, "", *pages]))
    folders = " and ".join(folder for _, folder in METHODS.values())
    heading(f"written: {place.out}/report.md; report.json and pictures in {folders} there")
    return whole


def _train_atop(place: Place) -> None:
    place.train_classifier(STANDARD)
    for name in atop.MODELS:
        atop.train(place, name)


def _begin() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    keep_memory()


class _Beside:
    """A second process that does what it is given, in that order; what it has not begun can be taken back."""

    def __init__(self, place: Place):
        self.place = place
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)
        self.given: list[tuple[Future, Callable, tuple[str, ...]]] = []

    def __enter__(self) -> _Beside:
        return self

    def __call__(self, work: Callable, *arguments: str) -> None:
        self.given.append((self.pool.submit(work, self.place.quiet(), *arguments), work, arguments))

    def finish(self) -> None:
        """Do what was not begun, last first, and wait for the rest."""
        for future, work, arguments in reversed(self.given):
            if future.cancel():
                work(self.place, *arguments)
        for future, _, _ in self.given:
            if not future.cancelled():
                future.result()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # what it works on can take minutes, and goes on where it was
            for child in active_children():
                child.terminate()
        self.pool.shutdown(cancel_futures=True)
