"""The official CARSO weights: three safetensors files per system, under the names the official code gives its tensors.

    {stem}_repr_compressors     i.j.0.*, i.j.1.*         layer i, block j: convolution, BatchNorm
    {stem}_repr_fcn_compressor  1.0.*, 1.1.*             the joint linear layer, BatchNorm
    {stem}_decoder              0.1.*, i.0.*, i.1.*, 5.* adapter; transposed convolutions, BatchNorm; the last one

The posterior encoder q(z | x, c) is in none of them: inference does not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._files import atomic
from ..._validation import check_shapes
from ...models.foreign import read_weights
from ...models.layers import Normalize
from ...protocols import NamesRepresentation
from .networks import Deconvolution

PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")
#: The tensors of each of `PARTS` by their official names.
Tensors = dict[str, dict[str, Tensor]]


def official_tensors(condition_encoder: nn.Module, decoder: nn.Module) -> Tensors:
    """The tensors of a version 4 system per official file, under their official names; memory is shared."""
    state: Tensors = {part: {} for part in PARTS}
    encoder: dict[str, Tensor] = condition_encoder.state_dict()
    for name, tensor in encoder.items():
        kind, _, rest = name.partition(".")
        part, official_name = ("repr_compressors", rest) if kind == "layers" else ("repr_fcn_compressor", f"1.{rest}")
        state[part][official_name] = tensor
    stack: dict[str, Tensor] = decoder.state_dict()
    last = max(int(name.split(".")[1]) for name in stack if name.startswith("stack."))
    for name, tensor in stack.items():
        kind, _, rest = name.partition(".")
        if kind == "adapter":
            state["decoder"][f"0.1.{rest}"] = tensor
        else:
            # This package's names count modules, of which a layer has three; the official names count layers.
            index, _, leaf = rest.partition(".")
            layer, module = divmod(int(index), 3)
            middle = "" if int(index) == last else f"{module}."
            state["decoder"][f"{layer + 1}.{middle}{leaf}"] = tensor
    return state


def _statistics(classifier: nn.Module) -> dict[str, list[float]]:
    """mean and std of the classifier's own normalization: a `Normalize` inside it, or RobustBench's two tensors."""
    for module in classifier.children():
        if isinstance(module, Normalize):
            return module.arguments
    tensors = {name: getattr(classifier, name, None) for name in ("mean", "std")}
    lists = {name: value.flatten().tolist() for name, value in tensors.items() if isinstance(value, Tensor)}
    return lists if len(lists) == 2 else {}


def _paths(directory: Path, stem: str | None) -> dict[str, Path]:
    """The file of each of `PARTS`."""
    if stem is None:
        ending = f"_{PARTS[0]}.safetensors"
        stems = sorted(path.name.removesuffix(ending) for path in directory.glob(f"*{ending}"))
        if len(stems) != 1:
            names = ", ".join(stems) or "none"
            raise ValueError(f"{directory} must hold one file *{ending}, or give its stem; there are: {names}")
        stem = stems[0]
    return {part: directory / f"{stem}_{part}.safetensors" for part in PARTS}


def _sizes(tensors: Tensors, paths: dict[str, Path]) -> tuple[dict[str, Any], int]:
    """The arguments of `Carso` that the files tell, and the number of layers in the representation."""

    def shape(part: str, name: str, dims: int) -> tuple[int, ...]:
        tensor = tensors[part].get(name)
        if tensor is None or tensor.dim() != dims:
            actual = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{paths[part]}: {name} must be there with {dims} dimensions, got {actual}")
        return tuple(tensor.shape)

    cond_dim = shape("repr_fcn_compressor", "1.0.weight", 2)[0]
    rows, columns = shape("decoder", "0.1.weight", 2)
    first = shape("decoder", "1.0.weight", 4)[0]
    side = isqrt(rows // first)
    hidden = [shape("decoder", f"{i}.0.weight", 4) for i in range(1, 5)]
    last = shape("decoder", "5.weight", 4)
    # 3 x 3 after four doublings (TinyImageNet), 2 x 2 after 3 - 5 - 9 - 17 - 33 (CIFAR)
    padding = (1, 1) if last[2] == 3 else (0, 0)
    layers = [
        *(Deconvolution(outputs, kernel, output_padding=padding) for _, outputs, kernel, _ in hidden),
        Deconvolution(last[1], last[2], stride=1),
    ]
    h = w = side
    for layer in layers:
        h, w = layer.size(h, w)
    blocks = [name.split(".")[:2] for name in tensors["repr_compressors"] if name.endswith(".0.weight")]
    if not blocks or rows != first * side * side or columns <= cond_dim:
        raise ValueError(f"{paths['decoder'].parent}: these are not the three files of a CARSO system")
    arguments = {
        "image_shape": (last[1], h, w),
        "cond_dim": cond_dim,
        "latent_dim": columns - cond_dim,
        "encoder_depth": len({block for _, block in blocks}),
        "decoder": ((first, side, side), layers),
    }
    return arguments, len({layer for layer, _ in blocks})


def read_official(
    classifier: nn.Module, directory: str | Path, stem: str | None, layers: Sequence[str] | None
) -> tuple[dict[Path, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of a system's files, and what `Carso` takes to hold them; see `Carso.from_official`."""
    paths = _paths(Path(directory), stem)
    tensors = {part: read_weights(path) for part, path in paths.items()}
    arguments, count = _sizes(tensors, paths)
    if layers is None:
        if not isinstance(classifier, NamesRepresentation):
            raise ValueError("layers: name the modules of this classifier that the files were trained on")
        layers = classifier.representation_layers()
    if len(layers) != count:
        raise ValueError(f"{paths['repr_compressors']} is for {count} layers, got {len(layers)}")
    arguments |= {"layers": layers, **_statistics(classifier)}
    return {path: tensors[part] for part, path in paths.items()}, arguments


@torch.no_grad()
def fill(condition_encoder: nn.Module, decoder: nn.Module, files: dict[Path, dict[str, Tensor]]) -> None:
    """Copy the files' tensors into a system's, if the names and shapes of all are the system's; else ValueError."""
    parts = list(zip(official_tensors(condition_encoder, decoder).values(), files.items(), strict=True))
    for own, (path, tensors) in parts:
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (tensors, own)]
        check_shapes(f"{path} does not fit this classifier and layers", *shapes)
    for own, (_, tensors) in parts:
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def write_official(condition_encoder: nn.Module, decoder: nn.Module, directory: str | Path, stem: str) -> None:
    """Write the three official files, each whole or absent; see `Carso.save_official`."""
    state = official_tensors(condition_encoder, decoder)
    paths = _paths(Path(directory), stem)
    try:
        readable = _sizes(state, paths)[0]["decoder"]
    except ValueError:
        readable = None
    layers = [Deconvolution.of(layer) for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    if readable != (decoder.start, layers):
        # Strides and paddings are not in the files: a reader takes the published ones.
        raise ValueError(
            "official files hold the published kind of decoder only (`purify_fast.methods.carso.published_decoder`)"
        )
    for part, tensors in state.items():
        with atomic(paths[part]) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
