"""Gives all denoisers (this package's U-Net, the U-Net of diffusers, and modules of users) the same interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._settings import first_tensor
from ...models.classifiers import load_weights
from ...models.layers import evaluation_mode
from ...models.unet import TimeLayer, UNet
from ...training.run import save_model
from ..saving import description, rebuilt

#: The denoisers of this package, by the names of their classes. Each has the attribute ``arguments``.
DENOISERS: dict[str, type[nn.Module]] = {"UNet": UNet}
#: The ``kind`` in the file of a denoiser that was saved without a classifier.
DENOISER_KIND = "Denoiser"
#: The class of diffusers' network, which can be made again from its ``config``.
DIFFUSERS = "UNet2DModel"


def _diffusers_model() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(f"{DIFFUSERS} needs diffusers: pip install 'purify-fast[diffusion]' ({error})") from error
    return UNet2DModel


def described_denoiser(denoiser: nn.Module) -> dict[str, Any]:
    """Describe a denoiser by JSON values to make it again, and a module of the user's own only by its class's name."""
    if type(denoiser).__name__ == DIFFUSERS:
        return {"kind": DIFFUSERS, "arguments": json.loads(json.dumps(dict(denoiser.config)))}  # type: ignore[arg-type]
    return description(denoiser, DENOISERS)


def rebuilt_denoiser(facts: dict[str, Any], module: nn.Module | None, folder: object) -> nn.Module:
    """Make the denoiser of a saved description. If ``module`` has it, return that; otherwise raise ValueError."""
    if module is None and facts["kind"] == DIFFUSERS:
        return _diffusers_model().from_config(facts["arguments"])
    return rebuilt(facts, module, DENOISERS, folder)


def save_denoiser(
    denoiser: nn.Module,
    folder: str | Path,
    image_shape: tuple[int, int, int],
    process: Mapping[str, Any],
    last_time: float = 1.0,
) -> None:
    """Write a trained denoiser without a classifier, with which `purify_fast.load_defence` combines it.

    Args:
        denoiser: the denoiser.
        folder: folder of ``model.safetensors``.
        image_shape: (C, H, W).
        process: the fields of `purify_fast.methods.diffusion.Process` that the training determines.
        last_time: last time for which the denoiser was trained, as a share of the process.
    """
    arguments = {"image_shape": list(image_shape), "process": dict(process), "last_time": last_time}
    save_model(folder, DENOISER_KIND, arguments | {"denoiser": described_denoiser(denoiser)}, denoiser.state_dict())


def read_pretrained(folder: str | Path) -> tuple[nn.Module, tuple[int, int, int], dict[str, Any]]:
    """Read a denoiser of diffusers from its folder, with the shape of its images and the settings of its process."""
    root = Path(folder)
    network = root / "unet" if (root / "unet").is_dir() else root
    scheduler = next((p for p in (root / "scheduler", root) if (p / "scheduler_config.json").is_file()), None)
    if scheduler is None or not (network / "config.json").is_file():
        raise FileNotFoundError(f"{folder} must have config.json and scheduler_config.json, like diffusers' pipelines")
    process = json.loads((scheduler / "scheduler_config.json").read_text(encoding="utf-8"))
    # Two variances of diffusers are not supported. With "learned", the network predicts the variance itself. With
    # "fixed_large_log", diffusers takes the square root of a logarithm.
    variances = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
    choices = []
    for name, default, names in (
        ("beta_schedule", "linear", {"linear": "linear", "squaredcos_cap_v2": "cosine"}),
        ("prediction_type", "epsilon", {"epsilon": "noise", "sample": "x0", "v_prediction": "v"}),
        ("variance_type", "fixed_small", variances),
    ):
        if (value := process.get(name, default)) not in names:
            raise ValueError(f"{scheduler}: {name} must be one of {', '.join(names)}, got {value!r}")
        choices.append(names[value])
    kind, prediction, variance = choices
    if process.get("trained_betas") is not None or process.get("thresholding") or process.get("rescale_betas_zero_snr"):
        raise ValueError(f"{scheduler}: trained_betas, thresholding and rescale_betas_zero_snr are not supported")
    if (most := process.get("clip_sample_range", 1.0)) != 1 and process.get("clip_sample", True):
        raise ValueError(f"{scheduler}: clip_sample_range must be 1, as images are in [-1, 1], got {most}")
    schedule = {"kind": kind, "steps": process.get("num_train_timesteps", 1000)}
    if kind == "linear":
        scale = schedule["steps"] / 1000
        schedule["first_beta"] = scale * process.get("beta_start", 1e-4)
        schedule["last_beta"] = scale * process.get("beta_end", 0.02)
    clip = bool(process.get("clip_sample", True))
    settings = {"schedule": schedule, "prediction": prediction, "variance": variance, "clip": clip}
    denoiser = _diffusers_model().from_pretrained(str(network), local_files_only=True)
    size = denoiser.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return denoiser, (denoiser.config["in_channels"], height, width), settings


def load_denoiser(denoiser: nn.Module, path: str | Path) -> nn.Module:
    """Load published weights into a network that the authors' code has built, and return this network.

    Args:
        denoiser: the network; it is changed in place.
        path: a file with a state dict, such as a file of guided-diffusion; or a checkpoint of score-SDE, whose moving
            average ``ema`` is used, if any. Only tensors are read.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file holds no weights, or the weights of another network.
    """
    load_weights(denoiser, path)
    return denoiser


class Denoiser(nn.Module):
    """Gives all denoisers one interface: a function ``(x_t, t) -> prediction``.

    ``module(x [B, C, H, W], t [B])`` returns a tensor, or an object with a tensor ``sample``, as models of diffusers
    do: ``[B, C, H, W]``, or ``[B, 2C, H, W]`` with learned variances. With ``whole_times``, t is int64.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], whole_times: bool):
        super().__init__()
        self.module, self.whole_times = module, whole_times
        channels, h, w = image_shape
        first = first_tensor(module)
        images = torch.zeros((2, *image_shape), device=first.device, dtype=first.dtype)
        with evaluation_mode(module), torch.no_grad():
            result = self(images, torch.ones(2, device=first.device, dtype=torch.float64))
        shapes = [[2, channels, h, w], [2, 2 * channels, h, w]]
        if list(result.shape) not in shapes:
            raise ValueError(f"denoiser must return {shapes[0]} or {shapes[1]}, got {list(result.shape)}")
        self.learns_variances = result.shape[1] == 2 * channels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the module's prediction."""
        # The time is not converted to bfloat16, whose mantissa of eight bits cannot distinguish a thousand values.
        t = t.long() if self.whole_times else t.to(torch.promote_types(x.dtype, torch.float32))
        output = self.module(x, t)
        return output if isinstance(output, Tensor) else output.sample

    def convert_to_bfloat16(self) -> None:
        """Convert the weights of convolutions and linear layers to bfloat16, in place."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(memory_format=torch.channels_last)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not isinstance(layer, TimeLayer):
                layer.to(torch.bfloat16)
