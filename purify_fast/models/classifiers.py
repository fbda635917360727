"""Classifiers that can be built, saved and loaded by their names.

`WideResNet` (BMVC 2016; Gowal et al., arXiv 2010.03593) has the parameter names of RobustBench's ``DMWideResNet``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .._files import check_shapes
from .._validation import check_literal
from ..model_state import is_users
from .layers import BatchNorm2d, Normalize, Statistic, check_sizes

Activation = Literal["silu", "relu"]

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class SmallCNN(nn.Module):
    """A small network of this package: four convolutions and two linear layers, with SiLU and a fixed normalization.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1] -> logits ``[B, num_classes]``. The layers are ``conv1`` to
    ``conv4`` and ``hidden``.

    Args:
        in_channels: number of channels of the images.
        num_classes: number of classes, at least 2.
        image_size: height and width of the images, at least 8 each.
        width: number of channels of the first two convolutions; the other two have twice as many.
    """

    # This network has no pooling, so its representation is the output of its penultimate layer.
    before_pooling = "hidden"

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, image_size: tuple[int, int] = (16, 16), width: int = 16
    ):
        super().__init__()
        if min(image_size) < 8:
            raise ValueError(f"image_size must be at least 8 x 8, got {tuple(image_size)}")
        check_sizes(num_classes, in_channels=in_channels, width=width)
        sizes = {"in_channels": in_channels, "num_classes": num_classes}
        self.arguments: dict[str, Any] = {**sizes, "image_size": list(image_size), "width": width}
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        h, w = ((s + 3) // 4 for s in image_size)
        self.hidden = nn.Linear(2 * width * h * w, 8 * width)
        self.head = nn.Linear(8 * width, num_classes)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.act(conv(x))
        return self.head(self.act(self.hidden(x.flatten(1))))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1 = BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        out = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet18(nn.Module):
    """ResNet-18 with pre-activation (He et al., ECCV 2016) for small images, with the normalization as first layer.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1], of any size -> logits ``[B, num_classes]``. The blocks are
    ``stages.i.j`` with i from 0 to 3 and j from 0 to 1. The map before pooling is the output of ``act``.

    Args:
        num_classes: number of classes, at least 2.
        in_channels: number of channels of the images.
        mean: mean of the images: a number, or a number for each channel.
        std: standard deviation of the images, in the same form.
        width: number of channels of the first stage (64 in He et al.).
    """

    before_pooling = "act"

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, mean: Statistic = 0.5, std: Statistic = 0.5, width: int = 64
    ):
        super().__init__()
        check_sizes(num_classes, in_channels=in_channels, width=width)
        self.normalize = Normalize(mean, std, in_channels)
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        self.arguments: dict[str, Any] = {**sizes, **self.normalize.arguments}
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        stages = []
        for i, (before, after) in enumerate(pairwise(channels)):
            stages.append(nn.Sequential(_Block(before, after, 2 if i else 1), _Block(after, after, 1)))
        self.stages = nn.Sequential(*stages)
        self.norm = BatchNorm2d(channels[4])
        self.act = nn.ReLU()
        self.head = nn.Linear(channels[4], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm(self.stages(self.conv(self.normalize(x)))))
        return self.head(out.mean((2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.strided = stride == 2
        self.batchnorm_0 = BatchNorm2d(inputs)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, 0 if self.strided else 1, bias=False)
        self.batchnorm_1 = BatchNorm2d(outputs)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.batchnorm_0(x))
        out = activated
        if self.strided:
            # This is "SAME" padding: at even sizes, a row and a column are added only at the end.
            h, w = out.shape[2:]
            out = F.pad(out, (w % 2, 1, h % 2, 1))
        out = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """The wide residual network WRN-depth-width. WRN-28-10 with SiLU is CARSO's classifier on CIFAR and TinyImageNet.

    ``forward``: images ``[B, in_channels, H, W]`` in [0, 1], of any size -> logits ``[B, num_classes]``. The output of
    ``relu`` is the map before pooling.

    Args:
        depth: number of layers: 6 n + 4, where n is the number of blocks in each of the three groups.
        width: factor by which the 16, 32 and 64 channels of the groups are multiplied.
        num_classes: number of classes, at least 2.
        mean: mean of the images: a number, or a number for each channel. The default is the mean of CIFAR-10.
        std: standard deviation of the images, in the same form. The default is that of CIFAR-10.
        in_channels: number of channels of the images.
        activation: "silu" as in RobustBench's ``DMWideResNet``, or "relu" as in the paper of Zagoruyko and Komodakis.
    """

    before_pooling = "relu"

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        *,
        mean: Statistic = CIFAR10_MEAN,
        std: Statistic = CIFAR10_STD,
        in_channels: int = 3,
        activation: Activation = "silu",
    ):
        super().__init__()
        check_literal("activation", activation, Activation)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, at least 10, got {depth}")
        check_sizes(num_classes, in_channels=in_channels, width=width)
        self.normalize = Normalize(mean, std, in_channels)
        sizes = {"depth": depth, "width": width, "num_classes": num_classes, "in_channels": in_channels}
        self.arguments: dict[str, Any] = {**sizes, **self.normalize.arguments, "activation": activation}
        activation_kind = {"silu": nn.SiLU, "relu": nn.ReLU}[activation]
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(in_channels, channels[0], 3, 1, 1, bias=False)
        groups = []
        for g, (before, after) in enumerate(pairwise(channels)):
            act, count = activation_kind(), (depth - 4) // 6
            blocks = [_WideBlock(after if i else before, after, 2 if g and not i else 1, act) for i in range(count)]
            groups.append(nn.Sequential(OrderedDict(block=nn.Sequential(*blocks))))
        self.layer = nn.Sequential(*groups)
        self.batchnorm = BatchNorm2d(channels[3])
        self.relu = activation_kind()
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.batchnorm(self.layer(self.init_conv(self.normalize(x)))))
        return self.logits(out.mean((2, 3)))

    def representation_layers(self) -> list[str]:
        """Name CARSO's representation in order: each block's convolutions, and shortcuts except in the first group."""
        return [
            f"layer.{g}.block.{b}.{part}"
            for g in range(3)
            for b in range((self.arguments["depth"] - 4) // 6)
            for part in ("conv_0", "conv_1", *(["shortcut"] if g and not b else []))
        ]


CLASSIFIERS: dict[str, type[nn.Module]] = {
    "small_cnn": SmallCNN,
    "preact_resnet18": PreActResNet18,
    "wide_resnet": WideResNet,
}


def build_classifier(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    activation: Activation | None = None,
    mean: Statistic = 0.5,
    std: Statistic = 0.5,
) -> nn.Module:
    """Make a classifier with random weights, by its name in `CLASSIFIERS`.

    Args:
        name: ``small_cnn``, ``preact_resnet18`` or ``wide_resnet``.
        image_shape: shape (C, H, W) of an image.
        num_classes: number of classes, at least 2.
        width: width of the network. None means 16 for ``small_cnn``, 64 for ``preact_resnet18``, 10 for
            ``wide_resnet``.
        depth: depth of ``wide_resnet``, only for this network. None means 28.
        activation: activation of ``wide_resnet``, only for this network: "silu" or "relu". None means "silu".
        mean: mean of the images: a number, or a number for each channel; ``small_cnn`` always uses 0.5.
        std: standard deviation of the images, in the same form; ``small_cnn`` always uses 0.5.

    Raises:
        ValueError: the name is unknown, or a width, depth or activation is given for a network that has none.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"name must be one of {', '.join(CLASSIFIERS)}, got {name!r}")
    kind = CLASSIFIERS[name]
    channels, *size = image_shape
    options: dict[str, Any] = {"in_channels": channels, "num_classes": num_classes, "image_size": tuple(size)}
    options |= {"mean": mean, "std": std}
    taken = inspect.signature(kind).parameters
    for option, value in {"width": width, "depth": depth, "activation": activation}.items():
        if value is not None:
            if option not in taken:
                raise ValueError(f"{option} must not be given for {name}, which has no {option}, got {value}")
            options[option] = value
    return kind(**{option: value for option, value in options.items() if option in taken})


