"""AToP: a random transform, a generative purifier fine-tuned to serve the classifier, and the classifier.

    t = random transform of x (RT1 hides blocks, RT2 adds noise first, RT3 hides each block once in N passes)
    xhat = (g(t, m) + 1) / 2,   RT3: each block from the pass that did not see it;   logits = f(xhat)

Lin, Li, Zhang, Tanaka, Zhao: "Adversarial Training on Purification (AToP): Advancing Both Robustness and
Generalization", arXiv 2401.16352 (ICLR 2024), section 3. The paper predicts from one draw; to predict from S draws is
this package's addition.
"""

from __future__ import annotations

import copy
from math import gcd
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..._tensors import dtype_of
from ..._validation import check_counts, check_literal
from ...defences.base import Defence, refuse_wrapped
from ...models.representation import count_classes, evaluation_mode
from ...ops.random_transform import random_transform
from ...ops.stitch import stitch
from ..base import description, save_defence
from .purifier import PURIFIERS, PurifierAdapter

if TYPE_CHECKING:
    from ...evaluation import AttackSpec

Transform = Literal["rt1", "rt2", "rt3"]
Aggregation = Literal["mean", "mean_softmax"]


class Atop(Defence):
    """A classifier behind AToP's random transform and purifier. Images in [0, 1] in, finite logits out.

    Args:
        classifier: any module, images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. It is copied, frozen and
            kept in evaluation mode; the caller's own is left untouched.
        purifier: `DeepFillGenerator`, `SmallGenerator`, `MaskedAutoencoder`, or any module of yours
            ``g(transformed [B, C, H, W], mask [B, 1, H, W]) -> image [B, C, H, W]``, all in [-1, 1], mask 1 where an
            image is hidden. It is copied too, and is what training changes.
        image_shape: (C, H, W).
        transform: ``rt1``, ``rt2`` (the paper's best) or ``rt3``.
        sigma: standard deviation of the noise of rt2 and rt3, in image units (paper: 0.25).
        block: side of a hidden block in pixels; None: the divisor of height and width that is nearest to an eighth of
            the height (paper: 32 at 256; 4 at 32, and at 28).
        mask_ratio: share of the blocks that rt1 and rt2 hide, rounded down to whole ones (paper: 0.25).
        num_passes: N, passes of rt3, which must divide the number of blocks (paper: 4).
        samples: S, draws of noise and mask per prediction (paper: 1).
        aggregation: aggregation of the S predictions: ``mean`` of the logits, or ``mean_softmax``, the log of the mean
            softmax.
        shared_mask: whether a whole batch has one mask, as in the official code, in place of one per image.

    Raises:
        ValueError: a setting that `purify_fast.ops.random_transform` refuses, or a classifier or purifier that is
            wrapped or does not fit image_shape.

    Run one forward pass at a time: not several threads or ``nn.DataParallel`` (one process per GPU works).

    Randomness: a fresh seed per call from torch's global generator, or `fixed_noise`. `deterministic` adds no noise and
    hides the same blocks in every image, those of seed 0.
    """

    draws_for_each_image = True
    compiled_parts = ("_refine",)

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
        aggregation: Aggregation = "mean",
        shared_mask: bool = False,
    ):
        super().__init__(classifier, image_shape)
        refuse_wrapped("purifier", purifier)
        check_literal("transform", transform, Transform)
        check_literal("aggregation", aggregation, Aggregation)
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
        # A purifier of a user's own might flatten its maps by ``view``, which channels_last maps do not allow.
        self.purifier_uses_channels_last = type(purifier) in PURIFIERS.values()
        if self.purifier_uses_channels_last:
            self.purifier.to(memory_format=torch.channels_last)
        self._ready()
        self._dry_run()

    @torch.no_grad()
    def _dry_run(self) -> None:
        """Send two blank images through everything, so that parts that do not fit raise an error now."""
        blank = torch.full((2, *self.image_shape), 0.5, device=self._noise_seed.device)
        with evaluation_mode(self), self.fixed_noise(0):
            images = self.purify(blank)
        self.num_classes = count_classes(
            lambda: self.classify(images).flatten(0, 1), self.image_shape, images[:, :, 0, 0, 0].numel()
        )

    # -- a prediction: transform -> repair -> join -> classify -> aggregate --------------------------------------------

    def purify(self, x: Tensor, draws: int = 1) -> Tensor:
        """Purified images in [0, 1], ``[B, draws S, C, H, W]``; differentiable to x.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
            draws: sets of S draws.
        """
        packed, owners = self.draw(x, draws)
        return self.join(self._run_part(self._refine, packed), owners).transpose(0, 1)

    # -- its parts ----------------------------------------------------------------------------------------------------

    def draw(self, x: Tensor, draws: int = 1, noise: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The random transforms of images, as the current mode draws them.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
            draws: number of draws for each of the S samples.
            noise: a seed, int64 ``[1]``, and sample ids, int64 ``[B]``, to draw from instead of the defence's own.

        Returns:
            ``(packed [T, C + 2, H, W], owners [draws S, B, H / block, W / block])``, see `random_transform`; T = draws
            S B, times N with rt3, sample by sample. Differentiable to x.

        Raises:
            ValueError: images of another shape.
        """
        self.check_images(x)
        sigma, samples = self.sigma, draws * self.samples
        if noise is None and self.noise_is_off:
            sigma, samples = 0.0, draws
            noise = torch.zeros_like(self._noise_seed), x.new_zeros(1, dtype=torch.int64)
        seed, ids = self.noise(len(x), x.device) if noise is None else noise
        dtype = self.purifier_dtype
        if self.fast is not None and dtype == torch.float32:
            dtype = self.fast.dtype
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
            dtype=dtype,
            channels_last=self.purifier_uses_channels_last,
        )

    def stages(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The purifier's images, each ``[T, C, H, W]`` in [-1, 1]; the last is the purified one.

        Args:
            packed: the images from `draw`, ``[T, C + 2, H, W]``.
        """
        with self._autocast(packed.device):
            return tuple(image.to(self.purifier_dtype) for image in self.purifier(packed))

    def _refine(self, packed: Tensor) -> Tensor:
        return self.stages(packed)[-1]

    def join(self, images: Tensor, owners: Tensor) -> Tensor:
        """Purified images in [0, 1], ``[S, B, C, H, W]``; with rt3 stitched from its N passes.

        Args:
            images: images of the last stage, ``[T, C, H, W]`` in [-1, 1].
            owners: the owners from `draw`, ``[S, B, H / block, W / block]``.
        """
        whole = stitch(images, owners) if self.num_passes is not None else images
        return (whole.unflatten(0, owners.shape[:2]) + 1) / 2

    @torch.no_grad()
    def transformed(self, x: Tensor) -> Tensor:
        """The input of the purifier, in [0, 1], hidden blocks grey: ``[B, S, C, H, W]``; with rt3 the first pass.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        packed, owners = self.draw(x)
        passes = packed.unflatten(0, (*owners.shape[:2], -1))  # [S, B, N, C + 2, H, W]
        return (passes[:, :, 0, : x.shape[1]].transpose(0, 1).float() + 1) / 2

    def authors_attacks(self, eps: float) -> list[AttackSpec]:
        """The evaluation by AToP's authors (`purify_fast.protocols.AuthorsEvaluation`), with and without its faults.

        Args:
            eps: radius in image units.

        Source: `purify_fast.methods.atop.released_evaluation`.
        """
        # a prediction does not need the package that judges it
        from .released_evaluation import authors_attacks

        return authors_attacks(self, eps)

    # -- speed, training and files ------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        """The precision of the purifier's weights."""
        return dtype_of(self.purifier.module)

    save = save_defence


def _block(image_shape: tuple[int, int, int]) -> int:
    """The side of blocks that tile an image, nearest to an eighth of its height; the smaller of two as near."""
    _, h, w = image_shape
    sides = [side for side in range(1, min(h, w) + 1) if gcd(h, w) % side == 0]
    return min(sides, key=lambda side: abs(side - h / 8))
