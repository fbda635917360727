"""The published systems of CARSO. ``recipes.yaml`` has every value and its source.

They are versions 4 to 6 of arXiv 2306.06081. A source that is only a file and a line is in emaballarin/CARSO, commit
307b873. "ebtorch" is its library emaballarin/ebtorch, commit e9f8d99.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import check_shapes
from ...models.classifiers import WideResNet, load_state, read_weights
from ...models.layers import Normalize
from ..recipes import Recipe, read_recipes
from .defence import Carso
from .method import CarsoConfig
from .networks import PUBLISHED, published_decoder
from .task import CarsoTask, atom_size

# -- the official weights: three safetensors files per system, with the official tensor names --------------------------
#
#    {stem}_repr_compressors     i.j.0.*, i.j.1.*     layer i, block j: convolution, BatchNorm
#    {stem}_repr_fcn_compressor  1.0.*, 1.1.*         the joint linear layer, BatchNorm
#    {stem}_decoder              0.1.*                the adapter
#                                i.0.*, i.1.*         transposed convolution i, BatchNorm
#                                5.*                  the last transposed convolution
#
# The files do not contain the posterior encoder q(z | x, c), because inference does not use it.

PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")
#: The tensors of each file in `PARTS`, by their official names.
Tensors = dict[str, dict[str, Tensor]]


def official_tensors(defence: Carso) -> Tensors:
    """Return the tensors of a defence for each official file, by their official names. They are not copied.

    Args:
        defence: a system whose representation has only maps and whose decoder is a `published_decoder`. Other systems
            have no official files, because the files have no strides and paddings.
    """
    state: Tensors = {
        "repr_compressors": defence.condition_encoder.get_submodule("layers").state_dict(),
        "repr_fcn_compressor": defence.condition_encoder.get_submodule("joint").state_dict(prefix="1."),
        "decoder": defence.decoder.adapter.state_dict(prefix="0.1."),
    }
    stack = list(defence.decoder.stack.children())
    for i, module in enumerate(stack):
        # This package numbers modules, of which a layer has three; the official names number layers.
        layer, part = divmod(i, 3)
        middle = "" if module is stack[-1] else f"{part}."
        state["decoder"] |= module.state_dict(prefix=f"{layer + 1}.{middle}")
    return state


def _statistics(classifier: nn.Module) -> dict[str, list[float]]:
    """Return the mean and std by which a classifier normalizes images."""
    for module in classifier.children():
        if isinstance(module, Normalize):
            return module.arguments
    tensors = {name: getattr(classifier, name, None) for name in ("mean", "std")}
    lists = {name: value.flatten().tolist() for name, value in tensors.items() if isinstance(value, Tensor)}
    return lists if len(lists) == 2 else {}


def _paths(directory: Path, stem: str | None) -> dict[str, Path]:
    if stem is None:
        ending = f"_{PARTS[0]}.safetensors"
        stems = sorted(path.name.removesuffix(ending) for path in directory.glob(f"*{ending}"))
        if len(stems) != 1:
            names = ", ".join(stems) or "none"
            raise ValueError(f"{directory} must have exactly one file *{ending} if stem is None, got {names}")
        stem = stems[0]
    return {part: directory / f"{stem}_{part}.safetensors" for part in PARTS}


def load_official(
    classifier: nn.Module,
    directory: str | Path,
    stem: str | None = None,
    *,
    layers: Sequence[str] | None = None,
    samples: int = 8,
) -> Carso:
    """Load a system from the three safetensors files of the official code, in evaluation mode.

    All sizes are taken from the files. The posterior encoder, which only the training uses, has fresh weights.

    Args:
        classifier: the classifier for which the files were trained.
        directory: folder with ``{stem}_repr_compressors``, ``{stem}_repr_fcn_compressor`` and ``{stem}_decoder``.
        stem: common name of the files; None if the folder has only one system.
        layers: paths of the modules whose outputs form the representation. None means those that a
            `purify_fast.models.WideResNet` names itself.
        samples: K.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: tensors are missing, unknown or have a wrong shape; the message names them and their file.
    """
    paths = _paths(Path(directory), stem)
    encoder, joint, decoder = (read_weights(path) for path in paths.values())
    blocks = [name.split(".")[:2] for name in encoder if name.endswith(".0.weight")]
    cond_dim, first = len(joint.get("1.0.weight", ())), decoder.get("0.1.weight", torch.empty(0, 0))
    # The files have no strides and paddings, so those of the published decoder with the same start shape are used.
    shape = next((shape for shape in PUBLISHED if prod(published_decoder(shape)[0]) == len(first)), None)
    if not blocks or not cond_dim or shape is None or first[0].numel() <= cond_dim:
        raise ValueError(f"{directory} must hold the three files of a CARSO system, but its files have other tensors")
    if layers is None:
        if not isinstance(classifier, WideResNet):
            raise ValueError(f"layers must be given for a {type(classifier).__name__}: those of the files' training")
        layers = classifier.representation_layers()
    if len(layers) != (count := len({layer for layer, _ in blocks})):
        raise ValueError(f"layers must have {count} paths, as in {paths['repr_compressors']}, got {len(layers)}")
    arguments: dict[str, Any] = {
        "layers": layers,
        "image_shape": shape,
        "cond_dim": cond_dim,
        "latent_dim": first.shape[1] - cond_dim,
        "encoder_depth": len({block for _, block in blocks}),
        "decoder": published_decoder(shape),
        **_statistics(classifier),
    }
    defence = Carso(classifier, samples=samples, **arguments)
    files = dict(zip(paths.values(), (encoder, joint, decoder), strict=True))
    for own, (path, tensors) in zip(official_tensors(defence).values(), files.items(), strict=True):
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (tensors, own)]
        check_shapes(f"{path} does not fit this classifier and layers", *shapes)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
    return defence.eval()


# -- the published systems --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarsoRecipe(Recipe):
    """A published CARSO system."""

    settings = CarsoConfig
    # The authors' code computes the rate from the batch.
    in_proportion = ("method.learning_rate",)

    def config(self, official_code: bool = False) -> CarsoConfig:
        """Return the settings. ``official_code`` scales eps, and trains TinyImageNet without adversarial examples."""
        config: CarsoConfig = super().config(official_code)
        if not official_code:
            return config
        local = self["loop.batch_size"] // self["run.processes"]
        fraction = 4 * atom_size(local, config.adversarial_fraction, allow_none=True) / local
        return replace(config, adversarial_fraction=fraction, allow_no_adversarial=fraction == 0)

    def defence(self, classifier: nn.Module, **changes: Any) -> Carso:
        """Build the defence with a fresh purifier. If no decoder was published for the images, it is `decoder_plan`'s.

        Args:
            classifier: a trained network. If it is not a `WideResNet`, name its ``layers``.
            changes: arguments of `Carso` that replace those of the recipe.
        """
        data = {"image_shape": self.image_shape, "mean": self["data.mean"], "std": self["data.std"]}
        options = {**self.part("defence"), **data, **changes}
        if isinstance(classifier, WideResNet) and options["layers"] == self["defence.layers"]:
            # The paper takes the same layers of every block, and this network may have fewer blocks.
            options["layers"] = classifier.representation_layers()
        shape = tuple(options["image_shape"])
        if shape in PUBLISHED:
            options.setdefault("decoder", published_decoder(shape))
        return Carso(classifier, **options)

    def load(self, directory: str | Path, classifier_weights: str | Path) -> Carso:
        """Load the system with its authors' weights, in evaluation mode.

        Args:
            directory: folder with the three safetensors files of the purifier.
            classifier_weights: file of the classifier's weights.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are those of another system; the message says what differs.
        """
        classifier = self.build_classifier()
        what = f"{classifier_weights} does not hold the classifier of this system"
        load_state(classifier, read_weights(classifier_weights), what, only_model=True)
        return load_official(classifier, directory, samples=self["defence.samples"])

    def task(self, defence: Carso, official_code: bool = False) -> CarsoTask:
        """Return the training of a defence, for `purify_fast.training.fit`. ``official_code`` is as in `config`."""
        return CarsoTask(defence, self.config(official_code))


RECIPES = read_recipes(CarsoRecipe, "carso")
