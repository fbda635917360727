"""The package's own attacks against the official AutoAttack: who finds more, and in how much time.

Each contest is one model, one set of images and one radius. Its contestants run one after the other in one process, and
every round runs all of them, so that what else the machine does meets them alike. What they return is judged alike: the
images are cut off at the ball, and the model itself decides, by fresh draws if it is random.

Every finished run of a contestant is kept in the results file and not made again: the command can be interrupted, and
the contests can be run one by one, by their names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from purify_fast import zoo
from purify_fast._files import write_text
from purify_fast.attacks import APGD, FABT, Attack, AttackContext, Square, frozen
from purify_fast.attacks.autoattack import implementation
from purify_fast.attacks.engine.gradient_copy import GradientCopies
from purify_fast.attacks.engine.rows import Judge, has_fallen
from purify_fast.data import load_dataset, to_float
from purify_fast.defences import StochasticDefence, WithAggregation
from purify_fast.demo.setting import EPS, digits
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.ops.pgd_step import pgd_step

from . import RESULTS, measure, options
from .studies import carso_resnet18

#: The results, as data and as the table that a page shows.
FILE, TABLE = "evaluation.json", "evaluation.md"
OFFICIAL, OURS, FAST = "AutoAttack", "standard", "fast"
OFFICIAL_RAND, OURS_RAND = "AutoAttack rand", "rand"
#: Steps of a shorter run against a random model, of as many draws each.
SHORT_STEPS = 60
SHORT_RAND = f"rand, {SHORT_STEPS} steps"
#: Draws by which the images of a random model are judged, and those that the attacks average.
JUDGES, DRAWS = 20, 20
#: Images that are attacked together, the official implementation's own number.
BATCH = 250


@dataclass(frozen=True)
class Amount:
    """How much of everything.

    Args:
        images: at most so many images; None: as many as the contest has.
        steps: of APGD and FAB.
        fast_steps: of the first run of "fast".
        queries: of Square.
        draws: that the attacks on a random model average.
        rounds: how often every contestant runs; the shortest time counts.
    """

    images: int | None = None
    steps: int = 100
    fast_steps: int = 25
    queries: int = 5000
    draws: int = DRAWS
    rounds: int = 1


QUICK = Amount(images=4, steps=2, fast_steps=2, queries=5, draws=2)


@dataclass(frozen=True)
class Subject:
    """What is attacked.

    Args:
        model: images to logits, as its users would hold it.
        x: images, float32 ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``.
        eps: the L-inf radius.
        random: whether two predictions differ.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    random: bool = False


Contestant = Callable[[Subject, Amount], Tensor]


def official(version: str) -> Contestant:
    """The official AutoAttack, called as its own documentation calls it."""

    def attack(subject: Subject, amount: Amount) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("auto-attack").setLevel(logging.ERROR)
            adversary = implementation()(subject.model, norm="Linf", eps=subject.eps, seed=0, version=version)
            parts = adversary.apgd, adversary.apgd_targeted
            for part in parts:
                part.n_iter = part.n_iter_orig = amount.steps
                part.n_iter_2, part.n_iter_min, part.size_decr = (
                    max(int(share * amount.steps), 1) for share in (0.22, 0.06, 0.03)
                )
            adversary.fab.n_iter, adversary.square.n_queries = amount.steps, amount.queries
            if version == "rand":
                adversary.apgd.eot_iter = amount.draws
            return adversary.run_standard_evaluation(subject.x, subject.y, batch_size=BATCH)[0]

    return attack


def in_turn(choose: Callable[[Amount], list[Attack]]) -> Contestant:
    """Our attacks, each on the images that those before it left."""

    def attack(subject: Subject, amount: Amount) -> Tensor:
        model, found = subject.model, subject.x.clone()
        context = AttackContext(
            num_classes=10, eps=subject.eps, draws_differ=subject.random, eot_iter=amount.draws, batch_size=BATCH,
            judge_draws=JUDGES, max_forward_batch=2 * BATCH if subject.random else None,
            copies=GradientCopies(),
        )  # fmt: skip
        judge = Judge(model, context.judges(context.eot_iter), context.max_forward_batch)
        with frozen(model), torch.no_grad():
            share = judge.shares(subject.x, subject.y)
            left = (~has_fallen(share)).nonzero()[:, 0]
            for one in choose(amount):
                for part in left.split(BATCH):
                    told = replace(context, sample_ids=part)
                    other = one.search(model, subject.x[part], subject.y[part], told)
                    new = judge.shares(other, subject.y[part])
                    better = part[new >= share[part]]
                    found[better], share[better] = other[new >= share[part]], new[new >= share[part]]
                left = left[~has_fallen(share[left])]
        return found

    return attack


