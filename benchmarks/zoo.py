"""Packs trained models into `purify_fast.zoo`, each with a card of what this package's evaluation left of it.

    python -m benchmarks zoo NAME[=FOLDER] ... [--images N] [--data DIR] [--out DIR]

FOLDER is what a training wrote: a saved classifier or defence. Without it the model is in the zoo already, and only its
card is written again. The classifier behind a defence is a model of the zoo as well, which defences share. An
evaluation that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from purify_fast import __version__
from purify_fast.attacks.arguments import read_norm
from purify_fast.data import DataSet, balanced_subset, load_dataset, to_float
from purify_fast.evaluation import evaluate
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.methods.loading import load_defence
from purify_fast.training import load_classifier
from purify_fast.training.checkpoint import read_model, save_model
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
    """What a card says before anything is measured; see `purify_fast.zoo.Card`.

    Attributes:
        bfloat16: whether the weights are stored in bfloat16, because in float32 they would be too large. They are
            judged as they are stored.
    """

    title: str
    method: str
    classifier: str | None = None
    bfloat16: bool = False
    data: str = "digits"
    study_only: bool = False
    norm: str = "linf"
    eps: float = 0.2
    training: str = "make demo (seed 0)"


def _mnist(title: str, method: str, row: str, classifier: str | None = None, study_only: bool = False) -> Entry:
    """A model of a study on MNIST."""
    training = f"python -m benchmarks study {row}, seed 0"
    return Entry(title, method, classifier, data="mnist", study_only=study_only, eps=0.3, training=training)


def _cifar10(title: str, method: str, row: str, seed: int) -> Entry:
    """A model of the study on CIFAR-10."""
    training = f"python -m benchmarks study cifar10 ({row}, seed {seed})"
    return Entry(title, method, data="cifar10", eps=8 / 255, training=training)


def _cifar10_defence(title: str, method: str, row: str, bfloat16: bool = False) -> Entry:
    """A defence of the study on CIFAR-10."""
    return replace(_cifar10(title, method, row, 1), classifier=ROBUST_CIFAR10, bfloat16=bfloat16)


#: The classifiers behind the defences.
STANDARD_DIGITS, ROBUST_DIGITS = "digits-standard", "digits-pgd-at"
ROBUST_MNIST, ROBUST_CIFAR10 = "mnist-pgd-at", "cifar10-pgd-at-w16"
ENTRIES = {
    STANDARD_DIGITS: Entry("A small convolutional network, trained on clean digits.", "classifier"),
    ROBUST_DIGITS: Entry("The same network, trained adversarially with PGD-7: the base of the others.", "classifier"),
    "digits-arrest": Entry("The standard network, finetuned by ARREST.", "ARREST"),
    "digits-carso-objective": Entry(
        "CARSO on digits-pgd-at, trained with the paper's objective.", "CARSO", ROBUST_DIGITS, study_only=True
    ),
    "digits-carso-pipeline": Entry(
        "CARSO on digits-pgd-at, then trained through the whole pipeline.", "CARSO", ROBUST_DIGITS
    ),
    "digits-atop-objective": Entry(
        "AToP on digits-standard, trained with the paper's objective.", "AToP", STANDARD_DIGITS, study_only=True
    ),
    "digits-atop-pipeline": Entry(
        "AToP on digits-standard, then trained through the whole pipeline.", "AToP", STANDARD_DIGITS
    ),
    ROBUST_MNIST: _mnist(
        "A small convolutional network, trained adversarially with PGD-7.", "classifier", "carso_mnist (classifier)"
    ),
    "mnist-arrest": _mnist("A small convolutional network, finetuned by ARREST.", "ARREST", "arrest_mnist (ARREST)"),
    "mnist-carso-objective": _mnist(
        "CARSO on mnist-pgd-at, trained with the paper's objective.",
        "CARSO",
        "carso_mnist (CARSO, paper's objective)",
        ROBUST_MNIST,
        study_only=True,
    ),
    ROBUST_CIFAR10: _cifar10(
        "A PreActResNet-18 of width 16 on CIFAR-10 (JPEG 75), trained adversarially with PGD-5.",
        "classifier",
        "PGD-AT",
        1,
    ),
    "cifar10-arrest-w16": _cifar10(
        "A PreActResNet-18 of width 16 on CIFAR-10 (JPEG 75), finetuned by ARREST with a moving average of weights.",
        "ARREST",
        "ARREST, moving average",
        0,
    ),
    "cifar10-carso-pipeline-w16": _cifar10_defence(
        "CARSO on cifar10-pgd-at-w16, then trained through the whole pipeline; stored in bfloat16.",
        "CARSO",
        "CARSO pipeline",
        bfloat16=True,
    ),
    "cifar10-atop-pipeline-w16": _cifar10_defence(
        "AToP on cifar10-pgd-at-w16, trained through the whole pipeline.",
        "AToP",
        "AToP pipeline",
    ),
}
#: What a saved model consists of.
FILES = ("model.json", "model.safetensors")


def size_of(folder: Path) -> int:
    """The size of a saved model, in bytes."""
    return sum((folder / file).stat().st_size for file in FILES)


def prepare(name: str, source: Path, out: Path) -> Path:
    """Write a model as the zoo keeps it, and return the folder; it stays beside the reports that are on it.

    Args:
        name: one of `ENTRIES`.
        source: the folder that a training wrote.
        out: where to.

    Raises:
        ValueError: both are one folder.
    """
    if source.resolve() == out.resolve():
        raise ValueError(f"{source} is where the model is put before it is packed: give the folder of a training")
    out.mkdir(parents=True, exist_ok=True)
    if not ENTRIES[name].bfloat16:
        for file in FILES:
            shutil.copyfile(source / file, out / file)
        return out
    facts, state = read_model(source)
    extra = {key: value for key, value in facts.items() if key not in ("kind", "arguments", "version")}
    stored = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    save_model(out, facts["kind"], facts["arguments"], stored, **extra)
    return out


def check_sizes(sources: dict[str, Path], models: Path) -> None:
    """That the zoo stays small; ValueError otherwise.

    Args:
        sources: the folders of the models as they are to be packed, by name.
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
        source: the folder that `prepare` wrote, or the one in the zoo.
        card: what is known of the model.
        models: the zoo's folder.
    """
    folder = models / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in FILES if source != folder else ():
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


def loaded(name: str, folders: dict[str, Path], models: Path) -> torch.nn.Module:
    """A model in evaluation mode; a defence with its classifier.

    Args:
        name: one of `ENTRIES`.
        folders: of the models that are being packed, by name.
        models: the zoo's folder.

    Raises:
        ValueError: a defence was trained for another classifier than the one in the zoo, or has one of its own.
    """
    folder, behind = folders.get(name, models / name), ENTRIES[name].classifier
    if behind is None:
        return load_classifier(folder)
    model = load_defence(folder, loaded(behind, folders, models))
    if model.own_classifier:
        raise ValueError(f"{folder} has a classifier that was trained with its purifier: the zoo cannot share it")
    return model


def judge(name: str, model: torch.nn.Module, images: int, data: DataSet, out: Path) -> Card:
    """Evaluate a model, and return its card.

    Args:
        name: one of `ENTRIES`.
        model: in evaluation mode.
        images: how many held-out images are attacked; `PROTOCOLS` has the share of each protocol.
        data: the data set that it was trained on.
        out: where the reports are kept, so that an interrupted evaluation goes on.
    """
    entry = ENTRIES[name]
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
        study_only=entry.study_only,
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
        classifier=entry.classifier,
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
        ValueError: an unknown name, no images, a model that is too large, another classifier than that of the zoo.
        FileNotFoundError: no such model or data.
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
    sets = {ENTRIES[name].data for name in sources}
    found = {kind: load_dataset(kind, chosen.data or "data") for kind in sorted(sets)}
    folders = {
        name: source if source == models / name else prepare(name, source, chosen.out / name / "model")
        for name, source in sources.items()
    }
    check_sizes(folders, models)
    ready = {name: loaded(name, folders, models) for name in sources}
    for name, entry in ENTRIES.items():
        # what stays in the zoo must fit a classifier that is packed anew
        if name not in sources and entry.classifier in sources and (models / name).is_dir():
            loaded(name, folders, models)
    cards = {
        name: judge(name, model, chosen.images, found[ENTRIES[name].data], chosen.out) for name, model in ready.items()
    }
    # all at once, so that a defence and its classifier never differ for long
    for name, card in cards.items():
        pack(name, folders[name], card, models)
        print(card)
    return list(cards.values())
