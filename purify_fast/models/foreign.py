"""Make classifiers of other libraries and of the user's code by their names.

- ``torchvision:resnet18``: a model of torchvision.
- ``timm:resnet18``: a model of timm, if timm is installed.
- ``package.module:function`` and ``path/to/file.py:function``: the result of a function or class of the user, which is
  called without arguments.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .._validation import check_shapes
from ..model_state import is_installed
from .layers import Normalize, Statistic

LIBRARIES = ("torchvision", "timm")


class ForeignClassifier(nn.Module):
    """A classifier from outside this package. It is made by its name, so that it can be saved and loaded."""

    def __init__(self, spec: str, in_channels: int, num_classes: int, mean: Statistic = 0.5, std: Statistic = 0.5):
        super().__init__()
        library, _, name = spec.partition(":")
        self.spec = spec
        self.arguments: dict[str, Any] = {"spec": spec, "in_channels": in_channels, "num_classes": num_classes}
        self.repeated = 1
        self.normalize: Normalize | nn.Identity = nn.Identity()
        if library in LIBRARIES:
            check_library_name(spec)
            self.normalize = Normalize(mean, std, in_channels)
            self.arguments |= self.normalize.arguments
        if library == "torchvision":
            # The import takes 1.7 seconds, and most classifiers do not need torchvision.
            from torchvision import models

            self.model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
            if in_channels not in (1, 3):
                raise ValueError(f"images must have 1 or 3 channels for {spec}, got {in_channels}")
            self.repeated = 3 // in_channels
        elif library == "timm":
            timm = importlib.import_module("timm")
            self.model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
        else:
            # A saved classifier contains this name, and loading the classifier must not run an arbitrary file.
            if spec.rpartition(":")[0].endswith(".py"):
                raise ValueError(
                    f"spec must be torchvision:NAME, timm:NAME or package.module:function, such as "
                    f"{Path(spec).stem}:{name} in the folder of the file, got {spec!r}"
                )
            model = called_by(spec, fresh=True)
            if not isinstance(model, nn.Module):
                raise ValueError(f"{spec} must return a torch.nn.Module; it returned the type {type(model).__name__}")
            self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.model(x if self.repeated == 1 else x.expand(-1, self.repeated, -1, -1))


def build_foreign(
    spec: str, in_channels: int, num_classes: int, mean: Statistic, std: Statistic, weights: str | None = None
) -> ForeignClassifier:
    """Make a classifier by its name, with random or given weights. This function downloads nothing."""
    if weights is None:
        return ForeignClassifier(spec, in_channels, num_classes, mean, std)
    library, _, name = spec.partition(":")
    path = Path(weights)
    if path.suffix or path.exists() or library not in LIBRARIES:
        classifier = ForeignClassifier(spec, in_channels, num_classes, mean, std)
    else:
        find = _torchvision_weights if library == "torchvision" else _timm_weights
        path, classes, own_mean, own_std = find(name, weights)
        if num_classes > classes:
            raise ValueError(
                f"weights must be for the {num_classes} classes of the data, got {weights} of {spec} for {classes} "
                "classes"
            )
        if num_classes < classes:
            warnings.warn(
                f"{weights} of {spec} are for {classes} classes, but the data have {num_classes}: label 0 of the data "
                "means class 0 of the weights, and so on. If the data have other classes, train a classifier on them",
                stacklevel=2,
            )
        if in_channels != len(own_mean):
            # Images with a single channel are normalized before the channel is repeated, so average the statistics.
            own_mean, own_std = (sum(own_mean) / len(own_mean),), (sum(own_std) / len(own_std),)
        classifier = ForeignClassifier(spec, in_channels, classes, own_mean, own_std)
    load_state(classifier.model, read_weights(path), str(path))
    return classifier


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, *, drop_prefix: bool = False) -> None:
    """Load a state dict, whose names and shapes must be equal to the model's."""
    own = model.state_dict()
    if drop_prefix:
        first = next(iter(own))
        prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), "")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    check_shapes(what, {name: value.shape for name, value in state.items()}, {n: v.shape for n, v in own.items()})
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file. Only tensors are read."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: give the path of a file of weights")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message would advise to load the file unsafely.
        raise ValueError(
            f"{path} contains Python objects, but only tensors are read: save the model's state dict"
        ) from error
    except OSError:
        raise
    # A file that is not a pickle may raise any kind of error.
    except Exception as error:
        raise ValueError(f"{path} contains no weights: {error}".splitlines()[0]) from error
    for key in ("state_dict", "model_state_dict", "model", "G"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} contains no state dict, which is a dictionary of tensors: save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in state.items()}


