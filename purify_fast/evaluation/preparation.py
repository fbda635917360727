"""What is looked at before a model is attacked: modes that nobody switches, hidden modules, copies that are stale."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from types import CodeType

from torch import nn

from .._tensors import digest
from ..contents import class_functions, hidden_modules, used_modules
from ..defences.base import Defence
from ..protocols import Classifier
from ..speed.folding.inference_copy import Accelerated
from .keep.fingerprint import fingerprint

logger = logging.getLogger("purify_fast")

#: Modules that a note names.
_NAMED = 3


def notes_of_modules(model: Classifier, name: str) -> list[str]:
    """Notes about modules in training mode that a model uses and nobody switches, and about those that it hides.

    The mode of a module is switched, and that of its parts; that of a function is not, nor that of a global variable.

    Args:
        model: what is judged, within `purify_fast.attacks.frozen`.
        name: how it is called in the report.
    """
    if not isinstance(model, nn.Module):
        training = _in_training_mode(used_modules(model))
        advice = "give a module in place of the function"
        return [_note_of_modes(f"{name} is a function, and what it uses", training, advice)] if training else []
    hidden = hidden_modules(model)
    switched = {id(part) for whole in (model, *(module for _, module in hidden)) for part in whole.modules()}
    others = (used for used in used_modules(class_functions(model)) if id(used[1]) not in switched)
    training, notes = _in_training_mode(others), []
    if training:
        advice = "make them attributes of the module that uses them"
        notes.append(_note_of_modes(f"what {name} uses besides its own modules", training, advice))
    if hidden:
        places = _listed([f"{place} ({type(module).__name__})" for place, module in hidden])
        notes.append(
            f"{name} holds modules that PyTorch does not know of: {places}. Here they were in evaluation mode, as the "
            "rest of the model. But to(), parameters() and state_dict() leave them out: hold them as attributes, or in "
            "nn.ModuleList or nn.ModuleDict"
        )
    return notes


def _note_of_modes(what: str, modules: list[str], advice: str) -> str:
    return (
        f"{what} is in training mode: {_listed(modules)}. The numbers are of the model as it is in training. If that "
        f"is not meant, call .eval() on these modules before, or {advice}"
    )


def _listed(modules: list[str]) -> str:
    more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
    return ", ".join(modules[:_NAMED]) + more


def _in_training_mode(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Those that behave as in training, each once."""
    return list(
        dict.fromkeys(
            f"{place} ({type(part).__name__})"
            for place, module in modules
            for part in module.modules()
            if part.training and _asks_for_mode(part)
        )
    )


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether a module computes something else in training, as dropout and batch normalization do."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return False
        codes = (getattr(value, "__code__", None) for value in vars(kind).values())
        if any(isinstance(code, CodeType) and "training" in code.co_names for code in codes):
            return True
    return False


def refresh_stale_copies(*models: object) -> None:
    """Let accelerated defences copy their classifiers again where these are others than when they were copied.

    `purify_fast.defences.base.Defence.accelerate` makes copies that do not follow changes in place. Judged with the old
    ones, a defence would be one that its weights no longer describe. That they were made again is logged.

    Args:
        models: what is judged or attacked from; any of them may be, hold or use accelerated defences, or be None.
    """
    modules = {id(part): part for model in models for whole in _wholes(model) for part in whole.modules()}
    for defence in modules.values():
        if not isinstance(defence, Defence) or defence.fast is None:
            continue
        if _contents(defence.fast) != _contents(defence.uncompiled_copies()):
            logger.warning(
                "%s is accelerated, and its classifier was changed since: its fast copies were made again, as its "
                "refresh() does, from the classifier as it is now",
                type(defence).__name__,
            )
            defence.refresh()
        # weights packed for a kernel are packed again, which takes a moment, when they are next used
        elif defence.fast.packed is not None:
            defence.fast.packed_from = None


def _wholes(model: object) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        yield model
        yield from (module for _, module in hidden_modules(model))
    elif model is not None:
        yield from (module for _, module in used_modules(model))


def _contents(copies: Accelerated) -> list[str]:
    """What stands for the copies of the classifier; of one without a fingerprint its tensors alone."""
    parts = [copies.classifier.classifier, *([] if copies.reader is None else [copies.reader.model])]
    return [fingerprint(part) or digest(*part.parameters(), *part.buffers()) for part in parts]
