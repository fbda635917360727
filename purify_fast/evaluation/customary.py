"""The radius: 0 is refused; one that others do not use on the data set is mentioned, as it compares with nothing."""

from __future__ import annotations

import math

from ..attacks.arguments import check_eps
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


def check_radius(eps: float, norm: str, attacked: bool) -> None:
    """ValueError for a radius of 0, within which no attack can move an image, and for one that is out of range.

    Args:
        eps: radius in image units.
        norm: of the ball.
        attacked: whether there is any attack; the accuracy on clean images needs no radius.
    """
    check_eps(eps, norm)
    if eps == 0 and attacked:
        raise ValueError(
            "eps must be above 0, got 0: no image could be moved, and every attack would find nothing. Give the "
            "radius to attack at, such as 8/255; for the accuracy on clean images alone, give attacks=[]"
        )


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
