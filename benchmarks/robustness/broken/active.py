"""Test whether an attack finds an adversarial point that was planted (Zimmermann et al., arXiv 2206.13991).

To plant a point, a random corner of an image's ball is made adversarial: the model's last linear layer gets another row
of weights, which separates the corner from the image and from many points inside the ball. Then a short attack along
the model's gradients tries to find any point on the corner's side. The power of the attack is the share of images for
which it finds such a point. If random corners of a ball are on this side too, chance alone finds such a point. The
result also has the number of the points that chance finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from purify_fast.attacks import apgd, frozen

#: Increase this number if a change in this file changes results. Saved results with an older number are then computed
#: again.
REVISION = 1
#: PLANTED is the number of images with a planted corner. INSIDE is the number of points inside each ball. LOOKING is
#: the number of random corners of each ball that are tried, to see whether chance alone finds the side of the planted
#: corner. DRAWS is the number of predictions over which a random model is averaged.
PLANTED, INSIDE, LOOKING, DRAWS = 32, 64, 10, 8
#: The distance of the points inside the ball from the image is at most NEAR times the radius. The added row of weights
#: scores points. A point is on the corner's side if its score is above a border. The border lies at the share BORDER of
#: the way from the highest score of the points inside to the score of the corner.
NEAR, BORDER = 0.95, 0.9
#: The short attack takes STEPS steps from each of STARTS random starts. If this attack finds less than the share LEAST
#: of the planted points, attacks on the model are called unreliable.
STEPS, STARTS, LEAST = 20, 2, 0.8


@dataclass
class Power:
    """The result of the test.

    Args:
        planted: number of planted points.
        found: number of planted points that the short attack found.
        by_chance: number of planted points that random corners found.
        reason: reason why no point could be planted, or "" if points were planted.
    """

    planted: int = 0
    found: int = 0
    by_chance: int = 0
    reason: str = ""

    @property
    def unreliable(self) -> bool:
        """Tell whether the attack missed so many planted points that attacks on the model are unreliable."""
        return self.planted > 0 and self.found < LEAST * self.planted


def linear_inputs(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Return the linear layers that a model calls for images, in the order of the calls, each with its input."""
    called: list[tuple[nn.Module, Tensor]] = []
    linear = {module for module in model.modules() if isinstance(module, nn.Linear)}
    handles = [each.register_forward_pre_hook(lambda m, inputs: called.append((m, inputs[0]))) for each in linear]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return called


def features(model: nn.Module, x: Tensor) -> Tensor:
    """Return the input of the model's last linear layer, ``[B, d]``."""
    return linear_inputs(model, x)[-1][1]


def obstacle(model: nn.Module, x: Tensor) -> str:
    """Return the reason why no point can be planted in a model, or ""."""
    called = linear_inputs(model, x)
    if not called:
        return "the model calls no linear layer"
    last, given = called[-1]
    if given.dim() != 2 or len(given) != len(x) or sum(module is last for module, _ in called) > 1:
        return "the last linear layer is not called once with one row for each image"
    return ""


class Planted(nn.Module):
    """A classifier with two logits: 0, and the score of a point. The score is above 0 on the side of a planted corner.

    A point is scored by the row of weights that was added for the nearest image.

    Args:
        model: classifier, images to logits.
        centers: images in the centers of the balls, ``[N, C, H, W]``.
        rows: the added row of weights of each image, ``[N, d]``, and its offset, ``[N]``.
    """

    def __init__(self, model: nn.Module, centers: Tensor, rows: tuple[Tensor, Tensor]):
        super().__init__()
        self.model, self.centers, self.rows = model, centers.flatten(1), rows

    def forward(self, x: Tensor) -> Tensor:
        at = torch.cdist(x.detach().flatten(1), self.centers, p=float("inf")).argmin(1)
        row, offset = (part[at] for part in self.rows)
        score = (features(self.model, x) * row).sum(1) + offset
        return torch.stack([torch.zeros_like(score), score], 1)


def row_of(inside: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the row of weights that separates a corner from points inside the ball, by ridge regression.

    Args:
        inside: features of the points inside the ball, ``[M, d]``.
        corner: features of the corner, ``[d]``.

    Returns:
        The row ``[d]`` and its offset []. If the row separates the corner, the score of the corner is slightly above 0,
        and the scores of the other points are below 0.
    """
    points = torch.cat([inside, corner[None]]).double()
    points = points - points.mean(0)
    sides = torch.full((len(points),), -1.0, dtype=torch.double)
    sides[-1] = len(inside)
    gram = points @ points.T
    ridge = 1e-4 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(points), dtype=torch.double)
    row = points.T @ torch.linalg.solve(gram + ridge, sides)
    scores = torch.cat([inside, corner[None]]).double() @ row
    least, most = scores[:-1].amax(), scores[-1]
    return row.float(), -(least + BORDER * (most - least)).float()


def power(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Power:
    """Plant points in the balls of some images, and count those that a short attack finds.

    Args:
        model: classifier, images to logits.
        x: images ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``. Misclassified images are left out.
        eps: L-inf radius on images in [0, 1].
    """
    generator = torch.Generator().manual_seed(0)

    def corners(x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        return (x + eps * signs).clamp(0, 1)

    with torch.no_grad(), frozen(model):
        torch.manual_seed(0)
        x = x[model(x).argmax(1) == y][:PLANTED]
        if len(x) == 0:
            return Power(reason="no image is classified correctly")
        if reason := obstacle(model, x):
            return Power(reason=reason)
        random = not torch.equal(features(model, x), features(model, x))
        draws = DRAWS if random else 1

        def mean(images: Tensor) -> Tensor:
            return torch.stack([features(model, images) for _ in range(draws)]).mean(0)

        targets, rows = corners(x), []
        for image, corner in zip(x, mean(targets), strict=True):
            noise = torch.rand(INSIDE - 1, *image.shape, generator=generator) * 2 - 1
            points = torch.cat([image[None], (image + NEAR * eps * noise).clamp(0, 1)])
            rows.append(row_of(mean(points), corner))
        planted = Planted(model, x, (torch.stack([row for row, _ in rows]), torch.stack([off for _, off in rows])))

        def reached(images: Tensor) -> Tensor:
            return torch.stack([planted(images)[:, 1] > 0 for _ in range(draws)]).float().mean(0) > 0.5

        # Use only corners whose score is above 0, because the other corners are not adversarial.
        valid = reached(targets)
        chance = torch.stack([reached(corners(x)) for _ in range(LOOKING)]).any(0)
        attacked = apgd(
            planted,
            x,
            torch.zeros_like(y[: len(x)]),
            eps=eps,
            steps=STEPS,
            restarts=STARTS,
            loss="margin",
            eot_iter=4 if random else 1,
            judge_draws=draws,
        )
        found = reached(attacked)
    return Power(int(valid.sum()), int((found & valid).sum()), int((chance & valid).sum()))
