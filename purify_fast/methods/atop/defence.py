"""AToP: a random transform, a generative purifier that was fine-tuned for the classifier, and the classifier.

    t = random transform of x,   xhat = (g(t, m) + 1) / 2,   logits = f(xhat)

Lin, Li, Zhang, Tanaka, Zhao: "Adversarial Training on Purification (AToP): Advancing Both Robustness and
Generalization", arXiv 2401.16352 (ICLR 2024), section 3. The paper predicts from one draw; S draws are this package's
addition.
"""

from __future__ import annotations

import copy
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..._settings import dtype_of, first_tensor
from ..._validation import check_counts, check_literal
from ...defences.base import Defence, refuse_wrapped
from ...models.layers import evaluation_mode
from ...ops.random_transform import random_transform
from ...ops.stitch import stitch
from ..saving import description, rebuilt, save_defence
from .generators import DeepFillGenerator, SmallGenerator

PURIFIERS: dict[str, type[nn.Module]] = {"deepfill": DeepFillGenerator, "small_generator": SmallGenerator}


def build_purifier(name: str, channels: int, *, width: int | None = None, residual: bool = False) -> nn.Module:
    """Build a purifier's network with fresh weights, by its name in `PURIFIERS`."""
    if name not in PURIFIERS:
        raise ValueError(f"purifier must be one of {', '.join(PURIFIERS)}, got {name!r}")
    if residual and name != "small_generator":
        raise ValueError(f"residual needs purifier small_generator, got {name}")
    options: dict[str, Any] = ({} if width is None else {"width": width}) | ({"residual": True} if residual else {})
    return PURIFIERS[name](channels + (2 if name == "deepfill" else 0), **options)