def standard_error(share: float, draws: int) -> float:
    """The standard error of a share of misclassified draws.

    Args:
        share: in [0, 1].
        draws: how many independent draws it was counted over, at least 1.

    Returns:
        Wilson's half width at one standard deviation, which is not 0 where all draws agree: four equal draws prove
        little.
    """
    return math.sqrt(share * (1 - share) / draws + 1 / (4 * draws**2)) / (1 + 1 / draws)


STANDARD_CONTESTANTS: dict[str, Contestant] = {
    OFFICIAL: official("standard"),
    OURS: in_turn(
        lambda amount: [
            APGD(steps=amount.steps, give_up=True),
            APGD(loss="dlr_targeted", steps=amount.steps, give_up=True),
            FABT(steps=amount.steps, give_up=True),
            Square(n_queries=amount.queries, give_up=True),
        ]
    ),
    FAST: in_turn(
        lambda amount: [APGD(steps=amount.fast_steps), APGD(loss="dlr_targeted", steps=amount.steps, give_up=True)],
    ),
}


def _rand(steps: int) -> list[Attack]:
    return [APGD(steps=steps, give_up=True), APGD(loss="dlr", steps=steps, give_up=True)]


RAND_CONTESTANTS: dict[str, Contestant] = {
    OFFICIAL_RAND: official("rand"),
    OURS_RAND: in_turn(lambda amount: _rand(amount.steps)),
    SHORT_RAND: in_turn(lambda amount: _rand(min(amount.steps, SHORT_STEPS))),
}


def _digits(name: str, images: int | None = None, random: bool = False) -> Subject:
    """A model of the zoo, and the digits that it was not trained on."""
    held_out, model = digits(), zoo.load(name)
    if isinstance(model, StochasticDefence) and not random:
        # AutoAttack's standard version is for models that predict the same every time
        model = WithAggregation(model, deterministic=True).eval()
    return Subject(model, to_float(held_out.x_test[:images]), held_out.y_test[:images], EPS, random)


def _resnet18(folder: Path | None) -> Subject:
    images = load_dataset("cifar10", folder)
    return Subject(carso_resnet18.classifier(), to_float(images.x_test[:200]), images.y_test[:200], 1 / 255)


#: What is attacked, by name: how it is made from the folder of CIFAR-10, and who attacks it.
CONTESTS: dict[str, tuple[Callable[[Path | None], Subject], dict[str, Contestant]]] = {
    "digits, base": (lambda _: _digits("digits-pgd-at"), STANDARD_CONTESTANTS),
    "digits, ARREST": (lambda _: _digits("digits-arrest"), STANDARD_CONTESTANTS),
    "digits, CARSO, paper's objective (z = 0)": (lambda _: _digits("digits-carso-objective"), STANDARD_CONTESTANTS),
    "digits, pipeline CARSO (z = 0)": (lambda _: _digits("digits-carso-pipeline"), STANDARD_CONTESTANTS),
    "digits, pipeline CARSO (K = 8, random)": (
        # 20 draws of eight samples for every step: a fifth of the images take the official attack several minutes
        lambda _: _digits("digits-carso-pipeline", 100, random=True),
        RAND_CONTESTANTS,
    ),
    "CIFAR-10 (JPEG 75), ResNet-18, eps 1/255": (_resnet18, STANDARD_CONTESTANTS),
}


def judged(subject: Subject, found: Tensor) -> tuple[float, float]:
    """The share of right predictions on what an attack found, in percent, and its standard error over the draws.

    Args:
        subject: what was attacked.
        found: what the attack returned; cut off at the ball first.
    """
    inside = pgd_step(found.detach(), torch.zeros_like(found), subject.x, 0.0, subject.eps)
    draws = JUDGES if subject.random else 1
    with frozen(subject.model):
        wrong = torch.cat(
            [
                Judge(subject.model, draws=draws, max_forward_batch=2 * BATCH).shares(a, b)
                for a, b in zip(inside.split(BATCH), subject.y.split(BATCH), strict=True)
            ]
        )
    errors = [standard_error(float(share), draws) for share in wrong] if subject.random else [0.0]
    return 100 * float(1 - wrong.mean()), 100 * sum(e**2 for e in errors) ** 0.5 / len(errors)


