"""What the defences share: a frozen classifier behind a purifier, plain or fast."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.representation import first_tensor
from ..speed.inference_copy import FrozenView, Region, channels_last, inside
from .stochastic import Randomised

if TYPE_CHECKING:
    from typing_extensions import Self


class Defence(Randomised):
    """A classifier, copied, frozen and in evaluation mode, behind a purifier; subclasses bring that.

    Args:
        classifier: any module, images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``; the caller's own is left
            untouched.
        image_shape: (C, H, W).

    Raises:
        ValueError: a classifier that is wrapped, or an image_shape that is not three sizes of at least 1.

    One forward pass at a time: not for several threads or ``nn.DataParallel`` (one process per GPU does it).

    A subclass sets ``arguments`` (what makes it again, JSON values), ``num_classes``, and ends its constructor with
    `_ready`; it implements `_purifier` and `_compiled_parts`.
    """

    arguments: dict[str, Any]
    num_classes: int

    def __init__(self, classifier: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        self.accelerated: dict[str, Any] | None = None
        # a frozen copy of the classifier; a tuple, so that it is no submodule: not saved, not trained
        self._fast: tuple[FrozenView] | None = None
        self._regions: dict[str, Region] = {}
        self.register_load_state_dict_post_hook(_reload)
        refuse_wrapped("classifier", classifier)
        image_shape = tuple(int(size) for size in image_shape)  # type: ignore[assignment]
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W), each at least 1, got {image_shape}")
        self.image_shape = image_shape
        self.own_classifier = False
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()

    def _ready(self) -> None:
        """To the classifier's device; the end of a subclass's constructor."""
        self._channels_last = channels_last(self.classifier, self.image_shape)
        self.to(first_tensor(self.classifier).device)

    def _purifier(self) -> tuple[nn.Module, ...]:
        """The purifier's parts."""
        raise NotImplementedError

    def _compiled_parts(self) -> tuple[Callable[..., Tensor], ...]:
        """Methods of tensors ``[B, ...]`` that ``accelerate(compile=True)`` compiles."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # each part computes in its own precision, whatever the images and the other part have
        self._classifier_dtype = first_tensor(self.classifier).dtype
        self._purifier_dtype = first_tensor(nn.ModuleList(self._purifier())).dtype
        self._prepare()
        return self

    # -- speed --------------------------------------------------------------------------------------------------------

    def accelerate(
        self, dtype: torch.dtype | None = torch.bfloat16, *, fold: bool = True, compile: bool = False
    ) -> Self:
        """Compute fast from now on: inference, attacks through the defence and its trainings.

        The classifier is read and attacked through frozen copies: BatchNorm folded, channels_last, ``dtype`` inside.
        The purifier keeps its weights, BatchNorm statistics and losses in float32 and multiplies in ``dtype``. Images,
        condition, latents and logits are float32 at every border. bfloat16 rounds the images to 8 bits as well.

        Args:
            dtype: ``torch.bfloat16``; ``torch.float32`` to fold only; None computes plainly again.
            fold: whether BatchNorms are folded into the layers before them.
            compile: whether `torch.compile` fuses the parts, each once for all batch sizes: classifying, and in
                evaluation mode, as within an attack, the purifier's.

        Returns:
            The defence. It saves, moves and copies as before. The frozen copies follow ``.to()`` and
            ``load_state_dict``; after another change of the classifier's weights call this again.

        Raises:
            ValueError: another dtype, or a classifier that cannot be folded (`purify_fast.speed.fold_batchnorm`).
        """
        chosen = None if dtype is None else {"dtype": dtype, "fold": fold, "compile": compile}
        before, self.accelerated = self.accelerated, chosen
        try:
            self._prepare()
        except Exception:  # the classifier's own, or no memory, too: the copies from before still serve
            self.accelerated = before
            raise
        return self

    @torch.inference_mode(False)  # its copies are to be differentiated, wherever they are made
    def _prepare(self) -> None:
        if self.accelerated is None:
            self._fast, self._regions = None, {}
            return
        self._fast = (FrozenView(self.classifier, self.image_shape, **self.accelerated),)
        parts = self._compiled_parts() if self.accelerated["compile"] else ()
        self._regions = {part.__name__: Region(part) for part in parts}

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A part as it is, or compiled. Not in training: padding would enter the BatchNorm statistics."""
        region = None if self.training else self._regions.get(part.__name__)
        return (part if region is None else region)(*inputs)

    @property
    def frozen_classifier(self) -> nn.Module:
        """What classifies the purified images and is attacked alone: the classifier, or its accelerated copy.

        It takes float32 images and gives float32 logits whatever the classifier's own dtype.
        """
        if self._fast is not None:
            return self._fast[0]
        return self.classifier if self._classifier_dtype == torch.float32 else _Float32(self.classifier)

    def _inside(self, device: torch.device) -> contextlib.AbstractContextManager:
        """How the purifier computes."""
        if self._fast is None or self._purifier_dtype != torch.float32:
            return contextlib.nullcontext()
        return inside(device, self._fast[0].dtype)

    # -- the parts ----------------------------------------------------------------------------------------------------

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape or not x.is_floating_point():
            want = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must be floating point [B, {want}], got {x.dtype} {list(x.shape)}")

    def classify(self, images: Tensor) -> Tensor:
        """The classifier's float32 logits ``[B, K, classes]`` of ``images [B, K, C, H, W]``, in one batch."""
        flat = images.flatten(0, 1)
        flat = flat if self._channels_last else flat.contiguous()
        logits = self.classifier(flat.to(self._classifier_dtype)) if self._fast is None else self._fast[0](flat)
        return logits.float().unflatten(0, (images.shape[0], images.shape[1]))

    def release_classifier(self) -> None:
        """Let the defence's own copy of the classifier be trained too; it is then saved with the purifier.

        Raises:
            ValueError: the defence is accelerated.
        """
        if self._fast is not None:
            raise ValueError("an accelerated defence computes with frozen copies: accelerate(None) first")
        self.classifier.requires_grad_(True)
        self.own_classifier = True

    def train(self, mode: bool = True) -> Self:
        """Training mode for the purifier; the classifier always stays in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        return self


def refuse_wrapped(name: str, module: nn.Module) -> None:
    """ValueError naming the argument if the module is none, is in ``nn.DataParallel`` or compiled."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.DataParallel):
        raise ValueError(f"{name}: unwrap it ({name}.module); for several GPUs run one process per GPU")
    if hasattr(module, "_orig_mod"):
        raise ValueError(f"{name}: unwrap it ({name}._orig_mod), and compile the defence instead")


class _Float32(nn.Module):
    """A classifier of another dtype behind float32 borders."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.dtype = classifier, first_tensor(classifier).dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.to(self.dtype)).float()


def _reload(defence: Defence, keys: object) -> None:
    """After load_state_dict: the accelerated copies get the new weights."""
    defence._prepare()
