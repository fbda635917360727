"""What is known of a model of the zoo: how it was trained, and what it withstands."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from .._files import write_text

#: The folder of the models that come with the package.
MODELS = Path(__file__).parent / "models"
#: The file of a card, beside the model.
FILE = "card.json"
#: What a card asks of a reader who found a stronger attack.
REPORT = (
    "Lower? Open an issue with the template 'I got a zoo model or another defence lower', with the attack and the "
    "seed. The card will carry your number and your name."
)


#: What a protocol of a card runs, in a few words.
PROTOCOLS = {
    "fast": "Auto-PGD, untargeted and targeted",
    "standard": "AutoAttack's four attacks by this package's engine",
    "rand": "AutoAttack's version for random models by this package's engine",
    "strong": "every target, restarts, surrogates, and other aggregations of the samples",
    "official": "AutoAttack itself",
}


@dataclass(frozen=True)
class Accuracy:
    """One accuracy of a model.

    Args:
        share: the share of the images that are classified correctly, in [0, 1].
        images: how many images.
        reliable: whether the checks of the evaluation found nothing that makes the number doubtful.
    """

    share: float
    images: int
    reliable: bool = True

    @property
    def standard_error(self) -> float:
        """The binomial standard error of `share`."""
        return math.sqrt(self.share * (1 - self.share) / self.images)

    def __str__(self) -> str:
        text = f"{100 * self.share:.1f} ± {100 * self.standard_error:.1f} % of {self.images:,} images"
        return text if self.reliable else f"{text} (unreliable)"


@dataclass(frozen=True)
class Card:
    """What is known of a model.

    Args:
        name: the model's name in the zoo.
        title: what it is, in one sentence.
        method: the defence: "classifier", "CARSO", "AToP" or "ARREST".
        study_only: whether it is here to be studied, not to be relied on: a purifier that was trained with its paper's
            objective alone.
        data: the data set that it was trained on, as `purify_fast.data.load_dataset` calls it.
        image_shape: (C, H, W) of its images.
        norm: the norm of the ball that it was trained and judged in.
        eps: the radius of that ball in image units.
        training: the command that trains it.
        judged: the command that made the numbers.
        version: the version of this package that made the numbers.
        licence: of the weights.
        clean: accuracy on images that are not attacked.
        attacked: accuracy by the name of the protocol, see `purify_fast.evaluation.evaluate`.
        classifier: the model of the zoo that stands behind the defence; None where the model is a classifier itself.
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

    @property
    def lowest(self) -> Accuracy:
        """The lowest accuracy under attack that is known."""
        return min(self.attacked.values(), key=lambda accuracy: accuracy.share)

    def __str__(self) -> str:
        size = "x".join(map(str, self.image_shape))
        lines = [f"{self.name}: {self.title}"]
        if self.study_only:
            lines.append(
                "It was trained with the paper's objective alone. It is here to be studied, not to be relied on."
            )
        if self.classifier is not None:
            lines.append(f"Its classifier is {self.classifier}, a model of the zoo as well.")
        lines += [
            f"Images: {self.data}, {size}. Attacks: {self.norm}, eps {self.eps:.4g} in image units.",
            f"Clean: {self.clean}.",
            *(f"Attacked by {_protocol(name)}: {accuracy}." for name, accuracy in self.attacked.items()),
            f"Trained by: {self.training}",
            f"Judged by: {self.judged} (purify_fast {self.version})",
            f"Licence of the weights: {self.licence}.",
            REPORT,
        ]
        return "\n".join(lines)


def _protocol(name: str) -> str:
    """A protocol in words."""
    return f"the protocol {name!r}" + (f" ({PROTOCOLS[name]})" if name in PROTOCOLS else "")


def read_card(folder: Path) -> Card:
    """The card in a model's folder.

    Args:
        folder: where the model is.

    Raises:
        FileNotFoundError: there is no card.
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
        card: what is known of it.
        folder: where the model is.
    """
    write_text(folder / FILE, json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")


def card(name: str) -> Card:
    """What is known of a model of the zoo.

    Args:
        name: one of `purify_fast.zoo.list`.

    Raises:
        ValueError: there is no such model; the message names those that there are.
    """
    return read_card(known_folder(name))


def names() -> list[str]:
    """The names of all models, sorted."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{FILE}"))


def known_folder(name: str) -> Path:
    """The folder of a model.

    Args:
        name: its name.

    Raises:
        ValueError: there is no such model; the message names those that there are.
    """
    if name not in names():
        raise ValueError(f"name must be a model of the zoo, got {name!r}: there are {', '.join(names())}")
    return MODELS / name
