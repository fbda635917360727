"""The demonstration: from digits to defended and honestly attacked classifiers, in minutes on a CPU.

CARSO on an adversarially trained classifier and AToP on a standard one, each as published and fine-tuned through the
whole pipeline (ours); the standard classifier finetuned by ARREST, and CARSO on that; under the same attacks as what
they stand on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from .._files import write_text
from .._process import end_with_parent
from ..evaluation import Report, merge, plot_tradeoff
from ..speed import retain_freed_memory
from . import arrest, atop, carso
from .common import BASE, EPS, QUICK, STANDARD, Budget, Place, digits

__all__ = ["EPS", "QUICK", "Budget", "Place", "run"]

#: The table's title, the method's module (MODELS, attack, model, conclusion) and the folder of its report.
METHODS = {
    "CARSO": (carso, "report_carso"),
    "AToP": (atop, "report_atop"),
    "ARREST": (arrest, "report_arrest"),
}


def run(out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> dict[str, Report]:
    """Train, attack, report: ``report.md``, and a folder with JSON and PNG pictures for each method.

    Finished parts are reused. AToP and ARREST are trained beside CARSO, on the core that small batches leave idle, and
    models are attacked there as soon as they are ready.

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
    heading("1/4 an adversarially trained classifier, the base; beside it a standard one, AToP on that, ARREST from it")
    beside = _Beside(place)
    with beside:
        trained = beside(_train_beside)
        for method in (arrest, atop):
            for name in method.MODELS:
                beside(method.attack, name, after=trained)
        beside(carso.attack, STANDARD, after=trained)
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
        # rows that are kept; ARREST is told against what it starts from and what CARSO stands on
        compared = arrest.COMPARED if method is arrest else method.MODELS
        reports = {name: method.attack(place, name) for name in compared}
        whole[title] = report = merge(reports.values())
        findings = [f"- {line}" for line in method.conclusion(reports, place.budget)]
        print(f"\n{report.to_text()}\n")
        print("\n".join(findings))
        report.save(place.out / folder, {name: method.model(place, name) for name in method.MODELS})
        if method is arrest:
            points = {
                name: (100 * r.row("clean").accuracy, 100 * r.row("worst").accuracy) for name, r in reports.items()
            }
            plot_tradeoff(place.out / folder / "tradeoff.png", points, title="clean accuracy and PGD")
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


def _train_beside(place: Place) -> None:
    place.train_classifier(STANDARD)
    for method in (atop, arrest):
        for name in method.MODELS:
            method.train(place, name)


def _begin() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    retain_freed_memory()


class _Beside:
    """A second process that does what it is given, in that order; what it has not begun can be taken back."""

    def __init__(self, place: Place):
        self.place = place
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin)
        self.given: list[tuple[Future[Any], Callable[..., Any], tuple[str, ...], Future[Any] | None]] = []

    def __enter__(self) -> _Beside:
        return self

    def __call__(self, work: Callable[..., Any], *arguments: str, after: Future[Any] | None = None) -> Future[Any]:
        """Give it ``work``, which needs what ``after`` does."""
        future = self.pool.submit(work, self.place.quiet(), *arguments)
        self.given.append((future, work, arguments, after))
        return future

    def finish(self) -> None:
        """Do what was not begun, last first, and wait for the rest."""
        for future, work, arguments, after in reversed(self.given):
            if future.cancel():
                if after is not None:
                    after.result()
                work(self.place, *arguments)
        for future, *_ in self.given:
            if not future.cancelled():
                future.result()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # what it works on can take minutes, and goes on where it was
            for child in active_children():
                child.terminate()
        self.pool.shutdown(cancel_futures=True)
