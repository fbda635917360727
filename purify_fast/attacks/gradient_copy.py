"""Keeps the frozen copies of the models that an evaluation attacks. The models themselves judge."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .._validation import GradientPrecision
from ..protocols import Classifier, CopiesItself, CountsImages, PassesOn, SampleLogits, is_purifier, supports
from ..speed.followed import Followed
from ..speed.frozen_copy import COMPARED, auto_dtype, copy_or_model, same_answers
from ..speed.graphs.step_graphs import remember
from ..speed.watch import FEWEST_WEIGHTS, matrix_weights

#: The number of kept copies. They are kept because captured steps can be replayed only with the same copy.
KEPT = 8


def gradient_dtype(model: Classifier, device: torch.device, precision: GradientPrecision) -> torch.dtype | None:
    """The dtype of the copy of a model that attacks take their gradients from; None if they attack the model itself.

    With "auto" these are a model with few weights, and a defence where bfloat16 is not faster. With any precision they
    are frozen copies, functions, modules without weights, and purifiers and random defences of the user's own.
    """
    own = supports(model, CopiesItself)
    alone = not own and (supports(model, SampleLogits) or is_purifier(model))
    if precision == "float32" or alone or not isinstance(model, nn.Module) or not (weights := matrix_weights(model)):
        return None
    if isinstance(getattr(model, "_followed", None), Followed):
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    dtype = auto_dtype(model, device)
    if own:
        return dtype if dtype == torch.bfloat16 else None
    return dtype if weights >= FEWEST_WEIGHTS else None


class Copies:
    """The copies of an evaluation's models. ``x``: images of the evaluation, on which copies are compared."""

    def __init__(self, x: Tensor):
        self.x = x[:COMPARED]
        self._kept: dict[Any, tuple[Any, Any]] = {}

    def of(self, model: Classifier, precision: GradientPrecision) -> Classifier:
        """The model from which an attack takes its gradients: the copy of a model, or this model itself."""
        for name, (_, made) in list(self._kept.items()):
            if isinstance(getattr(made, "_followed", None), Followed):
                try:
                    made.update()
                    if supports(made, CopiesItself):
                        made.take_noise()
                except ValueError:
                    del self._kept[name]
        key = id(model), precision
        known = self._kept.get(key)
        if known is None or known[0] is not model:
            known = model, self._made(model, precision)
        return remember(self._kept, key, known, KEPT)[1]

    def _made(self, model: Any, precision: GradientPrecision) -> Classifier:
        if not (isinstance(model, PassesOn) and supports(model, PassesOn)):
            dtype = gradient_dtype(model, self.x.device, precision)
            return model if dtype is None else copy_or_model(model, self.x, dtype)
        copied: list[bool] = []

        def replace(inner: Classifier) -> Classifier:
            made = self.of(inner, precision)
            copied.append(made is not inner)
            return made

        around: Any = model.around(replace)
        if not any(copied):
            return cast(Classifier, model)
        # A wrapper that counts images does not change the logits, and a comparison would add images to its count.
        counts = not isinstance(model, nn.Module) or supports(model, CountsImages)
        same: bool = counts or same_answers(around, cast(nn.Module, model), self.x)
        return cast(Classifier, around if same else model)
