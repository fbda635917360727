"""What an accelerated defence computes with: one plain object that holds every copy made for speed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import first_tensor
from ..models.representation import Representation
from .compiled_region import CompiledRegion
from .folding.inference_copy import InferenceCopy, autocast_to, prepare_for_inference


@dataclass(eq=False)
class Accelerated:
    """The copies of a defence's frozen parts: folded, in ``dtype``, channels_last.

    This is a plain object and no module, so that nothing in it is saved, trained or counted with the defence that holds
    it. `make` makes one; it follows neither moves nor changes of the weights by itself.

    Args:
        dtype: of the matrix products, float32 or bfloat16.
        classifier: classifies the purified images.
        reader: reads the representation, for a defence that has one.
        regions: compiled functions of the defence, by name.
        packed: a part's weights as its kernel takes them, kept here by a defence that has such a part.
        packed_from: names the weights that were packed; None: they may have changed since.
    """

    #: What a captured step need not look at (`purify_fast.contents`): it changes with every training step.
    not_dependencies = frozenset({"packed_from"})

    dtype: torch.dtype
    classifier: InferenceCopy
    reader: Representation | None = None
    regions: dict[str, CompiledRegion] = field(default_factory=dict)
    packed: Any = None
    packed_from: int | None = None

    def __post_init__(self) -> None:
        self.device = first_tensor(self.classifier).device

    @classmethod
    @torch.inference_mode(False)
    def make(
        cls,
        classifier: nn.Module,
        image_shape: tuple[int, ...],
        settings: Mapping[str, Any],
        reader: Representation | None = None,
        parts: tuple[Callable[..., Tensor], ...] = (),
    ) -> Accelerated:
        """Copies of ``classifier`` and ``reader`` as they are now.

        They are made outside inference mode, wherever this is called, because attacks differentiate through them.

        Args:
            classifier: images ``[B, *image_shape]`` in [0, 1] to logits.
            image_shape: (C, H, W).
            settings: ``dtype``, ``fold`` and ``compile``, as `InferenceCopy` takes them.
            reader: of the representation, or None.
            parts: functions of tensors ``[B, ...]`` that are compiled if the settings say so.

        Raises:
            ValueError: as `prepare_for_inference`.
        """
        if reader is not None:
            reader = copy.deepcopy(reader)
            prepare_for_inference(reader.model, image_shape, settings["dtype"], settings["fold"])
        regions = {part.__name__: CompiledRegion(part) for part in parts} if settings["compile"] else {}
        return cls(settings["dtype"], InferenceCopy(classifier, image_shape, **settings), reader, regions)

    def to(self, device: torch.device) -> None:
        """Move the copies.

        Args:
            device: where to.
        """
        self.device = device
        self.classifier.to(device)
        if self.reader is not None:
            self.reader.model.to(device)
        # What is packed lies on the old device: it is packed again when it is next used.
        self.packed = None

    def classify(self, x: Tensor) -> Tensor:
        """The classifier copy's logits, float32 ``[B, classes]``.

        Args:
            x: images ``[B, C, H, W]``.
        """
        self._check_device(x)
        return self.classifier(x)

    def read(self, x: Tensor) -> list[Tensor]:
        """The representation of images, layer by layer.

        Args:
            x: images ``[B, C, H, W]``.
        """
        assert self.reader is not None, "this defence has no representation"
        self._check_device(x)
        with autocast_to(x.device, self.dtype):
            return self.reader(x.float())

    def run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``part(*inputs)``, compiled if it was one of the parts to compile.

        Args:
            part: a method of the defence.
            inputs: tensors ``[B, ...]``.
        """
        return self.regions.get(part.__name__, part)(*inputs)

    def _check_device(self, x: Tensor) -> None:
        if x.device != self.device:
            raise RuntimeError(
                f"the images are on {x.device}, the accelerated copies on {self.device}: move the images, or call the "
                "defence's refresh() if it was moved as a part of another module"
            )
