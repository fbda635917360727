"""Evaluate trained models, and put them into `purify_fast.zoo`.

NAME=FOLDER packs the model that a training wrote into FOLDER; a new model needs a ``card.json`` there. NAME evaluates a
model of the zoo again. The classifier of a defence must be in the zoo too. The same command continues a stopped run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from purify_fast import __version__, zoo as packed
from purify_fast._files import write_text
from purify_fast._validation import read_norm
from purify_fast.data import DataSet, balanced_subset, load_dataset, to_float
from purify_fast.defences import MajorityVote
from purify_fast.evaluation import EvaluateConfig, certify, evaluate, refute
from purify_fast.judge.show.text import markdown_table
from purify_fast.methods.loading import load_defence
from purify_fast.training import load_classifier
from purify_fast.training.run import MODEL, read_model, save_model
from purify_fast.zoo import FILE, MODELS, Accuracy, Card, read_card

from . import revisions

#: The largest size in bytes of a model that is stored in float32.
LARGEST = 3_000_000
#: The protocols whose accuracies are in a card, each with the share of the images that it attacks.
PROTOCOLS = {"standard": 1.0, "strong": 0.25}
#: The protocols for a purifier by diffusion. "votes" attacks and judges the majority of `VOTES` predictions.
DIFFUSION_PROTOCOLS = {"rand": 1.0, "strong": 0.25, "votes": 0.25}
VOTES = 10
#: The default number of images that a protocol with the share 1 attacks.
IMAGES = 200
#: The largest number of test images on which clean accuracy is measured.
CLEAN = 10_000
#: The mark in the table for a number that was measured with attacks of an earlier version.
OLDER = "†"
#: The name of the method in the card of a `DiffusionPurifier`.
DIFFUSION = "diffusion"


def card_of(name: str, source: Path) -> Card:
    """Return the card that a model has before the evaluation."""
    for folder in (MODELS / name, source):
        if (folder / FILE).is_file():
            return replace(read_card(folder), name=name)
    raise ValueError(f"{name!r} has no {FILE} in {source}, and is no model of the zoo: {', '.join(packed.list())}")


def prepare(source: Path, out: Path) -> Path:
    """Write a model in the form in which the zoo stores it, and return its new folder.

    A model that is too large in float32 is stored in bfloat16. The evaluation uses the stored model.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (source / MODEL).stat().st_size <= LARGEST:
        shutil.copyfile(source / MODEL, out / MODEL)
    else:
        facts, state = read_model(source)
        extra = {key: value for key, value in facts.items() if key not in ("kind", "arguments", "version")}
        stored = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
        save_model(out, facts["kind"], facts["arguments"], stored, **extra)
    return out


def clean_accuracy(model: torch.nn.Module, data: DataSet) -> Accuracy:
    """Measure the accuracy on the first `CLEAN` test images."""
    x, y = data.x_test[:CLEAN], data.y_test[:CLEAN]
    torch.manual_seed(0)
    with torch.no_grad():
        predicted = torch.cat([model(to_float(part)).argmax(1) for part in x.split(250)])
    return Accuracy(float((predicted == y).double().mean()), len(x))


def loaded(card: Card, folders: dict[str, Path], models: Path) -> torch.nn.Module:
    """Load a model in evaluation mode. A defence is loaded together with its classifier."""
    folder = folders.get(card.name, models / card.name)
    if card.classifier is None:
        return load_classifier(folder)
    classifier = load_classifier(folders.get(card.classifier, models / card.classifier))
    return load_defence(folder, classifier)


def protocols_of(card: Card) -> dict[str, float]:
    """Return the protocols by which a model is evaluated, each with the share of the images that it attacks.

    `certified` evaluates a model for randomized smoothing.
    """
    if card.sigma is not None:
        return {}
    return DIFFUSION_PROTOCOLS if card.method == DIFFUSION else PROTOCOLS


def attacks_of(card: Card, protocol: str) -> str:
    """Return a short hash of the attacks that a protocol runs on a model."""
    random, name = card.method not in ("classifier", "ARREST"), "rand" if protocol == "votes" else protocol
    return revisions.short(name, random, card.method == DIFFUSION)


def certified(
    card: Card, model: torch.nn.Module, images: int, data: DataSet, out: Path
) -> tuple[Accuracy, dict[str, Accuracy]]:
    """Return the certified accuracy of a smoothed classifier, and its accuracy under a protocol, by name."""
    assert card.sigma is not None
    chosen = balanced_subset(data.x_test, data.y_test, images, 0, num_classes=data.num_classes)
    x, at = to_float(chosen.x), {"out": out, "name": card.name}
    made = certify(model, x, chosen.y, sigma=card.sigma, radius=card.eps, **at)
    # On MNIST, "strong" takes hours for a smoothed classifier.
    protocol = "strong" if card.data == "digits" else "fast"
    made, _ = refute(made, model, x, chosen.y, radius=card.eps, protocol=protocol, **at)
    made.save(out)
    print(made.to_text())
    low, high = made.between(card.eps)
    return Accuracy(low, images), {protocol: Accuracy(high, images)}


