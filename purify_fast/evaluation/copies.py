"""Whether the fast copies of accelerated defences are of the weights that the defences have now."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from .._fingerprint import digest
from ..attacks.held_modules import hidden_modules, used_modules
from ..defences.base import Defence
from ..speed.accelerated import Accelerated
from .fingerprint import fingerprint

logger = logging.getLogger("purify_fast")


def refresh_stale_copies(*models: object) -> None:
    """Let accelerated defences copy their classifiers again where these are others than when they were copied.

    `purify_fast.defences.base.Defence.accelerate` makes copies that do not follow changes in place. Judged with the old
    ones, a defence would be one that its weights no longer describe. That they were made again is logged.

    Args:
        models: what is judged or attacked from; any of them may be, hold or use accelerated defences, or be None.
    """
    found = {id(part): part for model in models for whole in _wholes(model) for part in whole.modules()}
    for defence in found.values():
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
        yield from (held for _, held in hidden_modules(model))
    elif model is not None:
        yield from (used for _, used in used_modules(model))


def _contents(copies: Accelerated) -> list[str]:
    """What stands for the copies of the classifier; of one without a fingerprint its tensors alone."""
    parts = [copies.classifier.classifier, *([] if copies.reader is None else [copies.reader.model])]
    return [fingerprint(part) or digest(*part.parameters(), *part.buffers()) for part in parts]
