"""``python -m benchmarks study NAME``: run a study, or go on with it, and write its tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from purify_fast import data, zoo
from purify_fast._files import folder_lock
from purify_fast.attacks.autoattack import implementation
from purify_fast.cli.command import usable_device

from . import arrest_mnist, atop_digits, atop_mnist, carso_digits, carso_mnist, carso_resnet18, cifar10, digits, run
from .cifar10.results import GIVEN, STEM, check_budget

STUDIES = {
    "carso_digits": (carso_digits, "digits"),
    "carso_mnist": (carso_mnist, "mnist"),
    "carso_resnet18": (carso_resnet18, "cifar10"),
    "cifar10": (cifar10, "cifar10"),
    "atop_digits": (atop_digits, "digits"),
    "atop_mnist": (atop_mnist, "mnist"),
    "arrest_mnist": (arrest_mnist, "mnist"),
}  # and their data sets
NO_AUTOATTACK = ("atop_mnist",)
#: Studies of networks that are large enough to use every core, so that their jobs run one after the other by default.
ALL_CORES = (carso_resnet18, cifar10)
RESULTS = Path(__file__).parents[1] / "results" / "studies"
SEEDS, WORKERS = 3, 2


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--data", help="of MNIST and CIFAR-10: the folder that holds them; data by default")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--full", action="store_true", help="of these too: the full budgets, days rather than an hour")
    budget.add_argument("--quick", action="store_true", help="the same path in a minute or two, no numbers")
    parser.add_argument("--seeds", type=int, help=f"of the digits study; {SEEDS} by default")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows of the digits study, and their needs")
    parser.add_argument(
        "--workers",
        type=int,
        help=f"jobs side by side; {WORKERS} by default, of one thread each; 1 of the studies on CIFAR-10, whose jobs "
        "share the threads between them",
    )
    parser.add_argument(
        "--width",
        type=int,
        help="of cifar10: channels of the networks' first stage; 16, --full 64, "
        "where the larger base has the size of base and purifier",
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="of cifar10: stand on this classifier of the zoo; only AToP, ARREST and a new standard classifier are "
        "trained, and have a table of their own",
    )
    parser.add_argument("--device", default="auto", help="of cifar10: auto, cpu, cuda or cuda:N; auto by default")
    parser.add_argument(
        "--so-far", action="store_true", help="of cifar10: train nothing, write the table of what is done"
    )
    parser.add_argument("--out", type=Path, help="where the runs are kept; runs/studies/NAME by default")


def check(chosen: argparse.Namespace) -> None:
    """What would stop the study later.

    Raises:
        ValueError: an option that the study does not have, a number below 1, an unknown row. FileNotFoundError: no
        data. ModuleNotFoundError: no AutoAttack, or what the data need is missing.
    """
    study, images = STUDIES[chosen.name]
    on_digits = images == "digits"
    for option in ("data", "full") if on_digits else ("seeds", "rows"):
        if getattr(chosen, option) not in (None, False):
            raise ValueError(f"--{option} does not go with {chosen.name}")
    for option, unset in (("so_far", False), ("device", "auto"), ("width", None), ("base", None)):
        if getattr(chosen, option) != unset and study is not cifar10:
            raise ValueError(f"--{option.replace('_', '-')} does not go with {chosen.name}")
    usable_device(chosen.device)
    for option in ("seeds", "workers", "width"):
        value = getattr(chosen, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")
    if study is cifar10:
        # results of another budget would stand in the way of the table, hours later
        check_budget(_places(chosen)[1], _budget(chosen), STEM if chosen.base is None else GIVEN)
        if chosen.base is not None:
            zoo.card(chosen.base)
    if on_digits:
        study.jobs(chosen.seeds or SEEDS, chosen.quick, chosen.rows)
    if chosen.so_far:
        return
    if chosen.name not in NO_AUTOATTACK:
        implementation()
    data.load_dataset(images, chosen.data or "data")


def main(chosen: argparse.Namespace) -> str:
    """Run what is not done yet; the page of tables."""
    return written(chosen).read_text()


def written(chosen: argparse.Namespace) -> Path:
    """Run what is not done yet. The tables go to benchmarks/results/studies; those of other budgets or widths, of some
    rows or of fewer seeds to the runs' folder."""
    root, results = _places(chosen)
    if chosen.so_far:
        # the study may be running: what its jobs left is only read
        return _write(chosen, root, results)
    with folder_lock(root):
        return _run(chosen, root, results)


def _places(chosen: argparse.Namespace) -> tuple[Path, Path]:
    """The folder of the runs, and that of the tables."""
    kind = "-quick" if chosen.quick else "-full" if chosen.full else ""
    if _budget(chosen) != _usual_budget(chosen):
        kind += f"-width-{chosen.width}"
    on = "" if chosen.base is None else f"-on-{chosen.base}"
    root = chosen.out or Path("runs/studies") / f"{chosen.name}{kind}{on}"
    parts = kind or chosen.rows is not None or (chosen.seeds or SEEDS) < SEEDS
    return root, root if parts else RESULTS


def _usual_budget(chosen: argparse.Namespace) -> Any:
    """How much of everything, with networks of the usual width; the studies on digits have no budget."""
    study, images = STUDIES[chosen.name]
    if images == "digits":
        return None
    return study.QUICK if chosen.quick else study.FULL if chosen.full else study.DEFAULT


def _budget(chosen: argparse.Namespace) -> Any:
    usual = _usual_budget(chosen)
    return usual if chosen.width is None else usual.of_width(chosen.width)


def _run(chosen: argparse.Namespace, root: Path, results: Path) -> Path:
    seeds, place = chosen.seeds or SEEDS, chosen.data or "data"
    study, images = STUDIES[chosen.name]
    workers = chosen.workers or (1 if study in ALL_CORES else WORKERS)
    if images == "digits":
        done = run(study.jobs(seeds, chosen.quick, chosen.rows), root, workers)
        return digits.write(done, results, chosen.name, study.notes(chosen.quick), study.LAYOUT)
    budget = _budget(chosen)
    if study is not cifar10:
        run(study.jobs(place, budget=budget), root, workers)
        return study.write(root, results, budget=budget)
    run(cifar10.jobs(place, budget, usable_device(chosen.device), chosen.base), root, workers)
    return _write(chosen, root, results)


def _write(chosen: argparse.Namespace, root: Path, results: Path) -> Path:
    """The table of the study on CIFAR-10, or of its rows on a base that is given."""
    if chosen.base is None:
        return cifar10.write(root, results, _budget(chosen))
    return cifar10.write_given(root, results, chosen.base, _budget(chosen))