class PurifierAdapter(nn.Module):
    """Gives all purifiers one interface: ``forward(packed [N, C + 2, H, W])`` returns a tuple of ``[N, C, H, W]``.

    ``packed`` has the transformed image, a plane of ones, and the mask. The last result is the purified image. The
    results have the dtype of ``packed``. At construction, the module is tried on two images in evaluation mode.

    Args:
        module: the network that repairs images; it is not copied. It is called as ``module(transformed, mask)``, with
            transformed ``[N, C, H, W]`` in [-1, 1], 0 where hidden, and mask ``[N, 1, H, W]``, 1 where hidden. If it
            has the attribute ``takes_packed = True``, it is called as ``module(packed, mask)``. It returns the purified
            image ``[N, C, H, W]``, or a tuple of such images whose last is the purified image. **Range: [-1, 1]**, like
            its input; other values are not clipped.
        image_shape: (C, H, W).

    Raises:
        ValueError: the module fails on two images, or returns something else; the message says what is allowed.
    """

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        self.module, self.image_shape = module, image_shape
        self.takes_packed = bool(getattr(module, "takes_packed", False))
        # The dry run finds out if the module overwrites its input; then `_run` gives it a copy.
        self._overwrites = False
        self._dry_run()

    @torch.inference_mode(False)
    def _dry_run(self) -> None:
        channels, h, w = self.image_shape
        first = first_tensor(self.module)
        packed = torch.zeros((2, channels + 2, h, w), device=first.device, dtype=first.dtype)
        packed[:, channels] = 1
        packed[1, channels + 1, : (h + 1) // 2] = 1
        version = packed._version
        with evaluation_mode(self.module), torch.no_grad():
            images = self._run(packed)
        self._overwrites = packed._version != version
        shapes, want = [list(image.shape) for image in images], [2, channels, h, w]
        finite = all(image.is_floating_point() and image.isfinite().all() for image in images)
        if not shapes or any(shape != want for shape in shapes) or not finite:
            needs = f"a finite floating-point tensor {want}, or a tuple of such tensors"
            raise ValueError(f"purifier must return {needs}, got {shapes}")

    def _run(self, packed: Tensor) -> tuple[Tensor, ...]:
        channels = self.image_shape[0]
        packed = packed.clone() if self._overwrites else packed
        images = self.module(packed if self.takes_packed else packed[:, :channels], packed[:, channels + 1 :])
        return tuple(images) if isinstance(images, (tuple, list)) else (images,)

    def forward(self, packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(image.to(packed.dtype) for image in self._run(packed))


# -- defence -----------------------------------------------------------------------------------------------------------

Transform = Literal["rt1", "rt2", "rt3"]
AtopAggregation = Literal["mean", "mean_softmax"]


class Atop(Defence):
    """A classifier behind AToP's random transform and purifier. The module maps images in [0, 1] to finite logits.

    The transform rt1 hides blocks of the image. rt2 first adds noise. rt3 adds noise and makes N passes; each block is
    hidden in one of the passes, and is taken from this pass.

    Every call draws a fresh seed from torch's global generator. Within `fixed_noise` the seed is the caller's. Within
    `deterministic` there is no noise, and the hidden blocks of every image are those of seed 0.

    Args:
        classifier: any module from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. The defence uses a
            frozen copy in evaluation mode.
        purifier: `DeepFillGenerator`, `SmallGenerator`, or your own module
            ``g(transformed [B, C, H, W], mask [B, 1, H, W]) -> image [B, C, H, W]``. Images are in [-1, 1], and the
            mask is 1 where an image is hidden. The defence uses a copy, which the training changes.
        image_shape: (C, H, W).
        transform: ``rt1``, ``rt2`` (the paper's best) or ``rt3``.
        sigma: standard deviation of the noise of rt2 and rt3, in image units (paper: 0.25).
        block: side of a hidden block in pixels (paper: 32 for images of 256 x 256). None means the common divisor of
            height and width that is nearest to an eighth of the height, such as 4 for 32 x 32.
        mask_ratio: share of the blocks that rt1 and rt2 hide; the number of blocks is rounded down (paper: 0.25).
        num_passes: N, number of passes of rt3, which must divide the number of blocks (paper: 4).
        samples: S, draws of noise and mask per prediction (paper: 1).
        aggregation: aggregation of the S predictions: ``mean`` of the logits, or ``mean_softmax``, the log of the mean
            softmax.
        shared_mask: whether all images of a batch have the same mask, as in the official code.

    Raises:
        ValueError: a setting is out of range, or the classifier or the purifier is wrapped or does not accept images of
            image_shape.
    """

    draws_for_each_image = True
    gray: Tensor

    def __init__(
        self,
        classifier: nn.Module,
        purifier: nn.Module,
        image_shape: tuple[int, int, int],
        *,
        transform: Transform = "rt2",
        sigma: float = 0.25,
        block: int | None = None,
        mask_ratio: float = 0.25,
        num_passes: int = 4,
        samples: int = 1,
        aggregation: AtopAggregation = "mean",
        shared_mask: bool = False,
    ):
        super().__init__(classifier, image_shape)
        refuse_wrapped("purifier", purifier)
        check_literal("transform", transform, Transform)
        check_literal("aggregation", aggregation, AtopAggregation)
        block = _block(self.image_shape) if block is None else block
        check_counts(samples=samples, block=block, num_passes=num_passes)
        self.transform, self.sigma, self.samples = transform, 0.0 if transform == "rt1" else float(sigma), samples
        self.block, self.mask_ratio = block, float(mask_ratio)
        self.num_passes = num_passes if transform == "rt3" else None
        self.aggregation, self.shared_mask = aggregation, bool(shared_mask)
        self.purifier = PurifierAdapter(copy.deepcopy(purifier), self.image_shape)
        self.arguments: dict[str, Any] = {
            "image_shape": list(self.image_shape),
            "transform": transform,
            "sigma": float(sigma),
            "block": self.block,
            "mask_ratio": self.mask_ratio,
            "num_passes": num_passes,
            "samples": samples,
            "aggregation": aggregation,
            "shared_mask": self.shared_mask,
            "purifier": description(purifier, PURIFIERS),
        }
        # A user's purifier might flatten its maps with ``view``, which fails for channels_last maps.
        self.purifier_uses_channels_last = type(purifier) in PURIFIERS.values()
        if self.purifier_uses_channels_last:
            self.purifier.to(memory_format=torch.channels_last)
        # A tensor beside a bfloat16 image makes the result float32, so `join` needs no cast.
        self.register_buffer("gray", torch.full((1,), 0.5, dtype=self.purifier_dtype), persistent=False)
        self._ready()
        # Wrong settings of the transform raise an error immediately.
        with torch.no_grad(), self.fixed_noise(0):
            self.purify(self._blank_images())

    @classmethod
    def rebuilt_arguments(cls, arguments: dict[str, Any], purifier: nn.Module | None, folder: object) -> dict[str, Any]:
        return {**arguments, "purifier": rebuilt(arguments["purifier"], purifier, PURIFIERS, folder)}

    # -- a prediction: transform -> repair -> join -> classify -> aggregate --------------------------------------------

    def purify(self, x: Tensor, draws: int = 1) -> Tensor:
        packed, owners = self.draw(x, draws)
        return self.join(self.stages(packed)[-1], owners).transpose(0, 1)

    # -- the parts of a prediction ------------------------------------------------------------------------------------

    def draw(self, x: Tensor, draws: int = 1, noise: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Transform each image ``draws`` times S times, in the current noise mode. The gradient reaches x.

        ``noise`` (seed, sample ids) replaces the mode's. The result is ``packed [T, C + 2, H, W]`` and
        ``owners [draws * S, B, H / block, W / block]`` (`random_transform`). T is draws * S * B, or N times this number
        with rt3.
        """
        self.check_images(x)
        sigma, samples = self.sigma, draws * self.samples
        if noise is None and self.noise_is_off:
            sigma, samples = 0.0, draws
            noise = torch.zeros_like(self._noise_seed), x.new_zeros(1, dtype=torch.int64)
        seed, ids = self.noise(len(x), x.device) if noise is None else noise
        return random_transform(
            x.to(self.purifier_dtype),
            seed,
            ids.expand(len(x)),
            sigma=sigma,
            block=self.block,
            mask_ratio=self.mask_ratio,
            num_passes=self.num_passes,
            samples=samples,
            shared_mask=self.shared_mask,
            dtype=self.compute_dtype or self.purifier_dtype,
            channels_last=self.purifier_uses_channels_last,
        )

    def stages(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Return the images of the stages, each ``[T, C, H, W]`` in [-1, 1]. The last is the purified image.

        They have the dtype of ``packed``: in a copy, that of its products.
        """
        with self._products(packed.device):
            stages: tuple[Tensor, ...] = self.purifier(packed)
        return stages

    def join(self, images: Tensor, owners: Tensor) -> Tensor:
        """Convert the last stage's images to [0, 1], ``[S, B, C, H, W]``, in the purifier's dtype.

        With rt3, each is stitched from N passes.
        """
        joined = stitch(images, owners) if self.num_passes is not None else images
        # Equal to (whole + 1) / 2 in each bit, but in one launch.
        return torch.add(self.gray, joined.unflatten(0, owners.shape[:2]), alpha=0.5)

    # -- speed, training and files ------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        return dtype_of(self.purifier.module)

    save = save_defence


def _block(image_shape: tuple[int, int, int]) -> int:
    """Return the common divisor of height and width nearest to height / 8; if two are equally near, the smaller."""
    _, h, w = image_shape
    sides = [side for side in range(1, min(h, w) + 1) if gcd(h, w) % side == 0]
    return min(sides, key=lambda side: abs(side - h / 8))
