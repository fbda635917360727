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
from ..speed.folding.batchnorm import fold_pairs, foldable_pairs
from ..speed.folding.inference_copy import InferenceCopy, prepare_for_inference, set_modes
from ..speed.followed import Followed
from ..speed.structure import Place, Structure


@torch.inference_mode(False)
def computing_in(
    defence: Any, dtype: torch.dtype, *, compile: bool = False, plain: bool = False, structure: Structure | None = None
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
        structure: decisions about the defence that are known already.

    Raises:
        ValueError: another dtype, or a purifier that is not in float32.
    """
    if defence.purifier_dtype != torch.float32:
        raise ValueError(f"the purifier must be in float32, got {defence.purifier_dtype}: call .float() first")
    other = copy.copy(defence)
    # The buffers are shared, because a step of a training may replace one.
    other._modules, other._kept_ids = dict(defence._modules), {}
    other.compute_dtype = dtype
    vars(other)["_reader_place"] = Place()
    how: dict[str, Any] = {"plain": plain, "structure": structure}
    other.classifier = InferenceCopy(defence.classifier, defence.image_shape, dtype, compile, **how)
    _read_representation(other, defence)
    return other


class _Reader(nn.Module):
    """The classifier of a copy that reads the representation."""

    def __init__(self, representation: Any):
        super().__init__()
        self.representation, self.model, self.training = representation, representation.model, False


def _read_representation(copied: Any, defence: Any) -> None:
    """Let a copy read the classifier of a defence into the classifier that reads the representation."""
    if defence.representation is None:
        return
    classifier = copied.classifier
    made = copy.deepcopy(defence.representation, memo_of(defence.classifier.modules()))
    made.model.requires_grad_(False).eval()
    set_modes(made.model, classifier._kept)
    decided = classifier.decisions["_reader"]
    prepare_for_inference(made.model, copied.image_shape, classifier.dtype, plain=classifier.plain, decided=decided)
    # It is registered, so it moves with the copy.
    copied._reader = vars(copied)["_reader_place"].put(_Reader(made), classifier._structure.number)


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
    decisions = followed.structure.decisions
    # The classifier and what reads its representation are copied below.
    kept = [defence.classifier, *([] if defence.representation is None else [defence.representation])]
    inside = set(defence.classifier.modules())
    memo = {id(one): one for one in kept} | memo_of(part for part in defence.modules() if part not in inside)
    other: Any = deep_copy(defence, memo)
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
            from ..speed.graphs.compiled_step import compile_calls

            compile_calls(part)
    if is_first:
        other._followed, followed.is_current = followed, True
        followed.adopt(other, other)
        other._made_from = followed.structure.number
    # A subclass may call its parts without `check_images`.
    other.register_forward_pre_hook(type(other)._follow)
    folded = sum(len(decisions[name].pairs or ()) for name in ("classifier", *(name for name, _ in parts)))
    compiled = ", compiled" if compile else ""
    reads = f", reads its model at every call, because {followed.reason}" if followed.reason else ""
    name = type(defence).__name__
    other.about = f"{name} in {dtype}, {folded} folded BatchNorms{compiled}{reads}".replace("torch.", "")
    return other


class FollowedDefence(Followed):
    """A defence that frozen copies follow. The methods do what the methods of these names of a `Defence` say."""

    def follow(self, copied: Any) -> None:
        if self.changed():
            copied.update(in_place=self.reason == "")
        elif self.reads != copied._reads:
            # Another copy with this object has made the parts again.
            self.adopt(copied, None)

    def update(self, copied: Any, in_place: bool) -> None:
        model: Any = self.read()
        if model is not None:
            how = {"compile": copied.classifier.compiled, "plain": copied.classifier.plain, "followed": self}
            self.adopt(copied, model.make_frozen_copy(copied.classifier.dtype, **how), in_place)
            self.is_current = True

    def follows(self, copied: Any, model: Any) -> bool:
        try:
            copied.update()
        except (TypeError, ValueError):
            return False
        copied._noise, copied._noise_ids = model._noise, model._noise_ids
        copied._noise_seed.copy_(model._noise_seed)
        return bool(self.structure.number == copied._made_from)

    def adopt(self, copied: Any, fresh: Any, in_place: bool = True) -> None:
        """Let a copy take the parts of a new copy; None: those that another copy with this object has taken."""
        copied._reads = self.reads
        for name, part in () if fresh is None else fresh.named_children():
            self.places[name].put(part, self.structure.number, in_place)
        copied._modules |= {name: place.network for name, place in self.places.items()}
        if fresh is None or fresh is copied:
            return
        own: list[dict[str, Any]] = [{**one._parameters, **one._buffers} for one in (copied, fresh)]
        with torch.no_grad():
            for name, mine in own[0].items():
                if mine is not None and name != "_noise_seed":
                    mine.copy_(own[1][name])
        held = {name: value for name, value in vars(fresh).items() if isinstance(value, Tensor)}
        vars(copied).update({name: value for name, value in held.items() if name != "_noise_ids"})
