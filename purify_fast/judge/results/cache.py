"""Caches finished rows on disk, and the measurements of the probes, and makes the fingerprints of models.

The file name of a row is a hash of everything on which the row depends. A damaged file is made again, with a warning.
The fingerprint of a model is a hash of its weights, of its answers, and of the user's source files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ... import _library
from ..._files import read_sealed, write_sealed
from ..._settings import digest, text_hash
from ..._tensors import per_image
from ..._version import __version__
from ...attacks.attacked_model import gradient_to, logits_of
from ...model_state import hidden_modules, is_users, used_modules
from ...ops.dispatch.registry import forced_backends
from ...protocols import Classifier, CountsImages, supports
from ...speed.draws import same_draws
from ...speed.precision import fast_bfloat16, float32_settings
from ..searches.model_tests import SAMPLE
from .rows import CUT, Row

logger = logging.getLogger("purify_fast")

#: Increase this number by one for every change after which the same settings, weights and data give other rows, probes
#: or surrogates: cached results are then made again. For a change within a single attack, increase the version of this
#: attack instead, so that cached rows of the other attacks remain valid.
RESULTS_VERSION = 9


class RowCache:
    """The cache of finished rows, and of results of the probes, in ``folder/rows``.

    Rows of other kernels (``served``) are not used, because kernels differ in the last bits of their results.
    """

    source = ""
    used = False

    def __init__(self, folder: Path | None, served: str = "", revision: str | None = None):
        self.folder = None if folder is None else folder / "rows"
        self.served, self.revision = served, revision
        self._written = list[Path]()
        # The fingerprint of each model, by its id, and the model itself, so that no other object can get this id.
        self._marks: dict[int, tuple[object, str | None]] = {id(None): (None, "")}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, settings: Mapping[str, Any], *models: object) -> str | None:
        """The name of the row with these settings and these models."""
        marks = [self._marks.get(id(model), (model, None))[1] for model in models]
        if self.folder is None or None in marks:
            return None
        # The name contains both settings of the backend, because `use_backend` overrides the environment variable.
        backends = [os.environ.get("PURIFY_FAST_BACKEND", ""), forced_backends()]
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        autocasts = [f"{kind} {torch.get_autocast_dtype(kind)}" for kind in kinds]
        # "auto" chooses the precision of gradients by the answer of `fast_bfloat16`.
        chosen = [float32_settings(), fast_bfloat16(torch.device("cpu")), *autocasts]
        machine = [__version__, str(torch.__version__), _library.loaded(), *backends, *chosen]
        content = [RESULTS_VERSION, machine, self.served, self.revision, settings, marks]
        return text_hash(json.dumps(content, sort_keys=True)).hexdigest()

    def register(self, name: str, model: Classifier, x: Tensor, asked: Classifier | None = None) -> None:
        """Let the rows of a frozen model be cached, named by its `fingerprint`; a warning says if they cannot be."""
        if self.folder is None:
            return
        self._marks[id(model)] = model, (mark := fingerprint(model, x, asked))
        if mark is None:
            why = "with the same seed, it answers the same images differently"
            logger.warning("out: the rows of %s are not kept, because %s", name, why)

    def row(self, key: str | None, make: Callable[[], Row]) -> Row:
        """Read a row from the cache, or make the row and cache it."""
        path = self._path(key)
        content, self.source = self._read(path), ""
        if content is not None:
            self.source, (values, tensors) = ", from the cache", content
            return Row.from_dict(values, {name: tensor.numpy() for name, tensor in tensors.items()})
        row = make()
        # A row that was cut short is made again, perhaps with more time.
        if path is not None and CUT not in row.warnings:
            arrays = {name: array for name, array in row.arrays().items() if array is not None}
            write_sealed(path, row.to_dict(), {name: torch.from_numpy(array) for name, array in arrays.items()})
        return row

    def _read(self, path: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Read the values and tensors of a file; None if the file is absent or damaged."""
        try:
            content = read_sealed(path) if path is not None and path.exists() else None
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged: %s. Its content is computed again", path, error)
            return None
        self.used |= content is not None
        return content

    def values(self, key: str | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Read plain values and tensors from the cache, or make the values and cache them."""
        path = self._path(key, ".values.safetensors")
        if (content := self._read(path)) is not None:
            return content[0] | content[1]
        values = make()
        if path is not None:
            tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
            write_sealed(path, {name: value for name, value in values.items() if name not in tensors}, tensors)
            self._written.append(path)
        return values

    def remove_written(self) -> None:
        """Remove the `values` that this object has written."""
        for path in self._written:
            path.unlink(missing_ok=True)

    def _path(self, key: str | None, ending: str = ".safetensors") -> Path | None:
        return None if self.folder is None or key is None else self.folder / f"{key}{ending}"


# -- fingerprints of models -------------------------------------------------------------------------------------------

#: The largest standard deviation of the noise; each image has more than the one before.
NOISE = 0.25
#: The endings of compiled modules, which are no source files.
_COMPILED = (".so", ".pyd")


def fingerprint(model: Classifier, x: Tensor, asked: Classifier | None = None) -> str | None:
    """Hash a model's weights, its answers for clean and noisy images, and the user's source files.

    Args:
        model: a frozen model.
        x: a few images ``[B, C, H, W]``, float32, on the device of the model.
        asked: what is called in place of the model; by default the model itself.

    Returns:
        The hash, or None if the same seed gives other answers in a second call.
    """
    first, second = (_answers(model, model if asked is None else asked, x) for _ in range(2))
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


def _answers(model: Classifier, asked: Classifier, x: Tensor) -> str:
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
                answers.append(logits_of(asked, part.clone()))
            # A model that fails only while gradients are recorded can be judged.
            with torch.enable_grad(), contextlib.suppress(Exception):
                leaf = part.clone().requires_grad_()
                logits = logits_of(asked, leaf)
                weights = torch.linspace(-1, 1, logits.shape[1], device="cpu").to(logits).expand_as(logits)
                answers.append(logits.detach())
                if (gradient := gradient_to(leaf, logits, weights)) is not None:
                    answers.append(gradient)
    return digest(*answers)


@contextlib.contextmanager
def _unchanged(model: Classifier) -> Iterator[None]:
    """A block after which counts of images and statistics of BatchNorms are as before. cuDNN is deterministic in it."""
    parts = [part for net in _networks(model) for part in net.modules()]
    counters = [cast(CountsImages, part) for part in (model, *parts) if supports(part, CountsImages)]
    counts = [counter.counted() for counter in counters]
    # Only in training mode does a BatchNorm write.
    buffers = [buffer for part in parts if part.training for buffer in part.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
        for counter, count in zip(counters, counts, strict=True):
            counter.count(count - counter.counted())
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
