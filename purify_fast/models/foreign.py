"""Classifiers of other libraries and of a user's own, by name.

- ``torchvision:resnet18``: a model of torchvision.
- ``timm:resnet18``: a model of timm, if that is installed.
- ``package.module:function``: what a function or class without arguments returns, for images in [0, 1].
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .._validation import check_shapes
from .layers import Normalize
from .own import made_by

LIBRARIES = ("torchvision", "timm")
FORMS = "torchvision:NAME, timm:NAME or package.module:function"


class ForeignClassifier(nn.Module):
    """A classifier that is not this package's, made by its name, so that it can be saved and loaded.

    ``forward(x)``: images ``[B, in_channels, H, W]`` in [0, 1] to logits ``[B, num_classes]``. The network is the
    module ``model``: the layers of a representation are ``model.layer1`` and so on.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME`` or ``package.module:function``. The last imports and calls code that
            the name says: a saved classifier of this kind is to be loaded from trusted folders only. Modules in the
            working folder are found too, and it stays on ``sys.path`` for what the model imports when it runs.
        in_channels: channels of the images. A torchvision network takes three: one channel is given to it three times.
        num_classes: classes of the data; a function of a user's own decides this itself.
        mean: what normalizes the images, one number per channel; a function of a user's own normalizes them itself.
        std: likewise, the standard deviations.

    Raises:
        ValueError: no such model, or what is found there is none; a function by its file; or, in place of a function,
            a module that exists already.
        ModuleNotFoundError: the library or the module is not installed.
    """

    def __init__(
        self,
        spec: str,
        in_channels: int,
        num_classes: int,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
    ):
        super().__init__()
        library, _, name = spec.partition(":")
        self.spec = spec
        self.arguments: dict[str, Any] = {"spec": spec, "in_channels": in_channels, "num_classes": num_classes}
        self.repeated = 1
        self.normalize: nn.Module = nn.Identity()
        if library == "torchvision":
            self.model = _torchvision_model(name, num_classes)
            if in_channels not in (1, 3):
                raise ValueError(f"{spec} takes images of 1 or 3 channels, got {in_channels}")
            self.repeated = 3 // in_channels
        elif library == "timm":
            self.model = _timm_model(name, in_channels, num_classes)
        else:
            self.model = _called(spec)
        if library in LIBRARIES:
            normalize = Normalize(mean, std, in_channels)
            self.normalize = normalize
            self.arguments |= normalize.arguments

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x)
        return self.model(x if self.repeated == 1 else x.expand(-1, self.repeated, -1, -1))


def build_foreign(
    spec: str,
    in_channels: int,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    weights: str | None = None,
) -> ForeignClassifier:
    """A classifier by its name, with fresh weights or given ones.

    Args:
        spec: as in `ForeignClassifier`.
        in_channels: channels of the images.
        num_classes: classes of the data.
        mean: what normalizes the images, one number per channel; weights of a library bring their own.
        std: likewise, the standard deviations.
        weights: None for fresh ones; a file, ``.safetensors`` or one of PyTorch's of which only tensors are read; or
            the library's name for weights that it has downloaded before: ``IMAGENET1K_V1`` of torchvision,
            ``pretrained`` of timm.

    Raises:
        FileNotFoundError: no such file, or the library has not downloaded these weights; nothing is downloaded here.
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
            # grey images are given three times, and are normalized before
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
        FileNotFoundError: there is no such file.
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
    # bytes that are no pickle fail in any way
    except Exception as error:
        raise ValueError(f"{path} holds no weights: {error}".splitlines()[0]) from error
    for key in ("state_dict", "model_state_dict", "model", "G"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: a table of tensors is wanted")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _torchvision() -> Any:
    # it takes 1.7 seconds to import, and most classifiers do without it
    return importlib.import_module("torchvision")


def _torchvision_model(name: str, num_classes: int) -> nn.Module:
    torchvision = _torchvision()
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no classifier {name!r}; torchvision.models.list_models() names them")
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _torchvision_weights(name: str, weights: str) -> tuple[Path, int, tuple[float, ...], tuple[float, ...]]:
    known = _torchvision().models.get_model_weights(name)
    if weights not in known.__members__:
        raise ValueError(f"torchvision's {name} has no weights {weights!r}, only {', '.join(known.__members__)}")
    entry = known[weights]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: nothing is downloaded here, get it from {entry.url}")
    preset = entry.transforms()
    return path, len(entry.meta["categories"]), tuple(preset.mean), tuple(preset.std)


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModuleNotFoundError("timm is not installed: pip install timm") from error


def _timm_model(name: str, in_channels: int, num_classes: int) -> nn.Module:
    timm = _timm()
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() names them")
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)


def _timm_weights(name: str, weights: str) -> tuple[Path, int, tuple[float, ...], tuple[float, ...]]:
    if weights != "pretrained":
        raise ValueError(f"weights of timm:{name} must be a file or 'pretrained', got {weights!r}")
    config = _timm().get_pretrained_cfg(name)
    cache = importlib.import_module("huggingface_hub").try_to_load_from_cache
    path = cache(config.hf_hub_id, "model.safetensors") if config.hf_hub_id else None
    if not isinstance(path, str):
        raise FileNotFoundError(
            f"the weights of timm:{name} are not on this machine: nothing is downloaded here, get model.safetensors "
            f"from huggingface.co/{config.hf_hub_id}"
        )
    return Path(path), config.num_classes, tuple(config.mean), tuple(config.std)


def _called(spec: str) -> nn.Module:
    module, _, name = spec.rpartition(":")
    if not module or not name:
        raise ValueError(f"a classifier by name is {FORMS}, got {spec!r}")
    # a saved classifier names its function, and a file of any place is not to be run by loading it
    if module.endswith(".py"):
        raise ValueError(
            f"spec must be {FORMS}, got {spec!r}: only `purify-fast evaluate` takes a function by its file. Name it by "
            f"its module, such as {Path(module).stem}:{name}, and start in its folder or put that on PYTHONPATH"
        )
    return made_by(spec, fresh=True)
