"""AToP: a random transform, a generative purifier fine-tuned to serve the classifier, and the classifier.

    t = random transform of x (RT1 hides blocks, RT2 adds noise first, RT3 hides each block once in N passes)
    xhat = (g(t, m) + 1) / 2,   RT3: each block from the pass that did not see it;   logits = f(xhat)

Lin, Li, Zhang, Tanaka, Zhao: "Adversarial Training on Purification (AToP): Advancing Both Robustness and
Generalization", arXiv 2401.16352 (ICLR 2024), section 3. The paper predicts from one draw; S draws are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import gcd, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...defences.base import Defence, refuse_wrapped
from ...ops.aggregate import aggregate
from ...ops.random_transform import random_transform
from ...ops.stitch import stitch
from .purifier import PURIFIERS, Purifier

if TYPE_CHECKING:
    from ...training.loop import Batch
    from .config import AtopConfig

TRANSFORMS = ("rt1", "rt2", "rt3")
AGGREGATIONS = ("mean", "probability")


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
        sigma: standard deviation of the noise in image units, of rt2 and rt3 (paper: 0.25).
        block: side of a hidden block in pixels; None: what divides height and width and is nearest to an eighth of the
            height (paper: 32 at 256; 4 at 32, and at 28).
        missing: share of the blocks that rt1 and rt2 hide, rounded down to whole ones (paper: 0.25).
        parts: N, passes of rt3, which must divide the blocks (paper: 4).
        samples: S, draws of noise and mask per prediction (paper: 1).
        aggregation: of the S predictions: ``mean`` of the logits, or ``probability``, the log of the mean softmax.
        shared_mask: one mask for the whole batch, as the official code has it, instead of one per image.

    Raises:
        ValueError: a setting that `purify_fast.ops.random_transform` refuses, or a classifier or purifier that is
            wrapped or does not fit image_shape.

    One forward pass at a time: not for several threads or ``nn.DataParallel`` (one process per GPU does it).

    Randomness: a fresh seed per call from torch's global generator, or `fixed_noise`. `deterministic` adds no noise and
    hides the same blocks in every image, those of seed 0.
    """

    def __init__(
        self,
        classifier: nn.Module,
        purifier: nn.Module,
        image_shape: tuple[int, int, int],
        *,
        transform: str = "rt2",
        sigma: float = 0.25,
        block: int | None = None,
        missing: float = 0.25,
        parts: int = 4,
        samples: int = 1,
        aggregation: str = "mean",
        shared_mask: bool = False,
    ):
        super().__init__(classifier, image_shape)
        refuse_wrapped("purifier", purifier)
        for name, value, allowed in (
            ("transform", transform, TRANSFORMS),
            ("aggregation", aggregation, AGGREGATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        block = _block(self.image_shape) if block is None else block
        for name, count in (("samples", samples), ("block", block), ("parts", parts)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
        self.transform, self.sigma, self.samples = transform, 0.0 if transform == "rt1" else float(sigma), samples
        self.block, self.missing, self.parts = block, float(missing), parts if transform == "rt3" else None
        self.aggregation, self.shared_mask = aggregation, bool(shared_mask)
        self.purifier = Purifier(copy.deepcopy(purifier), self.image_shape)
        self.arguments: dict[str, Any] = {
            "image_shape": list(self.image_shape),
            "transform": transform,
            "sigma": float(sigma),
            "block": self.block,
            "missing": self.missing,
            "parts": parts,
            "samples": samples,
            "aggregation": aggregation,
            "shared_mask": self.shared_mask,
            "purifier": description(purifier),
        }
        self._last = type(purifier) in PURIFIERS.values()  # another might flatten its maps by ``view``
        if self._last:
            self.purifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._ready()
        self._dry_run()

    @torch.no_grad()
    def _dry_run(self) -> None:
        """Two blank images through everything: what does not fit is found now."""
        device = self._noise_seed.device
        blank = torch.full((2, *self.image_shape), 0.5, device=device)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with self.fixed_noise(0):
                images = self.purify(blank)
        finally:
            for module, mode in modes.items():
                module.training = mode
        want = f"[B, {', '.join(map(str, self.image_shape))}] to logits [B, C]"
        try:
            logits = self.classify(images)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"the classifier must map {want}: {error}") from error
        if logits.dim() != 3:
            raise ValueError(f"the classifier must map {want}, got {list(logits.flatten(0, 1).shape)}")
        self.num_classes = logits.shape[2]

    def _purifier(self) -> tuple[nn.Module, ...]:
        return (self.purifier.module,)

    def _compiled_parts(self) -> tuple[Callable[..., Tensor], ...]:
        return (self._refine,)

    # -- the parts ----------------------------------------------------------------------------------------------------

    def draw(self, x: Tensor, draws: int = 1, seed: Tensor | None = None, ids: Tensor | None = None) -> tuple:
        """The random transforms of ``x [B, C, H, W]``, as the current mode draws them.

        Args:
            draws: as many for each of the S samples. seed, ids: int64 ``[1]`` and ``[B]`` to draw from instead, both.

        Returns:
            ``(packed [T, C + 2, H, W], owners [draws S, B, H / block, W / block])``, see `random_transform`; T = draws
            S B, times N with rt3, sample by sample. Differentiable to x.

        Raises:
            ValueError: images of another shape, or a seed without ids.
        """
        self._check(x)
        if (seed is None) != (ids is None):
            raise ValueError("seed and ids go together: give both or neither")
        sigma, samples = self.sigma, draws * self.samples
        if seed is None or ids is None:
            if self.silent:
                sigma, samples = 0.0, draws
                seed, ids = torch.zeros_like(self._noise_seed), x.new_zeros(1, dtype=torch.int64)
            else:
                seed, ids = self.noise(len(x), x.device)
        inner = self._purifier_dtype
        if self._fast is not None and inner == torch.float32:
            inner = self._fast[0].dtype
        return random_transform(
            x.to(self._purifier_dtype),
            seed,
            ids.expand(len(x)),
            sigma=sigma,
            block=self.block,
            mask_ratio=self.missing,
            num_passes=self.parts,
            samples=samples,
            shared_mask=self.shared_mask,
            dtype=inner,
            channels_last=self._last,
        )

    def stages(self, packed: Tensor) -> tuple[Tensor, ...]:
        """The purifier's images of ``packed [T, C + 2, H, W]``, each ``[T, C, H, W]`` in [-1, 1]; the last counts."""
        with self._inside(packed.device):
            return tuple(image.to(self._purifier_dtype) for image in self.purifier(packed))

    def _refine(self, packed: Tensor) -> Tensor:
        return self.stages(packed)[-1]

    def join(self, images: Tensor, owners: Tensor) -> Tensor:
        """Purified images ``[S, B, C, H, W]`` in [0, 1] of the last stage's; with rt3 stitched from its N passes."""
        whole = stitch(images, owners) if self.parts is not None else images
        return (whole.unflatten(0, owners.shape[:2]) + 1) / 2

    def purify(self, x: Tensor, draws: int = 1) -> Tensor:
        """Purified images ``[B, draws S, C, H, W]`` in [0, 1] of ``x [B, C, H, W]``; differentiable to x."""
        packed, owners = self.draw(x, draws)
        return self.join(self._run(self._refine, packed), owners).transpose(0, 1)

    @torch.no_grad()
    def transformed(self, x: Tensor) -> Tensor:
        """What the purifier gets to see of ``x [B, C, H, W]``, in [0, 1], hidden blocks grey: ``[B, S, C, H, W]``.

        Of rt3's N passes the first.
        """
        packed, owners = self.draw(x)
        passes = packed.unflatten(0, (*owners.shape[:2], -1))  # [S, B, N, C + 2, H, W]
        return (passes[:, :, 0, : x.shape[1]].transpose(0, 1).float() + 1) / 2

    def sample_logits(self, x: Tensor) -> Tensor:
        """Logits of the S draws, ``[B, S, classes]``."""
        return self.classify(self.purify(x))

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        """`sample_logits` of ``draws`` independent calls, ``[draws, B, S, classes]``, from one read of x."""
        if self._noise != "fresh":  # every call gives the same
            return self.sample_logits(x).expand(draws, -1, -1, -1)
        return self.classify(self.purify(x, draws)).unflatten(1, (draws, -1)).transpose(0, 1)

    def combine(self, logits: Tensor) -> Tensor:
        """``[B, S, classes]`` -> ``[B, classes]``, float32, by the defence's aggregation."""
        if logits.shape[1] == 1:
            return logits[:, 0]
        if self.aggregation == "mean":
            return aggregate(logits, "mean")
        return aggregate(torch.log_softmax(logits, -1), "lse") - log(logits.shape[1])

    # -- training and files -------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, config: AtopConfig | None = None) -> Tensor:
        """The loss of one batch, for a loop of your own; backward and the optimiser's step are yours.

        Args:
            batch: images in [0, 1], labels, sample indices, seed, epoch and epochs (`purify_fast.training.Batch`).
            config: `AtopConfig`; with ``gan_grad`` use `AtopTask`, which holds the discriminator.

        Raises:
            ValueError: ``gan_grad`` is asked for.
        """
        from .config import AtopConfig
        from .task import training_loss

        return training_loss(self, batch, config or AtopConfig())[0]

    def save(self, folder: str | Path) -> None:
        """Write the purifier to ``folder``; `purify_fast.load_defence` reads it back."""
        from ...training.defences import save_defence

        save_defence(self, folder)


def _block(image_shape: tuple[int, int, int]) -> int:
    """The side of blocks that tile an image, nearest to an eighth of its height; the smaller of two as near."""
    _, h, w = image_shape
    sides = [side for side in range(1, min(h, w) + 1) if gcd(h, w) % side == 0]
    return min(sides, key=lambda side: abs(side - h / 8))


def description(purifier: nn.Module) -> dict[str, Any]:
    """What makes the purifier again, JSON values; of one that is not this package's its class's name alone."""
    for name, kind in PURIFIERS.items():
        if type(purifier) is kind:
            return {"kind": name, "arguments": purifier.arguments}
    return {"kind": type(purifier).__qualname__, "arguments": None}
