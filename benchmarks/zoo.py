"""Packs trained models into `purify_fast.zoo`, each with a card of what this package's evaluation left of it.

    python -m benchmarks zoo NAME=FOLDER ... [--images N]

FOLDER is what a training wrote: a saved classifier, or a defence with its classifier inside.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from purify_fast import __version__
from purify_fast.attacks.arguments import read_norm
from purify_fast.data import balanced_subset, load_dataset, to_float
from purify_fast.evaluation import evaluate
from purify_fast.methods.loading import load_defence
from purify_fast.training import is_classifier, load_classifier
from purify_fast.zoo.cards import MODELS, Accuracy, Card, write_card

#: The largest model, and all of them together, in bytes.
LARGEST, ALL = 3_000_000, 20_000_000
#: The protocols that a card has a number of, and the share of the images that each one attacks.
PROTOCOLS = {"default": 1.0}
LICENCE = "MIT, as the package; the images that it was trained on have licences of their own"


@dataclass(frozen=True)
class Entry:
    """What a card says before anything is measured; see `purify_fast.zoo.Card`."""

    title: str
    method: str
    data: str = "digits"
    published: bool = False
    norm: str = "linf"
    eps: float = 0.2
    training: str = "make demo (seed 0)"


ENTRIES = {
    "digits-standard": Entry("A small convolutional network, trained on clean digits.", "classifier"),
    "digits-pgd-at": Entry("The same network, trained adversarially with PGD-7: the base of the others.", "classifier"),
    "digits-arrest": Entry("The standard network, finetuned by ARREST.", "ARREST"),
    "digits-carso-published": Entry("CARSO on digits-pgd-at, trained as published.", "CARSO", published=True),
    "digits-carso-pipeline": Entry("CARSO on digits-pgd-at, then trained through the whole pipeline.", "CARSO"),
    "digits-atop-published": Entry("AToP on digits-standard, trained as published.", "AToP", published=True),
    "digits-atop-pipeline": Entry("AToP on digits-standard, then trained through the whole pipeline.", "AToP"),
    "cifar10-pgd-at-w16": Entry(
        "A PreActResNet-18 of width 16, trained adversarially with PGD-10 on CIFAR-10 (JPEG 75).",
        "classifier",
        data="cifar10",
        eps=8 / 255,
        training="python -m benchmarks study cifar10 (base, seed 0)",
    ),
}


def pack(name: str, source: Path, models: Path = MODELS) -> Path:
    """Copy a model's files into the zoo.

    Args:
        name: one of `ENTRIES`.
        source: the folder that a training wrote.
        models: the zoo's folder.

    Returns:
        The model's folder in the zoo.

    Raises:
        ValueError: an unknown name, or a model that is too large.
    """
    if name not in ENTRIES:
        raise ValueError(f"name must be one of {', '.join(ENTRIES)}, got {name!r}")
    parts = [Path(), Path("classifier")] if (source / "classifier").is_dir() else [Path()]
    files = [part / file for part in parts for file in ("model.json", "model.safetensors")]
    size = sum((source / file).stat().st_size for file in files)
    if size > LARGEST:
        raise ValueError(f"{source} has {size:,} bytes: a model of the zoo has at most {LARGEST:,}")
    for file in files:
        (models / name / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, models / name / file)
    return models / name


def judge(name: str, folder: Path, images: int, data_root: Path | None = None) -> Card:
    """Evaluate a model of the zoo, and write its card.

    Args:
        name: one of `ENTRIES`.
        folder: its folder.
        images: how many held-out images are attacked; `PROTOCOLS` has the share of each protocol.
        data_root: where its data set is looked for.
    """
    entry = ENTRIES[name]
    model = load_classifier(folder) if is_classifier(folder) else load_defence(folder)
    data = load_dataset(entry.data, data_root)
    clean, attacked = None, {}
    for protocol, share in PROTOCOLS.items():
        chosen = balanced_subset(data.x_test, data.y_test, round(share * images), 0, num_classes=data.num_classes)
        report = evaluate(
            model,
            to_float(chosen.x),
            chosen.y,
            eps=entry.eps,
            norm=read_norm(entry.norm),
            name=name,
            dataset_name=entry.data,
            **({} if protocol == "default" else {"protocol": protocol}),
        )
        print(report.to_text())
        if clean is None:
            row = next(row for row in report.rows if row.kind == "clean")
            clean = Accuracy(row.accuracy, row.n, row.reliable)
        lowest = report.headlines[name]
        attacked[protocol] = Accuracy(lowest.accuracy, lowest.n, lowest.reliable)
    assert clean is not None
    card = Card(
        name=name,
        title=entry.title,
        method=entry.method,
        published=entry.published,
        data=entry.data,
        image_shape=data.image_shape,
        norm=entry.norm,
        eps=entry.eps,
        training=entry.training,
        judged=f"python -m benchmarks zoo {name}=FOLDER --images {images}",
        version=__version__,
        licence=LICENCE,
        clean=clean,
        attacked=attacked,
    )
    write_card(card, folder)
    return card
