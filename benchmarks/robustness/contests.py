"""Compare the package's attacks with the official AutoAttack, by robust accuracy and time.

The compared attacks, the contestants, run one after the other in one process. The images that AutoAttack returns are
clipped to the ball, and the model classifies the clipped images. The result of a protocol is taken from the report of
`evaluate`.

Every finished run is saved in the results file, with the weights, the images, and the attacks and their revisions. If
one of these has changed, the contestant runs again. A run may attack only a part of the images. The images in all
forward passes and gradient computations are counted. The results file has the outcome of each image, so that two
contestants can be compared image by image.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from examples.demo.methods import BASE, FOLDERS, train
from examples.demo.setting import EPS, Budget, Workspace, digits
from purify_fast import zoo
from purify_fast._settings import digest, weights_fingerprint
from purify_fast.attacks import frozen
from purify_fast.attacks.base import ThreatModel
from purify_fast.data import load_dataset, to_float
from purify_fast.evaluation import AttackSpec, evaluate
from purify_fast.judge.request import deadline as evaluated
from purify_fast.judge.request.preparation import protocol_attacks
from purify_fast.judge.searches.engine import Judge, has_fallen
from purify_fast.judge.searches.original_autoattack import implementation
from purify_fast.judge.show.text import markdown_table
from purify_fast.ops.pgd_step import pgd_step
from purify_fast.training import load_classifier

from .. import kept, options
from ..kept import Row
from ..speed import timing
from . import revisions
from .counted_model import CountedModel

FILE = "robust.json"
OFFICIAL, OURS, FAST = "AutoAttack", "standard", "fast"
#: The number of images in a batch, which is the default of the official implementation.
BATCH = 250
#: Images in a run of this slow contestant: an interruption loses little. The stopping rule of others needs all images.
PARTS = {OFFICIAL: 50}


@dataclass(frozen=True)
class Amount:
    """The numbers of images and steps in a contest.

    Args:
        images: largest number of images. None means all images of the contest.
        steps: largest number of steps of an attack. An attack that does not set a number of steps takes this number.
        queries: number of queries of Square.
        draws: number of random predictions whose gradients an attack on a random model averages.
    """

    images: int | None = None
    steps: int = 100
    queries: int = 5000
    draws: int = 20


QUICK = Amount(images=4, steps=2, queries=5, draws=2)


@dataclass(frozen=True)
class Subject:
    """The attacked model and images of a contest.

    Args:
        model: classifier, images to logits.
        x: images, float32 ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``.
        eps: L-inf radius on images in [0, 1].
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float


#: A function that attacks a `Subject`. It returns 1 for each image that fell, and otherwise 0, ``[N]``.
Contestant = Callable[[Subject, Amount], Tensor]


