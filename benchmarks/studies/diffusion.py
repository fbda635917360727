"""What diffusion purifiers withstand: as their authors attack them, and through the exact gradient of every step.

The models are those of the zoo: of each data set a purifier before a classifier of clean images, one before an
adversarially trained classifier, that classifier alone, and CARSO and AToP. All models of a data set face the same
images in one ball. The purifiers are also attacked with other processes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from torch import nn

from purify_fast import data, load_defence, zoo
from purify_fast._files import write_text
from purify_fast.data import balanced_subset, to_float
from purify_fast.evaluation import AttackSpec, evaluate, lee_kim_2023
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.training import load_classifier

from . import Job, Study, settings_of, write_page

#: What is asked of a purifier, and of the models beside it.
GROUPS, BESIDE = ("exact", "authors", "votes", "strong"), ("exact", "strong")
#: A row of a report, as the results keep it.
FACTS = ("attack", "kind", "variant", "robust", "mean", "reliable")


def model_of(name: str, process: dict[str, Any] | None) -> nn.Module:
    """A model of the zoo; a purifier with another process, if one is given."""
    if process is None:
        return zoo.load(name)
    return load_defence(zoo.folder(name), load_classifier(zoo.classifier_folder(name)), process=process)


def attacks_of(group: str, eps: float, quick: bool) -> dict[str, Any]:
    """What `evaluate` is asked for one group of attacks."""
    exact = lee_kim_2023(eps)
    if quick:
        exact = AttackSpec(replace(exact.resolved, steps=2, eot_iter=2), label=exact.label)
    asked: dict[str, dict[str, Any]] = {
        "exact": {"attacks": [exact]},
        "votes": {"attacks": [exact], "predict": "votes"},
        "authors": {"protocol": "authors"},
        "strong": {"protocol": "fast" if quick else "strong"},
    }
    return asked[group]


def attack(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """One model under one group of attacks: the rows of its report, and the processor time."""
    s = job.settings
    budget, whole = s["budget"], data.load_dataset(s["dataset"], s["data"])
    chosen = balanced_subset(whole.x_test, whole.y_test, budget.images, 0, num_classes=whole.num_classes)
    model, began = model_of(s["model"], s["process"]), time.process_time()
    report = evaluate(
        model, to_float(chosen.x), chosen.y, eps=s["eps"], n_eval=budget.draws, name=job.name, dataset_name=whole.name,
        out=folder, progress=False, **attacks_of(s["group"], s["eps"], budget.quick),
    )  # fmt: skip
    report.save(folder)
    rows = [{name: row.to_dict()[name] for name in FACTS} for row in report.rows]
    facts = {name: s[name] for name in ("dataset", "model", "group", "process", "eps")}
    return facts | {"cpu_seconds": round(time.process_time() - began, 1), "rows": rows}


class Found:
    """What one model withstood, from the results of its jobs."""

    def __init__(self, results: Sequence[dict[str, Any]]):
        self.groups = {result["group"]: result for result in results}

    def row(self, group: str, kind: str, variant: str = "random") -> dict[str, Any] | None:
        """The last row of a kind in a group, if the group has been attacked."""
        rows = self.groups.get(group, {"rows": []})["rows"]
        found = [row for row in rows if (row["kind"], row["variant"]) == (kind, variant)]
        return found[-1] if found else None

    def robust(self, group: str, kind: str, variant: str = "random") -> np.ndarray | None:
        """Image by image, 1 where it withstood."""
        row = self.row(group, kind, variant)
        return None if row is None else np.array([int(right) for right in row["robust"]])

    def seconds(self) -> str:
        """Processor time of an image under PGD-200."""
        exact = self.groups.get("exact")
        return "-" if exact is None else f"{exact['cpu_seconds'] / len(exact['rows'][0]['robust']):.1f}"


def share(robust: np.ndarray | None) -> str:
    """An accuracy with its standard error, in percent."""
    if robust is None:
        return "-"
    p = robust.mean()
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / len(robust)) ** 0.5:.1f}"


def difference(robust: np.ndarray | None, other: np.ndarray | None) -> str:
    """Of two accuracies on the same images, in points."""
    if robust is None or other is None:
        return "-"
    apart = robust - other
    return f"{100 * apart.mean():+.1f} ± {100 * apart.std() / len(apart) ** 0.5:.1f}"


def cells(found: Found, alone: Found) -> dict[str, str]:
    """What the table says of one model, by the name of the line.

    Args:
        found: of the model.
        alone: of the adversarially trained classifier.
    """
    exact, strong = found.row("exact", "pgd"), found.robust("strong", "worst")
    told = {"clean, one draw": share(found.robust("exact", "clean"))}
    for row in found.groups.get("authors", {"rows": []})["rows"]:
        if row["kind"] == "authors":
            told[row["attack"]] = share(np.array([int(right) for right in row["robust"]]))
    told["PGD-200, EOT 20: one draw"] = "-" if exact is None else f"{100 * exact['mean']:.1f}"
    told["PGD-200, EOT 20: every one of ten draws"] = share(found.robust("exact", "pgd"))
    told["PGD-200, EOT 20: majority of ten draws"] = share(found.robust("votes", "pgd"))
    told["PGD-200, EOT 20: fixed noise"] = share(found.robust("votes", "pgd", "fixed"))
    told["`strong`: every one of ten draws"] = share(strong)
    told["`strong`, minus the classifier alone"] = difference(strong, alone.robust("strong", "worst"))
    told["CPU seconds of PGD-200 an image"] = found.seconds()
    return told


class Diffusion(Study):
    """What diffusion purifiers withstand."""

    name, dataset, workers = "diffusion", "digits", 1
    amounts: ClassVar[dict[str, str]] = {"quick": "the same path in a minute or two, no numbers"}

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        every = list(settings_of(self.name)["data_sets"])
        parser.add_argument("--data-sets", nargs="+", choices=every, default=every, help="all of them by default")

    def check(self, chosen: argparse.Namespace, results: Path) -> None:
        super().check(chosen, results)
        for name in chosen.data_sets:
            data.load_dataset(name, chosen.data)

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """Each model under each group of attacks, the cheap groups first."""
        settings = settings_of(self.name)
        budget = SimpleNamespace(**settings[chosen.amount], quick=chosen.amount == "quick")
        jobs = []
        for dataset in chosen.data_sets:
            part = settings["data_sets"][dataset]
            common = {"data": chosen.data, "dataset": dataset, "eps": part["eps"], "budget": budget}
            asked = [(name, None, group) for name in part["purifiers"] for group in GROUPS]
            asked += [(name, None, group) for name in part["beside"] for group in BESIDE]
            # a hundred thousand gradients each: of one of the purifiers
            asked += [(part["processes_of"], process, "exact") for process in part.get("processes", ())]
            for model, process, group in sorted(asked, key=lambda one: GROUPS.index(one[2])):
                if budget.quick and group == "authors":
                    continue
                own = {"model": model, "process": process, "group": group}
                words = [model, *([] if process is None else [in_words(process)]), group]
                jobs.append(Job(" ".join(words), 0, attack, settings=common | own))
        return jobs

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """``diffusion.json`` with every image's outcome, and ``diffusion.md``; of the jobs that are done."""
        results = [job.result(root) for job in self.jobs(chosen) if job.done(root)]
        write_text(folder / f"{self.name}.json", json.dumps(results, indent=1) + "\n")
        tables = {name: self.tables(name, results) for name in chosen.data_sets}
        settings = settings_of(self.name)
        return write_page(
            folder, self.name, tables=tables, parts=settings["data_sets"], b=settings[chosen.amount],
            quick=chosen.amount == "quick",
        )  # fmt: skip

    def tables(self, dataset: str, results: Sequence[dict[str, Any]]) -> list[list[str]]:
        """The lines of a data set's tables: of its models, and of other processes if there are any."""
        part = settings_of(self.name)["data_sets"][dataset]
        mine = [result for result in results if result["dataset"] == dataset]
        found = {
            name: Found([result for result in mine if result["model"] == name and result["process"] is None])
            for name in (*part["purifiers"], *part["beside"])
        }
        columns = {name: cells(one, found[part["alone"]]) for name, one in found.items()}
        lines = list(dict.fromkeys(line for told in columns.values() for line in told))
        # what the authors' code attacks stands before the exact gradient
        lines.sort(key=lambda line: 0 if line.startswith("clean") else 1 if line.startswith("as ") else 2)
        body = [[line, *(told.get(line, "-") for told in columns.values())] for line in lines]
        tables = [markdown_table(["attack", *columns], body)]
        others = [result for result in mine if result["process"] is not None]
        if others:
            tables.append(of_processes(others))
        return tables


def in_words(process: dict[str, Any]) -> str:
    """What differs from the purifier's own process."""
    return ", ".join(f"{name} {value}" for name, value in process.items() if value is not None)


def of_processes(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each process of each purifier."""
    body = []
    for result in results:
        one = Found([result])
        exact = one.row("exact", "pgd")
        assert exact is not None
        told = [share(one.robust("exact", "clean")), f"{100 * exact['mean']:.1f}", share(one.robust("exact", "pgd"))]
        body.append([f"`{result['model']}`", in_words(result["process"]), *told, one.seconds()])
    head = ["model", "process", "clean", "one draw", "every one of ten draws", "CPU seconds an image"]
    return markdown_table(head, body)
