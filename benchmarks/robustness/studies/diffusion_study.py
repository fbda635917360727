"""A study of diffusion purifiers, under the attacks of their authors and under exact gradients of every step.

The models are those of the zoo. For each data set they are purifiers in front of a standard or an adversarially trained
classifier, these classifiers alone, and CARSO and AToP. All models of a data set are attacked on the same images, with
the same radius.

PGD-200 attacks with exact gradients, averaged over 20 random predictions. Then the protocol `strong` attacks those of
the first images that PGD did not break. Ten predictions of each attacked image are saved. So one attack gives four
numbers: the accuracy of one prediction, the mean over ten, the share of images that are right in all ten, and the
accuracy of the majority vote.
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

#: The groups of attacks on a purifier (GROUPS), on a classifier alone (CLASSIFIER), and on CARSO and AToP (BESIDE). The
#: fastest groups come first.
GROUPS, CLASSIFIER, BESIDE = ("exact", "fixed", "authors", "strong"), ("exact", "strong"), ("exact",)
#: The largest number of images times draws in a forward pass. It is small, because CARSO classifies several
#: reconstructions of each.
ROWS = 200
#: The fields of a report's row that are saved in the results file.
FACTS = ("attack", "kind", "robust", "mean", "n")


def model_of(name: str, process: dict[str, Any] | None) -> nn.Module:
    """Load a model of the zoo. If ``process`` is not None, it replaces settings of the purifier's diffusion process."""
    if process is None:
        return zoo.load(name)
    return load_defence(zoo.folder(name), load_classifier(zoo.classifier_folder(name)), process=process)


def images_of(job: Job) -> tuple[Tensor, Tensor]:
    """Return the images and labels of a job. Their beginning is balanced over the classes too."""
    s = job.settings
    whole = data.load_dataset(s["dataset"], s["data"])
    count = min(s["budget"].images, s.get("first", s["budget"].images))
    chosen = balanced_subset(whole.x_test, whole.y_test, count, 0, num_classes=whole.num_classes)
    return to_float(chosen.x), chosen.y


