"""Make classifiers of other libraries and of the user's code by their names.

- ``torchvision:resnet18``: a model of torchvision.
- ``timm:resnet18``: a model of timm, if timm is installed.
- ``package.module:function`` and ``path/to/file.py:function``: the result of a function or class of the user, which is
  called without arguments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .._files import check_shapes
from ..model_state import is_users
from .layers import Normalize, Statistic

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
            self.model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
        elif library == "timm":
            timm = importlib.import_module("timm")
            self.model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
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
    own, given = model.state_dict(), _short_names(state)
    names = _short_names(own)
    first = next(iter(names), "")
    prefixes = {name.removesuffix(first) for name in given if name.endswith(first)}
    whole = [p for p in prefixes if all(p + name in given or name.endswith(COUNT) for name in names)]
    prefix = min(whole, key=lambda prefix: (not _is_average(prefix), len(prefix)), default="")
    rest = not (only_model or _is_average(prefix))
    found = {n.removeprefix(prefix): state[full] for n, full in given.items() if rest or n.startswith(prefix)}
    found = {name: own[full] for name, full in names.items() if name.endswith(COUNT)} | found
    check_shapes(what, {n: v.shape for n, v in found.items()}, {n: own[full].shape for n, full in names.items()})
    model.load_state_dict(own | {full: found[name] for name, full in names.items()})


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
    return vars(module)[name]()