def judge(card: Card, model: torch.nn.Module, images: int, data: DataSet, out: Path) -> Card:
    """Evaluate a model, and return its new card."""
    name, attacked, proved = card.name, dict[str, Accuracy](), None
    if card.sigma is not None:
        proved, attacked = certified(card, model, images, data, out / name)
    for protocol, share in protocols_of(card).items():
        count = max(1, round(share * images))
        chosen = balanced_subset(data.x_test, data.y_test, count, 0, num_classes=data.num_classes)
        asked: dict[str, Any] = {"protocol": protocol}
        judged = model
        if protocol == "votes":
            judged, asked = MajorityVote(model, VOTES), {"protocol": "rand", "n_eval": 1}
        asked |= {"config": EvaluateConfig(dataset_name=card.data), "name": name, "out": out / name / protocol}
        report = evaluate(judged, to_float(chosen.x), chosen.y, eps=card.eps, norm=read_norm(card.norm), **asked)
        report.save(out / name / protocol, model)
        lowest = report.headline
        print(f"{name}, {protocol}: {lowest}")
        one_draw = None if lowest.n_eval == 1 else lowest.mean
        attacked[protocol] = Accuracy(lowest.accuracy, lowest.n, lowest.reliable, one_draw)
    return replace(
        card,
        image_shape=data.image_shape,
        judged=f"python -m benchmarks zoo {name} --images {images}",
        version=__version__,
        clean=clean_accuracy(model, data),
        attacked=attacked,
        certified=proved,
        attacks={protocol: attacks_of(card, protocol) for protocol in attacked},
    )


def table(models: Sequence[Card]) -> list[str]:
    """Return a table of the models of the zoo for each data set, the most robust first."""
    protocols, lines = list(dict.fromkeys(protocol for card in models for protocol in card.attacked)), list[str]()
    head = ["model", "what it is", "eps", "clean", "certified", *(f"`{name}`" for name in protocols)]
    for data in dict.fromkeys(card.data for card in models):
        own = sorted((card for card in models if card.data == data), key=_robust, reverse=True)
        body = []
        for card in own:
            eps = f"{round(255 * card.eps)}/255" if card.data == "cifar10" else f"{card.eps:g}"
            eps += ", L2" if card.norm == "l2" else ""
            cells = (_attacked(card, name) for name in protocols)
            proved = "-" if card.certified is None else _cell(card.certified)
            body.append([f"`{card.name}`", card.title, eps, _cell(card.clean), proved, *cells])
        # A column without a number is left out.
        kept = [k for k in range(len(head)) if any(line[k] != "-" for line in body)]
        lines += [f"## On {data}", ""]
        lines += [*markdown_table([head[k] for k in kept], [[line[k] for k in kept] for line in body]), ""]
    if any(OLDER in line for line in lines):
        lines += [f"{OLDER} This number was measured with attacks of an earlier or unknown version."]
    return lines


def _robust(card: Card) -> tuple[bool, float]:
    """The rank of a model by its lowest robust accuracy; models without one, or with an unreliable one, come last."""
    shares = [accuracy.share for accuracy in card.attacked.values()]
    reliable = all(accuracy.reliable for accuracy in card.attacked.values())
    return bool(shares) and reliable, min(shares, default=0.0)


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
    """Add the options of ``python -m benchmarks zoo``."""
    models = f"name of a model; for a new model also the folder of its training. Names: {', '.join(packed.list())}"
    parser.add_argument("models", nargs="+", metavar="NAME[=FOLDER]", help=models)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (PROTOCOLS | DIFFUSION_PROTOCOLS).items())
    shares = shares.replace("%", "%%")
    images = f"number of held-out images; default: {IMAGES}. The protocols attack these shares of them: {shares}"
    parser.add_argument("--images", type=int, default=IMAGES, help=images)
    parser.add_argument("--data", default="data", help="folder with MNIST and CIFAR-10; default: data")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder for reports; default: runs/zoo")


def main(chosen: argparse.Namespace, models: Path = MODELS) -> str:
    """Evaluate and pack models, and return their cards."""
    split = (model.partition("=") for model in chosen.models)
    sources = {name: Path(source) if equals else models / name for name, equals, source in split}
    cards = {name: card_of(name, source) for name, source in sources.items()}
    new = {name: source for name, source in sources.items() if source != models / name}
    folders = sources | {name: prepare(source, chosen.out / name / "model") for name, source in new.items()}
    ready = {name: loaded(card, folders, models) for name, card in cards.items()}
    for card in map(read_card, (path.parent for path in models.glob(f"*/{FILE}"))):
        if card.name not in cards and card.classifier in cards:
            # A defence that stays in the zoo must fit the classifier that is replaced.
            loaded(card, folders, models)
    judged = []
    for name, card in cards.items():
        judged.append(judge(card, ready[name], chosen.images, load_dataset(card.data, chosen.data), chosen.out))
    # Pack all models at the end, so that the zoo is inconsistent only for a short time.
    for card in judged:
        folder = models / card.name
        folder.mkdir(parents=True, exist_ok=True)
        if folders[card.name] != folder:
            shutil.copyfile(folders[card.name] / MODEL, folder / MODEL)
        weights = (folder / MODEL).read_bytes()
        card = replace(card, size=len(weights), sha256=hashlib.sha256(weights).hexdigest())
        write_text(folder / FILE, json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")
    return "\n".join(map(str, judged))
