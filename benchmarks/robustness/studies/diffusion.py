"""A study of diffusion purifiers, under the attacks of their authors and under exact gradients of every step.

The models are those of the zoo. For each data set they are purifiers in front of a standard or an adversarially trained
classifier, these classifiers alone, and CARSO and AToP. All models of a data set are attacked on the same images, with
the same radius.

PGD-200 attacks with exact gradients, averaged over 20 random predictions. Ten predictions of each attacked image are
saved. These predictions give four numbers: the accuracy of a single prediction, the mean accuracy of the ten
predictions, the share of images that are right in all ten, and the accuracy of the majority vote.

For the tables, an outcome is an array with a number for each image: 1 or 0 for a right or a wrong prediction after the
attack, or the share of right predictions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from purify_fast import data, frozen_copy, load_defence, zoo
from purify_fast._files import write_text
from purify_fast.attacks import PGD, AttackContext, LeavingPGD, OriginalAutoAttack
from purify_fast.data import balanced_subset, to_float
from purify_fast.evaluation import lee_kim_2023
from purify_fast.judge.show.text import markdown_table
from purify_fast.protocols import FixedNoise, supports
from purify_fast.training import load_classifier

from ... import kept
from ..authors import authors_evaluations, rows_of
from . import Job, settings_of, write_page

NAME = "diffusion"
#: The groups of attacks on a purifier (GROUPS), and on the other models (ALONE), the fastest first.
GROUPS, ALONE = ("exact", "fixed", "authors"), ("exact",)
#: The largest number of images times draws in a pass. CARSO classifies several reconstructions of each image.
ROWS = 200
#: The fields of a report's row that are saved in the results file.
FACTS = ("attack", "kind", "robust", "n")
#: The name of the group "exact" in tables.
PGD_EXACT = "PGD-200, EOT 20, exact"


def model_of(name: str, process: dict[str, Any] | None) -> nn.Module:
    """Load a model of the zoo. If ``process`` is not None, it replaces settings of the purifier's diffusion process."""
    if process is None:
        return zoo.load(name)
    return load_defence(zoo.folder(name), load_classifier(zoo.classifier_folder(name)), process=process)


def images_of(job: Job) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a job. The classes are balanced, also among the first images alone."""
    s = job.settings
    whole = data.load_dataset(s["dataset"], s["data"])
    count = min(s["budget"].images, s.get("first", s["budget"].images))
    chosen = balanced_subset(whole.x_test, whole.y_test, count, 0, num_classes=whole.num_classes)
    return to_float(chosen.x), chosen.y


def quiet(model: nn.Module, fixed: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a random model has fixed noise. If ``fixed`` is False, the context changes nothing."""
    return model.fixed_noise(0) if fixed else contextlib.nullcontext()  # type: ignore[operator]


def found_by_pgd(model: nn.Module, x: Tensor, y: Tensor, s: dict[str, Any], fixed: bool = False) -> Tensor:
    """Attack images by the PGD of Lee and Kim (`lee_kim_2023`), with exact gradients. Return the attacked images.

    A defence is attacked through its frozen copy in bfloat16.
    """
    budget, published = s["budget"], cast(PGD, lee_kim_2023(s["eps"]).attack)
    draws = budget.eot if supports(model, FixedNoise) and not fixed else 1
    seen = frozen_copy(model, x, dtype=torch.bfloat16) if supports(model, "make_frozen_copy") else model
    torch.manual_seed(0)
    with quiet(seen, fixed):
        attack = LeavingPGD(steps=budget.steps, alpha=published.alpha, random_start=False, eot_iter=draws)
        context = AttackContext(eps=s["eps"], max_forward_batch=ROWS)
        batches = enumerate(zip(x.split(budget.batch), y.split(budget.batch), strict=True))
        results = [attack.run(seen, *batch, replace(context, seed=number)) for number, batch in batches]
        return torch.cat([result.images for result in results])


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, draws: int, batch: int) -> Tensor:
    """Return the classes that a model predicts in several draws, ``[draws, n]``, in the precision of the model."""
    model.eval()
    return torch.stack([torch.cat([model(part).argmax(1) for part in x.split(batch)]) for _ in range(draws)])


def told(classes: Tensor, y: Tensor) -> dict[str, Any]:
    """Return texts of bits that say which images are right: a text for each draw, and a text for the majority vote."""
    return {"draws": [kept.bits(one == y) for one in classes], "vote": kept.bits(classes.mode(0).values == y)}


