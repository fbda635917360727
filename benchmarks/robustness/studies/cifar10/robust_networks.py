"""Train robust networks for the comparison of attacks: ``python -m benchmarks robust_networks NAME``.

Each training starts with a network of the zoo. The training is that of the base of the study on CIFAR-10, but makes
only a single pass over the images. An interrupted training is resumed. The trained network is written in bfloat16 into
the subfolder ``zoo`` of its folder. Then ``python -m benchmarks zoo NAME=FOLDER`` evaluates the network, and puts it
into the zoo. The zoo already has the network's card.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

from ....options import one_of
from ... import pack_zoo
from .. import Job, run
from .models import train_base
from .study import budget_of

#: The network of the zoo with which the trainings start. It is already robust, so one pass over the images is enough.
BASE = "cifar10-pgd-at-w16"


#: The settings of each network's training: TRADES, and adversarial training at half of the radius of the evaluation.
NETWORKS: dict[str, dict[str, object]] = {
    "cifar10-trades-w16": {"trades": True},
    "cifar10-half-eps-at-w16": {"share": 0.5},
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
    """Train a network, and return the folder with the stored network."""
    budget = SimpleNamespace(**vars(budget_of("default").training) | {"base_epochs": 1})
    how = NETWORKS[chosen.name] | {"begin": BASE}
    settings = {"data": chosen.data, "device": chosen.device, "budget": budget, "how": how}
    job = Job(chosen.name, 0, train_base, settings=settings)
    run([job], chosen.out, workers=1)
    folder = job.folder(chosen.out) / "zoo"
    pack_zoo.store_in_bfloat16(job.folder(chosen.out), folder)
    return folder
