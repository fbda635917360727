"""The tables of the study on CIFAR-10, of all that is judged so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purify_fast._files import write_text
from purify_fast.evaluation import Report, Tradeoff, merge
from purify_fast.evaluation.tables import markdown_table, percent

from . import RESULT, folder_of
from .cifar10_ahead import MIXED
from .cifar10_budget import (
    ARREST,
    AS_AUTHORS,
    AUTHORS,
    BASE,
    BEHIND,
    BEST,
    COMPARED,
    OFFICIAL,
    PAIRS,
    STANDARD,
    TRAINED_AS,
    TRIED,
    WORST,
    Budget,
    Judging,
    judged_name,
    rows,
    tried_name,
)
from .cifar10_pictures import Point, picture, plot


class NothingJudged(ValueError):
    """A table was asked for, and there is no row for it yet."""


@dataclass(frozen=True)
class Found:
    """What the jobs of one seed left, as far as they are done.

    Attributes:
        root: of the study. seed: of the trainings.
    """

    root: Path
    seed: int = 0

    def result(self, name: str) -> dict[str, Any] | None:
        """What a job found; None if it is not done."""
        path = folder_of(self.root, name, self.seed) / RESULT
        return json.loads(path.read_text()) if path.is_file() else None

    def needed(self, name: str) -> dict[str, Any]:
        """What a job found that must be done; FileNotFoundError if it is not."""
        return json.loads((folder_of(self.root, name, self.seed) / RESULT).read_text())

    def report(self, name: str, protocol: str) -> Report:
        """What a protocol left of a model that it has judged."""
        path = folder_of(self.root, judged_name(name, protocol), self.seed) / "report.json"
        return Report.from_json(path.read_text())

    def judged(self, names: Sequence[str], protocol: str) -> list[str]:
        """Those of the rows whose models a protocol has judged."""
        return [name for name in names if self.result(judged_name(name, protocol)) is not None]

    def hours(self, model: str, batch_size: int) -> float:
        """How long a model was trained, from its log: a training that was interrupted ran in several processes.

        Args:
            model: its row; the mixture was not trained, but its parts were.
            batch_size: images of a step.
        """
        seconds = 0.0
        for name in (STANDARD, BASE) if model == MIXED else (TRAINED_AS.get(model, model),):
            log = (folder_of(self.root, name, self.seed) / "log.jsonl").read_text().splitlines()
            before = 0
            for epoch in map(json.loads, log):
                seconds += (epoch["step"] - before) * batch_size / epoch["images_per_second"]
                before = epoch["step"]
        return seconds / 3600


def table(found: Found, names: Sequence[str], budget: Budget) -> list[str]:
    """One line for each model: accuracies, trade-offs, costs.

    Args:
        found: what the jobs left.
        names: of rows whose models are judged.
        budget: how much of everything there is.
    """
    counts = budget.judging
    protocols = [name for name in counts.protocols() if found.seed == 0 or name == counts.main]
    body = []
    for name in names:
        judged = found.needed(judged_name(name, counts.main))
        model = judged["model"]
        facts = found.needed(TRAINED_AS.get(model, model))
        both = Tradeoff(100 * judged["clean"], 100 * judged[counts.main]["share"])
        body.append(
            [
                name if name == model else f"{name}: {model}",
                _percent(judged["clean"], counts.clean),
                *(_attacked(found, name, model, protocol) for protocol in protocols),
                f"{both.sum:.1f}",
                f"{both.nrr:.1f}",
                f"{facts['parameters'] / 1e6:.2f}",
                f"{facts['inference_gflop']:.3f}",
                f"{facts['training_gflop']:.2f}",
                f"{found.hours(model, budget.training.batch_size):.2f}",
            ]
        )
    head = ["model", "clean", *(f"`{name}` ({counts.protocols()[name]:,})" for name in protocols), "SUM", "NRR"]
    costs = ["million parameters", "GFLOP a prediction", "GFLOP a training image", "hours of training"]
    return markdown_table([*head, *costs], body)


def _error(share: float, images: int) -> float:
    """The binomial standard error of a share, in percent points."""
    return 100 * (share * (1 - share) / images) ** 0.5


def _percent(share: float, images: int) -> str:
    """A share in percent, with its standard error."""
    return f"{100 * share:.1f} ± {_error(share, images):.1f}"


def _attacked(found: Found, name: str, model: str, protocol: str) -> str:
    """The cell of a protocol."""
    if found.result(judged_name(name, protocol)) is None:
        return "-"
    lowest = found.report(name, protocol).headlines[model]
    return _marked(percent(lowest), lowest.reliable)


def _marked(text: str, reliable: bool) -> str:
    """A number, and whether it can be believed."""
    return text if reliable else f"{text} **unreliable**"


def summary(found: Found, names: Sequence[str], budget: Budget) -> list[dict[str, Any]]:
    """The accuracies and costs of every model that is judged, for pages that quote them.

    Args:
        found: what the jobs left.
        names: of rows.
        budget: how much of everything there is.
    """
    lines, counts = [], budget.judging
    for name in found.judged(names, counts.main):
        judged = found.needed(judged_name(name, counts.main))
        facts = found.needed(TRAINED_AS.get(judged["model"], judged["model"]))
        results = {
            protocol: found.result(judged_name(name, protocol)) for protocol in (*counts.protocols(), "official")
        }
        shares = {protocol: result[protocol]["share"] for protocol, result in results.items() if result is not None}
        costs = {key: facts[key] for key in ("parameters", "inference_gflop", "training_gflop")}
        costs["hours"] = round(found.hours(judged["model"], budget.training.batch_size), 3)
        lines.append({"name": name, "seed": found.seed, "clean": judged["clean"], **shares, **costs})
    return lines


def candidates_table(found: Found, counts: Judging) -> list[str]:
    """The candidates on held-out training images."""
    body = []
    for name, source in TRIED.items():
        if (tried := found.result(tried_name(name))) is None:
            continue
        lowest = tried["tried"]
        attacked = _marked(_percent(lowest["share"], counts.candidates), lowest["reliable"])
        body.append([name, source, _percent(tried["clean"], counts.held_out), attacked])
    return markdown_table(["candidate", "what it is", "clean", f"`{counts.tried}`"], body) if body else []


def authors_lines(found: Found, counts: Judging) -> list[dict[str, Any]]:
    """Models under the attacks of their authors, beside what compares models, on the same images.

    Args:
        found: what the jobs left.
        counts: how many images each protocol has.

    Returns:
        One line for each row of `AS_AUTHORS` that is judged: shares, and in how many more images the second is right
        than the first, with the standard error.
    """
    lines: list[dict[str, Any]] = []
    for name in AS_AUTHORS:
        models = TRAINED_AS[name], BEHIND[TRAINED_AS[name]]
        if not found.judged([name], AUTHORS) or len(found.judged(models, counts.main)) < len(models):
            continue
        judged = found.needed(judged_name(name, AUTHORS))
        whole, classifier = (_first(found.report(it, counts.main), counts.authors).astype(float) for it in models)
        gained = whole - _first(found.report(name, AUTHORS), counts.authors)
        lines.append(
            {
                "name": name, "seed": found.seed, "clean": judged["clean"], "authors": judged[AUTHORS]["share"],
                "whole": whole.mean(), "classifier": classifier.mean(), "reliable": judged[AUTHORS]["reliable"],
                "gained": gained.mean(), "gained_error": gained.std() / len(gained) ** 0.5,
            }
        )  # fmt: skip
    return lines


def authors_table(lines: Sequence[dict[str, Any]], counts: Judging) -> list[str]:
    """The same as a table.

    Args:
        lines: of `authors_lines`.
        counts: how many images each protocol has.
    """
    body = [
        [
            line["name"],
            _marked(f"{100 * line['authors']:.1f}", line["reliable"]),
            f"{100 * line['whole']:.1f}",
            f"{100 * line['classifier']:.1f}",
            f"{100 * line['gained']:+.1f} ± {100 * line['gained_error']:.1f}",
        ]
        for line in lines
    ]
    head = ["model", "the attack of its authors", f"`{counts.main}`", f"its classifier alone, `{counts.main}`"]
    return markdown_table([*head, "second minus first"], body) if body else []


def _first(report: Report, count: int) -> np.ndarray:
    """Which of the first images withstood all attacks."""
    worst = next(row for row in report.rows if row.kind == WORST)
    return worst.robust[:count]


def strong_beside_main(found: Found, names: Sequence[str], counts: Judging) -> str:
    """In which rows ``strong`` leaves another number of the images that what compares models attacked too; "" if none.

    Args:
        found: what the jobs left.
        names: of rows whose models are judged.
        counts: how many images each protocol has.
    """
    rows = found.judged(names, "strong") if counts.main != "strong" else []
    if not rows:
        return ""
    more = {}
    for name in rows:
        kept = (_first(found.report(name, protocol), counts.strong).sum() for protocol in ("strong", counts.main))
        more[name] = int(np.subtract(*kept))
    others = [f"{name} {change:+d}" for name, change in more.items() if change]
    text = f"On the same {counts.strong:,} images `strong` leaves as many right as `{counts.main}` in "
    text += f"{len(rows) - len(others)} of {len(rows)} rows"
    return text + (f"; the others: {'; '.join(others)}." if others else ".")


def official_table(found: Found, counts: Judging) -> list[str]:
    """The official AutoAttack beside this package's protocols, on the same images."""
    protocols = [name for name, count in counts.protocols().items() if count >= counts.official]
    body = []
    for name in (name for name in OFFICIAL if all(found.judged([name], protocol) for protocol in protocols)):
        if (official := found.result(judged_name(name, "official"))) is None:
            continue
        reports = [found.report(name, protocol) for protocol in protocols]
        shares = [f"{100 * _first(report, counts.official).mean():.1f}" for report in reports]
        body.append([name, str(counts.official), *shares, f"{100 * official['official']['share']:.1f}"])
    head = ["model", "images", *(f"`{name}`" for name in protocols), "the official AutoAttack"]
    return markdown_table(head, body) if body else []


