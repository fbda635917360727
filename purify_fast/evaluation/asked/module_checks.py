"""Checks the modules of a model before it is attacked: their mode, and fast copies that are out of date."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from types import CodeType

from torch import nn

from ..._tensors import digest
from ...defences import Defence
from ...model_state import fingerprint, hidden_modules, used_modules
from ...protocols import Classifier
from ...speed.folding.inference_copy import Accelerated

logger = logging.getLogger("purify_fast")

#: The largest number of modules that a note names.
_NAMED = 3


def note_of_switched_modules(model: Classifier, name: str) -> list[str]:
    """A note on modules in training mode inside a model in evaluation mode, such as the dropout of a Bayesian network.

    Args:
        model: the judged model, before `purify_fast.attacks.frozen` puts all of its modules into evaluation mode.
        name: name of the model in the report.
    """
    if not isinstance(model, nn.Module) or model.training:
        return []
    parts = [(place, part) for place, part in model.named_modules() if part.training and _asks_for_mode(part)]
    if not parts:
        return []
    return [
        f"{name} is in evaluation mode, but holds modules in training mode: {_listed(parts)}. They were put into "
        "evaluation mode too, and the numbers describe the model in this state. To judge the model as it is, "
        "give a function in its place: evaluate(lambda x: model(x), ...)"
    ]


def notes_of_modules(model: Classifier, name: str) -> list[str]:
    """Notes on modules that the model uses in training mode, and on modules that PyTorch does not know of.

    An evaluation puts a model and its modules into evaluation mode, but not modules that only a function uses.

    Args:
        model: the judged model, frozen by `purify_fast.attacks.frozen`.
        name: name of the model in the report.
    """
    if isinstance(model, nn.Module):
        hidden, used = hidden_modules(model), []
    else:
        hidden, used = [], used_modules(model)
    parts = [(place, part) for place, module in used for part in module.modules()]
    training = [(place, part) for place, part in parts if part.training and _asks_for_mode(part)]
    notes = []
    if training:
        notes.append(
            f"{name} is a function that uses modules in training mode: {_listed(training)}. The numbers describe the "
            "model as it is in training. If this is not intended, call .eval() on these modules before evaluate, or "
            "give a module in place of the function"
        )
    if hidden:
        notes.append(
            f"{name} holds modules that PyTorch does not know of: {_listed(hidden)}. Here they were in evaluation "
            "mode, like the rest of the model. But to(), parameters() and state_dict() leave them out: make them "
            "attributes, or put them into nn.ModuleList or nn.ModuleDict"
        )
    return notes


def _listed(modules: Sequence[tuple[str, nn.Module]]) -> str:
    """Name the first modules by place and class, without duplicates, and give the number of further modules."""
    names = list(dict.fromkeys(f"{place} ({type(module).__name__})" for place, module in modules))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _asks_for_mode(module: nn.Module) -> bool:
    """Tell whether a module computes differently in training, as dropout and batch normalization do."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return False
        codes = (getattr(value, "__code__", None) for value in vars(kind).values())
        if any(isinstance(code, CodeType) and "training" in code.co_names for code in codes):
            return True
    return False


def refresh_stale_copies(*models: object) -> None:
    """Renew the copies of classifiers in accelerated defences if the classifiers have changed.

    `purify_fast.defences.base.Defence.accelerate` makes copies that do not follow later changes of the weights. With an
    old copy, the evaluated defence would have old weights. A warning is logged if a copy is renewed.

    Args:
        models: judged models, and other models that attacks use. Each may be, contain or use accelerated defences, or
            may be None.
    """
    modules = {id(part): part for model in models for whole in _wholes(model) for part in whole.modules()}
    for defence in modules.values():
        if not isinstance(defence, Defence) or defence.fast is None:
            continue
        if _contents(defence.fast) != _contents(defence.uncompiled_copies()):
            logger.warning(
                "the classifier of %s was changed after accelerate(): the fast copies were made again from the "
                "classifier as it is now, as refresh() does",
                type(defence).__name__,
            )
            defence.refresh()
        # Weights that were packed for a kernel may be outdated too, so they are packed again at their next use.
        elif defence.fast.packed is not None:
            defence.fast.packed_from = None


def _wholes(model: object) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        yield model
        yield from (module for _, module in hidden_modules(model))
    elif model is not None:
        yield from (module for _, module in used_modules(model))


def _contents(copies: Accelerated) -> list[str]:
    """Return a hash of each copied network: its fingerprint, or a hash of its tensors if it has no fingerprint."""
    parts = [copies.classifier.classifier, *([] if copies.reader is None else [copies.reader.model])]
    return [fingerprint(part) or digest(*part.parameters(), *part.buffers()) for part in parts]
