"""The attacked networks with their images and radii; they are trained once, and kept beside the results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from purify_fast._files import atomic
from purify_fast._tensors import weights_fingerprint

from . import planted
from .exact_networks import IMAGES, NETWORKS
from .planted import Part

WEIGHTS = "truth_networks.safetensors"
#: The names of the networks that hide a counterexample, with the gap that tells how well they hide it.
HIDDEN = {f"gap {gap:g}": gap for gap in planted.GAPS}
CONSTRUCTED = "robust by construction"
SUBJECTS = [*NETWORKS, *HIDDEN, CONSTRUCTED]


@dataclass(frozen=True)
class Amount:
    """The amounts of everything.

    Args:
        images: number of images of each network that is decided exactly.
        seconds: time limit of the program, after which an image is undecided.
        hidden: number of networks of each gap.
        effort: effort of their training.
        constructed: number of networks that are robust by construction.
    """

    images: int = IMAGES
    seconds: float = 60.0
    hidden: int = planted.EACH
    effort: planted.Effort = field(default_factory=planted.Effort)
    constructed: int = planted.CONSTRUCTED


QUICK = Amount(4, 5.0, 1, planted.Effort(updates=2, window=2, starts=1, others=2, batch=4), 1)


@dataclass(frozen=True)
class Setting:
    """Folders and amounts.

    Args:
        out: the folder of the results.
        data: the folder of MNIST.
        amount: the amounts.
    """

    out: Path
    data: Path | None
    amount: Amount

    @property
    def kept(self) -> dict[str, Tensor]:
        """The weights in the results folder."""
        path = self.out / WEIGHTS
        return load_file(path) if path.exists() else {}

    def keep(self, tensors: dict[str, Tensor]) -> None:
        """Add weights to those in the results folder."""
        with atomic(self.out / WEIGHTS) as temporary:
            save_file({name: one.contiguous() for name, one in (self.kept | tensors).items()}, temporary)


@functools.cache
def parts_of(setting: Setting, name: str) -> list[Part]:
    """The networks of a subject, which are trained if the results folder does not hold them.

    Args:
        setting: folders and amounts.
        name: name in `SUBJECTS`.

    Raises:
        ValueError: the data set of a network is not there.
    """
    amount = setting.amount
    if name in NETWORKS:
        network, shared = NETWORKS[name], f"{name}/"
        known = {key.removeprefix(shared): one for key, one in setting.kept.items() if key.startswith(shared)}
        x, y = network.images("test", amount.images, setting.data)
        if known:
            model = network.build()
            model.load_state_dict(known)
        else:
            model = network.trained(setting.data)
            setting.keep({shared + key: one for key, one in model.state_dict().items()})
        return [Part(model.eval().requires_grad_(False), x, y, network.eps)]
    if name == CONSTRUCTED:
        return [planted.constructed(seed) for seed in range(amount.constructed)]
    first, whole = list(HIDDEN).index(name) * amount.hidden, hidden(setting)
    images = whole.x.unflatten(2, (1, 8, 8))
    every = [Part(*one, planted.EPS) for one in zip(whole.models(), images, whole.y, strict=True)]
    return every[first : first + amount.hidden]


@functools.cache
def hidden(setting: Setting) -> planted.Hidden:
    """The networks of all gaps, which are trained together."""
    kept, layers = setting.kept, range(len(planted.WIDTHS) - 1)
    if "hidden/corner" not in kept:
        gaps = torch.tensor(list(HIDDEN.values())).repeat_interleave(setting.amount.hidden)
        made = planted.train(gaps, setting.amount.effort)
        tensors = {"x": made.x, "y": made.y, "corner": made.corner}
        tensors |= {f"weight.{i}": made.stack.weights[i] for i in layers}
        tensors |= {f"bias.{i}": made.stack.biases[i] for i in layers}
        setting.keep({f"hidden/{key}": one for key, one in tensors.items()})
        kept = setting.kept
    stack = planted.Stack(*([kept[f"hidden/{kind}.{i}"] for i in layers] for kind in ("weight", "bias")))
    return planted.Hidden(stack, *(kept[f"hidden/{key}"] for key in ("x", "y", "corner")))


def identity(parts: Sequence[Part]) -> str:
    """A text that differs for other networks, images or radii."""
    held = nn.ModuleList(part.model for part in parts)
    for k, part in enumerate(parts):
        held.register_buffer(f"x{k}", part.x)
        held.register_buffer(f"about{k}", torch.tensor([*part.y.tolist(), part.eps], dtype=torch.float64))
    return weights_fingerprint(held)
