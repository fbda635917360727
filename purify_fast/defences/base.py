"""The base class of this package's defences: a purifier in front of a frozen classifier. Both can be accelerated."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._compiler import is_compiled
from .._tensors import check_floating, dtype_of, first_tensor, write_stamp
from ..models.representation import Representation
from ..ops.aggregate import aggregate
from ..speed.folding.inference_copy import Accelerated, autocast_to, convert_to_channels_last
from ..speed.processor import fast_bfloat16
from ..speed.watch import can_read_values, tensors_of
from .stochastic import StochasticDefence, majority

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("purify_fast")


class Defence(StochasticDefence):
    """A purifier in front of a frozen copy of a classifier. Subclasses add the purifier.

    A new defence is in evaluation mode, in which predictions do not change its state. A training sets training mode
    itself. Several threads may predict at the same time. For several GPUs, run a process for each GPU.

    A subclass sets ``num_classes`` and ``arguments``, the arguments of its constructor as JSON values. If its samples
    are not aggregated by logsumexp, it also sets ``aggregation``. It defines `purifier_dtype`, and calls `_ready` at
    the end of its constructor.

    Args:
        classifier: any module from images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``. It is copied.
        image_shape: shape (C, H, W) of an image.

    Attributes:
        fast: the inference copies of an accelerated defence; None without acceleration.

    Raises:
        ValueError: the classifier is compiled or an ``nn.DataParallel``, or image_shape is not three sizes of at least
            1.
    """

    arguments: dict[str, Any]
    num_classes: int
    aggregation: str = "lse"
    #: The reader of the classifier's representation, for a defence that uses the outputs of some of its layers.
    representation: Representation | None = None
    #: The methods that ``accelerate(compile=True)`` compiles, by name. Each maps tensors ``[B, ...]`` to a tensor.
    compiled_parts: ClassVar[tuple[str, ...]] = ()
    not_dependencies = frozenset({"bank"})

    def __init__(self, classifier: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        self.fast: Accelerated | None = None
        # A hook also runs when a larger module loads its state dict, unlike an override of `load_state_dict`.
        self.register_load_state_dict_post_hook(_make_copies_again)  # type: ignore[no-untyped-call]
        refuse_wrapped("classifier", classifier)
        image_shape = tuple(int(size) for size in image_shape)  # type: ignore[assignment]
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W), each at least 1, got {image_shape}")
        self.image_shape = image_shape
        #: The settings of the adversarial bank (`purify_fast.training.bank`): the variants of an image, and the share
        #: of the adversarial images that is attacked again although the bank is full. Empty without a bank.
        self.bank: dict[str, Any] = {}
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.classifier_uses_channels_last = False

    def _ready(self) -> None:
        """Finish the construction: move all parts to the classifier's device, and set evaluation mode."""
        self.classifier_uses_channels_last = convert_to_channels_last(self.classifier, self.image_shape)
        self.to(first_tensor(self.classifier).device)
        self.eval()

    # -- the parts of a prediction ------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        """The dtype of the purifier's weights, inputs and outputs."""
        raise NotImplementedError

    @property
    def classifier_dtype(self) -> torch.dtype:
        """The dtype of the classifier's weights, which may differ from `purifier_dtype`."""
        return dtype_of(self.classifier)

    @property
    def frozen_classifier(self) -> nn.Module:
        """The classifier without the purifier, or its accelerated copy. It takes and returns float32 in any case."""
        if self.fast is not None:
            return self.fast.classifier
        return self.classifier if self.classifier_dtype == torch.float32 else _Float32Borders(self.classifier)

    def classify(self, images: Tensor) -> Tensor:
        """Classify purified images ``[B, K, C, H, W]`` in a single batch: logits ``[B, K, classes]``, float32."""
        flat = images.flatten(0, 1)
        flat = flat if self.classifier_uses_channels_last else flat.contiguous()
        logits = self.classifier(flat.to(self.classifier_dtype)) if self.fast is None else self.fast.classifier(flat)
        return logits.float().unflatten(0, images.shape[:2])

    def purify(self, x: Tensor, draws: int = 1) -> Tensor:
        """Return ``draws`` sets of K purified images in [0, 1], ``[B, draws * K, C, H, W]``. ``x`` gets a gradient."""
        raise NotImplementedError

    def sample_logits(self, x: Tensor) -> Tensor:
        return self.classify(self.purify(x))

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        if not self.noise_is_fresh:
            # Without new noise, all calls have the same result, so a single call is enough.
            return self.sample_logits(x).expand(draws, -1, -1, -1)
        return self.classify(self.purify(x, draws)).unflatten(1, (draws, -1)).transpose(0, 1)

    def aggregate(self, logits: Tensor) -> Tensor:
        """Aggregate logits ``[B, K, classes]`` by the method ``self.aggregation``: ``[B, classes]``, float32."""
        if logits.shape[1] == 1 and self.aggregation != "lse":
            return logits[:, 0]
        if self.aggregation == "vote":
            return majority(logits.transpose(0, 1))
        if self.aggregation == "mean_softmax":
            return aggregate(torch.log_softmax(logits, -1), "lse") - math.log(logits.shape[1])
        return aggregate(logits, self.aggregation)

    def check_images(self, x: Tensor) -> None:
        """Refuse an ``x`` that has no floating-point images of the defence's shape, and update the copies."""
        check_floating(x=x)
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x must be [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        if self.fast is not None and can_read_values(x.device) and self.fast.outdated():
            self.refresh()

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The autocast context in which the purifier computes."""
        if self.fast is None or self.purifier_dtype != torch.float32:
            return contextlib.nullcontext()
        return autocast_to(device, self.fast.dtype)

    def _run_part(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Call a method in its compiled form, if any, except in training mode: its padding would change BatchNorms."""
        if self.fast is None or self.training:
            return part(*inputs)
        return self.fast.run(part, *inputs)

    @property
    def computes_in_bfloat16(self) -> bool:
        """Tell whether the defence is accelerated in bfloat16."""
        return self.fast is not None and self.fast.dtype == torch.bfloat16

    # -- speed --------------------------------------------------------------------------------------------------------

    def accelerate(self, dtype: torch.dtype | Literal["auto"] | None = "auto", *, compile: bool = False) -> Self:
        """Make predictions, attacks and trainings of the defence faster, and return the defence itself.

        The classifier is replaced by inference copies, whose BatchNorms are folded and whose products are computed in
        ``dtype``. The purifier also computes its products in ``dtype``. Its weights, BatchNorm statistics and losses
        remain float32. Between the parts, images, condition, latents and logits are float32. With bfloat16, layers
        round the images to the 8 significant bits of bfloat16.

        The copies follow the weights of the classifier. Only writes through ``.data`` need a call of `refresh`.

        Args:
            dtype: ``torch.bfloat16``, or ``torch.float32`` to fold BatchNorms only, or None to end the acceleration.
                "auto" is bfloat16 where the processor or card multiplies faster in it, or else float32.
            compile: whether to compile the classifier and the parts of the purifier with `torch.compile`, each once for
                all batch sizes. In training mode, the purifier's compiled parts are not used.

        Raises:
            ValueError: the dtype is not allowed.
        """
        if dtype == "auto":
            dtype = torch.bfloat16 if fast_bfloat16(first_tensor(self.classifier).device) else torch.float32
            logger.info("%s computes its products in %s", type(self).__name__, dtype)
        # If this fails, for example because memory runs out, the earlier copies remain in use.
        self.fast = None if dtype is None else self._make_copies(dtype, compile)
        return self

    def refresh(self) -> None:
        """Make the inference copies of an accelerated defence again, from the current weights."""
        if self.fast is not None:
            self.fast = self._make_copies(self.fast.dtype, self.fast.compile)

    def _make_copies(self, dtype: torch.dtype, compile: bool) -> Accelerated:
        parts = tuple(getattr(self, name) for name in self.compiled_parts)
        reader, shape = self.representation, self.image_shape
        fast = Accelerated(self.classifier, shape, dtype, compile=compile, reader=reader, parts=parts)
        self._update_packed(fast)
        return fast

    def prepare_replay(self) -> None:
        """If weights that are packed for a kernel have changed, pack them again into the same memory."""
        if self.fast is not None:
            self._update_packed(self.fast)

    def _update_packed(self, fast: Accelerated) -> None:
        weight = self._weight_to_pack()
        if fast.dtype != torch.bfloat16 or weight is None:
            return
        if fast.packed is None or fast.packed_from != write_stamp(weight):
            # Attacks differentiate through the packed part, and autograd refuses tensors from inference mode.
            with torch.inference_mode(False), torch.no_grad():
                packed = self._pack()
                if fast.packed is None:
                    fast.packed = packed
                else:
                    # Captured steps read the memory of the earlier packed part, so it gets the new weights.
                    for (_, old), (_, new) in zip(tensors_of(fast.packed), tensors_of(packed), strict=True):
                        old.copy_(new)
            fast.packed_from = write_stamp(weight)

    def _weight_to_pack(self) -> Tensor | None:
        """A weight of the part that `_pack` packs for a kernel; None if no part can be packed, as in training."""
        return None

    def _pack(self) -> Any:
        """Pack a part with its current weights: a module whose parameters and buffers are the packed weights."""
        raise NotImplementedError

    # -- moves, files, modes ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Let ``to``, ``cuda`` and ``cpu`` also move the inference copies, whose dtype does not change."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.fast is not None:
            self.fast.to(first_tensor(self.classifier).device)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the purifier. The classifier always remains in evaluation mode."""
        super().train(mode)
        self.classifier.eval()
        if mode and self.fast is not None:
            # From now on, weights and BatchNorm statistics may change, so the next use must pack them again.
            self.fast.packed_from = None
        return self


def refuse_wrapped(name: str, module: nn.Module) -> None:
    """Raise a ValueError if a value is not a module, is compiled, or is an ``nn.DataParallel``."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.DataParallel):
        raise ValueError(f"{name} must not be an nn.DataParallel: give {name}.module, and run one process per GPU")
    if is_compiled(module):
        raise ValueError(f"{name} must not be compiled: give {name}._orig_mod, and compile the defence instead")


class _Float32Borders(nn.Module):
    """Wraps a classifier whose dtype is not float32, so that its images and logits are float32."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.dtype = classifier, dtype_of(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.to(self.dtype)).float()


def _make_copies_again(defence: Defence, keys: object) -> None:
    """Refresh the inference copies after weights were loaded."""
    defence.refresh()
