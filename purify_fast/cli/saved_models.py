"""Loads the models that commands use: from a folder, from the zoo, by the name of a network, or from a function."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data import DataSet
    from ..protocols import Classifier

#: The prefix of the name of a model in `purify_fast.zoo`. Without it, a text is the path of a folder.
ZOO = "zoo:"
#: The form of the name of code: torchvision:NAME, timm:NAME, package.module:function or path/to/file.py:function.
CODE = re.compile(r"(torchvision|timm):.*|(.*\.py|[^\W\d][\w.]*):[^/]*")


def zoo_name(folder: str | Path) -> str | None:
    """The name after ``zoo:``; None for a folder."""
    text = str(folder)
    return text.removeprefix(ZOO) if text.startswith(ZOO) else None


def saved_folder(folder: str | Path, classifier: bool = False) -> Path:
    """The folder of a saved model."""
    name = zoo_name(folder)
    if name is None:
        return Path(folder) / "classifier" if classifier else Path(folder)
    from .. import zoo

    return zoo.classifier_folder(name) if classifier else zoo.folder(name)


def is_named(classifier: str) -> bool:
    """Return True if a text names code, as `CODE` describes, and not a saved model."""
    return CODE.fullmatch(classifier) is not None and zoo_name(classifier) is None and not Path(classifier).exists()


def own_model(spec: str, images: DataSet) -> Classifier:
    """Call a function of the user and return its result, which is a module or a function from images to logits."""
    from torch import nn

    from ..models.foreign import called_by

    model: Classifier = called_by(spec)
    if not callable(model) or isinstance(model, type):
        raise ValueError(f"{spec} must return a torch.nn.Module or a function from images to logits, got {model!r}")
    return model.to(images.y_test.device) if isinstance(model, nn.Module) else model


def named_classifier(
    spec: str, weights: str | None, images: DataSet, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> nn.Module:
    """Make a network by its name. With random weights, a library's network gets the statistics of the images."""
    from ..data import statistics
    from ..models.foreign import LIBRARIES, build_foreign

    fresh = weights is None and spec.partition(":")[0] in LIBRARIES
    how: Any = statistics(images.x_train) if fresh else (mean or 0.0, std or 1.0)
    model = build_foreign(spec, images.image_shape[0], images.num_classes, mean=how[0], std=how[1], weights=weights)
    return model.to(images.y_test.device)


def trained_classifier(
    classifier: str | Path, weights: str | None, images: DataSet, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> nn.Module:
    """Load a trained classifier to the device of the images."""
    from ..models.foreign import LIBRARIES
    from ..training import load_classifier

    text = str(classifier)
    if not is_named(text):
        if weights is not None:
            raise ValueError(f"--classifier-weights is only for a classifier by name, not for the folder {classifier}")
        saved = load_classifier(saved_folder(classifier)).to(images.y_train.device)
        refuse_other_images(saved, images, f"the classifier in {classifier}")
        return saved
    if weights is None and text.partition(":")[0] in LIBRARIES:
        raise ValueError(f"{text} has random weights: give trained weights with --classifier-weights")
    return named_classifier(text, weights, images, mean, std).eval()


def accuracy_text(model: nn.Module, x: Tensor, y: Tensor, batch_size: int, most: int = 10**9) -> str:
    """The share of at most ``most`` images that are classified correctly, ``91.6 ± 1.2 % of 500 held-out images``."""
    import torch

    from ..data import to_float
    from ..models.representation import evaluation_mode

    if len(y) > most:
        # The images of a folder are sorted by class.
        chosen = torch.linspace(0, len(y) - 1, most, device="cpu").long()
        x, y = x[chosen.to(x.device)], y[chosen.to(y.device)]
    parts = [slice(k, k + batch_size) for k in range(0, len(y), batch_size)]
    with evaluation_mode(model), torch.no_grad():
        share = sum(int((model(to_float(x[part])).argmax(1) == y[part]).sum()) for part in parts) / len(y)
    return f"{100 * share:.1f} ± {100 * (share * (1 - share) / len(y)) ** 0.5:.1f} % of {len(y)} held-out images"


def refuse_other_images(model: nn.Module, images: DataSet, what: str) -> None:
    """Raise a ValueError if a model was trained on images of another size, on fewer classes or on other classes."""
    from ..data.images import same_name
    from ..defences.base import Defence

    # Every loaded classifier has the attribute `arguments`.
    facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
    classes = model.num_classes if isinstance(model, Defence) else facts["num_classes"]
    channels, *size = images.image_shape
    # A model without a fixed size accepts the size of these images.
    usual = (facts.get("in_channels", channels), *facts.get("image_size", size))
    shape: tuple[int, ...] = getattr(model, "image_shape", usual)
    if tuple(shape) != images.image_shape:
        own, other = ("x".join(map(str, sizes)) for sizes in (images.image_shape, shape))
        raise ValueError(f"images of {images.name} are {own}, but {what} was trained on {other} (--data, --size)")
    if images.num_classes > classes:
        raise ValueError(f"images have {images.num_classes} classes, but {what} has only {classes}")
    known = getattr(getattr(model, "classifier", model), "classes", None)
    for label, (own, other) in enumerate(zip(known or (), images.classes or (), strict=False)):
        if same_name(own) != same_name(other):
            raise ValueError(f"label {label} of the classes is {own!r} for {what}, but {other!r} in {images.name}")
