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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..._files import atomic, check_shapes
from ...models.layers import Normalize
from .defence import Carso
from .networks import Deconvolution

PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")
Shapes = dict[str, tuple[int, ...]]


def official_state(defence: Carso) -> dict[str, dict[str, Tensor]]:
    """The defence's tensors per official file, under their official names; they share its memory.

    Raises:
        ValueError: the defence is not of form v4 with maps [B, C, H, W] as its representation.
    """
    if defence.arguments["form"] != "v4" or any(len(shape) != 3 for shape in defence.representation.shapes):
        raise ValueError("official files hold systems of form v4 whose representation is maps [B, C, H, W] only")
    encoder: dict[str, Tensor] = defence.condition_encoder.state_dict()
    state: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in encoder.items():
        kind, _, rest = name.partition(".")
        if kind == "layers":
            state["repr_compressors"][rest] = tensor
        else:
            state["repr_fcn_compressor"][f"1.{rest}"] = tensor
    decoder: dict[str, Tensor] = defence.decoder.state_dict()
    last = max(int(name.split(".")[1]) for name in decoder if name.startswith("stack."))
    for name, tensor in decoder.items():
        kind, _, rest = name.partition(".")
        if kind == "adapter":
            state["decoder"][f"0.1.{rest}"] = tensor
        else:  # ours counts modules, three to a layer; theirs counts layers
            index, _, leaf = rest.partition(".")
            layer, module = divmod(int(index), 3)
            middle = "" if int(index) == last else f"{module}."
            state["decoder"][f"{layer + 1}.{middle}{leaf}"] = tensor
    return state


def _statistics(classifier: nn.Module) -> dict:
    """mean and std of the classifier's own normalization, where it has one by our name or by RobustBench's."""
    normalize = getattr(classifier, "normalize", None)
    if isinstance(normalize, Normalize):
        return normalize.arguments
    mean, std = getattr(classifier, "mean", None), getattr(classifier, "std", None)
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        return {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
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


def _sizes(shapes: dict[str, Shapes], paths: dict[str, Path]) -> tuple[dict, int]:
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


def load_official(
    classifier: nn.Module,
    directory: str | Path,
    stem: str | None = None,
    *,
    layers: Sequence[str] | None = None,
    samples: int = 8,
) -> Carso:
    """Read a system from its three official files; see `Carso.from_official`."""
    paths = _find(Path(directory), stem)
    shapes = {part: _shapes(path) for part, path in paths.items()}
    arguments, count = _sizes(shapes, paths)
    if layers is None:
        if not hasattr(classifier, "representation_layers"):
            raise ValueError("layers: name the modules of this classifier that the files were trained on")
        layers = classifier.representation_layers()  # type: ignore[operator]  # a method
    if len(layers) != count:
        raise ValueError(f"{paths['repr_compressors']} is for {count} layers, got {len(layers)}")
    defence = Carso(classifier, layers, samples=samples, **arguments, **_statistics(classifier))
    state = official_state(defence)
    for part, path in paths.items():
        wanted = {name: tensor.shape for name, tensor in state[part].items()}
        check_shapes(f"{path} does not fit this classifier and layers", shapes[part], wanted)
    for part, path in paths.items():
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, tensor in state[part].items():
                tensor.copy_(file.get_tensor(name))
    return defence.eval()


def save_official(defence: Carso, directory: str | Path, stem: str) -> None:
    """Write the three official files, each whole or absent; see `Carso.save_official`.

    The posterior encoder is not among them.
    """
    state = official_state(defence)
    paths = {part: Path(directory) / f"{stem}_{part}.safetensors" for part in PARTS}
    try:
        readable = _sizes({p: {k: tuple(v.shape) for k, v in state[p].items()} for p in PARTS}, paths)[0]["decoder"]
    except ValueError:
        readable = None
    layers = [
        Deconvolution(m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0], m.output_padding)  # type: ignore[arg-type]
        for m in defence.decoder.modules()
        if isinstance(m, nn.ConvTranspose2d)
    ]
    if readable != (defence.decoder.start, layers):  # strides and paddings are not in the files
        raise ValueError(
            "official files hold the published kind of decoder only (`purify_fast.methods.carso.published_decoder`)"
        )
    for part, tensors in state.items():
        with atomic(paths[part]) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
