"""The robust networks that are trained for the contest of attacks: ``python -m benchmarks robust_networks NAME``.

Each begins as a network of the zoo and is trained like the study's base, for one pass over the images. A stopped
training is resumed. The result lies in the folder ``zoo``, in bfloat16 and with a card; ``python -m benchmarks zoo
NAME=FOLDER`` judges and packs it.
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

#: The network of the zoo with which the trainings begin, so that one pass over the images is enough.
BASE = "cifar10-pgd-at-w16"


#: The settings of each network's training, and its description.
NETWORKS: dict[str, tuple[dict[str, object], str]] = {
    "cifar10-trades-w16": ({"trades": True}, "by TRADES with PGD-5"),
    "cifar10-half-eps-at-w16": ({"share": 0.5}, "with PGD-5 at half the radius that it is judged at"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks robust_networks``."""
    parser.add_argument("name", type=one_of(NETWORKS), help=f"which network: {', '.join(NETWORKS)}")
    parser.add_argument("--data", default="data", help="folder with cifar10.npz or the official files")
    parser.add_argument("--device", default="cpu", help="device of the training; cpu by default")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/robust_networks"), help="folder of the trainings; runs/robust_networks"
    )


def main(chosen: argparse.Namespace) -> Path:
    """Train a network, and return the folder that the zoo packs."""
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
