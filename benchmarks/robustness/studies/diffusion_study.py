"""The robustness of diffusion purifiers: under their authors' attacks, and under exact gradients of every step.

The models are those of the zoo: for each data set a purifier before a classifier of clean images, another before an
adversarially trained classifier, these classifiers alone, and CARSO and AToP. All models of a data set face the same
images in one ball. A purifier meets a chain of attacks: PGD-200 with 20 draws and exact gradients, and then the
protocol `strong` on the survivors among the first images. Every prediction is kept, so that one attack gives the
accuracy of one draw, of the mean of ten, of all ten and of their majority.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from purify_fast import data, load_defence, zoo
from purify_fast._files import write_text
from purify_fast.attacks import PGD, AutoAttack, LeavingPGD
from purify_fast.attacks.base import run_alone
from purify_fast.data import balanced_subset, to_float
from purify_fast.evaluation import AttackSpec, EvaluateConfig, evaluate, lee_kim_2023
from purify_fast.protocols import Accelerates, AuthorsEvaluation, FixedNoise, supports
from purify_fast.training import load_classifier

from ...options import at_least_one
from . import ASKED, RESULT, Job, Study, settings_of, write_page
from .diffusion_table import rows_of, tables_of

#: The groups of attacks on a purifier (GROUPS), on a classifier alone (CLASSIFIER), and on another random defence
#: (BESIDE). Cheap groups come first.
GROUPS, CLASSIFIER, BESIDE = ("exact", "fixed", "authors", "strong"), ("exact", "strong"), ("exact",)
#: A pass takes at most this many images times draws, since CARSO classifies several reconstructions of each.
ROWS = 200
#: The fields of a report's row that the results file keeps.
FACTS = ("attack", "kind", "robust", "mean", "n")


def model_of(name: str, process: dict[str, Any] | None) -> nn.Module:
    """A model of the zoo; a purifier gets another process, if one is given."""
    if process is None:
        return zoo.load(name)
    return load_defence(zoo.folder(name), load_classifier(zoo.classifier_folder(name)), process=process)


def images_of(job: Job) -> tuple[Tensor, Tensor]:
    """The images and labels of a job; every first part of them is balanced too."""
    s = job.settings
    whole = data.load_dataset(s["dataset"], s["data"])
    count = min(s["budget"].images, s.get("first", s["budget"].images))
    chosen = balanced_subset(whole.x_test, whole.y_test, count, 0, num_classes=whole.num_classes)
    return to_float(chosen.x), chosen.y


def quiet(model: nn.Module, fixed: bool) -> contextlib.AbstractContextManager[Any]:
    """A block in which a random model answers the same every time, if that is wanted."""
    return model.fixed_noise(0) if fixed else contextlib.nullcontext()  # type: ignore[operator]


def found_by_pgd(model: nn.Module, x: Tensor, y: Tensor, s: dict[str, Any], fixed: bool = False) -> Tensor:
    """Images of Lee and Kim's PGD, with exact gradients; a defence is attacked through a copy in bfloat16.

    Args:
        model: the attacked model.
        x: images ``[n, C, H, W]``.
        y: labels ``[n]``.
        s: settings of the job.
        fixed: whether the noise is fixed, and known to the attack.
    """
    budget, published = s["budget"], cast(PGD, lee_kim_2023(s["eps"]).resolved)
    draws = budget.eot if supports(model, FixedNoise) and not fixed else 1
    seen: Any = copy.deepcopy(model).accelerate(torch.bfloat16) if supports(model, Accelerates) else model  # type: ignore[operator]
    torch.manual_seed(0)
    with quiet(seen, fixed):
        parts = [
            run_alone(
                LeavingPGD,
                seen,
                part,
                labels,
                eps=s["eps"],
                steps=budget.steps,
                eot_iter=draws,
                alpha=published.alpha,
                random_start=False,
                seed=number,
                max_forward_batch=ROWS,
            )
            for number, (part, labels) in enumerate(zip(x.split(budget.batch), y.split(budget.batch), strict=True))
        ]
    return torch.cat(parts)


@torch.no_grad()
def predictions(model: nn.Module, x: Tensor, draws: int, batch: int) -> Tensor:
    """The classes predicted by a model in several draws, in its own precision, ``[draws, n]``."""
    model.eval()
    return torch.stack([torch.cat([model(part).argmax(1) for part in x.split(batch)]) for _ in range(draws)])


def told(classes: Tensor, y: Tensor) -> dict[str, Any]:
    """For each draw, and for the draws' majority: a text with 1 for right images."""
    in_bits = lambda right: "".join(str(int(one)) for one in right)  # noqa: E731
    return {"draws": [in_bits(one == y) for one in classes], "vote": in_bits(classes.mode(0).values == y)}