def quiet(model: nn.Module, fixed: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a random model has fixed noise if ``fixed`` is True. Otherwise it changes nothing."""
    return model.fixed_noise(0) if fixed else contextlib.nullcontext()  # type: ignore[operator]


def found_by_pgd(model: nn.Module, x: Tensor, y: Tensor, s: dict[str, Any], fixed: bool = False) -> Tensor:
    """Attack images by the PGD of Lee and Kim (`lee_kim_2023`), with exact gradients. Return the attacked images.

    A defence is attacked through a copy in bfloat16.

    Args:
        model: attacked model.
        x: images ``[n, C, H, W]`` in [0, 1].
        y: labels, int64 ``[n]``.
        s: settings of the job.
        fixed: True if the noise of the model is fixed and known to the attack.
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
    """Return the classes that a model predicts in several draws, ``[draws, n]``, in the precision of the model."""
    model.eval()
    return torch.stack([torch.cat([model(part).argmax(1) for part in x.split(batch)]) for _ in range(draws)])


def told(classes: Tensor, y: Tensor) -> dict[str, Any]:
    """Return a text for each draw, and a text for the majority vote. A text has a 1 for each right image, else a 0."""
    in_bits = lambda right: "".join(str(int(one)) for one in right)  # noqa: E731
    return {"draws": [in_bits(one == y) for one in classes], "vote": in_bits(classes.mode(0).values == y)}


def exact(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """Attack by PGD-200 through the whole model. Return new predictions before and after the attack."""
    budget = job.settings["budget"]
    torch.manual_seed(1)
    clean = predictions(model, x, budget.draws, budget.batch)
    found = found_by_pgd(model, x, y, job.settings)
    torch.manual_seed(2)
    return {"clean": told(clean, y), "attacked": told(predictions(model, found, budget.draws, budget.batch), y)}


def fixed(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """Attack by PGD-200 with fixed noise, so that there is a single draw, which the attack knows."""
    found = found_by_pgd(model, x, y, job.settings, fixed=True)
    with quiet(model, True):
        return {"attacked": told(predictions(model, found, 1, job.settings["budget"].batch), y)}


def reported(
    model: nn.Module, x: Tensor, y: Tensor, job: Job, attacks: list[AttackSpec] | None = None
) -> list[dict[str, Any]]:
    """Evaluate a model by a list of attacks, or by the protocol `strong` if the list is None. Return the rows."""
    s = job.settings
    config = EvaluateConfig(None if attacks else "strong", n_eval=s["budget"].draws, probes=False)
    report = evaluate(model, x, y, eps=s["eps"], config=config, attacks=attacks, name=job.name, progress=False)
    return [{name: row.to_dict()[name] for name in FACTS} for row in report.rows]


def authors(job: Job, model: nn.Module, x: Tensor, y: Tensor, root: Path) -> dict[str, Any]:
    """Run the attacks of the purifiers' authors. AutoAttack, which is one of them, attacks only the first images."""
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
    """Run the protocol `strong` on those of the first images that are right in all draws after PGD."""
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
    """Return an attack with two steps and two draws, which only tests that the code runs."""
    attack: Any = spec.resolved
    return replace(spec, attack=replace(attack, steps=2, eot_iter=2))


def attack(job: Job, folder: Path, root: Path) -> dict[str, Any]:
    """Run a group of attacks on a model. Return the outcome of each image, and the processor time."""
    s = job.settings
    x, y = images_of(job)
    model, began = model_of(s["model"], s["process"]), time.process_time()
    work = {"exact": exact, "fixed": fixed, "authors": authors, "strong": strong}[s["group"]]
    facts = work(job, model, x, y, root)
    spent = time.process_time() - began
    named = {name: s[name] for name in ("dataset", "model", "group", "process", "eps")}
    return named | facts | {"images": len(x), "cpu_seconds": round(spent, 1)}


class Diffusion(Study):
    """The study of diffusion purifiers, under the attacks of their authors and under exact gradients."""

    name, dataset, workers = "diffusion", "digits", 1
    amounts: ClassVar[dict[str, str]] = {"quick": "run everything in a minute or two; the numbers mean nothing"}

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        settings = settings_of(self.name)
        every, usual = list(settings["data_sets"]), settings["default"]
        parser.add_argument("--data-sets", nargs="+", choices=every, default=every, help="data sets; default: all")
        images = "number of images of each data set, for PGD-200 and the authors' attacks; default: "
        parser.add_argument("--images", type=at_least_one, help=f"{images}{usual['images']}")
        few = f"number of the first images that the protocol strong attacks; default: {usual['strong_images']}"
        parser.add_argument("--strong-images", type=at_least_one, help=few)
        parser.add_argument(
            "--until", choices=GROUPS, default=GROUPS[-1], help="last group of attacks to run; default: all groups"
        )

    def check(self, chosen: argparse.Namespace, results: Path) -> None:
        super().check(chosen, results)
        for name in chosen.data_sets:
            data.load_dataset(name, chosen.data)

    def budget(self, chosen: argparse.Namespace) -> SimpleNamespace:
        """Return the numbers of images, draws and steps for the attacks.

        ``--images`` and ``--strong-images`` replace the numbers of settings.yaml.
        """
        own = {name: getattr(chosen, name, None) for name in ("images", "strong_images")}
        usual = settings_of(self.name)[chosen.amount]
        given = {name: value for name, value in own.items() if value is not None}
        return SimpleNamespace(**usual | given, quick=chosen.amount == "quick")

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """Return a job for each model and each group of attacks. The fastest groups of a data set come first."""
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
        """Copy finished results into the folders of their jobs, so that no job runs again if its folder was deleted."""
        for job in self.jobs(chosen):
            for row in rows_of(folder):
                if row["name"] == job.name and row["asked"] == job.asked() and not job.done(root):
                    write_text(job.folder(root) / ASKED, json.dumps(job.asked(), indent=1) + "\n")
                    write_text(job.folder(root) / RESULT, json.dumps(row, indent=1) + "\n")

    def after_each(self, root: Path, folder: Path, chosen: argparse.Namespace) -> None:
        """Write the results file and the page after each job."""
        self.write(root, folder, chosen)

    def write(self, root: Path, folder: Path, chosen: argparse.Namespace) -> Path:
        """Write ``diffusion.json`` with the outcomes of all images, and ``diffusion.md``, for the finished jobs."""
        jobs = self.jobs(chosen)
        fresh = {job.name: job.result(root) | {"asked": job.asked()} for job in jobs if job.done(root)}
        # Keep existing rows of the data sets and groups that were not requested.
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
    """Describe the settings in which a process differs from the purifier's own process."""
    return ", ".join(f"{name} {value}" for name, value in process.items() if value is not None)
