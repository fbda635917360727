"""What ARREST's distillation keeps the classifier close to: its frozen start."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...data import StreamedImages, to_float
from ...models.representation import Representation
from ...speed.folding.inference_copy import autocast_to, prepare_for_inference
from ...training.task import Batch


def pool(features: list[Tensor]) -> list[Tensor]:
    """Means over the positions of maps and tokens; vectors as they are.

    Args:
        features: outputs of layers, ``[B, C, H, W]``, ``[B, T, D]`` or ``[B, F]``.
    """
    return [f.mean((2, 3)) if f.dim() == 4 else f.mean(1) if f.dim() == 3 else f for f in features]


class Teacher:
    """The frozen start h*: a copy of a classifier, in evaluation mode, read at ``layers``.

    Args:
        classifier: images ``[B, *image_shape]`` in [0, 1] to logits; the caller's own is left untouched.
        layers: module paths whose outputs are the representation.
        image_shape: (C, H, W).
        pooled: whether maps and tokens are read after their mean over the positions.
        dtype: bfloat16 reads an accelerated copy.

    Called with a `Batch` it returns the layers' outputs for its images, without a gradient; kept ones, after `keep`.

    Raises:
        ValueError: unknown layers, or ``pooled`` where all of them are vectors.
    """

    def __init__(
        self,
        classifier: nn.Module,
        layers: Sequence[str],
        image_shape: tuple[int, int, int],
        pooled: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        model = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.reader, self.pooled, self.dtype = Representation(model, tuple(layers), image_shape), pooled, dtype
        if pooled and all(len(shape) == 1 for shape in self.reader.shapes):
            raise ValueError(f"pooled is for maps and tokens: what {', '.join(layers)} puts out is a vector already")
        self._uses_channels_last = True
        if dtype != torch.float32:
            _, self._uses_channels_last = prepare_for_inference(model, image_shape, dtype)
        self._kept: list[Tensor] | None = None
        self._checked = -1

    @torch.no_grad()
    def read(self, x: Tensor) -> list[Tensor]:
        """The layers' outputs.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
        """
        with autocast_to(x.device, self.dtype):
            features = self.reader(x if self._uses_channels_last else x.contiguous())
        return pool(features) if self.pooled else features

    def keep(self, x: Tensor | StreamedImages, batch_size: int = 256, progress: bool = True) -> None:
        """Read all training images once, to save a pass of the teacher in every step; not for augmented training.

        Args:
            x: uint8 ``[N, C, H, W]``, those that are trained on. The outputs of all of them are held on its device.
            batch_size: images that are read at once.
            progress: whether there is a progress bar.
        """
        bar = tqdm(range(0, len(x), batch_size), desc="teacher", unit="batch", disable=not progress)
        parts = [self.read(to_float(x[i : i + batch_size])) for i in bar]
        kept = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        # rows of maps that are channels_last stay so when they are picked
        self._kept = [k.permute(0, 2, 3, 1).contiguous() if k.dim() == 4 else k for k in kept]

    def __call__(self, batch: Batch) -> list[Tensor]:
        if self._kept is None:
            return self.read(batch.x)
        features = [k[batch.sample_ids] for k in self._kept]
        features = [f.permute(0, 3, 1, 2) if f.dim() == 4 else f for f in features]
        if self._checked != batch.epoch:
            self._checked = batch.epoch
            for kept, now in zip(features, self.read(batch.x), strict=True):
                apart = (kept.float() - now.float()).norm()
                if not apart <= 0.01 * now.float().norm():
                    raise ValueError("the kept features are not those of these images: are they augmented?")
        return features
