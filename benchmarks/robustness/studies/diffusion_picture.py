"""Draw a picture for docs/diffusion.md: how a purifier noises and denoises a clean image and an attacked image."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from purify_fast import zoo
from purify_fast.data import balanced_subset, load_dataset, to_float
from purify_fast.methods.diffusion import DiffusionPurifier

from ... import style
from .diffusion import found_by_pgd, predictions

PATH = Path(__file__).parents[3] / "docs" / "pictures" / "diffusion.png"
MODEL, SEED = "digits-diffpure", 0
#: The picture shows the first of CANDIDATES images that is classified correctly before the attack and wrongly after it.
#: The attack takes STEPS steps, and averages over DRAWS random predictions in each step.
CANDIDATES, STEPS, DRAWS = 10, 40, 10


def states(purifier: DiffusionPurifier, image: Tensor) -> list[Tensor]:
    """Return the input of the denoiser at each step, and the purified image, all in [0, 1].

    Args:
        purifier: purifier with one round and one draw.
        image: image ``[1, C, H, W]`` in [0, 1].
    """
    seen: list[Tensor] = []
    watch = purifier.denoiser.register_forward_pre_hook(lambda _, given: seen.append((given[0] + 1) / 2))
    with torch.no_grad(), purifier.fixed_noise(SEED):
        purified = purifier.purify(image)[:, 0]
    watch.remove()
    return [*(one[0].clamp(0, 1) for one in seen), purified[0]]


def chosen(purifier: DiffusionPurifier) -> tuple[Tensor, Tensor, int]:
    """Return an image, the attacked image, and its label.

    Args:
        purifier: purifier for digits.

    Raises:
        ValueError: the attack did not change the prediction of any image.
    """
    data = load_dataset("digits")
    some = balanced_subset(data.x_test, data.y_test, CANDIDATES, SEED, num_classes=data.num_classes)
    x, y = to_float(some.x), some.y
    budget = SimpleNamespace(steps=STEPS, eot=DRAWS, batch=CANDIDATES)
    found = found_by_pgd(purifier, x, y, {"eps": zoo.card(MODEL).eps, "budget": budget})
    with purifier.fixed_noise(SEED):
        before, after = (predictions(purifier, each, 1, CANDIDATES)[0] == y for each in (x, found))
    fooled = (before & ~after).nonzero()[:, 0]
    if not len(fooled):
        raise ValueError(f"the attack broke none of CANDIDATES = {CANDIDATES} images: increase CANDIDATES or STEPS")
    i = int(fooled[0])
    return x[i : i + 1], found[i : i + 1], int(y[i])


def draw(path: Path = PATH) -> bool:
    """Draw the picture.

    Args:
        path: path of the PNG file.

    Returns:
        True if the picture was drawn, and False if matplotlib is not installed.
    """
    purifier = zoo.load(MODEL)
    assert isinstance(purifier, DiffusionPurifier)
    image, attacked, label = chosen(purifier)
    rows = {"clean": image, "attacked": attacked}
    cells = {name: [one[0], *states(purifier, one)] for name, one in rows.items()}
    steps = len(cells["clean"]) - 3
    heads = ["image", "noised", *(f"after step {i + 1}" for i in range(steps)), "purified"]
    figure = style.new_figure(figsize=(1.25 * len(heads), 3.1))
    if figure is None:
        return False
    panels = figure.subplots(2, len(heads), squeeze=False)
    for line, (name, shown) in zip(panels, cells.items(), strict=True):
        with torch.no_grad():
            told = [int(purifier.classifier(one[None]).argmax()) for one in (shown[0], shown[-1])]
        for axes, head, one in zip(line, heads, shown, strict=True):
            axes.imshow(one.movedim(0, -1).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if name == "clean":
                axes.set_title(head, fontsize=9, color=style.INK)
        line[0].set_ylabel(name, fontsize=9, color=style.INK)
        for axes, digit in ((line[0], told[0]), (line[-1], told[1])):
            color = style.OURS if digit == label else style.ALARM
            axes.set_xlabel(f"classified as {digit}", fontsize=8.5, color=color)
    style.save(figure, path)
    return True


def main(chosen: argparse.Namespace) -> str:
    """Run ``python -m benchmarks diffusion_picture``."""
    return str(PATH) if draw() else "matplotlib is not installed, so nothing was drawn: pip install matplotlib"