def check_library_name(spec: str) -> None:
    """Raise an error if a library has no classifier of a name."""
    library, _, name = spec.partition(":")
    try:
        known = importlib.import_module("torchvision.models" if library == "torchvision" else "timm").list_models()
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{spec}: timm is not installed, run pip install timm") from None
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 3))
        raise ValueError(f"{library} has no classifier {name!r}, near: {near or 'none'}")


def _torchvision_weights(name: str, weights: str) -> tuple[Path, int, tuple[float, ...], tuple[float, ...]]:
    from torchvision.models import get_model_weights

    known = get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(f"torchvision's {name} has no weights {weights!r}, only {', '.join(known.__members__)}")
    entry = known[weights]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, and nothing is downloaded here: get the file from {entry.url}")
    preset = entry.transforms()
    return path, len(entry.meta["categories"]), tuple(preset.mean), tuple(preset.std)


def _timm_weights(name: str, weights: str) -> tuple[Path, int, tuple[float, ...], tuple[float, ...]]:
    if weights != "pretrained":
        raise ValueError(f"weights of timm:{name} must be a file or 'pretrained', got {weights!r}")
    config = importlib.import_module("timm").get_pretrained_cfg(name)
    cache = importlib.import_module("huggingface_hub").try_to_load_from_cache
    path = cache(config.hf_hub_id, "model.safetensors") if config.hf_hub_id else None
    if not isinstance(path, str):
        raise FileNotFoundError(
            f"the weights of timm:{name} are not on this machine, and nothing is downloaded here: get "
            f"model.safetensors from huggingface.co/{config.hf_hub_id}"
        )
    return Path(path), config.num_classes, tuple(config.mean), tuple(config.std)


# -- the user's modules ------------------------------------------------------------------------------------------------


def called_by(spec: str, *, fresh: bool = False) -> Any:
    """Import a function or class by its name, call it without arguments, and return its result."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(
            f"the name of a model must be package.module:function or path/to/file.py:function, got {spec!r}"
        )
    # Like ``python -m`` and ``python file.py``, search this folder first, also for later imports inside `forward`.
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _imported(spec, place)
    if name not in vars(module):
        raise ValueError(f"{spec}: {module.__file__} has no function or class {name!r}")
    factory = vars(module)[name]
    if isinstance(factory, nn.Module):
        if fresh:
            raise ValueError(f"spec must name a function that makes a new module in each call, got {spec!r}, a module")
        return factory
    return factory()


def _imported(spec: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    if not Path(place).is_file():
        raise FileNotFoundError(f"{spec}: there is no file {place}")
    # With this name the module does not hide another module.
    name = f"own_{Path(place).stem}"
    found = importlib.util.spec_from_file_location(name, Path(place).resolve())
    assert found is not None and found.loader is not None
    # dataclasses and pickle look up the module of a class in sys.modules.
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def described(error: BaseException) -> str:
    """Describe an error in one line, with the file and the number of the last line of the user's code that ran."""
    every = [place for one in (error.__cause__, error) if one for place in traceback.extract_tb(one.__traceback__)]
    places = [place for place in every if not is_installed(place.filename)]
    at = "".join(f" ({place.filename}, line {place.lineno})" for place in places[-1:])
    return f"{type(error).__name__}: {error}{at}"
