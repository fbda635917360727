"""The facts and the notes of a report that are known before the attacks."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

import torch

from ..._validation import NormName
from ..._version import __version__
from ...attacks.outputs import INSTEAD_OF_PROBABILITIES, ONE_HOT, LogitsOf
from ...ops.dispatch.records import processor
from ...protocols import Classifier
from .attack_lists import notes_of_protocol
from .config import EvaluateConfig
from .naming import ball_name
from .subject import Subject, precision_name

logger = logging.getLogger("purify_fast")


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
    dtype = subject.base_model.dtype if isinstance(subject.base_model, LogitsOf) else None
    if dtype is not None:
        notes.append(f"the weights of {name} are {dtype}, so its images were converted to this dtype")
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