def found_by_autoattack(subject: Subject, amount: Amount, version: str = "standard") -> Tensor:
    """Run the official AutoAttack as its documentation says, and return its images ``[N, C, H, W]``."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        adversary = implementation()(subject.model, norm="Linf", eps=subject.eps, seed=0, version=version)
        for part in (adversary.apgd, adversary.apgd_targeted):
            part.n_iter = part.n_iter_orig = amount.steps
            part.n_iter_2, part.n_iter_min, part.size_decr = (
                max(int(share * amount.steps), 1) for share in (0.22, 0.06, 0.03)
            )
        adversary.fab.n_iter, adversary.square.n_queries = amount.steps, amount.queries
        if version == "rand":
            adversary.apgd.eot_iter = amount.draws
        return adversary.run_standard_evaluation(subject.x, subject.y, batch_size=BATCH)[0]


def official(subject: Subject, amount: Amount) -> Tensor:
    """Run the official AutoAttack, see `found_by_autoattack`."""
    return misclassified(subject, found_by_autoattack(subject, amount))


@dataclass(frozen=True)
class Protocol:
    """A contestant that runs a protocol of this package by `evaluate`, as users do.

    Args:
        name: name of the protocol.
        seed: seed of the evaluation.
    """

    name: str
    seed: int = 0

    def reduced(self, spec: AttackSpec, amount: Amount) -> AttackSpec:
        """Return the attack with at most the steps, queries and draws of ``amount``."""
        most = {"steps": amount.steps, "n_queries": amount.queries, "eot_iter": amount.draws}
        values = {name: getattr(spec.attack, name, None) for name in most}
        less = {name: min(value, most[name]) for name, value in values.items() if value is not None}
        return replace(spec, attack=replace(spec.attack, **less))

    def code(self, amount: Amount) -> list[str]:
        """Return descriptions of the attacks. A row whose attacks have other descriptions is outdated."""
        attacks = revisions.of_protocol(self.name, random=False, change=partial(self.reduced, amount=amount))
        return attacks + ([f"seed {self.seed}"] if self.seed else [])

    def __call__(self, subject: Subject, amount: Amount) -> Tensor:
        whole = evaluated.Subject(subject.model, subject.x, subject.y, batch_size=BATCH, n_eval=1, seed=0)
        specs = protocol_attacks(self.name, whole, ThreatModel("linf", subject.eps))
        how: dict[str, Any] = {"attacks": [self.reduced(spec, amount) for spec in specs], "steps": amount.steps}
        how |= {"seed": self.seed, "batch_size": BATCH, "probes": False, "progress": False}
        report = evaluate(subject.model, subject.x, subject.y, eps=subject.eps, **how)
        return 1 - torch.from_numpy(report.headline.robust).float()


SEEDS = (0, 1, 2)
CONTESTANTS: dict[str, Contestant] = {
    OFFICIAL: official,
    **{f"{name}, seed {seed}" if seed else name: Protocol(name, seed=seed) for name in (OURS, FAST) for seed in SEEDS},
}
#: On the large networks each attack has one seed.
LARGE_CONTESTANTS = {name: CONTESTANTS[name] for name in (OFFICIAL, OURS, FAST)}


class Contest(NamedTuple):
    """A model, a set of images, a radius, and the attacks that are compared.

    Args:
        make: function that makes the attacked model and images, from the folder of the images.
        contestants: compared attacks, by name.
        model: function that makes the model alone. It is None if the model needs a folder or a training.
    """

    make: Callable[[Path | None], Subject]
    contestants: dict[str, Contestant]
    model: Callable[[], nn.Module] | None = None


def _network(name: str, count: int, first: int = 0) -> Contest:
    """Return the contest of a network of the zoo on a part of the test images."""

    def make(folder: Path | None) -> Subject:
        card = zoo.card(name)
        images, part = load_dataset(card.data, folder), slice(first, first + count)
        return Subject(zoo.load(name), to_float(images.x_test[part]), images.y_test[part], card.eps)

    contestants = LARGE_CONTESTANTS if name.startswith("cifar10") else CONTESTANTS
    return Contest(make, contestants, partial(zoo.load, name))


def _digits_of_seed(seed: int, folder: Path | None) -> Subject:
    """Train the classifier of the demo adversarially, with a seed. Return it with the held-out digits."""
    held_out, place = digits(), Path("runs/digits_seeds") / str(seed)
    train(Workspace(place, Budget(), seed, progress=False), BASE)
    return Subject(load_classifier(place / FOLDERS[BASE]), to_float(held_out.x_test), held_out.y_test, EPS)


def _published(folder: Path | None) -> Subject:
    """Load a published, adversarially trained network for MNIST, from the subfolder ``networks`` of the data folder.

    The network is that of SDP-FO (Dathathri et al., NeurIPS 2020), as alpha-beta-CROWN distributes it. The authors of
    alpha-beta-CROWN report on 200 images at the radius of this contest: 76.0 % of the images were proved robust, and
    76.5 % were classified correctly after the best attack.
    """
    # Copy this file from alpha-beta-CROWN.
    path = (folder or Path("data")) / "networks" / "mnist_cnn_a_adv.model"
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    model.load_state_dict(torch.load(path, weights_only=True))
    images = load_dataset("mnist", folder)
    return Subject(model.eval(), to_float(images.x_test[:200]), images.y_test[:200], 0.3)


#: The contests. The name may end with the numbers of the first and the last test image.
CONTESTS = {"mnist_cnn_a_adv, published": Contest(_published, CONTESTANTS)}
CONTESTS |= {f"digits, seed {seed}": Contest(partial(_digits_of_seed, seed), CONTESTANTS) for seed in range(3)}
CONTESTS |= {
    f"{name}, {first + 1} to {first + count}": _network(name, count, first)
    for name, first, count in (
        ("cifar10-pgd-at-w16", 0, 700),
        ("cifar10-pgd-at-w16", 1000, 250),
        ("cifar10-trades-w16", 0, 350),
        ("cifar10-arrest-w16", 0, 250),
        ("mnist-pgd-at", 0, 250),
        ("mnist-arrest", 0, 200),
    )
}


def misclassified(subject: Subject, found: Tensor) -> Tensor:
    """Return 1 for each returned image that is misclassified, after it is clipped to the ball, and otherwise 0."""
    inside = pgd_step(found.detach(), torch.zeros_like(found), subject.x, 0.0, subject.eps)
    judge = Judge(subject.model, draws=1, max_forward_batch=2 * BATCH)
    with frozen(subject.model):
        parts = zip(inside.split(BATCH), subject.y.split(BATCH), strict=True)
        return torch.cat([judge.shares(*part) for part in parts])


def _run(attack: Contestant, subject: Subject, amount: Amount, row: Row) -> None:
    """Run a contestant once, and add the result to its row."""
    torch.manual_seed(0)
    door = CountedModel(subject.model)
    begin = time.perf_counter()
    wrong = attack(replace(subject, model=door), amount)
    row["seconds"].append(time.perf_counter() - begin)
    row["left"] += kept.bits(~has_fallen(wrong))
    row["robust"] = 100 * row["left"].count("1") / len(row["left"])
    row["forwards"] += door.counts.forwards
    row["gradients"] += door.counts.gradients


def is_current(row: Row, contest: Contest) -> bool:
    """Tell whether a row was made with the attacks and weights that the package has now."""
    code: dict[str, Any] = row.get("code", {})
    attack = contest.contestants.get(row["contestant"])
    if isinstance(attack, Protocol) and code.get("attacks") != attack.code(Amount(**row["amount"])):
        return False
    return contest.model is None or code.get("weights") == weights_fingerprint(contest.model())


def outdated(results: Path) -> list[str]:
    """Return a message for each row that was made with other attacks or weights than the package has now."""
    return [
        kept.outdated(FILE, f"{row['contestant']} of the contest {row['contest']!r}", "evaluation")
        for row in read(results / "studies")
        if row["contest"] not in CONTESTS or not is_current(row, CONTESTS[row["contest"]])
    ]


def run_contest(
    name: str, whole: Subject, contestants: dict[str, Contestant], amount: Amount, known: Sequence[Row] = ()
) -> Iterator[Row]:
    """Run the contestants in turn, and yield the row of a contestant after each of its runs."""
    before, rows, runs = {row["contestant"]: row for row in known}, {}, {}
    subject = replace(whole, x=whole.x[: amount.images], y=whole.y[: amount.images])
    clean = 100 * float(1 - misclassified(subject, subject.x).mean())
    shared = {"contest": name, "images": len(subject.x), "eps": subject.eps, "clean": clean}
    shared |= {"amount": asdict(amount)} | timing.environment(torch.device("cpu"))
    made_of = {"weights": weights_fingerprint(subject.model), "images": digest(subject.x, subject.y)[:16]}
    for who, attack in contestants.items():
        size = PARTS.get(who, len(subject.x))
        runs[who] = [slice(first, first + size) for first in range(0, len(subject.x), size)]
        attacks = {"attacks": attack.code(amount)} if isinstance(attack, Protocol) else {}
        fresh: Row = {"contestant": who, "code": made_of | attacks, "seconds": []}
        fresh |= {"left": "", "forwards": 0, "gradients": 0}
        old = before.get(who, {})
        rows[who] = old if old.get("code") == fresh["code"] else fresh
    for turn in range(max(map(len, runs.values()))):
        for who, parts in runs.items():
            row = rows[who]
            if len(row["seconds"]) <= turn < len(parts):
                part = replace(subject, x=subject.x[parts[turn]], y=subject.y[parts[turn]])
                _run(contestants[who], part, amount, row)
                row |= shared
                spent = row["seconds"][-1]
                print(f"{name}: robust accuracy {row['robust']:.1f} % under {who}, {spent:.1f} s", flush=True)
                yield row


def markdown(rows: list[Row]) -> list[str]:
    """Return the table for docs/evaluation.md. A line has a number for each seed of an attack."""
    head = ["model, images", "eps", "clean, %", "attack", "attacked", "left", "difference"]
    body: dict[tuple[str, str], list[list[str]]] = {}
    for row in rows:
        left, first = row["left"], next(other for other in rows if other["contest"] == row["contest"])
        compared = ""
        if row is not first and first["contestant"] == OFFICIAL:
            theirs = first["left"]
            common = min(len(left), len(theirs))
            compared = f"{left[:common].count('1') - theirs[:common].count('1'):+d}"
            compared += f" of {common}" if common < len(left) else ""
        costs = [f"{row[what] / len(left):,.0f}" for what in ("forwards", "gradients")]
        name = row["contestant"].partition(", seed ")[0]
        about = [row["contest"], f"{row['eps']:.3g}", f"{row['clean']:.1f}"] if row is first else [""] * 3
        about += [name if name == OFFICIAL else f"**{name}**", str(len(left))]
        body.setdefault((row["contest"], name), []).append([*about, str(left.count("1")), compared, *costs])
    head += ["forward passes per image", "gradients per image"]
    lines = [
        [*runs[0][:5], *("; ".join(cells) for cells in zip(*(run[5:] for run in runs), strict=True))]
        for runs in body.values()
    ]
    return [f"Measured on: {kept.machines(rows)}.", "", *markdown_table(head, lines)]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks evaluation``."""
    options.add_names(parser, CONTESTS, what="contests to run, which take days")
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz, or with the official files")
    options.add_out(parser, "/studies")


def main(chosen: argparse.Namespace) -> str:
    """Run contests, and return their table. Finished runs are not repeated."""
    amount = QUICK if chosen.quick else Amount()
    out = options.out_of(chosen, chosen.quick, "studies")

    def key(row: Row) -> tuple[int, int]:
        return list(CONTESTS).index(row["contest"]), list(CONTESTANTS).index(row["contestant"])

    def stays(row: Row) -> bool:
        """Tell whether a row may stay beside a new one. All rows of a contest must have the same `Amount`."""
        return row["contest"] != name or row["amount"] == asdict(amount)

    for name in chosen.names:
        contest = CONTESTS[name]
        known = [row for row in read(out) if row["contest"] == name and stays(row)]
        try:
            subject = contest.make(chosen.data)
        except (ValueError, FileNotFoundError) as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        for row in run_contest(name, subject, contest.contestants, amount, known):
            kept.put(out / FILE, row, key, stays)
    return "\n".join(markdown(read(out)))


def read(out: Path) -> list[Row]:
    """Return the rows in a folder of results, or an empty list if there is no results file."""
    return kept.rows_of(out / FILE)
