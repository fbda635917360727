"""Keeps the frozen copies of the models that an evaluation attacks. The models themselves judge."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._validation import GradientPrecision
from ..protocols import Classifier, CountsImages, SampleLogits, is_purifier, supports
from ..speed.frozen_copy import COMPARED, auto_dtype, copy_or_model, is_frozen_copy, same_answers
from ..speed.graphs.graphed_loop import remember
from ..speed.watch import FEWEST_WEIGHTS, matrix_weights

#: The numbers of kept copies and wrappers: an evaluation attacks several variants of one model, one after the other.
#: Wrappers are kept because a captured step can be replayed only with the wrapper with which it was captured.
KEPT, WRAPPERS = 2, 8


def gradient_dtype(model: Classifier, x: Tensor, precision: GradientPrecision) -> torch.dtype | None:
    """The dtype of the copy of a model that attacks take their gradients from; None if they attack the model itself.

    With "auto" these are a model with few weights, and a defence where bfloat16 is not faster. With any precision they
    are frozen copies, functions, modules without weights, and purifiers and random defences of the user's own.
    """
    own = supports(model, "make_frozen_copy")
    alone = is_frozen_copy(model) or (not own and (supports(model, SampleLogits) or is_purifier(model)))
    if precision == "float32" or alone or not isinstance(model, nn.Module) or not (weights := matrix_weights(model)):
        return None
    dtype = auto_dtype(model, x) if precision == "auto" else torch.bfloat16
    if own:
        return dtype if dtype == torch.bfloat16 else None
    return dtype if weights >= FEWEST_WEIGHTS or precision == "bfloat16" else None


class Copies:
    """The copies of an evaluation's models. ``x``: images of the evaluation, on which copies are compared.

    Attributes:
        dtypes: the dtypes of the copies that were attacked.
    """

    def __init__(self, x: Tensor):
        self.x = x[:COMPARED]
        self.dtypes = set[torch.dtype]()
        self._kept: dict[Any, tuple[Any, ...]] = {}
        self._wrappers: dict[int, tuple[Any, ...]] = {}

    def copy_for(self, model: Classifier, precision: GradientPrecision) -> Classifier:
        """The model from which an attack takes its gradients: the copy of a model, or this model itself."""
        if supports(model, "around"):
            return self._copy_inside(model, precision)
        copied: Any
        _, copied = self._kept.get((id(model), precision), (None, None))
        if copied is None or (copied is not model and not copied.follows(model)):
            dtype = gradient_dtype(model, self.x, precision)
            copied = copy_or_model(model, self.x, dtype) if dtype and isinstance(model, nn.Module) else model
        if copied is not model:
            self.dtypes.add(copied.compute_dtype)
        return cast(Classifier, remember(self._kept, (id(model), precision), (model, copied), KEPT)[1])

    def _copy_inside(self, wrapper: Any, precision: GradientPrecision) -> Classifier:
        """A wrapper around the copy of the model inside ``wrapper``; ``wrapper`` itself if there is no copy."""
        copied: list[Classifier] = []

        def replace(inner: Classifier) -> Classifier:
            fast = self.copy_for(inner, precision)
            copied.extend([fast] if fast is not inner else [])
            return fast

        around = wrapper.around(replace)
        if not copied:
            return cast(Classifier, wrapper)
        entry = self._wrappers.get(id(wrapper))
        if entry is None or entry[0] is not wrapper or entry[1] is not copied[0]:
            # A wrapper that counts images does not change the logits, and a comparison would add to its count.
            counts = not isinstance(wrapper, nn.Module) or supports(wrapper, CountsImages)
            entry = wrapper, copied[0], around if counts or same_answers(around, wrapper, self.x) else wrapper
        return cast(Classifier, remember(self._wrappers, id(wrapper), entry, WRAPPERS)[2])
