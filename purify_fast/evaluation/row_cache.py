"""Finished rows on disk, found again by what they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _library
from .._fingerprint import text_hash
from ..ops import choices_of_bits
from ..ops.dispatch.registry import forced_backends
from ..speed.precision import float32_settings
from .fingerprint import fingerprint
from .kept_file import read_arrays, read_values, write_arrays, write_values
from .partial_row import PartialRow
from .rows import Examples, Row

#: Raised by one whenever a row of the same settings, weights and data would come out differently than before: another
#: way to choose the attacked images, to seed, to judge or to count, or an op whose definition changed. Edited comments,
#: docstrings, labels, pictures and tables, and faster kernels of the same function, leave it as it is. A change within
#: one attack raises that attack's own version instead, so that the rows of the others are kept.
PROTOCOL_VERSION = 1


def environment() -> list[Any]:
    """What a row depends on besides the evaluation itself, and who serves the ops.

    Another release of PyTorch, or kernels in place of the reference, change the last bits of a model's arithmetic, and
    with them which of two equally good points an attack returns. A kernel extension that is built again from the same
    definitions does not, so that its bytes are no part of this: only whether it is there, and which backends are
    forced. What float32 means on a GPU changes far more than the last bits.
    """
    return [
        str(torch.__version__),
        _library.loaded(),
        os.environ.get("PURIFY_FAST_BACKEND", ""),
        # a block of `use_backend` overrides the variable
        forced_backends(),
        float32_settings(),
    ]


class RowCache:
    """Finished rows in ``folder/rows``: the row as JSON, its example images beside it.

    Args:
        folder: of the whole evaluation.
        served: who serves the ops, by `purify_fast.ops.kernel_choices`: kernels and references differ in the last bits,
            so that rows that others would serve are no part of the same evaluation.

    Attributes:
        was_kept: whether the last row was found, and not made.
    """

    was_kept = False

    def __init__(self, folder: Path, served: dict[str, Any]):
        self.folder = folder / "rows"
        self.served = choices_of_bits(served)
        self.folder.mkdir(parents=True, exist_ok=True)
        # the weights of a model are read once, not once for each row; with the model, so that its id stays its own
        self._fingerprints: dict[int, tuple[object, str | None]] = {}

    def key(self, what: Mapping[str, Any], *models: object) -> str | None:
        """Names a row by all it depends on.

        Args:
            what: settings, plain values.
            models: those that took part; None stands for one that did not.

        Returns:
            A file name, or None where a model has no fingerprint: such a row is made anew each time.
        """
        marks = [self._fingerprint(model) for model in models]
        if None in marks:
            return None
        text = json.dumps([PROTOCOL_VERSION, environment(), self.served, what, marks], sort_keys=True)
        return text_hash(text).hexdigest()

    def know(self, model: object, mark: str | None) -> None:
        """Take what stands for a model in the names of its rows.

        Args:
            model: the model.
            mark: its `fingerprint`; None: rows with it are not kept.
        """
        self._fingerprints[id(model)] = model, mark

    def _fingerprint(self, model: object) -> str | None:
        if model is None:
            return ""
        if id(model) not in self._fingerprints:
            self.know(model, fingerprint(model))
        return self._fingerprints[id(model)][1]

    def row(self, key: str | None, make: Callable[[PartialRow], Row]) -> Row:
        """The row of that name, made and kept if it is not there yet.

        Args:
            key: the name; None: the row is made and not kept.
            make: makes it; is given the batches that an interrupted run finished.
        """
        if key is None:
            self.was_kept = False
            return make(PartialRow(None))
        unfinished = PartialRow(self.folder / f"{key}.batches")
        row = self._read(key)
        self.was_kept = row is not None
        if row is None:
            row = make(unfinished)
            self._write(key, row)
        # a run that ended between the two left the batches of a finished row
        unfinished.remove()
        return row

    def value(self, key: str | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Plain values of that name, made and kept if they are not there yet.

        Args:
            key: the name; None: they are made and not kept.
            make: makes them.
        """
        if key is None:
            return make()
        path = self.folder / f"{key}.values"
        made = read_values(path)
        if made is None:
            made = make()
            write_values(path, made)
        return made

    def _read(self, key: str) -> Row | None:
        values = read_values(self.folder / f"{key}.json")
        if values is None:
            return None
        found: dict[str, np.ndarray] | None = {}
        if values.pop("arrays"):
            found = read_arrays(self.folder / f"{key}.npz")
        if found is None:
            return None
        try:
            row = Row.from_dict(values)
        except (TypeError, KeyError):
            # a row of another version has other fields
            return None
        if "clean" in found:
            row.examples = Examples.from_arrays(found)
        row.margins = found.get("margins")
        return row

    def _write(self, key: str, row: Row) -> None:
        arrays = {} if row.examples is None else row.examples.to_arrays()
        if row.margins is not None:
            arrays["margins"] = row.margins
        if arrays:
            write_arrays(self.folder / f"{key}.npz", arrays)
        # last: the row is finished when this file is there
        write_values(self.folder / f"{key}.json", row.to_dict() | {"arrays": sorted(arrays)})
