"""Classifiers of other libraries and of a user's own, by name, and the modules that a user's own functions return.

- ``torchvision:resnet18``: a model of torchvision.
- ``timm:resnet18``: a model of timm, if that is installed.
- ``package.module:function`` and ``path/to/file.py:function``: what a function or class without arguments returns.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pickle
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .._validation import check_shapes
from .layers import Normalize, Statistic

LIBRARIES = ("torchvision", "timm")
#: Folders of Python's library and of installed packages, and the import system; errors name a place in other code.
_NOT_OWN = ("<frozen ", *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")))


class ForeignClassifier(nn.Module):
    """A classifier from outside this package, made by its name, so that it can be saved and loaded.

    ``forward(x)``: images ``[B, in_channels, H, W]`` in [0, 1] to logits ``[B, num_classes]``. The network is the
    module ``model``: the layers of a representation are ``model.layer1`` and so on.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:function``. The last imports and calls code that
            the name says: a saved classifier of this kind is to be loaded from trusted folders only. Modules in the
            working folder are found too, and it stays on ``sys.path`` for what the model imports when it runs.
        in_channels: channels of the images. A torchvision network takes three: one channel is given to it three times.
        num_classes: classes of the data; a function of a user's own decides this itself.
        mean: the mean of the images, one number per channel; a function of a user's own normalizes them itself.
        std: the standard deviations of the images, in the same form.

    Raises:
        ValueError: no such model, or what is found there is none; a function by its file; or, in place of a function,
            a module that exists already.
        ModuleNotFoundError: the library or the module is not installed.
    """

    def __init__(self, spec: str, in_channels: int, num_classes: int, mean: Statistic = 0.5, std: Statistic = 0.5):
        super().__init__()
        library, _, name = spec.partition(":")
        self.spec = spec
        self.arguments: dict[str, Any] = {"spec": spec, "in_channels": in_channels, "num_classes": num_classes}
        self.repeated = 1
        self.normalize: nn.Module = nn.Identity()
        if library in LIBRARIES:
            check_library_name(spec)
            normalize = Normalize(mean, std, in_channels)
            self.normalize = normalize
            self.arguments |= normalize.arguments
        if library == "torchvision":
            # importing it takes 1.7 seconds, and most classifiers do not need it
            from torchvision import models

            self.model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
            if in_channels not in (1, 3):
                raise ValueError(f"{spec} takes images of 1 or 3 channels, got {in_channels}")
            self.repeated = 3 // in_channels
        elif library == "timm":
            timm = importlib.import_module("timm")
            self.model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
        else:
            # a saved classifier names its function, and loading it must not run a file from an arbitrary place
            if spec.rpartition(":")[0].endswith(".py"):
                raise ValueError(
                    f"spec must be torchvision:NAME, timm:NAME or package.module:function, got {spec!r}: only "
                    "`purify-fast evaluate` takes a function by its file. Name it by its module, such as "
                    f"{Path(spec).stem}:{name}, and start in its folder or put that on PYTHONPATH"
                )
            model = called_by(spec, fresh=True)
            if not isinstance(model, nn.Module):
                raise ValueError(f"{spec} must return a torch.nn.Module, it returned a {type(model).__name__}")
            self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.model(x if self.repeated == 1 else x.expand(-1, self.repeated, -1, -1))


def build_foreign(
    spec: str, in_channels: int, num_classes: int, mean: Statistic, std: Statistic, weights: str | None = None
) -> ForeignClassifier:
    """A classifier by its name, with fresh weights or given ones.

    Args:
        spec: the name, as for `ForeignClassifier`.
        in_channels: channels of the images.
        num_classes: classes of the data.
        mean: the mean of the images, one number per channel; weights of a library replace it by their own.
        std: the standard deviations of the images, in the same form.
        weights: None for fresh ones; a file, ``.safetensors`` or one of PyTorch's of which only tensors are read; or
            the library's name for weights that it has downloaded before: ``IMAGENET1K_V1`` of torchvision,
            ``pretrained`` of timm.

    Raises:
        FileNotFoundError: the file does not exist, or the library has not downloaded the weights: nothing is downloaded
            here.
        ValueError: weights of other shapes, or a file that holds more than tensors.
    """
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
            raise ValueError(f"{spec} with the weights {weights} has {classes} classes, the data {num_classes}")
        if in_channels != len(own_mean):
            # grey images are normalized, and then repeated for three channels
            own_mean, own_std = (sum(own_mean) / len(own_mean),), (sum(own_std) / len(own_std),)
        classifier = ForeignClassifier(spec, in_channels, classes, own_mean, own_std)
    load_state(classifier.model, read_weights(path), str(path))
    return classifier


def load_state(model: nn.Module, state: Mapping[str, Tensor], what: str, *, drop_prefix: bool = False) -> None:
    """Load a state dict whose names and shapes must all be the model's; ``what`` begins the error.

    With ``drop_prefix`` a wrapper's name before all others is dropped, such as "0." of a Sequential around the network.
    """
    own = model.state_dict()
    if drop_prefix:
        first = next(iter(own))
        prefix = next((name.removesuffix(first) for name in state if name.endswith(first)), "")
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    check_shapes(what, {name: value.shape for name, value in state.items()}, {n: v.shape for n, v in own.items()})
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file, of which only tensors are read.

    Args:
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote. A table ``state_dict``, ``model_state_dict``,
            ``model`` or ``G`` (a GAN's generator) in it is taken for the whole. The prefix ``module.`` of DataParallel
            is dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the weights to start from")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to load the file unsafely
        raise ValueError(f"{path} holds Python objects, and only tensors are read: save its state dict") from error
    except OSError:
        raise
    # bytes that are not a pickle raise any kind of error
    except Exception as error:
        raise ValueError(f"{path} holds no weights: {error}".splitlines()[0]) from error
    for key in ("state_dict", "model_state_dict", "model", "G"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: a table of tensors is wanted")
    return {name.removeprefix("module."): value for name, value in state.items()}


def check_library_name(spec: str) -> None:
    """Refuse a name that a library does not know.

    Args:
        spec: ``torchvision:NAME`` or ``timm:NAME``.

    Raises:
        ValueError: the library has no classifier of this name.
        ModuleNotFoundError: the library is not installed.
    """
    library, _, name = spec.partition(":")
    if library == "torchvision":
        from torchvision import models

        known, place = models.list_models(module=models), "torchvision.models.list_models()"
        if name in known:
            return
    else:
        timm = importlib.import_module("timm")
        if timm.is_model(name):
            return
        known, place = timm.list_models(), "timm.list_models()"
    near = difflib.get_close_matches(name, known, 3)
    hint = f"near: {', '.join(near)}; " if near else ""
    raise ValueError(f"{library} has no classifier {name!r}; {hint}{place} names all")


def _torchvision_weights(name: str, weights: str) -> tuple[Path, int, tuple[float, ...], tuple[float, ...]]:
    from torchvision.models import get_model_weights

    known = get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(f"torchvision's {name} has no weights {weights!r}, only {', '.join(known.__members__)}")
    entry = known[weights]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: nothing is downloaded here, get it from {entry.url}")
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
            f"the weights of timm:{name} are not on this machine: nothing is downloaded here, get model.safetensors "
            f"from huggingface.co/{config.hf_hub_id}"
        )
    return Path(path), config.num_classes, tuple(config.mean), tuple(config.std)


# -- modules of the user's own -----------------------------------------------------------------------------------------


def called_by(spec: str, *, fresh: bool = False) -> Any:
    """Call a function or class without arguments and return its result; only the module that it names is imported.

    Args:
        spec: ``package.module:name``, where modules in the working folder are found too, or ``path/to/file.py:name``,
            where those beside the file are. That folder stays on ``sys.path``, since a model may import more when it
            runs. A module that exists already, as a variable of that name, is taken as it is.
        fresh: refuse a module that exists already, since every model of that name would have the same weights.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: the module, or one that it imports, is not installed.
        ValueError: the name does not exist, is not callable, or fails; or `fresh` asks for a new module where one
            exists already.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"a model by name is package.module:function or path/to/file.py:function, got {spec!r}")
    # like ``python -m`` and ``python file.py``: modules of this folder are found first, also later, inside forward
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _imported(spec, place)
    if name not in vars(module):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)])
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"{spec}: {module.__name__} ({module.__file__}) has no function or class {name!r}{hint}")
    factory = vars(module)[name]
    if isinstance(factory, nn.Module):
        if fresh:
            raise ValueError(
                f"spec {spec!r} must name a function or class that makes a new module at each call; {name} is a "
                "module that exists already, and all classifiers of this name would share its weights"
            )
        return factory
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{spec} must work without arguments, but it failed: {_told(error)}") from error


