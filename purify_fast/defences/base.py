"""The base class of this package's defences: a purifier in front of a frozen classifier."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._compiler import is_compiled, outside_graphs
from .._tensors import check_floating, dtype_of, first_tensor
from ..models.representation import Representation, count_classes
from ..ops.aggregate import aggregate
from ..speed.folding.batchnorm import fold_pairs, foldable_pairs
from ..speed.folding.inference_copy import (
    InferenceCopy,
    autocast_to,
    convert_to_channels_last,
    prepare_for_inference,
    set_modes,
)
from ..speed.followed import Followed, is_frozen_copy, keeps_its_mode
from ..speed.watch import Place, Structure, deep_copy, memo_of
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
    not_dependencies = frozenset({"bank", "_followed", "_reads", "_made_from", "_reader_place", "_warned"})

    def __init__(self, classifier: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        #: In a frozen copy: the model, the number of its reads, and its structure when this copy was made.
        self._followed: Followed | None = None
        self._representation: Representation | None = None
        self._reads = self._made_from = 0
        self._warned = False
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

    def _products(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context in which the parts compute: in a copy, their products are in `compute_dtype`."""
        return contextlib.nullcontext() if self.compute_dtype is None else autocast_to(device, self.compute_dtype)

    @property
    def representation(self) -> Any:
        """The `Representation` of a defence that uses the outputs of some of the classifier's layers, or None."""
        reader: Any = self._modules.get("_reader")
        return self._representation if reader is None else reader.representation

    @representation.setter
    def representation(self, value: Representation) -> None:
        self._representation = value

    # -- copies -------------------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def computing_in(
        self: D, dtype: torch.dtype, *, compile: bool = False, plain: bool = False, structure: Structure | None = None
    ) -> D:
        """Make a defence with the same purifier and a copied classifier, which computes its products in ``dtype``.

        Trainings of the purifier use it. ``dtype`` is float32 or bfloat16. The weights, BatchNorm statistics and losses
        of the purifier must be float32 and remain so. Between the parts, images, condition, latents and logits are
        float32. With bfloat16, layers round the images to the 8 significant bits of bfloat16. With ``compile``, the
        classifier is compiled. With ``plain``, no BatchNorm is folded, and the layout of the weights remains.
        ``structure`` has decisions about the defence that are known already. Another dtype, or a purifier that is not
        in float32, raises a ValueError.
        """
        if self.purifier_dtype != torch.float32:
            raise ValueError(f"the purifier must be in float32, got {self.purifier_dtype}: call .float() first")
        other = copy.copy(self)
        # The buffers are shared, because a step of a training may replace one.
        other._modules, other._kept_ids = dict(self._modules), {}
        other.compute_dtype = dtype
        vars(other)["_reader_place"] = Place()
        how = {"plain": plain, "structure": structure}
        other.classifier = InferenceCopy(self.classifier, self.image_shape, dtype, compile, **how)  # type: ignore[arg-type]
        other._read_representation(self)
        return other

    def read_classifier(self, defence: Defence) -> None:
        """Let a copy that `computing_in` has made read the classifier of a defence again."""
        copied: Any = self.classifier
        copied.refresh(defence.classifier)
        self._read_representation(defence)

    def _read_representation(self, defence: Defence) -> None:
        """Let a copy read the classifier of a defence into the classifier that reads the representation."""
        if defence.representation is None:
            return
        copied: Any = self.classifier
        made = copy.deepcopy(defence.representation, memo_of(defence.classifier.modules()))
        made.model.requires_grad_(False).eval()
        set_modes(made.model, copied._kept)
        decided = copied.decisions["_reader"]
        prepare_for_inference(made.model, self.image_shape, copied.dtype, plain=copied.plain, decided=decided)
        # It is registered, so it moves with the copy.
        place: Any = vars(self)["_reader_place"]
        self._reader = place.put(_Reader(made), copied._structure.number)

    @torch.inference_mode(False)
    def make_frozen_copy(
        self: D, dtype: torch.dtype, *, compile: bool = False, plain: bool = False, followed: Followed | None = None
    ) -> D:
        """Make a frozen copy, see `purify_fast.frozen_copy`, which calls this method and compares the copy.

        ``followed``: that of an earlier copy in the same form, which is made again.
        """
        is_first = followed is None
        followed = Followed(self) if followed is None else followed
        decisions = followed.structure.decisions
        # The classifier and what reads its representation are copied below.
        kept = [self.classifier, *([] if self.representation is None else [self.representation])]
        inside = set(self.classifier.modules())
        memo = {id(one): one for one in kept} | memo_of(part for part in self.modules() if part not in inside)
        other: Any = deep_copy(self, memo)
        other = other.computing_in(dtype, compile=compile, plain=plain, structure=followed.structure)
        other.training = False
        other.requires_grad_(False)
        parts = [(name, part) for name, part in other.named_children() if name not in ("classifier", "_reader")]
        places = Counter(module for _, part in parts for module in part.modules())
        for name, part in parts:
            # A layer that two parts share is not folded.
            alone = all(places[module] == 1 for module in part.modules())
            part.eval()
            if decisions[name].pairs is None:
                decisions[name].pairs = foldable_pairs(part)[0] if alone and not plain else []
            fold_pairs(part, decisions[name].pairs or [])
            if compile:
                part.compile()
        if is_first:
            other._followed, followed.is_current = followed, True
            other._adopt(other)
            other._made_from = followed.structure.number
        # A subclass may call its parts without `check_images`.
        other.register_forward_pre_hook(Defence._follow)
        folded = sum(len(decisions[name].pairs or ()) for name in ("classifier", *(name for name, _ in parts)))
        compiled = ", compiled" if compile else ""
        reads = f", reads its model at every call, because {followed.reason}" if followed.reason else ""
        name = type(self).__name__
        other.about = f"{name} in {dtype}, {folded} folded BatchNorms{compiled}{reads}".replace("torch.", "")
        return other

    def update(self, in_place: bool = True) -> None:
        """Let a frozen copy read its model again: its parts are made anew, and its settings and its noise remain.

        ``in_place``: whether the present tensors get the new values if the parts differ in nothing else.

        Raises:
            ValueError: names, shapes or the sharing of the model's tensors have changed.
        """
        model: Any = None if self._followed is None else self._followed.read()
        if model is None or self._followed is None:
            return
        copied: Any = self.classifier
        how = {"compile": copied.compile_steps, "plain": copied.plain, "followed": self._followed}
        fresh = model.make_frozen_copy(copied.dtype, **how)
        self._adopt(fresh, in_place)
        self._followed.is_current = True

    def _adopt(self, fresh: Defence | None, in_place: bool = True) -> None:
        """Take the parts of a new copy; None: those that another copy with the same `Followed` has taken."""
        followed: Any = self._followed
        self._reads = followed.reads
        for name, part in () if fresh is None else fresh.named_children():
            followed.places[name].put(part, followed.structure.number, in_place)
        self._modules |= {name: place.network for name, place in followed.places.items()}
        if fresh is None or fresh is self:
            return
        own: list[dict[str, Any]] = [{**one._parameters, **one._buffers} for one in (self, fresh)]
        with torch.no_grad():
            for name, mine in own[0].items():
                if mine is not None and name != "_noise_seed":
                    mine.copy_(own[1][name])
        held = {name: value for name, value in vars(fresh).items() if isinstance(value, Tensor)}
        vars(self).update({name: value for name, value in held.items() if name != "_noise_ids"})

    def follows(self, model: nn.Module) -> bool:
        """Let a frozen copy read its model again and draw as it does now. False: the model needs a new copy."""
        defence: Any = model
        try:
            self.update()
        except (TypeError, ValueError):
            return False
        self._noise, self._noise_ids = defence._noise, defence._noise_ids
        self._noise_seed.copy_(defence._noise_seed)
        return self._followed is not None and self._followed.structure.number == self._made_from

    def prepare_replay(self) -> None:
        """Let a frozen copy follow its model before a prediction, or before a captured step is replayed."""
        followed = self._followed
        if followed is not None and followed.changed():
            self.update(in_place=followed.reason == "")
        elif followed is not None and followed.reads != self._reads:
            self._adopt(None)

    @outside_graphs
    def _read_outside(self) -> None:
        self.prepare_replay()

    def _follow(self, given: object = None) -> None:
        """Call `prepare_replay`; it is also a hook before the forward pass. A compiled graph ends here."""
        if not torch.compiler.is_compiling():
            self.prepare_replay()
        elif self._followed is not None:
            self._read_outside()

    def __getstate__(self) -> Any:
        self.prepare_replay()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def state_dict(self, *given: Any, **options: Any) -> Any:
        self.prepare_replay()
        return super().state_dict(*given, **options)

    # -- modes --------------------------------------------------------------------------------------------------------

    def train(self: D, mode: bool = True) -> D:
        """Set the mode of the purifier. The classifier always remains in evaluation mode, and so does a frozen copy."""
        if self._followed is not None:
            self._warned = keeps_its_mode(mode, self._warned)
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
    if is_frozen_copy(module):
        raise ValueError(f"{name} must not be a frozen copy, which follows another model: give this model")
    if is_compiled(module):
        raise ValueError(f"{name} must not be compiled: give {name}._orig_mod, and compile the defence instead")


class _Reader(nn.Module):
    """The classifier of a copy that reads the representation."""

    def __init__(self, representation: Representation):
        super().__init__()
        self.representation, self.model, self.training = representation, representation.model, False


class _Float32Borders(nn.Module):
    """Wraps a classifier whose dtype is not float32, so that its images and logits are float32."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier, self.dtype = classifier, dtype_of(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images.to(self.dtype)).float()