def settings(found: Found, budget: Budget) -> str:
    """What was trained and judged, and how much of it."""
    amount, counts = budget.training, budget.judging
    text = (
        f"CIFAR-10, L-inf 8/255. A PreActResNet-18 of width {amount.width}. Clean accuracy is on {counts.clean:,} test "
        "images; each protocol attacks as many of the first ones as its column says; all in percent, with binomial "
        "standard errors. CARSO and AToP predict without noise (CARSO from the most likely latent). Models are trained "
        f"on the first {amount.train_images:,} training images, for {amount.standard_epochs} epochs on clean images, "
        f"{amount.base_epochs} of PGD-{amount.steps} for each base ({amount.large_epochs} for the larger one; the "
        f"longer one is the base after {amount.long_epochs - amount.base_epochs} more), "
        f"{amount.arrest_epochs} of ARREST and AFT, {amount.published_epochs} of CARSO as published, "
        f"and {amount.pipeline_epochs} of AToP as published and of all that is trained through the "
        "pipeline; with seed 0 where nothing else is said. Hours of training are as "
        "they passed, with other jobs beside, on one to four threads: GFLOP compare costs. Both are of a row's last "
        "stage."
    )
    if (facts := found.result(ARREST)) is not None:
        pair = f"lambda {facts['weight']:g} and phi {facts['angle']:g}"
        text += f" On training images that the search left out {pair} were chosen for ARREST."
    return "\n\n".join([text, *not_judged(found, budget)])


