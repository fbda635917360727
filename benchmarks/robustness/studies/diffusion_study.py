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

from . import ASKED, RESULT, Job, Study, settings_of, write_page
from .diffusion_table import in_words, rows_of, tables_of

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


def in_bits(right: Tensor) -> str:
    """Return a text with a 1 for each right image, and a 0 for each other image."""
    return "".join(str(int(one)) for one in right)


def told(classes: Tensor, y: Tensor) -> dict[str, Any]:
    """Return a text of bits for each draw, and a text for the majority vote."""
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
        after[standing] = torch.tensor([right == "1" for right in worst["robust"]])
    return {"before": in_bits(standing), "after": in_bits(after)}


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
        every = list(settings_of(self.name)["data_sets"])
        parser.add_argument("--data-sets", nargs="+", choices=every, default=every, help="data sets; default: all")

    def check(self, chosen: argparse.Namespace, results: Path) -> None:
        super().check(chosen, results)
        for name in chosen.data_sets:
            data.load_dataset(name, chosen.data)

    def jobs(self, chosen: argparse.Namespace) -> list[Job]:
        """Return a job for each model and each group of attacks. The fastest groups of a data set come first."""
        settings, quick, jobs = settings_of(self.name), chosen.amount == "quick", []
        for dataset in chosen.data_sets:
            part = settings["data_sets"][dataset]
            budget = SimpleNamespace(**part["amounts"] | settings[chosen.amount], quick=quick)
            common = {"data": chosen.data, "dataset": dataset, "eps": part["eps"], "budget": budget}
            groups = {"purifiers": GROUPS, "classifiers": CLASSIFIER, "beside": BESIDE}
            asked = [(name, None, group) for kind in groups for name in part[kind] for group in groups[kind]]
            asked += [(part["processes_of"], process, "exact") for process in part.get("processes", ())]
            for model, process, group in sorted(asked, key=lambda one: GROUPS.index(one[2])):
                own = {"model": model, "process": process, "group": group}
                if model in part["beside"] and "beside_images" in part:
                    own["first"] = part["beside_images"]
                words = [model, *([in_words(process)] if process else []), group]
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
        fresh = [job.result(root) | {"asked": job.asked()} for job in jobs if job.done(root)]
        kept = [row for row in rows_of(folder) if row["dataset"] not in chosen.data_sets]
        rows = [*kept, *fresh]
        write_text(folder / f"{self.name}.json", json.dumps(rows) + "\n")
        settings = settings_of(self.name)
        parts = settings["data_sets"]
        found = {name: [row for row in rows if row["dataset"] == name] for name in parts}
        tables = {name: tables_of(parts[name], own) for name, own in found.items() if own}
        counts = {name: max(row["images"] for row in found[name]) for name in tables}
        quick, draws = chosen.amount == "quick", settings[chosen.amount]["draws"]
        return write_page(folder, self.name, tables=tables, parts=parts, counts=counts, draws=draws, quick=quick)