# -- classifiers of other libraries and of the user's code, by their names ---------------------------------------------
#
# - ``torchvision:resnet18``: a model of torchvision.
# - ``timm:resnet18``: a model of timm, if timm is installed.
# - ``package.module:function`` and ``path/to/file.py:function``: the result of a function or class of the user, which
#   is called without arguments.

LIBRARIES = ("torchvision", "timm")
#: The keys under which programs save a state dict in a checkpoint.
KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "params", "weights", "G")
#: Words in the key of a state dict, or before the names of its tensors, for an average of the weights.
AVERAGE = {"ema", "swa", "avg", "average", "averaged"}
#: The last part of the name of BatchNorm's count, which is not needed for predictions and which old files lack.
COUNT = "num_batches_tracked"


class ForeignClassifier(nn.Module):
    """A classifier from outside this package. It is made by its name, so that it can be saved and loaded."""

    def __init__(self, spec: str, in_channels: int, num_classes: int, mean: Statistic = 0.0, std: Statistic = 1.0):
        super().__init__()
        library, _, name = spec.partition(":")
        self.spec = spec
        self.arguments: dict[str, Any] = {"spec": spec, "in_channels": in_channels, "num_classes": num_classes}
        self.repeated = 3 if library == "torchvision" and in_channels == 1 else 1
        self.normalize = Normalize(mean, std, in_channels * self.repeated)
        self.arguments |= self.normalize.arguments
        if library == "torchvision":
            # The import takes 1.7 seconds, and most classifiers do not need torchvision.
            from torchvision import models

            if in_channels not in (1, 3):
                raise ValueError(f"images must have 1 or 3 channels for {spec}, got {in_channels}")
            if name not in (names := models.list_models()):
                raise ValueError(f"torchvision has no model {name!r}{_nearest(name, names)}")
            self.model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        elif library == "timm":
            timm = importlib.import_module("timm")
            try:
                self.model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
            except RuntimeError as error:
                raise ValueError(f"timm has no model {name!r}{_nearest(name, timm.list_models())}: {error}") from error
        else:
            # A saved classifier contains this name, and loading the classifier must not run an arbitrary file.
            if spec.rpartition(":")[0].endswith(".py"):
                text = "spec must be torchvision:NAME, timm:NAME or package.module:function, such as "
                raise ValueError(f"{text}{Path(spec).stem}:{name} in the folder of the file, got {spec!r}")
            model = called_by(spec)
            if not isinstance(model, nn.Module):
                raise ValueError(f"{spec} must return a torch.nn.Module; it returned the type {type(model).__name__}")
            self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalize(x if self.repeated == 1 else x.expand(-1, self.repeated, -1, -1)))


