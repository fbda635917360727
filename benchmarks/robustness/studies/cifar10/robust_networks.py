"""The robust networks that are trained for the contest of attacks: ``python -m benchmarks robust_networks NAME``.

Each is trained like the study's base, for fewer passes over the images; some go on from a network of the zoo. A stopped
training is resumed. The result lies in the folder ``zoo``, in bfloat16 and with a card; ``python -m benchmarks zoo
NAME=FOLDER`` judges and packs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from purify_fast import __version__
from purify_fast.zoo.cards import Accuracy, Card, write_card

from ....options import one_of
from ... import pack_zoo
from .. import Job, run
from .models import train_base
from .study import EPS, Training

#: The zoo's network from which some networks begin, so that one pass over the images is enough.
BASE = "cifar10-pgd-at-w16"


class Network(NamedTuple):
    """A network: its width, the differences of its training from the study's base, and its description."""

    width: int
    how: dict[str, object]
    training: str
    epochs: int
    seed: int = 0


NETWORKS = {
    "cifar10-trades-w16": Network(
        16, {"trades": True, "begin": BASE}, f"trained as {BASE}, then for one pass by TRADES with PGD-5", epochs=1
    ),
    "cifar10-half-eps-at-w16": Network(
        16,
        {"share": 0.5, "begin": BASE},
        f"trained as {BASE}, then for one pass with PGD-5 at half the radius that it is judged at",
        epochs=1,
    ),
    "cifar10-pgd-at-w20": Network(20, {}, "trained adversarially with PGD-5", epochs=3),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks robust_networks``."""
    parser.add_argument("name", type=one_of(NETWORKS), help=f"which network: {', '.join(NETWORKS)}")
    parser.add_argument("--data", default="data", help="folder with cifar10.npz or the official files")
    parser.add_argument("--device", default="cpu", help="where it is trained; cpu by default")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/robust_networks"), help="where trainings are kept; runs/robust_networks"
    )


def main(chosen: argparse.Namespace) -> Path:
    """Train a network, and return the folder that the zoo packs."""
    network = NETWORKS[chosen.name]
    budget = Training(width=network.width, base_epochs=network.epochs)
    settings = {"data": chosen.data, "device": chosen.device, "budget": budget, "how": network.how}
    job = Job(chosen.name, network.seed, train_base, settings=settings)
    run([job], chosen.out, workers=1)
    folder = job.folder(chosen.out) / "zoo"
    pack_zoo.store_in_bfloat16(job.folder(chosen.out), folder)
    card = Card(
        name=chosen.name,
        title=f"A PreActResNet-18 of width {network.width} on CIFAR-10 (JPEG 75), {network.training}.",
        method="classifier",
        study_only=False,
        data="cifar10",
        image_shape=(3, 32, 32),
        norm="linf",
        eps=EPS,
        training=f"python -m benchmarks robust_networks {chosen.name}",
        judged="",
        version=__version__,
        licence="MIT, as the package; the images that it was trained on have licences of their own",
        clean=Accuracy(0.0, 1),
        attacked={},
    )
    write_card(card, folder)
    return folder
