"""Caches finished rows on disk, and the measurements of the probes.

The file name of a row is a hash of everything on which the row depends. A damaged file is made again, with a warning.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import _library
from ..._files import read_sealed, write_sealed
from ..._settings import text_hash
from ..._version import __version__
from ...ops.dispatch.registry import forced_backends
from ...protocols import Classifier
from ...speed.precision import fast_bfloat16, float32_settings
from ..request.fingerprint import fingerprint
from .rows import CUT, Row

logger = logging.getLogger("purify_fast")

#: Increase this number by one for every change after which the same settings, weights and data give other rows, probes
#: or surrogates: cached results are then made again. For a change within a single attack, increase the version of this
#: attack instead, so that cached rows of the other attacks remain valid.
RESULTS_VERSION = 10


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

    def register(self, name: str, model: Classifier, x: Tensor) -> None:
        """Let the rows of a frozen model be cached, named by its `fingerprint`; a warning says if they cannot be."""
        if self.folder is None:
            return
        self._marks[id(model)] = model, (answers := fingerprint(model, x))
        if answers is None:
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
        """Read plain values and tensors from the cache, or make the values and cache them if they are ``whole``."""
        path = self._path(key, ".values.safetensors")
        if (content := self._read(path)) is not None:
            return content[0] | content[1]
        values = make()
        if path is not None and values.get("whole", True):
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