def _nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence that names the known names nearest to a name; empty if none is near."""
    near = difflib.get_close_matches(name, names, 3)
    return f", the nearest are {', '.join(near)}" if near else ""


def build_foreign(
    spec: str, in_channels: int, num_classes: int, mean: Statistic, std: Statistic, weights: str | None = None
) -> ForeignClassifier:
    """Make a classifier by its name, with random weights or with those of a file."""
    classifier = ForeignClassifier(spec, in_channels, num_classes, mean, std)
    if weights is not None:
        what = f"{weights} does not fit {spec} with {num_classes} classes (--num-classes)"
        load_weights(classifier.model, weights, what)
    return classifier


def load_weights(model: nn.Module, path: str | Path, what: str | None = None) -> None:
    """Load the weights of a file, or their moving average if the file has one."""
    tree = _read(path)
    load_state(model, _state_of(tree, path), what or str(path))
    averages = [
        entry["shadow_params"] for entry in tree.values() if isinstance(entry, dict) and "shadow_params" in entry
    ]
    if not averages:
        return
    # score-SDE and torch_ema store the moving average without names, in the order of the trained parameters.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if [tensor.shape for tensor in averages[0]] != [parameter.shape for parameter in trained]:
        text = f"{path} must have a moving average of the network's {len(trained)} trained parameters; it has "
        raise ValueError(f"{text}{len(averages[0])} tensors of other shapes")
    with torch.no_grad():
        for parameter, tensor in zip(trained, averages[0], strict=True):
            parameter.copy_(tensor)


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, *, only_model: bool = False) -> None:
    """Load a state dict, whose names and shapes must be equal to the model's.

    The names may have a prefix, such as "model.", and counts of BatchNorm's batches may be missing. Tensors without the
    prefix are refused, unless ``only_model`` is True or the prefix is that of an average, as "model_ema.".
    """
    own, short = model.state_dict(), _short_names(state)
    names = _short_names(own)
    first = next(iter(names), "")
    prefixes = {name.removesuffix(first) for name in short if name.endswith(first)}
    complete = [p for p in prefixes if all(p + name in short or name.endswith(COUNT) for name in names)]
    prefix = min(complete, key=lambda prefix: (not _is_average(prefix), len(prefix)), default="")
    rest = not (only_model or _is_average(prefix))
    values = {n.removeprefix(prefix): state[full] for n, full in short.items() if rest or n.startswith(prefix)}
    values = {name: own[full] for name, full in names.items() if name.endswith(COUNT)} | values
    check_shapes(what, {n: v.shape for n, v in values.items()}, {n: own[full].shape for n, full in names.items()})
    model.load_state_dict(own | {full: values[name] for name, full in names.items()})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file: the average of the weights, if the file has one. Only tensors are read."""
    state = _state_of(_read(path), path)
    return {name: state[full] for name, full in _short_names(state).items()}


