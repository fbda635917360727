"""Prepares an evaluation: checks its arguments, and tells facts and notes that are known before the attacks."""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._version import __version__
from ...attacks import Attack
from ...attacks.arguments import INSTEAD_OF_PROBABILITIES, ONE_HOT, check_eps
from ...attacks.base import ThreatModel
from ...model_state import used_modules
from ...ops.dispatch.records import processor
from ...protocols import Classifier
from ...training.batches import as_tensor, check_channels, check_range
from .config import EvaluateConfig
from .deadline import Subject, precision_name
from .naming import AttackFunction, AttackSpec, as_specs, ball_name

logger = logging.getLogger("purify_fast")

#: The allowed dtypes of labels.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: The settings that change no attack of a protocol, or that a report tells in other places.
APART = {"protocol", "n_eval", "predict", "batch_size", "max_forward_batch", "cuda_graphs", "cudnn_benchmark", "seed"}
APART |= {"claim", "dataset_name", "together"}
#: The largest number of modules that a note names.
_NAMED = 3


# -- the arguments ----------------------------------------------------------------------------------------------------


def collect(x: Any, y: Any) -> tuple[Tensor, Tensor, list[str]]:
    """Check and convert images and labels."""
    x, y = as_tensor("x", x), as_tensor("y", y)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}")
    check_channels("x", x)
    if y.shape != (len(x),) or y.dtype not in INTEGERS:
        raise ValueError(f"y must be integer labels [N] = [{len(x)}], got {y.dtype} {list(y.shape)}")
    # Tensors made in inference mode cannot take part in gradients.
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y.to(torch.int64), []
    if not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating point, got {x.dtype}: if x is in 0..255, give x.byte()")
    x = x.float()
    least, most = (float(value) for value in x.detach().aminmax())
    check_range("x", least, most)
    x, notes = x.clone() if x.is_inference() else x.detach(), list[str]()
    if least < 0 or most > 1:
        beyond = max(-least, most - 1)
        notes.append(f"values of the images outside [0, 1] by rounding, by at most {beyond:.1g}, were clamped")
        x = x.clamp(0, 1)
    return x, y.to(torch.int64), notes


def read_attacks(
    config: EvaluateConfig,
    attacks: Sequence[Attack | AttackSpec | AttackFunction] | None,
    ball: ThreatModel,
    pixels: int,
) -> tuple[EvaluateConfig, list[AttackSpec]]:
    """Return the config with the protocol that runs (None if attacks are given), and the attacks' specifications."""
    if config.protocol is not None and attacks is not None:
        raise ValueError(f"protocol and attacks exclude each other, got protocol={config.protocol!r} and attacks")
    if config.protocol is None and attacks is None:
        config = replace(config, protocol="standard")
    specs = [] if attacks is None else as_specs(attacks)
    # If the package of an attack is missing, its error is raised here, before any work.
    for spec in specs:
        spec.attack.revision()
    if config.protocol == "official":
        # The other protocols need none of what calls the original AutoAttack.
        from ..searches.original_autoattack import implementation

        implementation()
    if ball.eps == 0 and (specs or config.protocol or config.probes):
        raise ValueError("eps must be above 0, got 0; for the accuracy on clean images only, give attacks=[]")
    # An attack with a radius of its own may not have a ball that contains every image.
    for attack in (spec.attack for spec in specs):
        own: Any = attack
        if attack.norms and own.eps is not None:
            check_eps(own.eps, own.norm or ball.norm, pixels=pixels)
    return config, specs


# -- the model --------------------------------------------------------------------------------------------------------


def changes(config: EvaluateConfig) -> str:
    """The settings that change the attacks or the probes of a protocol, such as "steps 5"; may be empty."""
    # Every protocol has probes by default.
    usual, config = EvaluateConfig(), replace(config, probes=None) if config.probes else config
    values = {name: value for name, value in vars(config).items() if name not in APART}
    changed = {name: value for name, value in values.items() if value != getattr(usual, name)}
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in changed.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def facts(config: EvaluateConfig, ball: ThreatModel, model: Classifier, device: torch.device) -> dict[str, str]:
    """The facts about all rows, for `Report.about`."""
    values = {
        "threat": ball_name(*ball),
        "version": f"purify_fast {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
        "seed": str(config.seed),
        # Code that was typed, into a notebook or after -c, has no command that repeats it.
        "command": None if "ps1" in vars(sys) or sys.argv[0] == "-c" else shlex.join(["python", *sys.orig_argv[1:]]),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "precision": precision_name(model, device),
        "claim": None if config.claim is None else f"{config.claim:g}",
        "dataset": config.dataset_name,
        "protocol": config.protocol,
        "changed": (config.protocol and changes(config)) or None,
        "predict": config.predict and f"the worst of {config.n_eval} draws",
    }
    return {name: value for name, value in values.items() if value is not None}


def warn_of_probabilities(subject: Subject, name: str) -> None:
    """Log a warning if the model returns probabilities instead of logits."""
    if subject.has_probabilities:
        kind = ONE_HOT if subject.has_one_hot else f"returns probabilities, not logits: {INSTEAD_OF_PROBABILITIES}"
        logger.warning("%s %s. The report will mark its accuracy", name, kind)


def note_of_modes(model: Classifier, name: str) -> list[str]:
    """Notes and warnings on modules in training mode inside a model in evaluation mode, or read by a function."""
    own = [*model.named_modules()] if isinstance(model, nn.Module) and not model.training else []
    # A module from torch.export keeps its mode, and refuses `eval` by a method of its own.
    read = [(at, part) for at, net in used_modules(model) if "eval" not in vars(net) for part in net.modules()]
    notes = list[str]()
    for parts, what in (
        (own, "were put into evaluation mode; to keep them as they are, give a function: lambda x: model(x)"),
        (read, "stayed so, because they belong to a function; if this is not intended, call .eval() on them"),
    ):
        odd = [(place, part) for place, part in parts if part.training and not [*part.children()]]
        names = list(dict.fromkeys(f"{place} ({type(part).__name__})" for place, part in odd))
        if names:
            notes.append(f"{name} has modules in training mode, {', '.join(names[:_NAMED])}: they {what}")
            logger.warning(notes[-1])
    return notes
