"""The questions that the papers on CARSO, AToP and ARREST leave open, answered by small networks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.demo.setting import LAYERS
from purify_fast._files import folder_lock
from purify_fast._version import __version__
from purify_fast.judge.estimates import Estimate
from purify_fast.judge.show.text import markdown_table

from ...kept import Row, put, rows_of
from ...options import add_names, add_out, out_of
from ...speed.timing import environment
from . import measures as run
from .trained_models import AFT, Setting, arrest, carso, classifier

FILE = "papers_questions.json"
CARSOS = ("digits-carso-objective", "digits-carso-pipeline")
MNIST, CIFAR10 = "mnist-carso-objective", "cifar10-carso-pipeline-w16"
OTHERS = ("digits-pgd-at", "digits-atop-objective", "digits-atop-pipeline", "digits-arrest")
SAMPLES, RADII = (1, 2, 4, 8, 16), (0.05, 0.1, 0.2)
#: The settings of ARREST without its distillation, without its replay, without both, and with both.
FINETUNED: dict[str, dict[str, Any]] = {
    "AFT": AFT,
    "AFT + RGKD": {"replay": False},
    "AFT + NR": {"distillation_weight": 0.0},
    "ARREST": {},
}


@dataclass
class Part:
    """A table of the study.

    Args:
        columns: the heading of each column. The column "clean" has the accuracy without an attack.
        seeds: the seeds of each line. A model of the zoo has one training.
        lines: for each line, the function that measures it, which gets the setting and the seed.
        pairs: for two lines, the columns in which they are compared on the same images: the first minus the second.
        across: columns that are compared in each line, in a column of their own: the first minus the second.
    """

    columns: dict[str, str]
    seeds: Sequence[int] = (0,)
    lines: dict[str, Callable[[Setting, int], run.Numbers]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    across: Sequence[tuple[str, str]] = ()

    def add(self, line: str, work: Callable[..., run.Numbers], *options: Any) -> None:
        """Add a line, which ``work`` measures: it gets the setting, the seed and the options."""
        self.lines[line] = lambda setting, seed: work(setting, seed, *options)

    def compare(self, line: str, *others: str, columns: Sequence[str] = ("clean", "fast")) -> None:
        """Compare a line with other lines, in some columns."""
        self.pairs |= dict.fromkeys(((line, other) for other in others), columns)


JUDGED, ALONE = {"clean": "clean", "fast": "`fast`"}, "PGD on the classifier alone"
DRIFT = JUDGED | {"drift": "drift, degrees"}
ATTACKED = {"clean": "clean", "classifier alone": ALONE, "exact": "exact PGD"}
BALLS = {"L-inf": "L-inf 0.2", "L2": f"L2 {run.L2:g}", "L1": f"L1 {run.L1:g}", "StAdv": "StAdv 0.05"}
RULES = [("logsumexp", rule) for rule in list(run.RULES)[2:]]
END_TO_END = [("exact", "classifier alone"), ("exact", "PeeL")]
COSINES = {"classification": "reconstructions", "classifier": "classifier alone", "draw": "other draws"}
PARTS: dict[str, Part] = {
    "samples": Part(JUDGED | {"ms": "ms an image", "MFLOP": "MFLOP an image"}),
    "aggregation": Part({rule: rule for rule in run.RULES}, across=RULES),
    "interference": Part(COSINES, across=[("classification", "draw")]),
    "end_to_end": Part(ATTACKED | {"PeeL": "PGD through PeeL"}, across=END_TO_END),
    "layers": Part(JUDGED, (0, 1)),
    "threats": Part({"clean": "clean"} | BALLS | {key: key for key in ("Square", "SPSA", "HopSkipJump", "transfer")}),
    "transforms": Part(ATTACKED | {"L2": f"L2 {run.L2:g}", "StAdv": "StAdv 0.05"}, (0, 1)),
    "arrest": Part(DRIFT, (0, 1)),
    "sweep": Part(DRIFT, (0, 1)),
    "radius": Part(DRIFT, (0, 1)),
}


def _fill() -> None:
    """Add all lines and comparisons."""
    for name in CARSOS:
        for count in SAMPLES:
            PARTS["samples"].add(f"{name}, K = {count}", run.samples, name, count)
        PARTS["samples"].compare(f"{name}, K = 16", f"{name}, K = 1", f"{name}, K = 8")
        for rule in (None, "logsumexp", "mean", "probability"):
            how = "not attacked" if rule is None else f"attacked through {rule}"
            PARTS["aggregation"].add(f"{name}, {how}", run.aggregation, name, rule)
    for name, counts in ((MNIST, SAMPLES[::2]), (CIFAR10, SAMPLES[:3:2])):
        for count in counts:
            PARTS["samples"].add(f"{name}, K = {count}", run.samples, name, count)
        PARTS["samples"].compare(f"{name}, K = {counts[-1]}", f"{name}, K = 1")
    for name in (*CARSOS, MNIST, CIFAR10):
        PARTS["end_to_end"].add(name, run.end_to_end, name)
        for step in run.STEPS:
            PARTS["interference"].add(f"{name}, step {step}", run.interference, name, step)
    layers, subsets = PARTS["layers"], {"all three": LAYERS} | {layer: (layer,) for layer in LAYERS}
    for how, pipeline in (("objective", False), ("pipeline", True)):
        for name, chosen in subsets.items():
            layers.add(f"{name}, {how}", run.trained, carso, chosen, pipeline)
        layers.compare(f"all three, {how}", *(f"{layer}, {how}" for layer in LAYERS))
    layers.add("no condition, objective", run.trained, carso, ())
    layers.compare("all three, objective", "no condition, objective")
    for name in (*CARSOS, *OTHERS):
        PARTS["threats"].add(name, run.threats, name)
    for name in (*CARSOS, *OTHERS[1:]):
        PARTS["threats"].compare(name, OTHERS[0], columns=("L-inf", "L1", "Square"))
    for name, gan in (("RT1", True), ("RT2", True), ("RT3", True), ("RT2 without GAN", False)):
        for stage in ("pre-trained", "AToP"):
            PARTS["transforms"].add(f"{name}, {stage}", run.purifiers, name[:3].lower(), gan, stage == "AToP")
        PARTS["transforms"].compare(f"{name}, AToP", f"{name}, pre-trained", columns=list(ATTACKED))
    PARTS["transforms"].compare("RT2, AToP", "RT2 without GAN, AToP", columns=list(ATTACKED))
    for name, options in FINETUNED.items():
        PARTS["arrest"].add(name, run.finetuned, partial(arrest, **options))
    PARTS["arrest"].add("PGD-AT from scratch", run.finetuned, classifier)
    PARTS["arrest"].add("clean training from scratch", run.finetuned, partial(classifier, eps=0.0, epochs=20))
    for name in ("AFT + RGKD", "AFT + NR", "ARREST"):
        PARTS["arrest"].compare(name, "AFT", columns=list(DRIFT))
    PARTS["arrest"].compare("ARREST", "AFT + RGKD", "AFT + NR")
    PARTS["arrest"].compare("PGD-AT from scratch", "AFT", "ARREST", columns=list(DRIFT))
    for weight in (1, 5, 20, 50):
        PARTS["sweep"].add(f"lambda {weight}", run.finetuned, partial(arrest, distillation_weight=float(weight)))
    for angle in (10, 20, 45):
        PARTS["sweep"].add(f"phi {angle}", run.finetuned, partial(arrest, angle=float(angle)))
    PARTS["sweep"].compare("lambda 5", *(line for line in PARTS["sweep"].lines if line != "lambda 5"))
    trainings = {"PGD-AT": classifier, "ARREST": arrest}
    for eps in RADII:
        for name, make in trainings.items():
            PARTS["radius"].add(f"{name}, eps {eps:g}", run.finetuned, partial(make, eps=eps))
        PARTS["radius"].compare(f"ARREST, eps {eps:g}", f"PGD-AT, eps {eps:g}")


_fill()


def key(row: Row) -> tuple[int, int, int]:
    """Return the place of a row in the file: its part, its line, and its seed."""
    part = PARTS[row["part"]]
    return list(PARTS).index(row["part"]), list(part.lines).index(row["line"]), row["seed"]


def outcomes(rows: Sequence[Row], column: str) -> np.ndarray:
    """Return the values of a column, float ``[K, n]``: K predictions of one training, or means of K trainings."""
    cells = [row["numbers"][column] for row in rows]
    made = [np.array([list(map(float, draw)) for draw in cell] if _is_share(cell) else [cell]) for cell in cells]
    return made[0] if len(made) == 1 else np.array([each.mean(0) for each in made])


def _is_share(cell: Sequence[Any]) -> bool:
    return isinstance(cell[0], str)


def _text(values: np.ndarray, share: bool, sign: str = "") -> str:
    """Return a mean with its standard error over images, and over predictions or trainings: shares in percent."""
    estimate, digits = Estimate.of(values), 1 if share else 2
    mean, error = (100 * number if share else number for number in estimate[:2])
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if values.shape[1] > 1 else "")


def _difference(first: tuple[list[Row], str], second: tuple[list[Row], str]) -> str:
    """Return a paired difference, and in brackets that of each training if there are several."""
    both = sorted({row["seed"] for row in first[0]} & {row["seed"] for row in second[0]})
    pair = [([row for row in rows if row["seed"] in both], column) for rows, column in (first, second)]
    share = _is_share(pair[0][0][0]["numbers"][first[1]])
    own, other = (outcomes(*each) for each in pair)
    if len(own) != len(other) or len(both) == 1:
        # Predictions of two models have no draws in common.
        own, other = own.mean(0, keepdims=True), other.mean(0, keepdims=True)
    each = ", ".join(f"{(100 if share else 1) * mean:+.1f}" for mean in (own - other).mean(1))
    return _text(own - other, share, "+") + (f" ({each})" if len(both) > 1 else "")


def table(part: str, results: Path) -> list[str]:
    """Return the tables of a part: its lines, and the comparisons of lines.

    Args:
        part: name of the part.
        results: folder of the committed results.
    """
    chosen, rows = PARTS[part], [row for row in rows_of(results / "studies" / FILE) if row["part"] == part]
    if not rows:
        raise FileNotFoundError(f"{results}/studies/{FILE} has no row of {part}")
    by_line = {line: [row for row in rows if row["line"] == line] for line in chosen.lines}
    by_line = {line: own for line, own in by_line.items() if own}
    body = []
    for line, own in by_line.items():
        cells = [f"`{line}`"]
        for column in chosen.columns:
            doubt = any(column in row["numbers"].get("unreliable", ()) for row in own)
            text = _text(outcomes(own, column), _is_share(own[0]["numbers"][column]))
            cells.append(f"{text} (unreliable)" if doubt else text)
        cells += [_difference((own, a), (own, b)) for a, b in chosen.across]
        body.append([*cells, str(len(own)), str(outcomes(own, next(iter(chosen.columns))).shape[1])])
    apart = [f"{chosen.columns[a]} minus {chosen.columns[b]}" for a, b in chosen.across]
    lines = markdown_table(["model", *chosen.columns.values(), *apart, "trainings", "images"], body)
    pairs = {pair: columns for pair, columns in chosen.pairs.items() if by_line.keys() >= set(pair)}
    shown = [column for column in chosen.columns if any(column in columns for columns in pairs.values())]
    compared = []
    for (a, b), columns in pairs.items():
        cells = (_difference((by_line[a], at), (by_line[b], at)) if at in columns else "-" for at in shown)
        compared.append([f"`{a}` minus `{b}`", *cells])
    head = ["difference", *(chosen.columns[column] for column in shown)]
    return [*lines, "", *markdown_table(head, compared)] if compared else lines


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks study``."""
    parser.add_argument("name", choices=["papers_questions"], help=__doc__)
    add_names(parser, PARTS, "parts", "which tables")
    parser.add_argument("--data", type=Path, help="folder with the images of MNIST and CIFAR-10")
    add_out(parser, "/studies")


