"""Prepares a model for an evaluation: facts and notes that are known before the attacks, and fast copies renewed."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..._tensors import digest
from ..._validation import NormName
from ..._version import __version__
from ...attacks.outputs import INSTEAD_OF_PROBABILITIES, ONE_HOT
from ...model_state import fingerprint, used_modules
from ...ops.dispatch.records import processor
from ...protocols import Classifier
from .attack_lists import notes_of_protocol
from .config import EvaluateConfig
from .naming import ball_name
from .subject import Subject, precision_name

logger = logging.getLogger("purify_fast")

#: The largest number of modules that a note names.
_NAMED = 3


def facts(
    config: EvaluateConfig, norm: NormName, eps: float, model: Classifier, device: torch.device
) -> dict[str, str]:
    """The facts about all rows, for `Report.about`."""
    words = {None: None, "worst_of": "the worst", "votes": "the majority"}[config.predict]
    known = {
        "threat": ball_name(norm, eps),
        "version": f"purify_fast {__version__}",
        "seed": str(config.seed),
        # Code that was typed, into a notebook or after -c, has no command that repeats it.
        "command": None if "ps1" in vars(sys) or sys.argv[0] == "-c" else shlex.join(["python", *sys.orig_argv[1:]]),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "precision": precision_name(model, device),
        "claim": None if config.claim is None else f"{config.claim:g}",
        "dataset": config.dataset_name,
        "protocol": config.protocol,
        "predict": words and f"{words} of {config.n_eval} draws",
    }
    return {what: value for what, value in known.items() if value is not None}


def first_notes(
    config: EvaluateConfig, model: Classifier, subject: Subject, name: str, modes: Sequence[str] = ()
) -> list[str]:
    """The first notes of a report; ``modes``: see `note_of_modes`."""
    draws = f"{config.n_eval} fresh draws of the model"
    judged = {
        None: [],
        "worst_of": [f"each image was judged by the worst of {draws}: it has fallen if any of them is wrong"],
        "votes": [f"each image was judged by one majority vote of {draws}, and the attacks attacked this vote"],
    }
    notes = [*modes]
    for note in notes:
        logger.warning(note)
    if subject.has_probabilities:
        kind = ONE_HOT if subject.has_one_hot else f"returns probabilities, not logits: {INSTEAD_OF_PROBABILITIES}"
        logger.warning("%s %s. The report will mark its accuracy", name, kind)
    if subject.draws_once_per_call:
        notes.append(
            f"{name} draws its randomness once per call, for all images of a batch, so each draw needs a separate "
            "call: a step or a judgement by 20 draws takes 20 calls. Other random models compute several draws in one "
            "call"
        )
    return judged[config.predict] + notes + notes_of_protocol(config.protocol, model)


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
    # The evaluation of a model that is no defence of this package needs no code of accelerated copies.
    from ...defences import Defence

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
    elif model is not None:
        yield from (module for _, module in used_modules(model))


def _contents(copies: Any) -> list[str]:
    """Return a hash of each copied network: its fingerprint, or a hash of its tensors if it has no fingerprint."""
    parts = [copies.classifier.classifier, *([] if copies.reader is None else [copies.reader.model])]
    return [fingerprint(part) or digest(*part.parameters(), *part.buffers()) for part in parts]
