"""The classifiers that commands start from: a saved folder, or a network by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from ..data import DataSet
    from ..models.foreign import ForeignClassifier


#: What stands before the name of a model of `purify_fast.zoo` where a folder may stand as well.
ZOO = "zoo:"


def zoo_name(folder: str | Path) -> str | None:
    """The name behind ``zoo:``; None for a folder.

    Args:
        folder: what was given for a saved model.
    """
    text = str(folder)
    return text.removeprefix(ZOO) if text.startswith(ZOO) else None


def saved_folder(folder: str | Path) -> Path:
    """Where a saved model is: the folder itself, or that of a model of the zoo.

    Args:
        folder: a folder, or ``zoo:NAME``.

    Raises:
        ValueError: the zoo has no such model.
    """
    name = zoo_name(folder)
    if name is None:
        return Path(folder)
    from .. import zoo

    return zoo.folder(name)


def saved_classifier(folder: str | Path) -> Path:
    """Where the classifier of a saved defence is: inside its folder, or in the zoo.

    Args:
        folder: of a defence, or ``zoo:NAME``.

    Raises:
        ValueError: the zoo has no such defence.
    """
    name = zoo_name(folder)
    if name is None:
        return Path(folder) / "classifier"
    from .. import zoo

    return zoo.classifier_folder(name)


def is_named(classifier: str) -> bool:
    """Whether this is ``torchvision:NAME``, ``timm:NAME`` or ``package.module:function``, and no saved model."""
    return ":" in classifier and zoo_name(classifier) is None and not Path(classifier).exists()


def own_model(spec: str, images: DataSet) -> nn.Module:
    """What a function of the user's own returns, on the images' device, if it maps them to logits.

    Args:
        spec: ``package.module:function`` or ``path/to/file.py:function``.
        images: what it is to be attacked on.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the module is not installed.
        ValueError: no function that returns a module, or one that does not run on the images.
    """
    from ..attacks import frozen
    from ..data import to_float
    from ..evaluation.inputs import returning_logits
    from ..models.foreign import LIBRARIES
    from ..models.own import made_by

    if spec.partition(":")[0] in LIBRARIES:
        raise ValueError(
            f"{spec} has fresh weights, which are not worth an attack: train it by `train classifier --model {spec}` "
            "and evaluate that folder, or name a function of yours that loads its weights, as module:function"
        )
    model = made_by(spec).to(images.y_test.device)
    some = to_float(images.x_test[:2])
    try:
        with frozen(model):
            returning_logits(model, some)
    except Exception as error:
        raise ValueError(f"{spec} does not run on images {list(some.shape[1:])} of {images.name}: {error}") from error
    return model


def own_name(spec: str) -> str:
    """How a model of the user's own is called in a report, such as ``defences.make``.

    Args:
        spec: ``package.module:function`` or ``path/to/file.py:function``.
    """
    place, _, name = spec.rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place}.{name}"


def own_folder(spec: str) -> str:
    """How a model's folder in ``runs/own`` is called: `own_name`, and for a file elsewhere a sign of its place.

    Files of one name in two folders have two reports, such as ``model.make-1f0c2a9b``. The place is taken from the
    working folder, so that both may be moved together.

    Args:
        spec: ``package.module:function`` or ``path/to/file.py:function``.
    """
    place = spec.rpartition(":")[0]
    if not place.endswith(".py"):
        return own_name(spec)
    file = os.path.relpath(Path(place).resolve(), Path.cwd().resolve())
    # a file in the working folder is the module of its name
    sign = "" if file == Path(file).name else f"-{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}"
    return own_name(spec) + sign


def fresh_classifier(
    model: str,
    images: DataSet,
    *,
    width: int | None = None,
    depth: int | None = None,
    activation: Literal["silu", "relu"] | None = None,
) -> nn.Module:
    """A classifier with fresh weights for the images, on their device.

    Args:
        model: its name, as ``--model`` takes it.
        images: the data set; its statistics normalize the images.
        width: channels of the first stage, or wide_resnet's factor; None for the network's own.
        depth: of wide_resnet; None for 28.
        activation: of wide_resnet; None for "silu".

    Raises:
        ValueError: no such classifier, or a size that it does not have.
    """
    from ..data import statistics
    from ..models.classifiers import build_classifier
    from ..models.foreign import build_foreign

    mean, std = statistics(images.x_train)
    if is_named(model):
        for name, value in (("width", width), ("depth", depth), ("activation", activation)):
            if value is not None:
                raise ValueError(f"--{name} {value}: the size of {model} is in its name")
        named = build_foreign(model, images.image_shape[0], images.num_classes, mean=mean, std=std)
        return _running(named.to(images.y_train.device), images)
    made = build_classifier(
        model,
        images.image_shape,
        images.num_classes,
        width=width,
        depth=depth,
        activation=activation,
        mean=mean,
        std=std,
    )
    return made.to(images.y_train.device)


def trained_classifier(classifier: str | Path, weights: str | None, images: DataSet) -> nn.Module:
    """A classifier that was trained, on the images' device.

    Args:
        classifier: a folder that `train classifier` or `train arrest` wrote, ``zoo:NAME``, or a network by name.
        weights: of a network by name: a file, or the library's name for them.
        images: the data set it is for.

    Raises:
        FileNotFoundError: the folder or the weights are not there.
        ValueError: they are broken, or do not fit.
    """
    from ..data import statistics
    from ..models.foreign import LIBRARIES, build_foreign
    from ..training import load_classifier

    text = str(classifier)
    if not is_named(text):
        if weights is not None:
            raise ValueError(f"--classifier-weights {weights}: the folder {classifier} brings its own")
        saved = load_classifier(saved_folder(classifier)).to(images.y_train.device)
        refuse_other_images(saved, images, f"the classifier in {classifier}")
        return saved
    if weights is None and text.partition(":")[0] in LIBRARIES:
        raise ValueError(
            f"--classifier {text} has fresh weights: give trained ones with --classifier-weights, or train it first "
            f"with `train classifier --model {text}`"
        )
    mean, std = statistics(images.x_train)
    made = build_foreign(text, images.image_shape[0], images.num_classes, mean=mean, std=std, weights=weights)
    return _running(made.to(images.y_train.device), images).eval()


def _running(model: ForeignClassifier, images: DataSet) -> ForeignClassifier:
    """The model, if it maps these images to logits; many of the libraries' are made for larger ones."""
    import torch

    training = model.training
    shape = images.image_shape
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros((2, *shape), device=images.y_train.device))
    except RuntimeError as error:
        raise ValueError(f"{model.spec} does not run on images {_size(list(shape[1:]))}: {error}") from error
    if logits.dim() != 2 or logits.shape[1] < images.num_classes:
        raise ValueError(f"{model.spec} must map images to logits [B, {images.num_classes}], got {list(logits.shape)}")
    return model.train(training)


def refuse_other_images(model: nn.Module, images: DataSet, what: str) -> None:
    """ValueError if a model was trained on images of another size or on fewer classes, as far as it says so.

    Args:
        model: a defence, or one of this package's classifiers.
        images: what it is to be trained or attacked on.
        what: how the model is called in the message.
    """
    from ..defences.base import Defence

    channels, *size = images.image_shape
    if isinstance(model, Defence):
        wanted_channels, *wanted = model.image_shape
        classes = model.num_classes
    else:
        # every classifier that is loaded has them
        facts: dict[str, Any] = model.arguments  # type: ignore[assignment]
        wanted_channels, wanted, classes = facts["in_channels"], facts.get("image_size", size), facts["num_classes"]
    if list(wanted) != list(size):
        hint = f"; --size {' '.join(map(str, wanted))} resizes the images"
        raise ValueError(f"images are {_size(size)}, {what} was trained on {_size(wanted)}{hint}")
    if wanted_channels != channels:
        raise ValueError(f"images have {channels} channels, {what} was trained on {wanted_channels}")
    if images.num_classes > classes:
        raise ValueError(f"images are of {images.num_classes} classes, {what} knows {classes}")


def _size(size: list[int]) -> str:
    return "x".join(map(str, size))
