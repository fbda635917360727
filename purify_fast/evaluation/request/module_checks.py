"""Checks the modules of a model before it is attacked: their mode, and fast copies that are out of date."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from ..._tensors import digest
from ...defences import Defence
from ...model_state import fingerprint, hidden_modules, used_modules
from ...protocols import Classifier
from ...speed.folding.inference_copy import Accelerated

logger = logging.getLogger("purify_fast")

#: The largest number of modules that a note names.
_NAMED = 3


def note_of_modes(model: Classifier, name: str) -> list[str]:
    """A note on modules in training mode inside a model in evaluation mode, or used by a function."""
    if isinstance(model, nn.Module):
        parts = [] if model.training else [*model.named_modules()]
        what = "were put into evaluation mode; to keep them as they are, give a function: lambda x: model(x)"
    else:
        parts = [(place, part) for place, module in used_modules(model) for part in module.modules()]
        what = "stayed so, because they belong to a function; if this is not intended, call .eval() on them"
    odd = [(place, part) for place, part in parts if part.training and not [*part.children()]]
    names = list(dict.fromkeys(f"{place} ({type(part).__name__})" for place, part in odd))
    return [f"{name} has modules in training mode, {', '.join(names[:_NAMED])}: they {what}"] if names else []


def refresh_stale_copies(*models: object) -> None:
    """Renew the copies of classifiers in accelerated defences if the classifiers have changed."""
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