def _imported(spec: str, place: str) -> ModuleType:
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise FileNotFoundError(f"{spec}: there is no file {place}")
    try:
        return _from_file(Path(place)) if is_file else importlib.import_module(place)
    except ImportError as error:
        raise ModuleNotFoundError(f"{spec}: {error}") from error
    except (Exception, SystemExit) as error:
        advice = '. Put what only belongs to running the file below `if __name__ == "__main__":`'
        told = f"{_told(error)}{advice if isinstance(error, SystemExit) else ''}"
        raise ValueError(f"{spec}: {place} cannot be imported: {told}") from error


def _from_file(path: Path) -> ModuleType:
    """Import the file as a module with a unique name, so that it hides no other module."""
    name = f"own_{path.stem}"
    place = importlib.util.spec_from_file_location(name, path.resolve())
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    # dataclasses and pickle look a class's module up
    sys.modules[name] = module
    place.loader.exec_module(module)
    return module


def _told(error: BaseException) -> str:
    """An error of the user's code in one line, with the innermost line of that code."""
    places = [
        place
        for place in traceback.extract_tb(error.__traceback__)
        if not place.filename.startswith((__file__, *_NOT_OWN))
    ]
    at = "".join(f" ({place.filename}, line {place.lineno})" for place in places[-1:])
    return f"{type(error).__name__}: {error}{at}"