def main(chosen: argparse.Namespace) -> str:
    """Measure the lines that are missing, and return the tables.

    Trainings are kept in runs/studies, and each line is kept as soon as it is measured.
    """
    out = out_of(chosen, chosen.quick, "studies")
    runs = Path("runs/studies") / (chosen.name + "-quick" * chosen.quick) if chosen.out is None else chosen.out / "runs"
    trial: dict[str, Any] = {"images": 10, "few": 10, "steps": 2, "queries": 100, "brief": True}
    setting = Setting(runs, chosen.data, **(trial if chosen.quick else {}))
    torch.set_num_threads(1)
    amounts = {"steps": setting.steps, "queries": setting.queries}
    facts = {"version": __version__} | amounts | environment(torch.device("cpu"))
    with folder_lock(runs):
        kept = {key(row) for row in rows_of(out / FILE)}
        for name in chosen.parts:
            for line, measure in list(PARTS[name].lines.items())[: 2 if chosen.quick else None]:
                for seed in PARTS[name].seeds:
                    row: Row = {"part": name, "line": line, "seed": seed}
                    if key(row) in kept:
                        continue
                    began = time.process_time()
                    numbers = measure(setting, seed)
                    row |= {"numbers": numbers, "seconds": round(time.process_time() - began, 1)}
                    put(out / FILE, row | facts, key)
                    print(f"{name}: {line}, seed {seed}: {row['seconds']} s", flush=True)
    return "\n\n".join("\n".join(table(name, out.parent)) for name in chosen.parts)