def exact(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """Attack by PGD-200 through the whole model. Return new predictions before and after the attack."""
    budget = job.settings["budget"]
    torch.manual_seed(1)
    clean = predictions(model, x, budget.draws, budget.batch)
    found = found_by_pgd(model, x, y, job.settings)
    torch.manual_seed(2)
    return {"clean": told(clean, y), "attacked": told(predictions(model, found, budget.draws, budget.batch), y)}


def fixed(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """Attack by PGD-200 with fixed noise. The result has a single draw, with the noise that the attack knows."""
    found = found_by_pgd(model, x, y, job.settings, fixed=True)
    with quiet(model, True):
        return {"attacked": told(predictions(model, found, 1, job.settings["budget"].batch), y)}


def authors(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """Run the attacks of the purifiers' authors. AutoAttack, one of these attacks, attacks only the first images."""
    budget, eps = job.settings["budget"], job.settings["eps"]
    chosen = []
    for evaluation in authors_evaluations(model, eps):
        attack = evaluation.attack
        if isinstance(attack.attack, OriginalAutoAttack):
            attack = replace(attack, max_images=budget.autoattack_images)
        if not budget.quick:
            chosen.append(evaluation._replace(attack=attack))
        elif isinstance(attack.attack, PGD):
            # Two steps and two draws only test that the code runs.
            chosen.append(
                evaluation._replace(attack=replace(attack, attack=replace(attack.attack, steps=2, eot_iter=2)))
            )
    rows = [row.to_dict() for row in rows_of(chosen, x, y, eps=eps)]
    return {"rows": [{name: row[name] for name in FACTS} for row in rows]}


def attack(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """Run a group of attacks on a model. Return the outcome of each image, and the processor time."""
    s = job.settings
    x, y = images_of(job)
    model, began = model_of(s["model"], s["process"]), time.process_time()
    work = {"exact": exact, "fixed": fixed, "authors": authors}[s["group"]]
    facts = work(job, model, x, y, root)
    spent = time.process_time() - began
    named = {name: s[name] for name in ("dataset", "model", "group", "process", "eps")}
    return named | facts | {"images": len(x), "cpu_seconds": round(spent, 1)}


def bits(text: Sequence[str]) -> np.ndarray:
    """Convert a text of 0 and 1 to an array of numbers."""
    return np.array([int(one) for one in text], dtype=float)


class Found:
    """The outcomes of a model under several groups of attacks. An outcome is None if a group is not for the model."""

    def __init__(self, results: Sequence[dict[str, Any]]):
        self.groups = {result["group"]: result for result in results}

    def rule(self, rule: str, when: str = "attacked", group: str = "exact") -> np.ndarray | None:
        """Return an outcome of several random predictions of each image."""
        if group not in self.groups:
            return None
        of = self.groups[group][when]
        if rule == "vote":
            return bits(of["vote"])
        draws = np.stack([bits(one) for one in of["draws"]])
        return {"first": draws[0], "mean": draws.mean(0), "all": draws.min(0)}[rule]

    def authors(self) -> dict[str, np.ndarray]:
        """Return the outcomes of the authors' attacks, by the labels of the attacks."""
        rows = self.groups.get("authors", {"rows": []})["rows"]
        return {row["attack"]: bits(row["robust"]) for row in rows}

    def seconds(self) -> str:
        """Return the processor seconds of PGD for one image, as a text."""
        return f"{self.groups['exact']['cpu_seconds'] / self.groups['exact']['images']:.1f}"


def share(robust: np.ndarray | None) -> str:
    """Return the mean of an outcome with its standard error, in percent."""
    if robust is None:
        return "-"
    return f"{100 * robust.mean():.1f} ± {100 * robust.std() / len(robust) ** 0.5:.1f}"


def difference(robust: np.ndarray | None, other: np.ndarray | None) -> str:
    """Return the paired difference of two outcomes on their common images, in percentage points, and its standard
    error.
    """
    if robust is None or other is None:
        return "-"
    few = min(len(robust), len(other))
    apart = robust[:few] - other[:few]
    return f"{100 * apart.mean():+.1f} ± {100 * apart.std() / few**0.5:.1f}"


def cells(found: Found, alone: Found, name: str) -> dict[str, str]:
    """Return the table's cells for a model, by the names of the lines."""
    lines = {"clean: mean of the draws": share(found.rule("mean", "clean"))}
    lines |= {label: f"{share(left)} ({len(left)})" for label, left in found.authors().items()}
    rules = {"first": "one draw", "mean": "mean of the draws", "all": "every draw right", "vote": "majority"}
    lines |= {f"{PGD_EXACT}: {words}": share(found.rule(rule)) for rule, words in rules.items()}
    lines[f"{PGD_EXACT}: mean, minus `{name}` alone"] = difference(found.rule("mean"), alone.rule("mean"))
    lines[f"{PGD_EXACT}: one draw, fixed and known"] = share(found.rule("first", group="fixed"))
    return lines | {"CPU seconds of PGD-200 per image": found.seconds()}


def tables_of(part: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the tables of a data set. The first compares models, and a second may compare diffusion processes."""
    names = [*part["purifiers"], *part["classifiers"], *part["beside"]]
    found = {name: Found([row for row in rows if row["model"] == name and row["process"] is None]) for name in names}
    alone = part["alone"]
    columns = {name: cells(one, found[alone], alone) for name, one in found.items() if one.groups}
    lines = list(dict.fromkeys(line for column in columns.values() for line in column))
    # Put clean accuracy first, then the authors' attacks, and then the attacks with exact gradients.
    lines.sort(key=lambda line: 0 if line.startswith("clean") else 1 if line.startswith("as ") else 2)
    body = [[line, *(column.get(line, "-") for column in columns.values())] for line in lines]
    most = max(row["images"] for row in rows)
    head = {name: f"`{name}`" for name in columns}
    for row in rows:
        if row["images"] < most and row["model"] in head:
            head[row["model"]] = f"`{row['model']}`, {row['images']} images"
    tables = [markdown_table(["%", *head.values()], body)]
    others = [row for row in rows if row["process"] is not None]
    if others:
        tables.append(of_processes(others, found[part["processes_of"]]))
    return tables


def of_processes(results: Sequence[dict[str, Any]], own: Found) -> list[str]:
    """Return the table of a purifier with different diffusion processes."""
    found_by_process = {"the model's own": own}
    for result in results:
        found_by_process[in_words(result["process"])] = Found([result])
    body = []
    for words, one in found_by_process.items():
        columns = [share(one.rule("mean", "clean")), *(share(one.rule(rule)) for rule in ("mean", "all", "vote"))]
        body.append([words, *columns, one.seconds()])
    head = ["process", "clean", "mean of the draws", "every draw right", "majority", "CPU seconds per image"]
    return [f"`{results[0]['model']}` with other processes, under {PGD_EXACT}:", "", *markdown_table(head, body)]


def in_words(process: dict[str, Any]) -> str:
    """Describe the settings in which a process differs from the purifier's own process."""
    return ", ".join(f"{name} {value}" for name, value in process.items() if value is not None)


def jobs_of(chosen: argparse.Namespace) -> list[Job]:
    """Return a job for each model and each group of attacks. The fastest groups of a data set come first."""
    settings, quick, jobs = settings_of(NAME), chosen.amount == "quick", []
    for dataset, part in settings["data_sets"].items():
        budget = SimpleNamespace(**part["amounts"] | settings[chosen.amount], quick=quick)
        common = {"data": chosen.data, "dataset": dataset, "eps": part["eps"], "budget": budget}
        groups = {"purifiers": GROUPS, "classifiers": ALONE, "beside": ALONE}
        asked = [(name, None, group) for kind in groups for name in part[kind] for group in groups[kind]]
        asked += [(part["processes_of"], process, "exact") for process in part.get("processes", ())]
        for model, process, group in sorted(asked, key=lambda one: GROUPS.index(one[2])):
            own = {"model": model, "process": process, "group": group}
            if model in part["beside"] and "beside_images" in part:
                own["first"] = part["beside_images"]
            words = [model, *([in_words(process)] if process else []), group]
            jobs.append(Job(" ".join(words), 0, attack, (), common | own))
    return jobs


def write_results(root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
    """Write ``diffusion.json`` with the outcomes of all images, and the page ``diffusion.md``."""
    rows = [job.result(root) | {"asked": job.asked()} for job in jobs_of(chosen)]
    write_text(folder / f"{NAME}.json", json.dumps(rows) + "\n")
    return write_tables(folder, rows, chosen.amount)


def write_tables(folder: Path, rows: Sequence[dict[str, Any]], amount: str) -> Path:
    """Write the page with the tables of all data sets."""
    settings = settings_of(NAME)
    parts = settings["data_sets"]
    found = {name: [row for row in rows if row["dataset"] == name] for name in parts}
    tables = {name: tables_of(parts[name], own) for name, own in found.items() if own}
    counts = {name: max(row["images"] for row in found[name]) for name in tables}
    quick, draws = amount == "quick", settings[amount]["draws"]
    return write_page(folder, NAME, tables=tables, parts=parts, counts=counts, draws=draws, quick=quick)
