"""Finished rows on disk, named by everything that they depend on, and the finished batches of an unfinished row.

Every file holds a checksum of its content (`purify_fast._sealed`). A damaged file counts as absent: its content is
computed again, with a warning.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._sealed import read_sealed, write_sealed
from .._tensors import text_hash
from ..ops.dispatch.registry import forced_backends
from ..speed.precision import float32_settings
from .rows import Row

logger = logging.getLogger("purify_fast")

#: Increase this number by one whenever the same settings, weights and data would give other rows than before. Kept rows
#: with an older number are then made again. Such a change is another way to choose the attacked images, to seed, to
#: judge or to count, or another definition of an op. Leave the number as it is for edited comments, docstrings, labels,
#: pictures and tables, and for faster kernels of the same function. For a change within one attack increase that
#: attack's own version instead, so that the rows of the other attacks are kept.
PROTOCOL_VERSION = 2


def read_file(path: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read values and tensors that `purify_fast._sealed.write_sealed` wrote; None if the file is absent or damaged."""
    if path is not None and path.exists():
        try:
            return read_sealed(path)
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged: %s. Its content is computed again", path, error)
    return None


def remove_batches(folder: Path | None) -> None:
    """Remove the folder of a row's batches, if there is one: the row is finished."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


class RowCache:
    """Finished rows, and the answers to the probes, in ``folder/rows``.

    Args:
        folder: folder of the whole evaluation; None: nothing is kept.
        served: the kernels that run the ops, by `purify_fast.ops.kernels_now`. Kernels and references differ in the
            last bits, so rows of other kernels do not belong to the same evaluation.
        revision: the user's name for what the model computes, part of what every row depends on.

    Attributes:
        was_kept: whether the last row was read from its file.
    """

    was_kept = False

    def __init__(self, folder: Path | None, served: dict[str, Any] | None = None, revision: str | None = None):
        self.folder = None if folder is None else folder / "rows"
        self.served, self.revision = served or {}, revision
        # The fingerprint of each model, by the id of the model. The model itself is kept beside its fingerprint, so
        # that no other object can get the same id.
        self._marks: dict[int, tuple[object, str | None]] = {id(None): (None, "")}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, settings: Mapping[str, Any], *models: object) -> str | None:
        """The name of a row of these settings, in plain values, on these models.

        The name also depends on PyTorch's release, on the presence of the kernel extension and on forced backends,
        which change the last bits of a model's arithmetic, and on the precision of float32 on a GPU, which changes
        more. It does not depend on the extension's bytes: a new build of the same definitions computes the same.

        Args:
            settings: everything that the row depends on except the models.
            models: the models that took part; None stands for a model that did not.

        Returns:
            A file name, or None if nothing is kept or a model has no fingerprint.
        """
        marks = [] if self.folder is None else [self._marks[id(model)][1] for model in models]
        if self.folder is None or None in marks:
            return None
        # The name needs both settings, because a block of `use_backend` overrides the environment variable.
        backends = [os.environ.get("PURIFY_FAST_BACKEND", ""), forced_backends()]
        machine = [str(torch.__version__), _library.loaded(), *backends, float32_settings()]
        whole = [PROTOCOL_VERSION, machine, self.served, self.revision, settings, marks]
        return text_hash(json.dumps(whole, sort_keys=True)).hexdigest()

    def know(self, model: object, mark: str | None) -> None:
        """Use this mark, a `fingerprint`, for the model in the names of its rows; with None no rows are kept."""
        self._marks[id(model)] = model, mark

    def row(self, key: str | None, make: Callable[[Path | None], Row]) -> Row:
        """Read the row of that name, or make and keep it.

        Args:
            key: name of the row; None: the row is made and not kept.
            make: makes the row; it gets the folder with the batches that an interrupted run finished, if rows are kept.
        """
        path, batches = self._path(key), self._path(key, ".batches")
        content = read_file(path)
        self.was_kept = content is not None
        if content is None:
            row = make(batches)
            if path is not None:
                arrays = {name: array for name, array in row.arrays().items() if array is not None}
                write_sealed(path, row.to_dict(), {name: torch.from_numpy(array) for name, array in arrays.items()})
        else:
            values, tensors = content
            row = Row.from_dict(values, {name: tensor.numpy() for name, tensor in tensors.items()})
        # Remove the batches in any case: a run that was interrupted after it wrote the row has not removed them.
        remove_batches(batches)
        return row

    def values(self, key: str | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Read the plain values of that name, or make and keep them.

        Args:
            key: name of the values; None: they are made and not kept.
            make: makes the values.
        """
        path = self._path(key, ".values.safetensors")
        content = read_file(path)
        if content is not None:
            return content[0]
        values = make()
        if path is not None:
            write_sealed(path, values, {})
        return values

    def _path(self, key: str | None, ending: str = ".safetensors") -> Path | None:
        return None if self.folder is None or key is None else self.folder / f"{key}{ending}"
