"""The official CARSO weights: three safetensors files per system, under the names the official code gives its tensors.

    {stem}_repr_compressors     i.j.0.*, i.j.1.*         layer i, block j: convolution, BatchNorm
    {stem}_repr_fcn_compressor  1.0.*, 1.1.*             the joint linear layer, BatchNorm
    {stem}_decoder              0.1.*, i.0.*, i.1.*, 5.* adapter; transposed convolutions, BatchNorm; the last one

The posterior encoder q(z | x, c) is in none of them: inference does not use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._files import atomic
from ..._validation import check_shapes
from ...models.layers import Normalize
from ...protocols import NamesRepresentation
from .networks import Deconvolution

PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")
Shapes = dict[str, tuple[int, ...]]


def official_tensors(condition_encoder: nn.Module, decoder: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of a version 4 system per official file, under their official names; memory is shared.

    Args:
        condition_encoder: a `ConditionEncoder` of maps.
        decoder: a `Decoder`.
    """
    state: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in condition_encoder.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind == "layers":
            state["repr_compressors"][rest] = tensor
        else:
            state["repr_fcn_compressor"][f"1.{rest}"] = tensor
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
    held = {**vars(classifier), **dict(classifier.named_buffers(recurse=False))}
    found = {name: held.get(name) for name in ("mean", "std")}
    if all(isinstance(value, Tensor) for value in found.values()):
        return {name: value.flatten().tolist() for name, value in found.items() if isinstance(value, Tensor)}
    return {}


def _find(directory: Path, stem: str | None) -> dict[str, Path]:
    if stem is None:
        ending = f"_{PARTS[0]}.safetensors"
        stems = sorted(path.name[: -len(ending)] for path in directory.glob(f"*{ending}"))
        if len(stems) != 1:
            found = ", ".join(stems) or "none"
            raise ValueError(f"{directory} must hold one file *{ending}, or give its stem; there are: {found}")
        stem = stems[0]
    paths = {part: directory / f"{stem}_{part}.safetensors" for part in PARTS}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a system is {', '.join(f'{stem}_{part}' for part in PARTS)}")
    return paths


def _shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _sizes(shapes: dict[str, Shapes], paths: dict[str, Path]) -> tuple[dict[str, Any], int]:
    """The arguments of `Carso` that the files tell, and the number of layers in the representation."""

    def shape(part: str, name: str, dims: int) -> tuple[int, ...]:
        found = shapes[part].get(name)
        if found is None or len(found) != dims:
            raise ValueError(f"{paths[part]}: {name} must be there with {dims} dimensions, found {found}")
        return found

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
    pairs = [name.split(".") for name in shapes["repr_compressors"] if name.endswith(".0.weight")]
    if not pairs or rows != first * side * side or columns <= cond_dim:
        raise ValueError(f"{paths['decoder'].parent}: these are not the three files of a CARSO system")
    arguments = {
        "image_shape": (last[1], h, w),
        "cond_dim": cond_dim,
        "latent_dim": columns - cond_dim,
        "encoder_depth": len({pair[1] for pair in pairs}),
        "decoder": ((first, side, side), layers),
    }
    return arguments, len({pair[0] for pair in pairs})


@dataclass(frozen=True)
class OfficialFiles:
    """The three files of a system, and the shapes of the tensors in them.

    Args:
        paths: of each of `PARTS`.
        shapes: of each of `PARTS`, by tensor name.
    """

    paths: dict[str, Path]
    shapes: dict[str, Shapes]

    def read_into(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy the files' tensors into the system's.

        Args:
            state: what `official_tensors` gives of the system.

        Raises:
            ValueError: the files' names or shapes are not the system's; nothing is copied then.
        """
        for part, path in self.paths.items():
            wanted = {name: tuple(tensor.shape) for name, tensor in state[part].items()}
            check_shapes(f"{path} does not fit this classifier and layers", self.shapes[part], wanted)
        for part, path in self.paths.items():
            with safe_open(path, "pt") as file, torch.no_grad():
                for name, tensor in state[part].items():
                    tensor.copy_(file.get_tensor(name))


def official_arguments(
    classifier: nn.Module, directory: str | Path, stem: str | None, layers: Sequence[str] | None
) -> tuple[OfficialFiles, dict[str, Any]]:
    """A system's files, and what `Carso` takes to hold them; see `Carso.from_official`.

    Args:
        classifier: the one that the files were trained for.
        directory: where the files are.
        stem: their common name; None if there is one system in the directory.
        layers: the representation's modules; None for what the classifier names itself, as a `WideResNet` does.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not those of a system, or not for so many layers.
    """
    paths = _find(Path(directory), stem)
    files = OfficialFiles(paths, {part: _shapes(path) for part, path in paths.items()})
    arguments, count = _sizes(files.shapes, paths)
    if layers is None:
        if not isinstance(classifier, NamesRepresentation):
            raise ValueError("layers: name the modules of this classifier that the files were trained on")
        layers = classifier.representation_layers()
    if len(layers) != count:
        raise ValueError(f"{paths['repr_compressors']} is for {count} layers, got {len(layers)}")
    return files, {"layers": layers, **arguments, **_statistics(classifier)}


def write_official(condition_encoder: nn.Module, decoder: nn.Module, directory: str | Path, stem: str) -> None:
    """Write the three official files, each whole or absent; see `Carso.save_official`.

    The posterior encoder is not among them.

    Args:
        condition_encoder: a `ConditionEncoder` of maps.
        decoder: a `Decoder`.
        directory: where to.
        stem: the files' common name.

    Raises:
        ValueError: the files cannot hold this decoder.
    """
    state = official_tensors(condition_encoder, decoder)
    paths = {part: Path(directory) / f"{stem}_{part}.safetensors" for part in PARTS}
    try:
        readable = _sizes({p: {k: tuple(v.shape) for k, v in state[p].items()} for p in PARTS}, paths)[0]["decoder"]
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
