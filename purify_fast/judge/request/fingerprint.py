"""The fingerprint of a model: a hash of its weights, of its answers, and of the user's source files."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..._settings import digest, text_hash
from ..._tensors import per_image
from ...attacks.attacked_model import gradient_to, logits_of
from ...model_state import hidden_modules, is_users, used_modules
from ...protocols import Classifier
from ...speed.draws import same_draws
from ..searches.model_tests import SAMPLE

#: The largest standard deviation of the noise; each image has more than the one before.
NOISE = 0.25
#: The endings of compiled modules, which are no source files.
_COMPILED = (".so", ".pyd")


def fingerprint(model: Classifier, x: Tensor) -> str | None:
    """Hash a model's weights, its answers for clean and noisy images, and the user's source files.

    Args:
        model: a frozen model.
        x: a few images ``[B, C, H, W]``, float32, on the device of the model.

    Returns:
        The hash, or None if the same seed gives other answers in a second call.
    """
    first, second = (_answers(model, x) for _ in range(2))
    # The answers may have imported further modules, so the sources come after them.
    return text_hash(repr([state_digest(model), first, _sources()])).hexdigest() if first == second else None


def state_digest(model: Classifier) -> str:
    """Hash the parameters and buffers of a model and of other modules that it uses; "" if there are none."""
    tensors = [tensor for net in _networks(model) for tensor in (*net.parameters(), *net.buffers())]
    return text_hash(" ".join(map(_content, tensors))).hexdigest() if tensors else ""


def _networks(model: Classifier) -> list[nn.Module]:
    own = [("", model), *hidden_modules(model)] if isinstance(model, nn.Module) else []
    return [net for _, net in (*own, *used_modules(model))]


def _content(tensor: Tensor) -> str:
    try:
        return digest(tensor)
    # The values of a sparse tensor, for example, show in the answers.
    except Exception:
        return f"{tensor.dtype} {list(tensor.shape)}"


def _answers(model: Classifier, x: Tensor) -> str:
    """Hash the logits of images, clean and noisy, and the gradients of a combination of the logits, bit by bit."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    noise *= per_image(torch.linspace(NOISE / len(x), NOISE, len(x), device="cpu"), x).to(x)
    answers = list[Tensor]()
    own = model if isinstance(model, nn.Module) else None
    with same_draws(own, x.device), _unchanged(model):
        for seeded in (torch.manual_seed, np.random.seed, random.seed):
            seeded(0)
        for part in torch.cat([x, (x + noise).clamp(0, 1)]).split(SAMPLE):
            with torch.no_grad():
                answers.append(logits_of(model, part.clone()))
            # A model that fails only while gradients are recorded can be judged.
            with torch.enable_grad(), contextlib.suppress(Exception):
                leaf = part.clone().requires_grad_()
                logits = logits_of(model, leaf)
                weights = torch.linspace(-1, 1, logits.shape[1], device="cpu").to(logits).expand_as(logits)
                answers.append(logits.detach())
                if (gradient := gradient_to(leaf, logits, weights)) is not None:
                    answers.append(gradient)
    return digest(*answers)


@contextlib.contextmanager
def _unchanged(model: Classifier) -> Iterator[None]:
    """A block after which the statistics of BatchNorms are as before. cuDNN is deterministic in it."""
    # Only in training mode does a BatchNorm write.
    training = [part for net in _networks(model) for part in net.modules() if part.training]
    buffers = [buffer for part in training for buffer in part.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def _sources() -> list[str]:
    """Hash the source files of the user's imported modules; a file that is gone counts by the name of its module."""
    hashes = set[str]()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        # Modules that a library has made itself, as torch.compile does, may lie outside of its folder.
        if not file or file.endswith(_COMPILED) or not (is_users(name) and is_users(name.partition(".")[0])):
            continue
        try:
            hashes.add(text_hash(str(Path(file).read_bytes())).hexdigest())
        except OSError:
            hashes.add(name)
    return sorted(hashes)
