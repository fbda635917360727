"""The radii that others use on a data set: an unusual one is mentioned, since numbers at it compare with nothing."""

from __future__ import annotations

import math

from .labels import ball_name

#: By data set and norm, what most published numbers are about.
CUSTOMARY: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist": {"linf": (0.3,), "l2": (2.0, 1.5), "l1": (10.0,)},
    "fashion_mnist": {"linf": (0.1,), "l2": (1.5,)},
    "cifar10": {"linf": (8 / 255,), "l2": (0.5, 1.0), "l1": (12.0,)},
    "cifar100": {"linf": (8 / 255,), "l2": (0.5,)},
    "svhn": {"linf": (8 / 255,), "l2": (0.5,)},
    "tiny_imagenet": {"linf": (4 / 255, 8 / 255)},
    "imagenette": {"linf": (4 / 255, 8 / 255), "l2": (3.0,)},
}


def unusual_radius(dataset: str | None, norm: str, eps: float) -> list[str]:
    """A note where a radius is not one that others use on this data set; none for an unknown one.

    Args:
        dataset: its name.
        norm: of the ball.
        eps: radius in image units.
    """
    known = CUSTOMARY.get(dataset or "", {}).get(norm, ())
    if not known or any(math.isclose(eps, usual, rel_tol=1e-3) for usual in known):
        return []
    usual = " or ".join(ball_name(norm, radius) for radius in known)
    return [f"{ball_name(norm, eps)} is unusual on {dataset}, where most numbers are about {usual}"]
