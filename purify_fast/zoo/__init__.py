"""Small trained models to attack. Those on digits come with the package, and others are downloaded at the first use.

    from purify_fast import zoo

    zoo.list()                                  # the names of the models
    model = zoo.load("digits-carso-pipeline")   # a module from images in [0, 1] to logits, in evaluation mode
    print(zoo.card("digits-carso-pipeline"))    # the model's training, and its accuracy under attack

A card describes the training of a model and its accuracy under attack. Weights that are not on this machine are
downloaded from the release of this version.

If you find an attack that lowers an accuracy, please report the attack.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import json
import math
import sys
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from importlib.metadata import metadata
from pathlib import Path

from torch import nn

from .._files import MODEL, atomic, render
from .._version import __version__
from ..methods.loading import load_defence
from ..ops.dispatch.records import folder as cache_folder
from ..training import load_classifier

__all__ = ["Accuracy", "Card", "card", "classifier_folder", "folder", "list", "load"]

#: The folder of the cards. A clone has the weights of all models there, and an installed package those on digits.
MODELS = Path(__file__).parent / "models"
#: The file of a card, beside the model.
FILE = "card.json"


@dataclass(frozen=True)
class Accuracy:
    """An accuracy of a model.

    Args:
        share: share of the images that are classified correctly, in [0, 1]. For a random model under attack, an image
            counts as correct only if every draw classifies it correctly.
        images: number of images.
        reliable: whether the checks of the evaluation found no reason to doubt the number.
        one_draw: for a random model under attack, the mean accuracy of a single draw. None for a deterministic model,
            and for a card without this number.
    """

    share: float
    images: int
    reliable: bool = True
    one_draw: float | None = None

    @property
    def standard_error(self) -> float:
        """The standard error of `share` by the binomial distribution."""
        return math.sqrt(self.share * (1 - self.share) / self.images)

    def __str__(self) -> str:
        text = f"{100 * self.share:.1f} ± {100 * self.standard_error:.1f} % of {self.images:,} images"
        text += "" if self.one_draw is None else f" in every draw, {100 * self.one_draw:.1f} % in one draw"
        return text if self.reliable else f"{text} (unreliable)"


@dataclass(frozen=True)
class Card:
    """The description of a model.

    Args:
        name: name of the model in the zoo.
        title: a sentence that says what the model is.
        method: the defence: "classifier", "CARSO", "AToP", "ARREST" or "diffusion".
        study_only: whether the model is a purifier that was trained with the paper's objective. Such a purifier is not
            robust, and is only for studies.
        data: name of the data set of its training, as in `purify_fast.data.load_dataset`.
        image_shape: shape (C, H, W) of its images.
        norm: norm of the ball in its training and its evaluation.
        eps: radius of that ball in image units.
        training: command that trains the model.
        judged: command that measured the accuracies.
        version: version of this package that measured the accuracies.
        licence: license of the weights.
        clean: accuracy on images that are not attacked.
        attacked: accuracy for each protocol of `purify_fast.evaluation.evaluate`, by its name. "votes" is the protocol
            "rand" with the majority of ten draws as prediction.
        classifier: name of the defence's classifier in the zoo; None if the model is itself a classifier.
        attacks: for each protocol, by its name, a short hash of its attacks with their options and revisions. Older
            results have no hash.
        sigma: for a model that was trained for randomized smoothing: standard deviation of the noise in image units.
            The accuracies except `clean` are then those of the smoothed classifier.
        certified: accuracy that `purify_fast.evaluation.certify` proves at the radius ``eps`` with this noise.
        size: size of the file with the weights in bytes; 0 before the model is in the zoo.
        sha256: SHA-256 of that file.
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
    sigma: float | None = None
    certified: Accuracy | None = None
    size: int = 0
    sha256: str = ""

    def __str__(self) -> str:
        return render(__package__, "card.txt.jinja", card=self)


def read_card(folder: Path) -> Card:
    """Read the card in a model's folder."""
    facts = json.loads((folder / FILE).read_text(encoding="utf-8"))
    facts["image_shape"], facts["clean"] = tuple(facts["image_shape"]), Accuracy(**facts["clean"])
    facts["attacked"] = {name: Accuracy(**accuracy) for name, accuracy in facts["attacked"].items()}
    if facts.get("certified"):
        facts["certified"] = Accuracy(**facts["certified"])
    return Card(**facts)


