"""The demonstration: from digits to defended and honestly attacked classifiers, in minutes on a CPU.

CARSO on an adversarially trained classifier and AToP on a standard one, each with its paper's objective and fine-tuned
through the whole pipeline, which is not in the papers; the standard classifier finetuned by ARREST, and CARSO on that;
all under the same attacks as what they stand on.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from .._files import write_text
from ..evaluation import Report, merge, plot_tradeoff
from ..evaluation.show.tables import markdown_table, percent
from .methods import ARREST_MODELS, ATOP_MODELS, CARSO_OBJECTIVE, CARSO_PIPELINE, METHODS, attack, model, train
from .setting import EPS, digits
from .workspace import BASE, QUICK, STANDARD, Budget, SecondProcess, Workspace

__all__ = ["EPS", "QUICK", "Budget", "Workspace", "run"]

#: What a reader of the demonstration may do next.
NEXT = [
    "Next steps:",
    "",
    "- `purify-fast evaluate runs/demo/carso_pipeline --eps 0.2` attacks one of these models anew.",
    "- `purify-fast report runs/demo/report_carso` opens a method's report as a page, with pictures.",
    "- `purify-fast train carso --help` says how to train on your own images and classifier.",
]


def run(out: Path = Path("runs/demo"), quick: bool = False, seed: int = 0) -> dict[str, Report]:
    """Train, attack, report: ``report.md``, and a folder with the page and JSON for each method.

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
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"\n[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    budget, images = workspace.budget, digits()
    say(f"digits: {len(images.x_train)} images to train on, {budget.images} held out to attack, L-inf eps {EPS}")
    say("1/4 an adversarially trained classifier, the base; beside it a standard one, AToP on that, ARREST from it")
    with SecondProcess(workspace) as second:
        trained = second(_train_beside)
        for name in (*ARREST_MODELS, *ATOP_MODELS, STANDARD):
            second(attack, name, after=trained)
        workspace.train_classifier(BASE)
        second(attack, BASE)
        say("2/4 CARSO's purifier with the paper's objective: trained on attacks that see the classifier alone")
        train(workspace, CARSO_OBJECTIVE)
        second(attack, CARSO_OBJECTIVE)
        say("3/4 the same purifier fine-tuned through the whole pipeline, which is not in the paper")
        train(workspace, CARSO_PIPELINE)
        say("4/4 attacks, each with full knowledge of the model it attacks")
        attack(workspace, CARSO_PIPELINE)
        second.finish()
    reports: dict[str, Report] = {}
    pages: list[str] = []
    for title in METHODS:
        reports[title], page = _report(workspace, title)
        pages += page
    notes = ["- The settings were chosen on these same images: differences of a point or two are not to be trusted."]
    if quick:
        notes.insert(0, "- QUICK RUN: hardly trained, hardly attacked; these numbers mean nothing.")
    print("\n".join(notes))
    head = ["# The demonstration on digits", "", *notes, "", "## Summary", "", *_summary(reports), "", *NEXT, ""]
    write_text(workspace.out / "report.md", "\n".join([*head, *pages]))
    folders = " and ".join(method.folder for method in METHODS.values())
    say(f"written: {workspace.out}/report.md; report.html and report.json in {folders} there")
    return reports


def _train_beside(workspace: Workspace) -> None:
    """Train what the second process trains."""
    workspace.train_classifier(STANDARD)
    for name in (*ATOP_MODELS, *ARREST_MODELS):
        train(workspace, name)


def _report(workspace: Workspace, title: str) -> tuple[Report, list[str]]:
    """One method's report, printed and saved, and its part of the page."""
    method = METHODS[title]
    # every row is there already
    names = (*method.beside, *method.models)
    reports = {name: attack(workspace, name, constant_step=not method.beside) for name in names}
    report = merge(reports.values())
    sentences = [f"- {line}" for line in method.conclude(reports, workspace.budget)]
    print(f"\n{report.to_text()}\n")
    print("\n".join(sentences))
    place = workspace.out / method.folder
    report.save(place, {name: model(workspace, name) for name in method.models})
    if method.beside:
        points = {name: (100 * r.row("clean").accuracy, 100 * r.row("worst").accuracy) for name, r in reports.items()}
        plot_tradeoff(place / "tradeoff.png", points, title="clean accuracy and PGD")
    pictures = [f"![{title}: {path.stem}]({method.folder}/{path.name})" for path in sorted(place.glob("*.png"))]
    # the report's own headings stand below the method's
    body = re.sub(r"^#+", lambda heading: f"##{heading[0]}", (place / "report.md").read_text(), flags=re.MULTILINE)
    return report, [f"## {title}", "", *sentences, "", body, *pictures, ""]


def _summary(reports: dict[str, Report]) -> list[str]:
    """Lines of a Markdown table: every model once, with the lowest number of all attacks on it."""
    body: dict[str, list[str]] = {}
    for report in reports.values():
        for name, lowest in report.headlines.items():
            clean = next(row for row in report.rows if (row.model, row.kind) == (name, "clean"))
            verdict = "yes" if lowest.reliable else "no: the attack lacked gradients"
            body.setdefault(name, [name, percent(clean), percent(lowest), lowest.attack, str(lowest.n), verdict])
    head = ["model", "clean, %", "lowest under attack, %", "attack", "images", "can the number be believed?"]
    return markdown_table(head, body.values())
