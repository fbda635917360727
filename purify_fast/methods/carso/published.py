"""A published CARSO system from its authors' weight files: three of the purifier, and one of its classifier."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ..._validation import check_shapes
from ...models.foreign import read_weights
from .defence import Carso
from .official import PARTS
from .recipes import RECIPES, CarsoRecipe, system

_ENDINGS = (".pt", ".pth", ".safetensors")


def load_published(name: str, directory: str | Path, classifier_weights: str | Path | None = None) -> Carso:
    """A published system, in evaluation mode.

    Args:
        name: cifar10, cifar100 or tiny_imagenet.
        directory: where the three safetensors files of the purifier are, and the classifier's file unless it is named.
        classifier_weights: the file of the classifier's weights; None: the one file of weights in ``directory`` that is
            not the purifier's, or of several the one that is called as the authors call it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another name, or files of another system; the message says what differs.
    """
    made = system(name)
    if made["defence.version"] != "v4":
        known = ", ".join(one for one, other in RECIPES.items() if other["defence.version"] == "v4")
        raise ValueError(f"recipe must be a system whose weights were published, {known}, got {name!r}")
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: it must hold the published files of CARSO")
    path = _classifier_file(made, folder) if classifier_weights is None else Path(classifier_weights)
    classifier = made.build_classifier()
    _fill(classifier, path)
    defence = Carso.from_official(classifier, folder, samples=made["defence.samples"])
    if defence.image_shape != made.image_shape:
        raise ValueError(
            f"{folder} holds a system for images {list(defence.image_shape)}, {name} has {list(made.image_shape)}"
        )
    return defence


def _classifier_file(made: CarsoRecipe, folder: Path) -> Path:
    """The file of weights that is none of the purifier's."""
    purifier = tuple(f"_{part}.safetensors" for part in PARTS)
    found = sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS and not path.name.endswith(purifier))
    weights = made["start.classifier"].partition(":")[0]
    named = [path for path in found if path.stem == weights]
    if len(named or found) == 1:
        return (named or found)[0]
    if not found:
        raise FileNotFoundError(
            f"{folder} lacks the classifier that this system purifies for: put its weights there, which its authors "
            f"call {weights} ({', '.join(_ENDINGS)}), or name the file (--classifier-weights)"
        )
    names = ", ".join(path.name for path in found)
    raise ValueError(
        f"{folder} holds several files that may be the classifier's, {names}: name it (--classifier-weights)"
    )


def _fill(classifier: nn.Module, path: Path) -> None:
    """Read the classifier's weights, whatever its authors' code wraps around it."""
    wanted = classifier.state_dict()
    found: dict[str, Tensor] = read_weights(path)
    # a wrapper's names stand before all others, such as "0." of a Sequential around the network
    first = next(iter(wanted))
    prefix = next((name.removesuffix(first) for name in found if name.endswith(first)), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    check_shapes(
        f"{path} does not hold the classifier of this system",
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
    )
    classifier.load_state_dict(state)
