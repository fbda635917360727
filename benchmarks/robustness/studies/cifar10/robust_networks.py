"""Train robust networks for the comparison of attacks: ``python -m benchmarks robust_networks NAME``.

Each network starts as a network of the zoo, and is trained like the base of the study for one pass over the images. An
interrupted training is resumed. The trained network is written in bfloat16 into the folder ``zoo``, with a card.
``python -m benchmarks zoo NAME=FOLDER`` then evaluates it and puts it into the zoo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from purify_fast import __version__
from purify_fast.zoo.cards import Accuracy, Card, write_card

from ....options import one_of
from ... import pack_zoo
from .. import Job, run
from .models import train_base
from .study import EPS, Training

#: The network of the zoo with which the trainings start. Therefore one pass over the images is enough.
BASE = "cifar10-pgd-at-w16"


#: The settings of each network's training, and words that describe the training on the card.
NETWORKS: dict[str, tuple[dict[str, object], str]] = {
    "cifar10-trades-w16": ({"trades": True}, "by TRADES with PGD-5"),
    "cifar10-half-eps-at-w16": ({"share": 0.5}, "with PGD-5 at half the radius that it is judged at"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks robust_networks``."""
    parser.add_argument("name", type=one_of(NETWORKS), help=f"name of the network: {', '.join(NETWORKS)}")
    data = "folder with cifar10.npz, or with the official files; default: data"
    parser.add_argument("--data", default="data", help=data)
    parser.add_argument("--device", default="cpu", help="device of the training; default: cpu")
    out = "folder of the trainings; default: runs/robust_networks"
    parser.add_argument("--out", type=Path, default=Path("runs/robust_networks"), help=out)


def main(chosen: argparse.Namespace) -> Path:
    """Train a network, and return the folder with the stored network and its card."""
    how, text = NETWORKS[chosen.name]
    budget = Training(base_epochs=1)
    settings = {"data": chosen.data, "device": chosen.device, "budget": budget, "how": how | {"begin": BASE}}
    job = Job(chosen.name, 0, train_base, settings=settings)
    run([job], chosen.out, workers=1)
    folder = job.folder(chosen.out) / "zoo"
    pack_zoo.store_in_bfloat16(job.folder(chosen.out), folder)
    card = Card(
        name=chosen.name,
        title=f"A PreActResNet-18 of width 16 on CIFAR-10 (JPEG 75), trained as {BASE}, then for one pass {text}.",
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
