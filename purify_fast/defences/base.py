"""The base class of this package's defences: a purifier in front of a frozen classifier."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._library import ends_graphs, is_compiled, outside_graphs
from .._settings import dtype_of, first_tensor
from .._tensors import check_floating
from ..models.layers import Representation, count_classes
from ..ops.aggregate import aggregate
from ..speed.layout import autocast_to, convert_to_channels_last
from .stochastic import StochasticDefence, majority

D = TypeVar("D", bound="Defence")


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
        compute_dtype: in a copy, the dtype of the products of classifier and purifier; None otherwise.
        about: a line that says what a frozen copy is; empty otherwise.

    Raises:
        ValueError: the classifier is compiled or an ``nn.DataParallel``, or image_shape is not three sizes of at least
            1.
    """

    arguments: dict[str, Any]
    num_classes: int
    aggregation: str = "lse"
    compute_dtype: torch.dtype | None = None
    about: str = ""
    not_dependencies = frozenset({"_followed", "_reads", "_made_from"})

    def __init__(self, classifier: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        #: In a frozen copy: the model, which is a `FollowedDefence`, the number of its last read, and the watch of the
        #: model with which this copy was made.
        self._followed: Any = None
        self._representation: Representation | None = None
        self._reads, self._made_from = 0, None
        refuse_wrapped("classifier", classifier)
        image_shape = tuple(int(size) for size in image_shape)  # type: ignore[assignment]
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be (C, H, W), each at least 1, got {image_shape}")
        self.image_shape = image_shape
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.classifier_uses_channels_last = False

    def _ready(self) -> None:
        """Finish the construction: move all parts to the classifier's device, and set evaluation mode."""
        self.classifier_uses_channels_last = convert_to_channels_last(self.classifier, self.image_shape)
        self.to(first_tensor(self.classifier).device)
        self.eval()

    @torch.no_grad()
    def _blank_images(self) -> Tensor:
        """Count the classes on two gray images, ``[2, C, H, W]``, and return these."""
        blank = torch.full((2, *self.image_shape), 0.5, device=self._noise_seed.device)
        self.num_classes = count_classes(lambda: self.classify(blank[:, None]).flatten(0, 1), self.image_shape, 2)
        return blank

    @classmethod
    def rebuilt_arguments(cls, arguments: dict[str, Any], purifier: nn.Module | None, folder: object) -> dict[str, Any]:
        """Return the constructor's arguments from those of a file; ``purifier`` is the user's own, for a file without.

        A subclass whose purifier is an argument makes the module of the saved description here.

        Raises:
            ValueError: ``purifier`` is given for a file that needs none, or is missing, or does not fit the file.
        """
        if purifier is not None:
            raise ValueError(f"purifier must be None, got a module: {folder} includes the purifier of a {cls.__name__}")
        return arguments

    # -- the parts of a prediction ------------------------------------------------------------------------------------

    @property
    def purifier_dtype(self) -> torch.dtype:
        """The dtype of the purifier's weights, inputs and outputs."""
        raise NotImplementedError

    @property
    def classifier_dtype(self) -> torch.dtype:
        """The dtype of the classifier's inputs: that of its weights, or float32 in a copy."""
        return dtype_of(self.classifier) if self.compute_dtype is None else torch.float32

    @property
    def frozen_classifier(self) -> nn.Module:
        """The classifier without the purifier, or its copy in a copy. It takes and returns float32 in any case."""
        self._follow()
        return self.classifier if self.classifier_dtype == torch.float32 else _Float32Borders(self.classifier)

    def classify(self, images: Tensor) -> Tensor:
        """Classify purified images ``[B, K, C, H, W]`` in a single batch: logits ``[B, K, classes]``, float32."""
        self._follow()
        flat = images.flatten(0, 1)
        flat = flat if self.classifier_uses_channels_last else flat.contiguous()
        return self.classifier(flat.to(self.classifier_dtype)).float().unflatten(0, images.shape[:2])

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
        """Refuse an ``x`` that has no floating-point images of the defence's shape. A frozen copy follows its model."""
        check_floating(x=x)
        if x.dim() != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x must be [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        self._follow()

    def _products(
        self, device: torch.device, network: nn.Module | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        """The context in which the parts compute: in a copy, their products are in `compute_dtype`."""
        dtype = self.compute_dtype
        return contextlib.nullcontext() if dtype is None else autocast_to(device, dtype, network)

    @property
    def representation(self) -> Any:
        """The `Representation` of a defence that uses the outputs of some of the classifier's layers, or None."""
        reader: Any = self._modules.get("_reader")
        return self._representation if reader is None else reader.representation

    @representation.setter
    def representation(self, value: Representation) -> None:
        self._representation = value

    # -- copies -------------------------------------------------------------------------------------------------------

    def computing_in(self: D, dtype: torch.dtype, **how: Any) -> D:
        """Make a defence with the same purifier and a copied classifier, which computes its products in ``dtype``.

        Trainings of the purifier use it. ``how``: see `purify_fast.defences.copied_defence.computing_in`.
        """
        from .copied_defence import computing_in

        return computing_in(self, dtype, **how)

    def make_frozen_copy(self: D, dtype: torch.dtype, **how: Any) -> D:
        """Make a frozen copy, see `purify_fast.frozen_copy`, which calls this method and compares the copy.

        ``how``: see `purify_fast.defences.copied_defence.make_frozen_copy`.
        """
        from .copied_defence import make_frozen_copy

        return make_frozen_copy(self, dtype, **how)

    def update(self, in_place: bool = True) -> None:
        """Let a frozen copy read its model again. Its settings and its noise remain.

        ``in_place``: whether the present tensors get the new values, if nothing else differs.

        Raises:
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        if self._followed is not None:
            self._followed.update(self, in_place)

    def follows(self, model: nn.Module) -> bool:
        """Let a frozen copy read its model again and draw as it does now. False: the model needs a new copy."""
        return self._followed is not None and bool(self._followed.follows(self, model))

    def prepare_replay(self) -> None:
        """Let a frozen copy follow its model before a prediction, or before a captured step is replayed."""
        if self._followed is not None:
            self._followed.follow(self)

    @outside_graphs
    def _read_outside(self) -> None:
        self.prepare_replay()

    def _follow(self, hook: object = None) -> None:
        """Call `prepare_replay`; it is also a hook before the forward pass. A compiled graph ends here."""
        if not torch.compiler.is_compiling():
            self.prepare_replay()
        elif self._followed is not None and ends_graphs():
            self._read_outside()

    def __getstate__(self) -> Any:
        self.prepare_replay()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def state_dict(self, *args: Any, **options: Any) -> Any:
        self.prepare_replay()
        return super().state_dict(*args, **options)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._followed is not None:
            self._followed.refuse_state()
        super()._load_from_state_dict(*args)

    # -- modes --------------------------------------------------------------------------------------------------------

    def train(self: D, mode: bool = True) -> D:
        """Set the mode of the purifier. The classifier always remains in evaluation mode, and so does a frozen copy."""
        if self._followed is not None:
            self._followed.keep_mode(mode)
            return self
        super().train(mode)
        self.classifier.eval()
        return self

    train.sets_modes_only = True  # type: ignore[attr-defined]


def refuse_wrapped(name: str, module: nn.Module) -> None:
    """Raise a ValueError if a value is not a module, is compiled, a frozen copy, or an ``nn.DataParallel``."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(module, nn.DataParallel):
        raise ValueError(f"{name} must not be an nn.DataParallel: give {name}.module, and run one process per GPU")
    if getattr(module, "_followed", None) is not None:
        raise ValueError(f"{name} must not be a frozen copy, which follows another model: give this model")
    if is_compiled(module):
        raise ValueError(f"{name} must not be compiled: give {name}._orig_mod, and compile the defence instead")


class _Float32Borders(nn.Module):
    """Wraps a classifier whose dtype is not float32, so that its images and logits are float32."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.dtype = classifier, dtype_of(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.to(self.dtype)).float()
