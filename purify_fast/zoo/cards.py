"""The models of the zoo, and their cards: how each was trained, and what it withstands."""

from __future__ import annotations

import builtins
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from .._files import write_text
from .._templates import render
from ..methods.loading import load_defence
from ..training import load_classifier

#: The folder of the models that come with the package.
MODELS = Path(__file__).parent / "models"
#: The file of a card, beside the model.
FILE = "card.json"


@dataclass(frozen=True)
class Accuracy:
    """An accuracy of a model.

    Args:
        share: the share of the images that are classified correctly, in [0, 1].
        images: how many images.
        reliable: whether the checks of the evaluation found nothing that makes the number doubtful.
        one_draw: for a random model under attack, whose ``share`` needs every draw right, the share of single draws
            that are right; None if the model predicts the same every time, and for a card that lacks it.
    """

    share: float
    images: int
    reliable: bool = True
    one_draw: float | None = None

    @property
    def standard_error(self) -> float:
        """The binomial standard error of `share`."""
        return math.sqrt(self.share * (1 - self.share) / self.images)

    def __str__(self) -> str:
        text = f"{100 * self.share:.1f} ± {100 * self.standard_error:.1f} % of {self.images:,} images"
        text += "" if self.one_draw is None else f" in every draw, {100 * self.one_draw:.1f} % in one draw"
        return text if self.reliable else f"{text} (unreliable)"


@dataclass(frozen=True)
class Card:
    """The facts about a model.

    Args:
        name: the model's name in the zoo.
        title: a sentence that says what the model is.
        method: the defence: "classifier", "CARSO", "AToP", "ARREST" or "diffusion".
        study_only: whether the model is here to be studied, not to be relied on: a purifier that was trained with only
            its paper's objective.
        data: the data set that it was trained on, as `purify_fast.data.load_dataset` calls it.
        image_shape: (C, H, W) of its images.
        norm: the norm of the ball that it was trained and judged in.
        eps: the radius of that ball in image units.
        training: the command that trains it.
        judged: the command that made the numbers.
        version: the version of this package that made the numbers.
        licence: licence of the weights.
        clean: accuracy on images that are not attacked.
        attacked: accuracy by the name of the protocol, see `purify_fast.evaluation.evaluate`; "votes" is the protocol
            "rand" against the majority of ten draws.
        classifier: the model of the zoo that stands behind the defence; None if the model is a classifier itself.
        attacks: a short hash of each protocol's attacks, of their options and revisions, by the name of the protocol. A
            protocol whose hash is missing was run before cards had them.
    """

    name: str
    title: str
    method: str
    study_only: bool
    data: str
    image_shape: tuple[int, int, int]
    norm: str
    eps: float
    training: str
    judged: str
    version: str
    licence: str
    clean: Accuracy
    attacked: dict[str, Accuracy]
    classifier: str | None = None
    attacks: dict[str, str] = field(default_factory=dict)

    @property
    def lowest(self) -> Accuracy:
        """The lowest known accuracy under attack."""
        return min(self.attacked.values(), key=lambda accuracy: accuracy.share)

    def __str__(self) -> str:
        return render(__package__, "card.txt.jinja", card=self)


def read_card(folder: Path) -> Card:
    """The card in a model's folder.

    Args:
        folder: where the model is.

    Raises:
        FileNotFoundError: the folder has no card.
    """
    facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return Card(
        **facts
        | {
            "image_shape": tuple(facts["image_shape"]),
            "clean": Accuracy(**facts["clean"]),
            "attacked": {name: Accuracy(**accuracy) for name, accuracy in facts["attacked"].items()},
        }
    )


def write_card(card: Card, folder: Path) -> None:
    """Write a card beside its model, atomically.

    Args:
        card: the facts about the model.
        folder: where the model is.
    """
    write_text(folder / FILE, json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")


def card(name: str) -> Card:
    """The facts about a model of the zoo.

    Args:
        name: a name in `list`.

    Raises:
        ValueError: the zoo has no such model; the message names its models.
    """
    return read_card(folder(name))


def list() -> builtins.list[str]:
    """The names of all models, sorted."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{FILE}"))


def folder(name: str) -> Path:
    """The folder that a model was saved in; do not write there, it belongs to the installed package.

    The classifier of a defence is not inside: `classifier_folder` says where it is, and `load` reads both.

    Args:
        name: a name in `list`.

    Raises:
        ValueError: the zoo has no such model; the message names its models.
    """
    if name not in list():
        raise ValueError(f"name must be a model of the zoo, got {name!r}: there are {', '.join(list())}")
    return MODELS / name


def classifier_folder(name: str) -> Path:
    """The folder of the classifier behind a defence of the zoo.

    Args:
        name: a name in `list`, of a defence.

    Raises:
        ValueError: the zoo has no such model, or the model is a classifier itself.
    """
    behind = card(name).classifier
    if behind is None:
        raise ValueError(f"name must be a defence of the zoo, got {name!r}, whose card names no classifier")
    return folder(behind)


def load(name: str) -> nn.Module:
    """A trained model, in evaluation mode, on the CPU.

    Args:
        name: a name in `list`.

    Returns:
        Images ``[B, C, H, W]``, float32 in [0, 1], to logits ``[B, classes]``. A defence has its classifier inside.

    Raises:
        ValueError: the zoo has no such model; the message names its models.
    """
    if card(name).classifier is None:
        return load_classifier(folder(name))
    return load_defence(folder(name), load_classifier(classifier_folder(name)))