def _read(path: str | Path) -> Any:
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training scripts, such as timm's, save their options beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, "cpu", weights_only=True)
    except OSError:
        raise
    # A file that is not a pickle of tensors may raise any kind of error.
    except Exception as error:
        # PyTorch's message would advise to load the file unsafely.
        raise ValueError(f"{path} has no weights that can be read as tensors alone: save model.state_dict()") from error


def _state_of(tree: Any, path: str | Path) -> dict[str, Tensor]:
    if (state := _state_in(tree)) is None:
        keys = ", ".join(map(repr, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{path} has no state dict, alone or under one of the keys {', '.join(KEYS)}; it has {keys}")
    return state


def _state_in(tree: Any) -> dict[str, Tensor] | None:
    """Find a state dict in the nested dictionaries of a checkpoint: an average of the weights, or else the weights."""
    if not isinstance(tree, dict):
        return None
    if tree and all(isinstance(value, Tensor) for value in tree.values()):
        return tree
    averages = [key for key in tree if isinstance(key, str) and _is_average(key)]
    return next((state for key in (*averages, *KEYS) if (state := _state_in(tree.get(key)))), None)


def _is_average(name: str) -> bool:
    return not AVERAGE.isdisjoint(re.split(r"[\W_]+", name.lower()))


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """The names of tensors, by their names without wrappers: compiled modules, DataParallel and AveragedModel."""
    short = {name.replace("_orig_mod.", ""): name for name in names if not name.endswith("n_averaged")}
    while short and all(name.startswith("module.") for name in short):
        short = {name.removeprefix("module."): full for name, full in short.items()}
    return short


# -- the user's modules ------------------------------------------------------------------------------------------------


def called_by(spec: str) -> Any:
    """Import a function or class by its name, call it without arguments, and return its result."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"a model's name must be package.module:function or path/to/file.py:function, got {spec!r}")
    # Like ``python -m`` and ``python file.py``, search this folder first, also for later imports inside `forward`.
    is_file, module_name = place.endswith(".py"), place
    if is_file:
        if not Path(place).is_file():
            raise FileNotFoundError(f"{place} does not exist")
        module_name = Path(place).stem
        # Another file of this name may have been imported before, or this file before it was changed.
        if is_users(module_name):
            sys.modules.pop(module_name, None)
    sys.path.insert(0, str(Path(place).resolve().parent) if is_file else os.getcwd())
    module = importlib.import_module(module_name)
    if name not in vars(module):
        raise ValueError(f"{spec}: {module.__file__} has no function or class {name!r}")
    function = vars(module)[name]
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(f"{spec} must take no arguments and return the model, but calling it fails: {error}") from None
    return function()