def not_judged(found: Found, budget: Budget) -> list[str]:
    """A sentence for each part of the study that has not ended; none when all is done."""
    counts = budget.judging
    official = OFFICIAL if counts.official > 0 else ()
    parts = {
        "Not judged yet": [(name, judged_name(name, counts.main), 0) for name in (*rows(budget), BEST)],
        "Candidates that are not judged yet": [(name, tried_name(name), 0) for name in TRIED],
        "Not attacked by the official AutoAttack yet": [(name, judged_name(name, "official"), 0) for name in official],
    }
    for seed in range(1, budget.seeds):
        jobs = [(name, judged_name(name, counts.main), seed) for name in COMPARED]
        parts[f"With seed {seed} not judged yet"] = jobs
    missing = {
        what: [name for name, job, seed in jobs if Found(found.root, seed).result(job) is None]
        for what, jobs in parts.items()
    }
    return [f"{what}: {'; '.join(names)}." for what, names in missing.items() if names]


def reached_by(found: Found, name: str, report: Report, counts: Judging) -> Point:
    """Where a model stands in the pictures.

    Args:
        found: what the jobs left.
        name: the model's row.
        report: of the protocol that compares models.
        counts: how many images each protocol has.
    """
    judged = found.needed(judged_name(name, counts.main))
    clean, robust = judged["clean"], report.headlines[judged["model"]]
    return 100 * clean, 100 * robust.accuracy, _error(clean, counts.clean), 100 * robust.standard_error


