"""What the studies on digits share: the classifier that is defended, how a model is attacked, which rows are run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from purify_fast._files import write_text
from purify_fast.attacks import AutoAttack
from purify_fast.demo import setting
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.evaluation.subject import Variant
from purify_fast.methods.carso import rank_layers
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierTask, FitConfig, fit, save_classifier

from . import Job, over_seeds

EPS, EPS_L2 = setting.EPS, 1.0
BASE_EPOCHS = setting.BASE_EPOCHS
ALL_LAYERS = ("conv1", "conv2", "conv3", "conv4", "hidden")
AUTO = "AutoAttack"
#: The row of a purifier whose targets and loss are the paper's; its networks, rates and epochs are this package's.
OBJECTIVE = "paper's objective"


def effort(quick: bool) -> tuple[int, int, int, int, int]:
    """Images, steps of PGD, steps and Square's queries of AutoAttack, steps of PGD on K draws."""
    return (40, 4, 4, 20, 2) if quick else (500, 100, 100, 1000, 40)


def zero_attacks(randomised: bool, quick: bool, auto: bool = True) -> tuple[list[AttackSpec], dict[str, str]]:
    """PGD, and if asked for AutoAttack, on a model without its randomness; the rows of the results' keys."""
    _, steps, auto_steps, queries, _ = effort(quick)
    variant: Variant = "deterministic" if randomised else "random"
    attacks = setting.ce_then_dlr(variant)
    rows = {
        "clean": "clean, deterministic" if randomised else "clean",
        "pgd": f"PGD-{steps} dlr" + (", deterministic" if randomised else ""),  # of the survivors of ce
    }
    if auto:
        auto_attack = AutoAttack(steps=auto_steps, n_queries=queries)
        attacks.append(AttackSpec(auto_attack, variant=variant, survivors_only=True, label=AUTO))
        rows["autoattack"] = AUTO
    return attacks, rows


def attacked(
    model: nn.Module,
    seed: int,
    attacks: Sequence[AttackSpec],
    rows: dict[str, str],
    quick: bool,
    eps: float = EPS,
    norm: str = "linf",
) -> dict:
    """The accuracies of ``rows`` (key -> label), and whether the attacks had gradients."""
    n, steps, *_ = effort(quick)
    report = setting.attacked(
        model, n, list(attacks), eps=eps, norm=norm, steps=steps, n_eval=3, seed=seed, progress=False
    )
    healthy = all(r.reliable for r in report.rows if r.kind not in ("autoattack", "worst"))
    return {key: report.row(row).accuracy for key, row in rows.items()} | {"gradients": "healthy" if healthy else "BAD"}


def train_base(job: Job, folder: Path, root: Path) -> dict:
    """A classifier, adversarially trained unless it is to be ``standard``: {width, epochs, norm, standard}."""
    s = job.settings
    norm, eps = s.get("norm", "linf"), EPS if s.get("norm", "linf") == "linf" else EPS_L2
    digits = setting.digits()
    torch.manual_seed(job.seed)
    model = SmallCNN(width=s.get("width", 16))
    trained = 0.0 if s.get("standard") else eps
    config = replace(setting.BASE_TRAINING, attack=replace(setting.BASE_TRAINING.attack, eps=trained, norm=norm))
    epochs = 2 if s["quick"] else s.get("epochs", BASE_EPOCHS)
    fit(ClassifierTask(model, config), digits.x_train, digits.y_train, FitConfig(epochs, 64, job.seed), folder)
    save_classifier(model, folder)
    attacks, rows = zero_attacks(False, s["quick"])
    result = attacked(model, job.seed, attacks, rows, s["quick"], eps=eps, norm=norm)
    if s.get("rank"):
        images = digits.x_test.float() / 255
        ranking = rank_layers(model, ALL_LAYERS, images, digits.y_test, eps=eps, norm=norm)
        result["layers"] = [vars(score) for score in ranking]
    return result | {"parameters": count(model)}


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def select(made: list[Job], rows: Sequence[str] | None) -> list[Job]:
    """All jobs, or those of some rows and what they need; ValueError for a row that no job has."""
    if rows is None:
        return made
    names = {job.name for job in made}
    unknown = set(rows) - names
    if unknown:
        raise ValueError(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    wanted: set[str] = set()
    more = set(rows)
    while more:
        wanted |= more
        more = {need for job in made if job.name in wanted for need in job.needs} - wanted
    return [job for job in made if job.name in wanted]


@dataclass(frozen=True)
class Layout:
    """A digits study's columns: keys of the results and their heads.

    Attributes:
        main: accuracies that every row has.
        compared: those of them whose differences to the base are shown.
        more: accuracies that some rows have.
        numbers: of other kinds, with their decimals.
    """

    main: dict[str, str]
    compared: dict[str, str]
    more: dict[str, str]
    numbers: dict[str, tuple[str, int]]


def _by_row(results: Sequence[dict]) -> dict[str, dict[int, dict]]:
    rows: dict[str, dict[int, dict]] = {}
    for result in results:
        rows.setdefault(result["name"], {})[result["seed"]] = result
    return rows


def _base(name: str) -> str:
    return "base, L2" if name.endswith("L2") else "base"


def markdown(results: Sequence[dict], notes: Sequence[str], layout: Layout) -> str:
    """One line per row of the study; differences are to the base of the same seed."""
    rows = _by_row(results)
    numbers = [head for head, _ in layout.numbers.values()]
    heads = (layout.main, layout.compared, layout.more)
    head = ["model", *(title for some in heads for title in some.values()), *numbers, "seeds"]
    body = []
    for name, seeds in rows.items():
        got = list(seeds.values())
        base = rows.get(_base(name), {})
        both = [s for s in seeds if s in base and name != _base(name)]
        changes = {key: [seeds[s][key] - base[s][key] for s in both] for key in layout.compared}

        def mean(key, places, got=got):
            known = [result[key] for result in got if key in result]
            return f"{statistics.fmean(known):,.{places}f}" if known else "-"

        bad = any(r.get("gradients") == "BAD" for r in got)
        cells = [
            name + (" (gradients unhealthy)" if bad else ""),
            *(over_seeds([r[key] for r in got]) for key in layout.main),
            *(over_seeds(change) if both else "-" for change in changes.values()),
        ]
        cells += [over_seeds([r[k] for r in got]) if k in got[0] else "-" for k in layout.more]
        cells += [mean(key, places) for key, (_, places) in layout.numbers.items()] + [str(len(got))]
        body.append(cells)
    lines = [*notes, "", *markdown_table(head, body)]
    ranked = [result for result in results if "layers" in result]
    if ranked:
        layers = []
        names = [score["layer"] for score in ranked[0]["layers"]]
        for name in names:
            own = [next(score for score in r["layers"] if score["layer"] == name) for r in ranked]
            cells = [over_seeds([score[key] for score in own]) for key in ("probe", "image")]
            drift = statistics.fmean(score["drift"] for score in own)
            layers.append([name, *cells, f"{drift:.2f}", str(own[0]["features"])])
        head = ["layer", "probe, attacked", "image explained, attacked", "drift", "features"]
        lines += ["", *markdown_table(head, layers)]
    return "\n".join(lines).strip() + "\n"


def write(results: Sequence[dict], folder: Path, name: str, notes: Sequence[str], layout: Layout) -> Path:
    """``name.json`` and ``name.md`` in ``folder``."""
    write_text(folder / f"{name}.json", json.dumps(list(results), indent=1) + "\n")
    write_text(folder / f"{name}.md", markdown(results, notes, layout))
    return folder / f"{name}.md"
