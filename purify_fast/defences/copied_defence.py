"""Copies of defences: for trainings of the purifier, and frozen copies, which follow the defence.

A defence that was never copied needs nothing of this module.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..speed.copying import deep_copy, memo_of
from ..speed.folding.batchnorm import Values, fold_pairs, foldable_pairs
from ..speed.folding.inference_copy import InferenceCopy, computed_values, kept_modes, prepare_for_inference, set_modes
from ..speed.frozen_copy import Followed
from ..speed.watch import copy_all


@torch.inference_mode(False)
def computing_in(
    defence: Any, dtype: torch.dtype, *, compile: bool = False, plain: bool = False, kept: set[str] | None = None
) -> Any:
    """Make a defence with the same purifier and a copied classifier, which computes its products in ``dtype``.

    The weights, BatchNorm statistics and losses of the purifier must be float32 and remain so. Between the parts,
    images, condition, latents and logits are float32. With bfloat16, layers round the images to the 8 significant bits
    of bfloat16.

    Args:
        defence: a `purify_fast.defences.Defence`.
        dtype: float32 or bfloat16.
        compile: whether the classifier is compiled.
        plain: whether no BatchNorm is folded, and the layout of the weights remains.
        kept: the modules of the classifier that stay in training mode, see `InferenceCopy`.

    Raises:
        ValueError: another dtype, or a purifier that is not in float32.
    """
    if defence.purifier_dtype != torch.float32:
        raise ValueError(f"the purifier must be in float32, got {defence.purifier_dtype}: call .float() first")
    other = copy.copy(defence)
    # The buffers are shared, because a step of a training may replace one.
    other._modules, other._kept_ids = dict(defence._modules), {}
    other.compute_dtype = dtype
    how: dict[str, Any] = {"plain": plain, "kept": kept}
    other.classifier = InferenceCopy(defence.classifier, defence.image_shape, dtype, compile, **how)
    if defence.representation is not None:
        # It is registered, so it moves with the copy.
        other._reader = _Reader(defence, other.classifier)
    return other


class _Reader(nn.Module):
    """The classifier that reads the representation in a copy of a defence, prepared like the copied classifier."""

    def __init__(self, defence: Any, classifier: InferenceCopy):
        super().__init__()
        copied = copy.deepcopy(defence.representation, memo_of(defence.classifier.modules()))
        copied.model.requires_grad_(False).eval()
        set_modes(copied.model, classifier._kept)
        how = {"plain": classifier.plain, "channels_last": classifier.uses_channels_last}
        self.prepared = prepare_for_inference(copied.model, classifier.image_shape, classifier.dtype, **how)
        self.representation, self.model, self.training = copied, copied.model, False


@torch.inference_mode(False)
def make_frozen_copy(
    defence: Any,
    dtype: torch.dtype,
    *,
    compile: bool = False,
    plain: bool = False,
    followed: FollowedDefence | None = None,
) -> Any:
    """Make a frozen copy of a defence, without a comparison; the arguments are those of `computing_in`.

    ``followed``: that of an earlier copy in the same form, which is made again.
    """
    is_first = followed is None
    followed = FollowedDefence(defence) if followed is None else followed
    # The classifier and what reads its representation are copied below.
    kept = [defence.classifier, *([] if defence.representation is None else [defence.representation])]
    inside = set(defence.classifier.modules())
    memo = {id(item): item for item in kept} | memo_of(part for part in defence.modules() if part not in inside)
    other: Any = deep_copy(defence, memo)
    other = other.computing_in(dtype, compile=compile, plain=plain, kept=followed.kept)
    other.training = False
    other.requires_grad_(False)
    parts = [(name, part) for name, part in other.named_children() if name not in ("classifier", "_reader")]
    places = Counter(module for _, part in parts for module in part.modules())
    followed.folds = {}
    for name, part in parts:
        # A layer that two parts share is not folded.
        alone = all(places[module] == 1 for module in part.modules())
        part.eval()
        followed.folds[name] = foldable_pairs(part)[0] if alone and not plain else []
        fold_pairs(part, followed.folds[name])
        if compile:
            from ..speed.graphs.compiled_step import compile_calls

            compile_calls(part)
    # A subclass may call its parts without `check_images`.
    other.register_forward_pre_hook(type(other)._follow)
    folded = other.classifier.folded + sum(map(len, followed.folds.values()))
    compiled = ", compiled" if compile else ""
    reads = f", reads its model at every call, because {followed.reason}" if followed.reason else ""
    name = type(defence).__name__
    other.about = f"{name} in {dtype}, {folded} folded BatchNorms{compiled}{reads}".replace("torch.", "")
    if is_first:
        other._followed = followed
        followed.take(other, other)
        followed.end_read(other)
    return other


class FollowedDefence(Followed):
    """A defence that frozen copies follow. The methods do what the methods of these names of a `Defence` say.

    Attributes:
        kept: the modules of the classifier that stay in training mode in the copies.
        folds: the names of the folded layers and BatchNorms of each part, except the classifier.
        parts: the parts of the copies.
    """

    def __init__(self, model: Any = None):
        super().__init__(model)
        self.kept = set[str]() if model is None else kept_modes(model.classifier)
        self.folds, self.parts = dict[str, list[tuple[str, str]]](), dict[str, nn.Module]()
        self._values: Any = None

    def follow(self, copied: Any) -> None:
        if self.changed():
            # In a call of `torch.func.functional_call`, the given tensors serve.
            if self._values is None or not self._values.own.swapped():
                copied.update(in_place=self.may_write)
        elif self.reads != copied._reads:
            # Another copy with this object has made the parts again.
            copied._modules |= self.parts
            copied._reads = self.reads

    def update(self, copied: Any, in_place: bool) -> None:
        defence: Any = self._model
        if defence is not None:
            watch = self.read()
            if not (in_place and self._values is not None and self._values.fit(watch)):
                how = {"compile": copied.classifier.compiled, "plain": copied.classifier.plain, "followed": self}
                self.take(copied, defence.make_frozen_copy(copied.classifier.dtype, **how))
            self._values.write(self.graphs)
            self.end_read(copied)

    def __deepcopy__(self, memo: dict[int, Any]) -> FollowedDefence:
        other: Any = super().__deepcopy__(memo)
        # Its parts are its own.
        other._values, other.parts = None, {}
        return other

    def end_read(self, copied: Any) -> None:
        self.finish(self._values)
        copied._modules |= self.parts
        copied._reads = self.reads

    def take(self, copied: Any, fresh: Any) -> None:
        """Take the parts of a new copy, and let a copy have its tensors; it may be the new copy itself."""
        defence: Any = self._model
        self.parts = {name: part for name, part in fresh._modules.items() if part is not None}
        held = {name: item for name, item in vars(fresh).items() if isinstance(item, Tensor) and name != "_noise_ids"}
        vars(copied).update(held)
        # An attribute has no source whose values could be written.
        more: list[tuple[Tensor, Any]] = [(value, None) for value in held.values()]
        own, theirs = ({**item._parameters, **item._buffers} for item in (copied, defence))
        pairs = [(item, theirs[name]) for name, item in own.items() if item is not None and name != "_noise_seed"]
        copy_all(pairs)
        more += pairs
        copies: list[Any] = [(fresh.classifier.classifier, defence.classifier, fresh.classifier.prepared.pairs)]
        if "_reader" in self.parts:
            copies.append((fresh._reader.model, defence.representation.model, fresh._reader.prepared.pairs))
        for network, model, _ in copies:
            more += computed_values(network, model)
        copies += [(self.parts[name], getattr(defence, name), pairs) for name, pairs in self.folds.items()]
        self._values, copied._made_from = Values(self.watch, copies, more), self.watch

    def follows(self, copied: Any, model: Any) -> bool:
        before = copied._made_from
        try:
            copied.update()
        except (TypeError, ValueError):
            return False
        vars(copied).update({name: vars(model)[name] for name in ("_noise", "_noise_ids", "_seeds")})
        copied._noise_seed.copy_(model._noise_seed)
        return before is self.watch
