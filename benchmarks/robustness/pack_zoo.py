"""Packs trained models into `purify_fast.zoo`, each with a card of what this package's evaluation left of it.

FOLDER is the folder that a training wrote, with a saved classifier or defence. Without a folder the model must be in
the zoo already, and only its card is written again. The card describes the model. For a new model put a ``card.json``
into FOLDER; its numbers are replaced by those of the evaluation. The classifier behind a defence is a model of the zoo
too, and several defences share it. An interrupted evaluation continues where it stopped.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from purify_fast import __version__
from purify_fast import zoo as packed
from purify_fast._validation import read_norm
from purify_fast.data import DataSet, balanced_subset, load_dataset, to_float
from purify_fast.evaluation import EvaluateConfig, evaluate
from purify_fast.evaluation.show.tables import markdown_table
from purify_fast.methods.loading import load_defence
from purify_fast.training import load_classifier
from purify_fast.training.checkpoint import MODEL, read_model, save_model
from purify_fast.zoo.cards import FILE, MODELS, Accuracy, Card, read_card, write_card

from .. import options
from ..options import Unfit
from . import revisions
from .studies.cifar10 import clean_accuracy as share_correct

#: The largest size of a model, and of all models of the zoo together, in bytes.
LARGEST, ALL = 3_000_000, 20_000_000
#: The protocols whose accuracies a card shows, each with the share of the images that it attacks.
PROTOCOLS = {"standard": 1.0, "strong": 0.25}
#: The protocols for a purifier by diffusion, which predicts at random. "votes" attacks and judges the majority of
#: `VOTES` draws.
DIFFUSION_PROTOCOLS = {"rand": 1.0, "strong": 0.25, "votes": 0.25}
VOTES = 10
#: How many images a protocol with the share 1 attacks, if the command gives no other number.
IMAGES = 200
#: Clean accuracy is measured on at most this many test images.
CLEAN = 10_000
#: The mark of a number that was made by other attacks than the package has now, in the table.
OLDER = "†"
#: The name of the method of a `DiffusionPurifier` in its card.
DIFFUSION = "diffusion"


def size_of(folder: Path) -> int:
    """The size of a saved model, in bytes."""
    return (folder / MODEL).stat().st_size


def card_of(name: str, source: Path) -> Card:
    """The card of a model before the model is judged.

    Raises:
        Unfit: there is no card that describes the model.
    """
    for folder in (MODELS / name, source):
        if (folder / FILE).is_file():
            return replace(read_card(folder), name=name)
    raise Unfit(
        f"there is no model {name!r} in the zoo: there are {', '.join(packed.list())}. For a new model give "
        f"NAME=FOLDER, and put a {FILE} into FOLDER"
    )


def prepare(source: Path, out: Path) -> Path:
    """Write a model in the form of the zoo, and return its folder, which stays beside the reports on the model.

    A model that is too large in float32 is stored in bfloat16. It is judged in the form in which it is stored.

    Args:
        source: the folder that a training wrote.
        out: the folder to write to.

    Raises:
        Unfit: both are the same folder.
    """
    if source.resolve() == out.resolve():
        raise Unfit(f"source and output are the same folder, {source}: as source give the folder that a training wrote")
    out.mkdir(parents=True, exist_ok=True)
    if size_of(source) <= LARGEST:
        shutil.copyfile(source / MODEL, out / MODEL)
    else:
        store_in_bfloat16(source, out)
    return out


def store_in_bfloat16(source: Path, out: Path) -> None:
    """Write a saved model again, with its weights in bfloat16.

    Args:
        source: the folder of the model.
        out: the folder to write to.
    """
    facts, state = read_model(source)
    extra = {key: value for key, value in facts.items() if key not in ("kind", "arguments", "version")}
    stored = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    save_model(out, facts["kind"], facts["arguments"], stored, **extra)


def check_sizes(sources: dict[str, Path], models: Path) -> None:
    """Check that the zoo stays small; raise Unfit otherwise.

    Args:
        sources: the folders of the models as they are to be packed, by name.
        models: the zoo's folder.
    """
    total = sum(size_of(path.parent) for path in models.glob(f"*/{MODEL}") if path.parent.name not in sources)
    for source in sources.values():
        size = size_of(source)
        if size > LARGEST:
            raise Unfit(f"the model in {source} has {size:,} bytes, but a model of the zoo has at most {LARGEST:,}")
        total += size
    if total > ALL:
        raise Unfit(f"the zoo would have {total:,} bytes, but at most {ALL:,} are allowed: pack fewer models")


def pack(source: Path, card: Card, models: Path) -> None:
    """Put a model and its card into the zoo.

    Args:
        source: the folder that `prepare` wrote, or the model's folder in the zoo.
        card: the card of the model.
        models: the zoo's folder.
    """
    folder = models / card.name
    folder.mkdir(parents=True, exist_ok=True)
    if source != folder:
        shutil.copyfile(source / MODEL, folder / MODEL)
    write_card(card, folder)


def clean_accuracy(model: torch.nn.Module, data: DataSet) -> Accuracy:
    """Accuracy on the first test images.

    Args:
        model: images to logits.
        data: data set with the test images.
    """
    x = data.x_test[:CLEAN]
    torch.manual_seed(0)
    return Accuracy(share_correct(model, x, data.y_test), len(x))


def loaded(card: Card, folders: dict[str, Path], models: Path) -> torch.nn.Module:
    """A model in evaluation mode; a defence with its classifier.

    Args:
        card: the card of the model.
        folders: folders of the models that are being packed, by name.
        models: the zoo's folder.

    Raises:
        Unfit: a defence was trained for another classifier than the one in the zoo, or has one of its own.
    """
    folder = folders.get(card.name, models / card.name)
    if card.classifier is None:
        return load_classifier(folder)
    classifier = load_classifier(folders.get(card.classifier, models / card.classifier))
    try:
        model = load_defence(folder, classifier)
    except ValueError as error:
        raise Unfit(str(error)) from error
    if model.own_classifier:
        raise Unfit(
            f"{folder} has a classifier that was trained together with its purifier, but defences of the zoo share "
            "their classifiers: give a defence with a classifier of the zoo"
        )
    return model


def protocols_of(card: Card) -> dict[str, float]:
    """The protocols that judge a model, and the share of the images that each one attacks.

    Args:
        card: the card of the model.
    """
    return DIFFUSION_PROTOCOLS if card.method == DIFFUSION else PROTOCOLS


def attacks_of(card: Card, protocol: str) -> str:
    """A short hash of the attacks that judge a model by a protocol.

    Args:
        card: the card of the model.
        protocol: one of `protocols_of`.
    """
    random, name = card.method not in ("classifier", "ARREST"), "rand" if protocol == "votes" else protocol
    return revisions.short(name, random, card.method == DIFFUSION)


def judge(card: Card, model: torch.nn.Module, images: int, data: DataSet, out: Path) -> Card:
    """Evaluate a model, and return its card.

    Args:
        card: the card of the model.
        model: the model, in evaluation mode.
        images: number of held-out images; `protocols_of` has the share that each protocol attacks.
        data: the data set on which the model was trained.
        out: folder of the reports, by which an interrupted evaluation continues.
    """
    name, attacked = card.name, {}
    for protocol, share in protocols_of(card).items():
        count = max(1, round(share * images))
        chosen = balanced_subset(data.x_test, data.y_test, count, 0, num_classes=data.num_classes)
        asked: dict[str, Any] = {"protocol": protocol}
        if protocol == "votes":
            asked = {"protocol": "rand", "predict": "votes", "n_eval": VOTES}
        config, norm = EvaluateConfig(dataset_name=card.data, **asked), read_norm(card.norm)
        kept: dict[str, Any] = {"name": name, "out": out / name / protocol}
        report = evaluate(model, to_float(chosen.x), chosen.y, eps=card.eps, config=config, norm=norm, **kept)
        report.save(out / name / protocol, model)
        lowest = report.headlines[name]
        print(f"{name}, {protocol}: {lowest}")
        attacked[protocol] = Accuracy(lowest.accuracy, lowest.n, lowest.reliable, report.one_draw(lowest))
    command = f"python -m benchmarks zoo {name} --images {images}"
    return replace(
        card,
        image_shape=data.image_shape,
        judged=command,
        version=__version__,
        clean=clean_accuracy(model, data),
        attacked=attacked,
        attacks={protocol: attacks_of(card, protocol) for protocol in attacked},
    )


def table(models: Sequence[Card]) -> list[str]:
    """The models of the zoo as a table for a page.

    Args:
        models: their cards.
    """
    protocols = list(dict.fromkeys(protocol for card in models for protocol in card.attacked))
    body = []
    for card in models:
        eps = f"{round(255 * card.eps)}/255" if card.data == "cifar10" else f"{card.eps:g}"
        body.append(
            [f"`{card.name}`", card.title, eps, _cell(card.clean), *(_attacked(card, name) for name in protocols)]
        )
    head = ["model", "what it is", "eps", "clean", *(f"`{name}`" for name in protocols)]
    lines = markdown_table(head, body)
    if any(OLDER in line for line in lines):
        lines += [
            "",
            f"{OLDER} An earlier version of the attacks made this number, or one that the card does not name.",
        ]
    return lines


def _attacked(card: Card, protocol: str) -> str:
    if protocol not in card.attacked:
        return "-"
    text = _cell(card.attacked[protocol])
    return text if card.attacks.get(protocol) == attacks_of(card, protocol) else f"{text} {OLDER}"


def _cell(accuracy: Accuracy) -> str:
    text = f"{100 * accuracy.share:.1f} ({accuracy.images:,})"
    text += "" if accuracy.one_draw is None else f", one draw {100 * accuracy.one_draw:.1f}"
    return text if accuracy.reliable else f"{text} **unreliable**"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks zoo``."""
    models = f"a model of the zoo, with the folder of a training that is packed; names: {', '.join(packed.list())}"
    parser.add_argument("models", nargs="+", metavar="NAME[=FOLDER]", help=models)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (PROTOCOLS | DIFFUSION_PROTOCOLS).items())
    shares = shares.replace("%", "%%")
    images = f"how many held-out images are attacked: {shares}; {IMAGES} by default"
    parser.add_argument("--images", type=options.at_least_one, default=IMAGES, help=images)
    parser.add_argument(
        "--data", default="data", help="of MNIST and CIFAR-10: the folder that holds them; data by default"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder for reports; runs/zoo by default")


def sources_of(chosen: argparse.Namespace, models: Path) -> dict[str, Path]:
    """The folders of the models that are packed or judged, by name."""
    split = (model.partition("=") for model in chosen.models)
    return {name: Path(source) if equals else models / name for name, equals, source in split}


def check(chosen: argparse.Namespace, models: Path = MODELS) -> None:
    """ValueError for an unknown name; FileNotFoundError for a model or data that are not there."""
    for name, source in sources_of(chosen, models).items():
        card = card_of(name, source)
        if not (source / MODEL).is_file():
            raise FileNotFoundError(f"{source} holds no model: give NAME=FOLDER, with the folder that a training wrote")
        load_dataset(card.data, chosen.data)


def main(chosen: argparse.Namespace, models: Path = MODELS) -> str:
    """Pack and judge models, and return their cards.

    Args:
        chosen: the options, which `check` has checked.
        models: the zoo's folder.

    Raises:
        Unfit: a model is too large, or of another classifier than that of the zoo.
    """
    sources = sources_of(chosen, models)
    cards = {name: card_of(name, source) for name, source in sources.items()}
    folders = {
        name: source if source == models / name else prepare(source, chosen.out / name / "model")
        for name, source in sources.items()
    }
    check_sizes(folders, models)
    ready = {name: loaded(card, folders, models) for name, card in cards.items()}
    for path in models.glob(f"*/{FILE}"):
        # Load the defences that stay in the zoo, to check that they fit a classifier that is packed anew.
        if (card := read_card(path.parent)).name not in cards and card.classifier in cards:
            loaded(card, folders, models)
    judged = [
        judge(card, ready[name], chosen.images, load_dataset(card.data, chosen.data), chosen.out)
        for name, card in cards.items()
    ]
    # Pack all models in one go at the end, so that a defence and its classifier do not differ for long.
    for card in judged:
        pack(folders[card.name], card, models)
    return "\n".join(map(str, judged))
