"""The demonstration: from digits to defended and honestly attacked classifiers, in minutes on a CPU.

CARSO on an adversarially trained classifier and AToP on a standard one, each with its paper's objective and fine-tuned
through the whole pipeline, which is not in the papers; the standard classifier finetuned by ARREST, and CARSO on that;
all under the same attacks as what they stand on.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import ModuleType

from .._files import write_text
from ..evaluation import Report, merge, plot_tradeoff
from ..evaluation.show.tables import markdown_table, percent
from . import arrest, atop, carso
from .second_process import SecondProcess
from .setting import EPS, digits
from .workspace import BASE, QUICK, STANDARD, Budget, Workspace

__all__ = ["EPS", "QUICK", "Budget", "Workspace", "run"]

#: The table's title, the method's module (MODELS, attack, model, conclusion) and the folder of its report.
METHODS = {
    "CARSO": (carso, "report_carso"),
    "AToP": (atop, "report_atop"),
    "ARREST": (arrest, "report_arrest"),
}

#: What a reader of the demonstration may do next.
NEXT = [
    "Next steps:",
    "",
    "- `purify-fast evaluate runs/demo/carso_pipeline --eps 0.2` attacks one of these models anew.",
    "- `purify-fast report runs/demo/report_carso` opens a method's report as a page, with pictures.",
    "- `purify-fast train carso --help` says how to train on your own images and classifier.",
]


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
    workspace = Workspace(out.with_name(out.name + "-quick") if quick else out, QUICK if quick else Budget(), seed)
    clock = _Clock()
    _train_and_attack(workspace, clock)
    pages: list[str] = []
    found = {}
    for title, (method, folder) in METHODS.items():
        found[title], page = _report(workspace, title, method, folder)
        pages += page
    notes = ["- The settings were chosen on these same images: differences of a point or two are not to be trusted."]
    if quick:
        notes.insert(0, "- QUICK RUN: hardly trained, hardly attacked; these numbers mean nothing.")
    print("\n".join(notes))
    head = ["# The demonstration on digits", "", *notes, "", "## Summary", "", *_summary(found), "", *NEXT, ""]
    write_text(workspace.out / "report.md", "\n".join([*head, *pages]))
    folders = " and ".join(folder for _, folder in METHODS.values())
    clock.say(f"written: {workspace.out}/report.md; report.html, report.json and pictures in {folders} there")
    return found


class _Clock:
    """Says what is done now, and after how many seconds."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)


def _train_and_attack(workspace: Workspace, clock: _Clock) -> None:
    """Train every model and attack it, in two processes."""
    clock.say(
        f"digits: {len(digits().x_train)} images to train on, {workspace.budget.images} held out to attack, "
        f"L-inf eps {EPS}"
    )
    clock.say(
        "1/4 an adversarially trained classifier, the base; beside it a standard one, AToP on that, ARREST from it"
    )
    second = SecondProcess(workspace)
    with second:
        trained = second(_train_atop_and_arrest)
        for method in (arrest, atop):
            for name in method.MODELS:
                second(method.attack, name, after=trained)
        second(carso.attack, STANDARD, after=trained)
        workspace.train_classifier(BASE)
        second(carso.attack, BASE)
        clock.say("2/4 CARSO's purifier with the paper's objective: trained on attacks that see the classifier alone")
        carso.train(workspace, carso.OBJECTIVE)
        second(carso.attack, carso.OBJECTIVE)
        clock.say("3/4 the same purifier fine-tuned through the whole pipeline, which is not in the paper")
        carso.train(workspace, carso.PIPELINE)
        clock.say("4/4 attacks, each with full knowledge of the model it attacks")
        carso.attack(workspace, carso.PIPELINE)
        second.finish()


def _train_atop_and_arrest(workspace: Workspace) -> None:
    workspace.train_classifier(STANDARD)
    for method in (atop, arrest):
        for name in method.MODELS:
            method.train(workspace, name)


def _report(workspace: Workspace, title: str, method: ModuleType, folder: str) -> tuple[Report, list[str]]:
    """One method's report, printed and saved with its pictures, and its part of the page."""
    # every row is there already; ARREST is told against what it starts from and what CARSO stands on
    compared = arrest.COMPARED if method is arrest else method.MODELS
    reports = {name: method.attack(workspace, name) for name in compared}
    report = merge(reports.values())
    findings = [f"- {line}" for line in method.conclusion(reports, workspace.budget)]
    print(f"\n{report.to_text()}\n")
    print("\n".join(findings))
    place = workspace.out / folder
    report.save(place, {name: method.model(workspace, name) for name in method.MODELS})
    if method is arrest:
        points = {name: (100 * r.row("clean").accuracy, 100 * r.row("worst").accuracy) for name, r in reports.items()}
        plot_tradeoff(place / "tradeoff.png", points, title="clean accuracy and PGD")
    pictures = [f"![{title}: {path.stem}]({folder}/{path.name})" for path in sorted(place.glob("*.png"))]
    # the report's own headings stand below the method's
    body = re.sub(r"^#+", lambda found: f"##{found[0]}", (place / "report.md").read_text(), flags=re.MULTILINE)
    return report, [f"## {title}", "", *findings, "", body, *pictures, ""]


def _summary(reports: dict[str, Report]) -> list[str]:
    """Lines of a Markdown table: every model once, with the lowest number of all attacks on it."""
    body: dict[str, list[str]] = {}
    for report in reports.values():
        for model, lowest in report.headlines.items():
            clean = next(row for row in report.rows if (row.model, row.kind) == (model, "clean"))
            verdict = "yes" if lowest.reliable else "no: the attack lacked gradients"
            body.setdefault(model, [model, percent(clean), percent(lowest), lowest.attack, str(lowest.n), verdict])
    head = ["model", "clean, %", "lowest under attack, %", "attack", "images", "can the number be believed?"]
    return markdown_table(head, body.values())
