"""Loads the models that commands use: from a folder, from the zoo, by the name of a network, or from a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..protocols import Classifier

Model = TypeVar("Model", bound="Classifier")

#: The prefix of the name of a model in `purify_fast.zoo`. Without it, a text is the path of a folder.
ZOO = "zoo:"


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
    """Tell whether a text names code (torchvision:NAME, timm:NAME, module:function) and not a saved model."""
    return ":" in classifier and zoo_name(classifier) is None and not Path(classifier).exists()


def refuse_fresh_weights(spec: str, instead: str) -> None:
    """Raise a ValueError for the name of a network of torchvision or timm, because the network has random weights."""
    from ..models.foreign import LIBRARIES, check_library_name

    if spec.partition(":")[0] in LIBRARIES:
        check_library_name(spec)
        raise ValueError(f"{spec} has random weights: {instead}, or train it with `train classifier --model {spec}`")


def own_model(spec: str, images: DataSet) -> Classifier:
    """Call a function of the user and return its result, which is a module or a function from images to logits."""
    from ..models.foreign import called_by

    refuse_fresh_weights(spec, "name a folder, or your function that loads weights, as module:function")
    model = called_by(spec)
    if not callable(model) or isinstance(model, type):
        raise ValueError(
            f"{spec} must return a torch.nn.Module or a function from images to logits; it returned the type "
            f"{type(model).__name__}"
        )
    return on_images(model, spec, images)


def named_classifier(spec: str, weights: str | None, images: DataSet) -> nn.Module:
    """Make a network by its name, with random or given weights."""
    from ..data import statistics
    from ..models.foreign import build_foreign

    mean, std = statistics(images.x_train)
    model = build_foreign(spec, images.image_shape[0], images.num_classes, mean=mean, std=std, weights=weights)
    return on_images(model, spec, images)


def trained_classifier(classifier: str | Path, weights: str | None, images: DataSet) -> nn.Module:
    """Load a trained classifier to the device of the images."""
    from ..training import load_classifier

    text = str(classifier)
    if not is_named(text):
        if weights is not None:
            raise ValueError(
                f"--classifier-weights is only for a classifier that --classifier names, got {weights}: leave the "
                f"option out, because the folder {classifier} contains the weights"
            )
        saved = load_classifier(saved_folder(classifier)).to(images.y_train.device)
        refuse_other_images(saved, images, f"the classifier in {classifier}")
        return saved
    if weights is None:
        refuse_fresh_weights(text, "give trained weights with --classifier-weights")
    return named_classifier(text, weights, images).eval()


def on_images(model: Model, spec: str, images: DataSet) -> Model:
    """Move a module to the device of the images, and try the model on two images."""
    from torch import nn

    from ..attacks.attacked_model import check_model, frozen
    from ..data import to_float
    from ..models.foreign import described

    if isinstance(model, nn.Module):
        model.to(images.y_test.device)
    some = to_float(images.x_test[:2])
    try:
        with frozen(model):
            classes = check_model(model, some)[1]
    except Exception as error:
        shape = _size(some.shape[1:])
        raise ValueError(f"{spec} does not run on images {shape} of {images.name}: {described(error)}") from error
    if classes < images.num_classes:
        raise ValueError(f"{spec} must map images to logits [B, {images.num_classes}], got [B, {classes}]")
    return model


def refuse_other_images(model: nn.Module, images: DataSet, what: str) -> None:
    """Raise a ValueError if a model was trained on images of another size, or on fewer classes than these images."""
    from ..defences.base import Defence

    # Every loaded classifier has the attribute `arguments`.
    facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
    classes = model.num_classes if isinstance(model, Defence) else facts["num_classes"]
    channels, *size = images.image_shape
    # A model without a fixed size accepts the size of these images.
    usual = (facts.get("in_channels", channels), *facts.get("image_size", size))
    shape: tuple[int, ...] = getattr(model, "image_shape", usual)
    if tuple(shape) != images.image_shape:
        fits = shape[0] == images.image_shape[0]
        hint = f", or resize these images by --size {shape[1]} {shape[2]}" if fits else ""
        raise ValueError(
            f"images of {images.name} are {_size(images.image_shape)}, but {what} was trained on {_size(shape)}: "
            f"use --data to choose the data set of its training{hint}"
        )
    if images.num_classes > classes:
        raise ValueError(f"images have {images.num_classes} classes, but {what} has only {classes}")


def _size(size: Any) -> str:
    return "x".join(map(str, size))
