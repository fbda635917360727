"""The models that commands start from: a saved folder, a model of the zoo, a network by name, or a function's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..protocols import Classifier

Model = TypeVar("Model", bound="Classifier")

#: This prefix marks a model of `purify_fast.zoo` where a folder may stand as well.
ZOO = "zoo:"


def zoo_name(folder: str | Path) -> str | None:
    """The name behind ``zoo:``; None for a folder."""
    text = str(folder)
    return text.removeprefix(ZOO) if text.startswith(ZOO) else None


def saved_folder(folder: str | Path, classifier: bool = False) -> Path:
    """Return the folder of a saved model, or of the classifier of a saved defence; ``zoo:NAME`` names one of the zoo.

    Raises:
        ValueError: the zoo has no such model.
    """
    name = zoo_name(folder)
    if name is None:
        return Path(folder) / "classifier" if classifier else Path(folder)
    from .. import zoo

    return zoo.classifier_folder(name) if classifier else zoo.folder(name)


def is_named(classifier: str) -> bool:
    """Tell whether this is ``torchvision:NAME``, ``timm:NAME`` or ``package.module:function``, not a saved model."""
    return ":" in classifier and zoo_name(classifier) is None and not Path(classifier).exists()


def refuse_fresh_weights(spec: str, instead: str) -> None:
    """ValueError if this names a network of torchvision or timm, which has fresh weights; ``instead`` is the advice."""
    from ..models.foreign import LIBRARIES, check_library_name

    if spec.partition(":")[0] in LIBRARIES:
        check_library_name(spec)
        raise ValueError(f"{spec} has fresh weights: {instead}; `train classifier --model {spec}` trains it")


def own_model(spec: str, images: DataSet) -> Classifier:
    """Call the user's function, ``package.module:function`` or ``path/to/file.py:function``, and return its model.

    The model is a module, or a function from images to logits.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: the module is not installed.
        ValueError: the function does not return a model, or the model does not run on the images.
    """
    from ..models.foreign import called_by

    refuse_fresh_weights(spec, "name a folder, or a function of yours that loads its weights, as module:function")
    model = called_by(spec)
    if not callable(model) or isinstance(model, type):
        raise ValueError(
            f"{spec} must return a torch.nn.Module, or a function from images to logits, it returned a "
            f"{type(model).__name__}"
        )
    return on_images(model, spec, images)


def named_classifier(spec: str, weights: str | None, images: DataSet) -> nn.Module:
    """Build a network by its name, with fresh weights or given weights.

    Raises:
        FileNotFoundError: the weights are not there.
        ValueError: no network has this name, the weights are broken, or the network does not run on the images.
    """
    from ..data import statistics
    from ..models.foreign import build_foreign

    mean, std = statistics(images.x_train)
    model = build_foreign(spec, images.image_shape[0], images.num_classes, mean=mean, std=std, weights=weights)
    return on_images(model, spec, images)


def trained_classifier(classifier: str | Path, weights: str | None, images: DataSet) -> nn.Module:
    """A trained classifier, on the images' device: of a folder or ``zoo:NAME``, or a network by name with its weights.

    Raises:
        FileNotFoundError: the folder or the weights are not there.
        ValueError: they are broken, or do not fit.
    """
    from ..training import load_classifier

    text = str(classifier)
    if not is_named(text):
        if weights is not None:
            raise ValueError(
                f"--classifier-weights is for a classifier by name, got {weights}: the folder {classifier} holds its "
                "weights, leave the option out"
            )
        saved = load_classifier(saved_folder(classifier)).to(images.y_train.device)
        refuse_other_images(saved, images, f"the classifier in {classifier}")
        return saved
    if weights is None:
        refuse_fresh_weights(text, "give trained ones with --classifier-weights")
    return named_classifier(text, weights, images).eval()


def on_images(model: Model, spec: str, images: DataSet) -> Model:
    """The model, if it is a module on the images' device; ValueError unless it maps them to logits of as many classes.

    A function's own modules stay where they are.
    """
    from torch import nn

    from ..attacks import frozen
    from ..data import to_float
    from ..evaluation.inputs import returning_logits

    if isinstance(model, nn.Module):
        model.to(images.y_test.device)
    some = to_float(images.x_test[:2])
    try:
        with frozen(model):
            classes = returning_logits(model, some)[1]
    except Exception as error:
        shape = _size(some.shape[1:])
        raise ValueError(f"{spec} does not run on images {shape} of {images.name}: {error}") from error
    if classes < images.num_classes:
        raise ValueError(f"{spec} must map images to logits [B, {images.num_classes}], got [B, {classes}]")
    return model


def refuse_other_images(model: nn.Module, images: DataSet, what: str) -> None:
    """ValueError if a model was trained on images of another size or on fewer classes, as far as it says so.

    ``what`` is how the message calls the model, a defence or one of this package's classifiers.
    """
    from ..defences.base import Defence
    from ..evaluation.inputs import image_shape_of

    # every classifier that is loaded has arguments
    facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
    classes = model.num_classes if isinstance(model, Defence) else facts["num_classes"]
    shape = image_shape_of(model, images.image_shape) or images.image_shape
    if tuple(shape) != images.image_shape:
        hint = f"; --size {shape[1]} {shape[2]} resizes the images" if shape[0] == images.image_shape[0] else ""
        raise ValueError(f"images are {_size(images.image_shape)}, {what} was trained on {_size(shape)}{hint}")
    if images.num_classes > classes:
        raise ValueError(f"images have {images.num_classes} classes, {what} knows {classes}")


def _size(size: Any) -> str:
    return "x".join(map(str, size))
