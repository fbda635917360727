"""The base of the defences: a frozen classifier behind a purifier, plain or accelerated."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._compiler import is_compiled
from .._tensors import dtype_of, first_tensor, write_stamp
from ..models.representation import Representation
from ..ops.aggregate import aggregate
from ..speed.folding.inference_copy import Accelerated, autocast_to, convert_to_channels_last
from .stochastic import StochasticDefence
from .voting import majority

if TYPE_CHECKING:
    from typing_extensions import Self


class Defence(StochasticDefence):
    """A classifier, copied, frozen and in evaluation mode, behind a purifier, which subclasses add.

    Args:
        classifier: any module, images ``[B, C, H, W]`` in [0, 1] to logits ``[B, classes]``; the caller's own is left
            untouched.
        image_shape: (C, H, W).

    Attributes:
        acceleration: the settings that `accelerate` was given (``dtype``, ``fold``, ``compile``), or None.
        fast: the copies that an accelerated defence computes with, or None.

    Raises:
        ValueError: a classifier that is wrapped, or an image_shape that is not three sizes of at least 1.

    It starts in evaluation mode, in which a prediction changes nothing; a training sets training mode itself. Several
    threads may predict at once; ``nn.DataParallel`` is not for it (one process per GPU is).

    A subclass sets ``arguments`` (what makes it again, JSON values) and ``num_classes``, and ``aggregation`` if its
    samples are not aggregated by logsumexp. It says in `purifier_dtype` in which precision its purifier computes, and
    ends its constructor with `_ready`.
    """

    arguments: dict[str, Any]
    num_classes: int
    aggregation: str = "lse"
    #: Reads the classifier's representation, the outputs of some of its layers, for a defence that is conditioned on
    #: it.
    representation: Representation | None = None
    #: The names of the methods, from tensors ``[B, ...]`` to a tensor, that ``accelerate(compile=True)`` compiles.
    compiled_parts: ClassVar[tuple[str, ...]] = ()
    not_dependencies = frozenset({"bank"})

    def __init__(self, classifier: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        self.acceleration: dict[str, Any] | None = None
        self.fast: Accelerated | None = None
        # This is a hook and not an override of `load_state_dict`, because a hook also runs when a larger module loads
        # the defence as one of its parts.
        self.register_load_state_dict_post_hook(_make_copies_again)  # type: ignore[no-untyped-call]
        refuse_wrapped("classifier", classifier)
        image_shape = tuple(int(size) for size in image_shape)  # type: ignore[assignment]
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W), each at least 1, got {image_shape}")
        self.image_shape = image_shape
        self.own_classifier = False
        #: The training step from which on each term of the loss was used, by the term's name; empty without a training.
        self.acts_from_step: dict[str, int] = {}
        #: The settings of the bank, the store of adversarial images that a training reuses: the variants that it keeps
        #: of an image, and the share of a step's images that is attacked anew; empty without a bank.
        self.bank: dict[str, Any] = {}
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.classifier_uses_channels_last = False

    def _ready(self) -> None:
        """Move to the classifier's device, at the end of a subclass's constructor."""
        self.classifier_uses_channels_last = convert_to_channels_last(self.classifier, self.image_shape)
        self.to(first_tensor(self.classifier).device)
        self.eval()

    # -- the parts of a prediction ------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        """The precision of the purifier's weights, in which it takes and gives tensors."""
        raise NotImplementedError

    @property
    def classifier_dtype(self) -> torch.dtype:
        """The precision of the classifier's weights; it may differ from the purifier's."""
        return dtype_of(self.classifier)

    @property
    def frozen_classifier(self) -> nn.Module:
        """The classifier, or its accelerated copy, which classifies the purified images and is attacked alone.

        It takes float32 images and gives float32 logits whatever the classifier's own dtype.
        """
        if self.fast is not None:
            return self.fast.classifier
        return self.classifier if self.classifier_dtype == torch.float32 else _Float32Borders(self.classifier)

    def classify(self, images: Tensor) -> Tensor:
        """The classifier's logits of purified images, all in one batch; float32 ``[B, K, classes]``.

        Args:
            images: ``[B, K, C, H, W]``.
        """
        flat = images.flatten(0, 1)
        flat = flat if self.classifier_uses_channels_last else flat.contiguous()
        logits = self.classifier(flat.to(self.classifier_dtype)) if self.fast is None else self.fast.classify(flat)
        return logits.float().unflatten(0, images.shape[:2])

    def purify(self, x: Tensor, draws: int = 1) -> Tensor:
        """Purified images in [0, 1], ``[B, draws K, C, H, W]``; differentiable to x.

        Args:
            x: images ``[B, C, H, W]`` in [0, 1].
            draws: sets of K draws.
        """
        raise NotImplementedError

    def sample_logits(self, x: Tensor) -> Tensor:
        return self.classify(self.purify(x))

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        if not self.noise_is_fresh:
            # Without fresh noise every call gives the same result, so one call is enough.
            return self.sample_logits(x).expand(draws, -1, -1, -1)
        return self.classify(self.purify(x, draws)).unflatten(1, (draws, -1)).transpose(0, 1)

    def aggregate(self, logits: Tensor) -> Tensor:
        """``[B, classes]``, float32, by the defence's aggregation.

        Args:
            logits: ``[B, K, classes]``.
        """
        if logits.shape[1] == 1 and self.aggregation != "lse":
            return logits[:, 0]
        if self.aggregation == "vote":
            return majority(logits.transpose(0, 1))
        if self.aggregation == "mean_softmax":
            return aggregate(torch.log_softmax(logits, -1), "lse") - math.log(logits.shape[1])
        return aggregate(logits, self.aggregation)

    def check_images(self, x: Tensor) -> None:
        """ValueError unless ``x`` holds floating-point images of the defence's shape.

        Args:
            x: ``[B, C, H, W]``.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape or not x.is_floating_point():
            want = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x must be floating point [B, {want}], got {x.dtype} {list(x.shape)}")

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context in which the purifier computes."""
        if self.fast is None or self.purifier_dtype != torch.float32:
            return contextlib.nullcontext()
        return autocast_to(device, self.fast.dtype)

    def _run_part(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """A part, compiled if it may be. Not in training: the padding would enter BatchNorm's statistics."""
        if self.fast is None or self.training:
            return part(*inputs)
        return self.fast.run(part, *inputs)

    @property
    def computes_in_bfloat16(self) -> bool:
        """Tell whether the defence is accelerated in bfloat16."""
        return self.fast is not None and self.fast.dtype == torch.bfloat16

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
            The defence. It saves, moves and copies as before. The copies follow its own ``to``, ``cuda``, ``cpu`` and
            ``load_state_dict``; after another change of the classifier's weights call `refresh`, as
            `purify_fast.evaluation.evaluate` does where it finds one.

        Raises:
            ValueError: another dtype, or a classifier that cannot be folded (`purify_fast.speed.fold_batchnorm`).
        """
        settings = None if dtype is None else {"dtype": dtype, "fold": fold, "compile": compile}
        # If making the copies fails, for example because memory runs out, the earlier copies stay in use.
        self.fast = None if settings is None else self._make_copies(settings)
        self.acceleration = settings
        return self

    def refresh(self) -> None:
        """Make the copies of an accelerated defence again, from the weights as they are now."""
        if self.acceleration is not None:
            self.fast = self._make_copies(self.acceleration)

    def uncompiled_copies(self) -> Accelerated:
        """The copies that `refresh` would make, without compiling them, to be compared with the current ones.

        Raises:
            ValueError: the defence is not accelerated.
        """
        if self.acceleration is None:
            raise ValueError("the defence has no copies, because it is not accelerated: call accelerate() first")
        return self._make_copies({**self.acceleration, "compile": False})

    def _make_copies(self, settings: Mapping[str, Any]) -> Accelerated:
        parts = tuple(getattr(self, name) for name in self.compiled_parts)
        fast = Accelerated.make(self.classifier, self.image_shape, settings, self.representation, parts)
        self._update_packed(fast)
        return fast

    def prepare_replay(self) -> None:
        """Pack a part's weights again where they were packed before, if they have changed (`PreparesReplay`)."""
        if self.fast is not None:
            self._update_packed(self.fast)

    def _update_packed(self, fast: Accelerated) -> None:
        weight = self._weight_to_pack()
        if fast.dtype != torch.bfloat16 or weight is None:
            return
        if fast.packed is None or fast.packed_from != write_stamp(weight):
            # Leave inference mode, because attacks differentiate through the packed part.
            with torch.inference_mode(False), torch.no_grad():
                packed = self._pack()
                if fast.packed is None:
                    fast.packed = packed
                else:
                    # Captured steps read the memory of the earlier packed part, so the new weights are written there.
                    for old, new in zip(fast.packed.tensors(), packed.tensors(), strict=True):
                        old.copy_(new)
            fast.packed_from = write_stamp(weight)

    def _weight_to_pack(self) -> Tensor | None:
        """A weight that is written whenever those of the packed part are; None if no part may be packed now.

        A packed part has frozen weights, so that none is packed in training.
        """
        return None

    def _pack(self) -> Any:
        """The packed part, with the weights as they are now; its ``tensors()`` lists all of its tensors."""
        raise NotImplementedError

    # -- moves, files, modes ------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        """Move the accelerated copies with ``to``, ``cuda`` and ``cpu``; the copies keep their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.fast is not None:
            self.fast.to(first_tensor(self.classifier).device)
        return self

    def release_classifier(self) -> None:
        """Let the defence's own copy of the classifier be trained too; it is then saved with the purifier.

        Raises:
            ValueError: the defence is accelerated.
        """
        if self.fast is not None:
            raise ValueError("an accelerated defence cannot train its classifier: call accelerate(None) first")
        self.classifier.requires_grad_(True)
        self.own_classifier = True

    def train(self, mode: bool = True) -> Self:
        """Training mode for the purifier; the classifier always stays in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.classifier.eval()
        if mode and self.fast is not None:
            # Weights and BatchNorm statistics may change from now on, so packed weights are packed again at their next
            # use.
            self.fast.packed_from = None
        return self


def refuse_wrapped(name: str, module: nn.Module) -> None:
    """ValueError if the value is not a module, or is in ``nn.DataParallel`` or compiled.

    Args:
        name: name of the argument, for the message.
        module: value of the argument.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.DataParallel):
        raise ValueError(f"{name} must not be an nn.DataParallel: give {name}.module, and run one process per GPU")
    if is_compiled(module):
        raise ValueError(f"{name} must not be compiled: give {name}._orig_mod, and compile the defence instead")


class _Float32Borders(nn.Module):
    """A classifier of another dtype that takes and gives float32."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.dtype = classifier, dtype_of(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.to(self.dtype)).float()


def _make_copies_again(defence: Defence, keys: object) -> None:
    """Refresh the accelerated copies after weights were loaded."""
    defence.refresh()