def write(root: Path, folder: Path, budget: Budget | None = None) -> Path:
    """``cifar10.md`` and its numbers, reports and pictures in ``folder``, of every model that is judged.

    Args:
        root: of the study.
        folder: of the results.
        budget: how much of everything there is; the default one by default.

    Raises:
        NothingJudged: no model is judged yet.
    """
    budget, found = budget or Budget(), Found(root)
    counts, main = budget.judging, budget.judging.main
    wanted = [*rows(budget), BEST]
    names = found.judged(wanted, main)
    if not names:
        raise NothingJudged(f"{root} holds no model that is judged: the study writes its table when the first one is")
    reports = {name: found.report(name, main) for name in names}
    lines = [settings(found, budget), "", *table(found, names, budget), ""]
    lines += [
        f"- {name} minus {other}, `{main}`: {reports[name].paired(reports[other])}."
        for name, other in PAIRS
        if name in reports and other in reports
    ]
    if beside := strong_beside_main(found, names, counts):
        lines += ["", beside]
    for seed in range(1, budget.seeds):
        again = Found(root, seed)
        if judged := again.judged(COMPARED, main):
            lines += ["", f"Trained with seed {seed}:", "", *table(again, judged, budget)]
    if tried := candidates_table(found, counts):
        where = f"{counts.candidates:,} training images that no model was trained on"
        lines += ["", f"Candidates, judged on {where} (clean accuracy on {counts.held_out:,}):", "", *tried]
    if authors := authors_lines(found, counts):
        how = (
            f"With noise, and attacked as their authors do, through PeeL or the classifier alone: PGD-"
            f"{budget.training.carso_steps} with two losses, five draws a step, on the first {counts.authors:,} test "
            "images. An image counts if each of five predictions is right. The other columns are without noise, on the "
            "same images:"
        )
        lines += ["", how, "", *authors_table(authors, counts)]
    if official := official_table(found, counts):
        lines += ["", "The official AutoAttack on the same images:", "", *official]
    numbers = [line for seed in range(budget.seeds) for line in summary(Found(root, seed), wanted, budget)]
    numbers += authors
    write_text(folder / "cifar10.json", json.dumps(numbers, indent=1) + "\n")
    merge(reports.values()).save(folder / "cifar10")
    reached = {name: reached_by(found, name, report, counts) for name, report in reports.items()}
    plot(reached, budget, folder / "cifar10" / "tradeoff.png")
    picture(reached, folder / "cifar10" / "photos.png")
    write_text(folder / "cifar10.md", "\n".join(lines) + "\n")
    return folder / "cifar10.md"
