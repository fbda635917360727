"""Packs trained models into `purify_fast.zoo`, each with a card of what this package's evaluation left of it.

    python -m benchmarks zoo NAME[=FOLDER] ... [--images N] [--data DIR] [--out DIR]

FOLDER is what a training wrote: a saved classifier, or a defence with its classifier inside. Without it the model is in
the zoo already, and only its card is written again. An evaluation that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from purify_fast import __version__
from purify_fast.attacks.arguments import read_norm
from purify_fast.data import DataSet, balanced_subset, load_dataset, to_float
from purify_fast.evaluation import evaluate
from purify_fast.evaluation.tables import markdown_table
from purify_fast.methods.loading import load_defence
from purify_fast.training import is_classifier, load_classifier
from purify_fast.zoo.cards import MODELS, Accuracy, Card, write_card

from .studies.cifar10 import clean_accuracy as share_correct

#: The largest model, and all of them together, in bytes.
LARGEST, ALL = 3_000_000, 20_000_000
#: The protocols that a card has a number of, and the share of the images that each one attacks.
PROTOCOLS = {"standard": 1.0, "strong": 0.25}
#: Images that the first of these attacks, if the command does not say another number.
IMAGES = 200
#: Test images of clean accuracy, at most.
CLEAN = 10_000
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


def _mnist(title: str, method: str, row: str, published: bool = False) -> Entry:
    """A model of a study on MNIST."""
    return Entry(title, method, "mnist", published, eps=0.3, training=f"python -m benchmarks study {row}, seed 0")


def _cifar10(how: str, row: str, method: str = "classifier") -> Entry:
    """A classifier of the study on CIFAR-10."""
    title = f"A PreActResNet-18 of width 16 on CIFAR-10 (JPEG 75), {how}."
    training = f"python -m benchmarks study cifar10 ({row}, seed 0)"
    return Entry(title, method, "cifar10", eps=8 / 255, training=training)


ENTRIES = {
    "digits-standard": Entry("A small convolutional network, trained on clean digits.", "classifier"),
    "digits-pgd-at": Entry("The same network, trained adversarially with PGD-7: the base of the others.", "classifier"),
    "digits-arrest": Entry("The standard network, finetuned by ARREST.", "ARREST"),
    "digits-carso-published": Entry("CARSO on digits-pgd-at, trained as published.", "CARSO", published=True),
    "digits-carso-pipeline": Entry("CARSO on digits-pgd-at, then trained through the whole pipeline.", "CARSO"),
    "digits-atop-published": Entry("AToP on digits-standard, trained as published.", "AToP", published=True),
    "digits-atop-pipeline": Entry("AToP on digits-standard, then trained through the whole pipeline.", "AToP"),
    "mnist-pgd-at": _mnist(
        "A small convolutional network, trained adversarially with PGD-7.", "classifier", "carso_mnist (classifier)"
    ),
    "mnist-arrest": _mnist("A small convolutional network, finetuned by ARREST.", "ARREST", "arrest_mnist (ARREST)"),
    "mnist-carso-published": _mnist(
        "CARSO on mnist-pgd-at, trained as published.", "CARSO", "carso_mnist (CARSO published)", published=True
    ),
    "mnist-carso-pipeline": _mnist(
        "CARSO on mnist-pgd-at, then trained through the whole pipeline.", "CARSO", "carso_mnist (CARSO pipeline)"
    ),
    "cifar10-pgd-at-w16": _cifar10("trained adversarially with PGD-5", "PGD-AT"),
    "cifar10-trades-w16": _cifar10("trained by TRADES", "TRADES"),
    "cifar10-arrest-w16": _cifar10("finetuned by ARREST", "ARREST", method="ARREST"),
}


def files_of(source: Path) -> list[Path]:
    """The files of a saved model that the zoo keeps, relative to its folder."""
    parts = [Path(), Path("classifier")] if (source / "classifier").is_dir() else [Path()]
    return [part / file for part in parts for file in ("model.json", "model.safetensors")]


def size_of(source: Path) -> int:
    """The size of these files, in bytes."""
    return sum((source / file).stat().st_size for file in files_of(source))


def check_sizes(sources: dict[str, Path], models: Path) -> None:
    """That the zoo stays small; ValueError otherwise.

    Args:
        sources: the folders of the models that are to be packed, by name.
        models: the zoo's folder.
    """
    total = sum(size_of(path.parent) for path in models.glob("*/model.json") if path.parent.name not in sources)
    for source in sources.values():
        size = size_of(source)
        if size > LARGEST:
            raise ValueError(f"{source} has {size:,} bytes: a model of the zoo has at most {LARGEST:,}")
        total += size
    if total > ALL:
        raise ValueError(f"the zoo would have {total:,} bytes: at most {ALL:,} are allowed")


def pack(name: str, source: Path, card: Card, models: Path) -> None:
    """Put a model and its card into the zoo.

    Args:
        name: one of `ENTRIES`.
        source: the folder that a training wrote, or the one in the zoo.
        card: what is known of the model.
        models: the zoo's folder.
    """
    folder = models / name
    for file in files_of(source) if source != folder else []:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, folder / file)
    write_card(card, folder)


def clean_accuracy(model: torch.nn.Module, data: DataSet) -> Accuracy:
    """Accuracy on the first test images.

    Args:
        model: images to logits.
        data: whose test images are classified.
    """
    x = data.x_test[:CLEAN]
    torch.manual_seed(0)
    return Accuracy(share_correct(model, x, data.y_test), len(x))


def judge(name: str, folder: Path, images: int, data: DataSet, out: Path) -> Card:
    """Evaluate a model, and return its card.

    Args:
        name: one of `ENTRIES`.
        folder: where the model is.
        images: how many held-out images are attacked; `PROTOCOLS` has the share of each protocol.
        data: the data set that it was trained on.
        out: where the reports are kept, so that an interrupted evaluation goes on.
    """
    entry = ENTRIES[name]
    model = load_classifier(folder) if is_classifier(folder) else load_defence(folder)
    model.eval()
    attacked = {}
    for protocol, share in PROTOCOLS.items():
        count = max(1, round(share * images))
        chosen = balanced_subset(data.x_test, data.y_test, count, 0, num_classes=data.num_classes)
        report = evaluate(
            model, to_float(chosen.x), chosen.y, eps=entry.eps, norm=read_norm(entry.norm), protocol=protocol,
            name=name, dataset_name=entry.data, out=out / name / protocol,
        )  # fmt: skip
        report.save(out / name / protocol, model)
        lowest = report.headlines[name]
        print(f"{name}, {protocol}: {lowest}")
        attacked[protocol] = Accuracy(lowest.accuracy, lowest.n, lowest.reliable)
    return Card(
        name=name,
        title=entry.title,
        method=entry.method,
        published=entry.published,
        data=entry.data,
        image_shape=data.image_shape,
        norm=entry.norm,
        eps=entry.eps,
        training=entry.training,
        judged=f"python -m benchmarks zoo {name} --images {images}",
        version=__version__,
        licence=LICENCE,
        clean=clean_accuracy(model, data),
        attacked=attacked,
    )


def markdown(models: Sequence[Card]) -> str:
    """The models of the zoo as a table for a page.

    Args:
        models: their cards.
    """
    protocols = list(dict.fromkeys(protocol for card in models for protocol in card.attacked))
    body = []
    for card in models:
        eps = f"{round(255 * card.eps)}/255" if card.data == "cifar10" else f"{card.eps:g}"
        cells = [_cell(card.clean), *(_cell(card.attacked.get(name)) for name in protocols)]
        body.append([f"`{card.name}`", card.title, eps, *cells])
    head = ["model", "what it is", "eps", "clean", *(f"`{name}`" for name in protocols)]
    return "\n".join(markdown_table(head, body))


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    text = f"{100 * accuracy.share:.1f} ({accuracy.images:,})"
    return text if accuracy.reliable else f"{text} **unreliable**"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks zoo``."""
    models = f"a model of the zoo, with the folder of a training that is packed; names: {', '.join(ENTRIES)}"
    parser.add_argument("models", nargs="+", metavar="NAME[=FOLDER]", help=models)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in PROTOCOLS.items()).replace("%", "%%")
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        help=f"how many held-out images are attacked: {shares}; {IMAGES} by default",
    )
    parser.add_argument("--data", help="of MNIST and CIFAR-10: the folder that holds them; data by default")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder for reports; runs/zoo by default")


def main(chosen: argparse.Namespace, models: Path = MODELS) -> list[Card]:
    """Pack and judge models.

    Args:
        chosen: what `add_arguments` read.
        models: the zoo's folder.

    Raises:
        ValueError: an unknown name, no images, a model that is too large. FileNotFoundError: no such model or data.
    """
    if chosen.images < 1:
        raise ValueError(f"--images must be at least 1, got {chosen.images}")
    split = (model.partition("=") for model in chosen.models)
    sources = {name: Path(source) if equals else models / name for name, equals, source in split}
    for name, source in sources.items():
        if name not in ENTRIES:
            raise ValueError(f"there is no model {name!r}: there are {', '.join(ENTRIES)}")
        if not (source / "model.json").is_file():
            raise FileNotFoundError(f"{source} holds no model: give NAME=FOLDER")
    check_sizes(sources, models)
    sets = {ENTRIES[name].data for name in sources}
    found = {kind: load_dataset(kind, chosen.data or "data") for kind in sorted(sets)}
    cards = []
    for name, source in sources.items():
        card = judge(name, source, chosen.images, found[ENTRIES[name].data], chosen.out)
        pack(name, source, card, models)
        print(card)
        cards.append(card)
    return cards