def card(name: str) -> Card:
    """The description of a model in the zoo. Another name than those of `list` raises a ValueError."""
    if name not in list():
        near = ", ".join(difflib.get_close_matches(name, list(), 3) or list())
        every = "`purify-fast zoo` lists all"
        raise ValueError(f"name must be a model of the zoo, got {name!r}: the nearest are {near}; {every}")
    return read_card(MODELS / name)


def list() -> builtins.list[str]:
    """The sorted names of all models in the zoo."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{FILE}"))


def folder(name: str) -> Path:
    """The folder of a model's weights, which belongs to the package or to its cache: do not write there.

    An installed package has the models on digits, and a clone has all models. The weights of other models are in the
    user's cache folder. If they are missing there, they are downloaded from the release of this version, and a line
    on stderr says so. The folder of a defence does not contain its classifier, which is in `classifier_folder`.

    Args:
        name: a name in `list`. Another name raises a ValueError, which names the models of the zoo. A failed download
            raises a FileNotFoundError, and a file with another SHA-256 than the card's a ValueError.
    """
    facts = card(name)
    here = MODELS / name
    return here if (here / MODEL).is_file() else kept_folder(name, facts.size, facts.sha256)


def classifier_folder(name: str) -> Path:
    """The folder of the classifier of a defence in the zoo. A classifier's name raises a ValueError."""
    behind = card(name).classifier
    if behind is None:
        raise ValueError(f"name must be a defence of the zoo, got {name!r}, which is a classifier")
    return folder(behind)


def load(name: str) -> nn.Module:
    """Load a trained model in evaluation mode, on the CPU.

    Args:
        name: a name in `list`. Its weights are found, or downloaded, as in `folder`, which also names the errors.

    Returns:
        A module from images ``[B, C, H, W]``, float32 in [0, 1], to logits ``[B, classes]``. A defence contains its
        classifier.
    """
    if card(name).classifier is None:
        return load_classifier(folder(name))
    return load_defence(folder(name), load_classifier(classifier_folder(name)))


# -- files -----------------------------------------------------------------------------------------------------------


def address(name: str) -> str:
    """The address of a model's weights, a file of this version's release in the repository of the package."""
    urls = dict(line.split(", ", 1) for line in metadata("purify-fast").get_all("Project-URL", ()))
    return f"{urls['Repository']}/releases/download/v{__version__}/{name}.safetensors"


def kept_folder(name: str, size: int, sha256: str) -> Path:
    """The folder with the weights of a model in the user's cache folder. Missing weights are downloaded.

    A file with another SHA-256 raises a ValueError, and is not kept after a download.
    """
    path = cache_folder() / "zoo" / name / MODEL
    kept = path.is_file()
    source = path if kept else address(name)
    data = path.read_bytes() if kept else downloaded(name, size, str(source), path)
    got = hashlib.sha256(data).hexdigest()
    if got != sha256:
        cure = ". Remove this file" if kept else ""
        text = f"{source} is not the file of the zoo's model {name}: SHA-256 must be {sha256}, got {got}{cure}"
        raise ValueError(text)
    if not kept:
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    return path.parent


def downloaded(name: str, size: int, source: str, path: Path) -> bytes:
    """Download the weights of a model that belong at a path, and say so on stderr."""
    try:
        # A release writes the address of its repository in place of ADDRESS.
        if "/ADDRESS/" in source:
            raise OSError("this package was built without the address of its repository")
        print(f"purify_fast downloads the model {name} ({size:,} bytes) from {source} to {path}", file=sys.stderr)
        # A server that is silent for 30 seconds is an error. One byte more than the size shows a file that is too long.
        with urllib.request.urlopen(source, timeout=30) as answer:
            return bytes(answer.read(size + 1))
    except (OSError, HTTPException) as error:
        clone = f"the file purify_fast/zoo/models/{name}/{MODEL} of a clone of the repository"
        raise FileNotFoundError(f"{source} cannot be read: {error}; copy {clone} to {path}") from error