def exact(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """PGD-200 through the whole model, with fresh predictions before and after it."""
    budget = job.settings["budget"]
    torch.manual_seed(1)
    clean = predictions(model, x, budget.draws, budget.batch)
    found = found_by_pgd(model, x, y, job.settings)
    torch.manual_seed(2)
    return {"clean": told(clean, y), "attacked": told(predictions(model, found, budget.draws, budget.batch), y)}


def fixed(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """The same attack with fixed noise: a single draw, which the attack knows."""
    found = found_by_pgd(model, x, y, job.settings, fixed=True)
    with quiet(model, True):
        return {"attacked": told(predictions(model, found, 1, job.settings["budget"].batch), y)}


def reported(
    model: nn.Module, x: Tensor, y: Tensor, job: Job, attacks: list[AttackSpec] | None = None
) -> list[dict[str, Any]]:
    """The rows of an evaluation without its signs; without a list of attacks, of the protocol strong."""
    s = job.settings
    config = EvaluateConfig(None if attacks else "strong", n_eval=s["budget"].draws, probes=False)
    report = evaluate(model, x, y, eps=s["eps"], config=config, attacks=attacks, name=job.name, progress=False)
    return [{name: row.to_dict()[name] for name in FACTS} for row in report.rows]


def authors(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """The attacks of the authors of such purifiers; AutoAttack through the adjoint covers only the first images."""
    budget = job.settings["budget"]
    assert isinstance(model, AuthorsEvaluation)
    specs = [
        replace(spec, max_images=budget.strong_images) if isinstance(spec.resolved, AutoAttack) else spec
        for spec in model.authors_attacks(job.settings["eps"])
    ]
    if budget.quick:
        specs = [short(spec) for spec in specs if not isinstance(spec.resolved, AutoAttack)]
    rows = reported(model, x, y, job, attacks=specs)
    return {"rows": [row for row in rows if row["kind"] == "authors"]}


def strong(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """The end of the chain: `strong` on the first images, without the images that any draw after PGD got wrong."""
    budget = job.settings["budget"]
    draws = job.result(root, job.needs[0])["attacked"]["draws"]  # type: ignore[arg-type]
    few = min(len(x), budget.strong_images)
    standing = torch.tensor([all(right[i] == "1" for right in draws) for i in range(few)])
    after = standing.clone()
    if bool(standing.any()):
        stand_in = [short(lee_kim_2023(job.settings["eps"]))] if budget.quick else None
        rows = reported(model, x[:few][standing], y[:few][standing], job, stand_in)
        worst = next((row for row in rows if row["kind"] == "worst"), rows[-1])
        after[standing] = torch.tensor([right == "1" for right in map(str, map(int, worst["robust"]))])
    bits = ["".join(str(int(one)) for one in each) for each in (standing, after)]
    return {"before": bits[0], "after": bits[1]}


def short(spec: AttackSpec) -> AttackSpec:
    """An attack of two steps and two draws, which only tests the code path."""
    attack: Any = spec.resolved
    return replace(spec, attack=replace(attack, steps=2, eot_iter=2))


def attack(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """A model under a group of attacks: the images that withstood, and the processor time of an image."""
    s = job.settings
    x, y = images_of(job)
    model, began = model_of(s["model"], s["process"]), time.process_time()
    work = {"exact": exact, "fixed": fixed, "authors": authors, "strong": strong}[s["group"]]
    facts = work(job, model, x, y, root)
    spent = time.process_time() - began
    named = {name: s[name] for name in ("dataset", "model", "group", "process", "eps")}
    return named | facts | {"images": len(x), "cpu_seconds": round(spent, 1)}


class Diffusion(Study):
    """The study of the robustness of diffusion purifiers."""

    name, dataset, workers = "diffusion", "digits", 1
    amounts: ClassVar[dict[str, str]] = {"quick": "the same path in a minute or two, no numbers"}

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        settings = settings_of(self.name)
        every, usual = list(settings["data_sets"]), settings["default"]
        parser.add_argument("--data-sets", nargs="+", choices=every, default=every, help="all of them by default")
        images = f"of each data set, for PGD-200 and what the authors run; {usual['images']} by default"
        parser.add_argument("--images", type=at_least_one, help=images)
        few = f"the first of them, for strong; {usual['strong_images']} by default"
        parser.add_argument("--strong-images", type=at_least_one, help=few)
        parser.add_argument(
            "--until", choices=GROUPS, default=GROUPS[-1], help="the last group of attacks; all by default"
        )

    def check(self, chosen: argparse.Namespace, results: Path) -> None:
        super().check(chosen, results)
        for name in chosen.data_sets:
            data.load_dataset(name, chosen.data)

    def budget(self, chosen: argparse.Namespace) -> SimpleNamespace:
        """The amounts of the attacks."""
        own = {name: getattr(chosen, name, None) for name in ("images", "strong_images")}
        usual = settings_of(self.name)[chosen.amount]
        given = {name: value for name, value in own.items() if value is not None}
        return SimpleNamespace(**usual | given, quick=chosen.amount == "quick")

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """Each model under each group of attacks, the cheap groups of a data set first."""
        settings, budget, jobs = settings_of(self.name), self.budget(chosen), []
        wanted = GROUPS[: GROUPS.index(chosen.until) + 1]
        for dataset in chosen.data_sets:
            part = settings["data_sets"][dataset]
            common = {"data": chosen.data, "dataset": dataset, "eps": part["eps"], "budget": budget}
            groups = {"purifiers": GROUPS, "classifiers": CLASSIFIER, "beside": BESIDE}
            asked = [(name, None, group) for kind in groups for name in part[kind] for group in groups[kind]]
            asked = [each for each in asked if each[2] in wanted]
            asked += [(part["processes_of"], process, "exact") for process in part.get("processes", ())]
            for model, process, group in sorted(asked, key=lambda one: GROUPS.index(one[2])):
                own = {"model": model, "process": process, "group": group}
                if model in part["beside"] and "beside_images" in part:
                    own["first"] = part["beside_images"]
                words = [model, *([] if process is None else [in_words(process)]), group]
                needs = (f"{model} exact",) if group == "strong" else ()
                jobs.append(Job(" ".join(words), 0, attack, needs, common | own))
        return jobs

    def begin(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """Take over the results file, so that its jobs are not repeated even if the runs' folder is gone."""
        for job in self.jobs(chosen):
            for row in rows_of(folder):
                if row["name"] == job.name and row["asked"] == job.asked() and not job.done(root):
                    write_text(job.folder(root) / ASKED, json.dumps(job.asked(), indent=1) + "\n")
                    write_text(job.folder(root) / RESULT, json.dumps(row, indent=1) + "\n")

    def after_each(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """Write each row to the results file at once."""
        self.write(root, folder, chosen)

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """Write ``diffusion.json`` with every image's outcome, and ``diffusion.md``, for the finished jobs."""
        jobs = self.jobs(chosen)
        fresh = {job.name: job.result(root) | {"asked": job.asked()} for job in jobs if job.done(root)}
        # Keep earlier rows of data sets and groups that were not requested now.
        later = GROUPS[GROUPS.index(chosen.until) + 1 :]
        kept = [row for row in rows_of(folder) if row["dataset"] not in chosen.data_sets or row["group"] in later]
        rows = [*kept, *fresh.values()]
        write_text(folder / f"{self.name}.json", json.dumps(rows) + "\n")
        settings = settings_of(self.name)
        parts = {name: settings["data_sets"][name] for name in settings["data_sets"]}
        tables = {
            name: tables_of(part, [row for row in rows if row["dataset"] == name])
            for name, part in parts.items()
            if any(row["dataset"] == name for row in rows)
        }
        counts = {name: max(row["images"] for row in rows if row["dataset"] == name) for name in tables}
        quick, draws = chosen.amount == "quick", self.budget(chosen).draws
        return write_page(folder, self.name, tables=tables, parts=parts, counts=counts, draws=draws, quick=quick)


def in_words(process: dict[str, Any]) -> str:
    """Describe the differences from the purifier's own process."""
    return ", ".join(f"{name} {value}" for name, value in process.items() if value is not None)
