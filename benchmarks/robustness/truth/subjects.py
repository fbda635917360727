"""Return the attacked networks with their images and radii. Networks are trained once, and saved with the results.

A subject is a group of networks with one row in the tables. It is either one network of `NETWORKS`, or all networks
that hide an adversarial example with the same gap, or all networks that are robust by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from purify_fast._files import atomic
from purify_fast._tensors import weights_fingerprint

from . import planted
from .exact_networks import IMAGES, NETWORKS
from .planted import Part

WEIGHTS = "truth_networks.safetensors"
#: The gap of each group of networks that hide an adversarial example (see `planted.GAPS`), by the group's name.
HIDDEN = {f"gap {gap:g}": gap for gap in planted.GAPS}
CONSTRUCTED = "robust by construction"
SUBJECTS = [*NETWORKS, *HIDDEN, CONSTRUCTED]


@dataclass(frozen=True)
class Setting:
    """The folders, the numbers of images and networks, and the effort.

    Args:
        out: folder of the results.
        data: folder of MNIST.
        images: number of images that are decided for each network of `NETWORKS`.
        seconds: time limit for an image. An image that needs more time is undecided.
        hidden: number of networks that hide an adversarial example, for each gap.
        effort: effort of the training of the networks that hide an adversarial example.
        constructed: number of networks that are robust by construction.
    """

    out: Path
    data: Path | None
    images: int = IMAGES
    seconds: float = 60.0
    hidden: int = planted.EACH
    effort: planted.Effort = field(default_factory=planted.Effort)
    constructed: int = planted.CONSTRUCTED

    @property
    def kept(self) -> dict[str, Tensor]:
        """The saved weights of all networks. The dictionary is empty before the first training."""
        path = self.out / WEIGHTS
        return load_file(path) if path.exists() else {}

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Add weights to the saved weights."""
        with atomic(self.out / WEIGHTS) as temporary:
            save_file({name: one.contiguous() for name, one in (self.kept | tensors).items()}, temporary)


#: The amounts of a trial.
QUICK: dict[str, Any] = {
    "images": 4,
    "seconds": 5.0,
    "hidden": 1,
    "effort": planted.Effort(updates=2, window=2, starts=1, others=2, batch=4),
    "constructed": 1,
}


@functools.cache
def parts_of(setting: Setting, name: str) -> list[Part]:
    """Return the networks of a subject with their images. Networks without saved weights are trained.

    Args:
        setting: folders and amounts.
        name: name of the subject in `SUBJECTS`.

    Raises:
        ValueError: the data set does not exist.
    """
    if name in NETWORKS:
        network, shared = NETWORKS[name], f"{name}/"
        known = {key.removeprefix(shared): one for key, one in setting.kept.items() if key.startswith(shared)}
        x, y = network.images("test", setting.images, setting.data)
        if known:
            model = network.build()
            model.load_state_dict(known)
        else:
            model = network.trained(setting.data)
            setting.keep({shared + key: one for key, one in model.state_dict().items()})
        return [Part(model.eval().requires_grad_(False), x, y, network.eps)]
    if name == CONSTRUCTED:
        return [planted.constructed(seed) for seed in range(setting.constructed)]
    first, whole = list(HIDDEN).index(name) * setting.hidden, hidden(setting)
    images = whole.x.unflatten(2, (1, 8, 8))
    every = [Part(*one, planted.EPS) for one in zip(whole.models(), images, whole.y, strict=True)]
    return every[first : first + setting.hidden]


@functools.cache
def hidden(setting: Setting) -> planted.Hidden:
    """Return the networks of all gaps. If there are no saved weights, all these networks are trained together."""
    kept, layers = setting.kept, range(len(planted.WIDTHS) - 1)
    if "hidden/corner" not in kept:
        gaps = torch.tensor(list(HIDDEN.values())).repeat_interleave(setting.hidden)
        made = planted.train(gaps, setting.effort)
        tensors = {"x": made.x, "y": made.y, "corner": made.corner}
        tensors |= {f"weight.{i}": made.stack.weights[i] for i in layers}
        tensors |= {f"bias.{i}": made.stack.biases[i] for i in layers}
        setting.keep({f"hidden/{key}": one for key, one in tensors.items()})
        kept = setting.kept
    stack = planted.Stack(*([kept[f"hidden/{kind}.{i}"] for i in layers] for kind in ("weight", "bias")))
    return planted.Hidden(stack, *(kept[f"hidden/{key}"] for key in ("x", "y", "corner")))


def identity(parts: Sequence[Part]) -> str:
    """Return a fingerprint of networks, images, labels and radii."""
    held = nn.ModuleList(part.model for part in parts)
    for k, part in enumerate(parts):
        held.register_buffer(f"x{k}", part.x)
        held.register_buffer(f"about{k}", torch.tensor([*part.y.tolist(), part.eps], dtype=torch.float64))
    return weights_fingerprint(held)