def contest(name: str, folder: Path | None, amount: Amount, known: Sequence[dict] = ()) -> Iterator[list[dict]]:
    """The rows of one contest, a contestant each, again after every run of a contestant.

    Args:
        name: of one of `CONTESTS`.
        folder: with ``cifar10.npz``, or the official files.
        amount: how much of everything.
        known: the rows of a contest that was interrupted; its runs are not made again.
    """
    make, contestants = CONTESTS[name]
    whole = make(folder)
    subject = replace(whole, x=whole.x[: amount.images], y=whole.y[: amount.images])
    shared = {"contest": name, "images": len(subject.x), "eps": subject.eps, "clean": judged(subject, subject.x)[0]}
    shared |= {"amount": asdict(amount)} | measure.environment(torch.device("cpu"))
    rows: dict[str, dict] = {row["contestant"]: row for row in known}
    for turn in range(amount.rounds):
        for who, attack in contestants.items():
            row = rows.setdefault(who, {"contestant": who, "seconds": [], "cpu_seconds": []})
            if len(row["seconds"]) > turn:
                continue
            torch.manual_seed(0)
            begin, work = time.perf_counter(), time.process_time()
            found = attack(subject, amount)
            row["seconds"].append(time.perf_counter() - begin)
            # what else runs on the machine lengthens this less
            row["cpu_seconds"].append(time.process_time() - work)
            row["robust"], row["error"] = judged(subject, found)
            row |= shared
            print(f"{name}: {who} leaves {row['robust']:.1f} % in {row['seconds'][-1]:.1f} s", flush=True)
            yield [rows[one] for one in contestants if one in rows]


def markdown(rows: list[dict]) -> list[str]:
    """The table of all contests.

    Args:
        rows: of `contest`.
    """
    compared = ["difference, points", "seconds", "times faster", "times less CPU time"]
    head = ["model", "images", "clean, %", "attack", "robust accuracy, %", *compared]
    body = []
    for row in rows:
        first = next(r for r in rows if r["contest"] == row["contest"])
        seconds, work = min(row["seconds"]), min(row["cpu_seconds"])
        error = f" ± {row['error']:.1f}" if row["error"] else ""
        robust, spent = f"{row['robust']:.1f}{error}", f"{seconds:,.1f}"
        if row is first:
            model = [row["contest"], str(row["images"]), f"{row['clean']:.1f}", row["contestant"]]
            body.append([*model, robust, "", spent, "", ""])
        else:
            faster = [f"{min(first['seconds']) / seconds:.1f}", f"{min(first['cpu_seconds']) / work:.1f}"]
            lead = f"{row['robust'] - first['robust']:+.1f}"
            body.append(["", "", "", f"**{row['contestant']}**", robust, lead, spent, *faster])
    machines = ", ".join(dict.fromkeys(f"{row['device']}, {row['threads']} threads" for row in rows))
    return [f"{machines}.", "", *markdown_table(head, body)]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks evaluation``."""
    which = f"which contests; all by default: {'; '.join(CONTESTS)}"
    parser.add_argument("names", nargs="*", metavar="name", type=options.one_of(CONTESTS), help=which)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz or the official files, for the ResNet-18")
    parser.add_argument("--images", type=options.at_least_one, help="at most so many images of each contest")
    parser.add_argument(
        "--rounds", type=options.at_least_one, default=1, help="how often every contestant runs; 1 by default"
    )
    parser.add_argument("--quick", action="store_true", help="tiny: that it works, no numbers")
    parser.add_argument("--redo", action="store_true", help="also what is done already")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results/studies by default")


def main(chosen: argparse.Namespace) -> str:
    """Run contests; their table. Every finished run of a contestant is kept and not made again."""
    amount = replace(QUICK if chosen.quick else Amount(), rounds=chosen.rounds)
    if chosen.images is not None:
        amount = replace(amount, images=chosen.images)
    out = chosen.out or (Path("runs/benchmarks") if chosen.quick else RESULTS / "studies")
    order = list(CONTESTS)
    for name in chosen.names or CONTESTS:
        same = [row for row in read(out) if row["contest"] == name and row["amount"] == asdict(amount)]
        known = [] if chosen.redo else same
        runs = [len(row["seconds"]) for row in known]
        if len(runs) == len(CONTESTS[name][1]) and min(runs) >= amount.rounds:
            continue
        for rows in contest(name, chosen.data, amount, known):
            # read again: another process may have run another contest meanwhile
            every = [row for row in read(out) if row["contest"] != name] + rows
            every.sort(key=lambda row: order.index(row["contest"]))
            write_text(out / FILE, json.dumps(every, indent=1) + "\n")
    table = "\n".join(markdown(read(out))) + "\n"
    write_text(out / TABLE, table)
    return table


def read(out: Path) -> list[dict]:
    """The rows of a results folder; none where there is no results file.

    Args:
        out: the folder.
    """
    path = out / FILE
    return json.loads(path.read_text()) if path.exists() else []
