"""Gives all purifiers (generators with two stages, and modules of users) the same interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._settings import first_tensor
from ...models.representation import evaluation_mode
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
            wanted = f"a finite floating-point tensor {want}, or a tuple of such tensors"
            raise ValueError(f"purifier must return {wanted}, got {shapes}")

    def _run(self, packed: Tensor) -> tuple[Tensor, ...]:
        channels = self.image_shape[0]
        packed = packed.clone() if self._overwrites else packed
        images = self.module(packed if self.takes_packed else packed[:, :channels], packed[:, channels + 1 :])
        return tuple(images) if isinstance(images, (tuple, list)) else (images,)

    def forward(self, packed: Tensor) -> tuple[Tensor, ...]:
        return tuple(image.to(packed.dtype) for image in self._run(packed))
