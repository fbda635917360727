"""Finished rows on disk, found again by what they depend on."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _library
from .._files import atomic, write_text
from .._fingerprint import text_hash
from ..ops._op import forced_backends
from ..speed.precision import float32_settings
from .fingerprint import fingerprint
from .partial_row import PartialRow
from .rows import Examples, Row

#: Raised by one whenever a row of the same settings, weights and data would come out differently than before: another
#: way to choose the attacked images, to seed, to judge or to count, or an op whose definition changed. Edited comments,
#: docstrings, labels, pictures and tables, and faster kernels of the same function, leave it as it is. A change within
#: one attack raises that attack's own version instead, so that the rows of the others are kept.
PROTOCOL_VERSION = 1


def environment() -> list[Any]:
    """What a row depends on besides the evaluation itself.

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
    """

    def __init__(self, folder: Path):
        self.folder = folder / "rows"
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
        text = json.dumps([PROTOCOL_VERSION, environment(), what, marks], sort_keys=True)
        return text_hash(text).hexdigest()

    def _fingerprint(self, model: object) -> str | None:
        if model is None:
            return ""
        if id(model) not in self._fingerprints:
            self._fingerprints[id(model)] = model, fingerprint(model)
        return self._fingerprints[id(model)][1]

    def row(self, key: str | None, make: Callable[[PartialRow], Row]) -> Row:
        """The row of that name, made and kept if it is not there yet.

        Args:
            key: the name; None: the row is made and not kept.
            make: makes it; is given the batches that an interrupted run finished.
        """
        row = None if key is None else self._read(key)
        if row is None:
            unfinished = PartialRow(None if key is None else self.folder / f"{key}.batches")
            row = make(unfinished)
            if key is not None:
                self._write(key, row)
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
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
        made = make()
        write_text(path, json.dumps(made))
        return made

    def _read(self, key: str) -> Row | None:
        try:
            row = Row.from_dict(json.loads((self.folder / f"{key}.json").read_text()))
        # absent, half-written, or of another version
        except (OSError, ValueError, TypeError, KeyError):
            return None
        with (
            contextlib.suppress(OSError, ValueError, zipfile.BadZipFile),
            np.load(self.folder / f"{key}.npz", allow_pickle=False) as file,
        ):
            if "clean" in file:
                row.examples = Examples(file["clean"], file["adversarial"], file["labels"])
            row.margins = file.get("margins")
        return row

    def _write(self, key: str, row: Row) -> None:
        arrays = {} if row.examples is None else dict(vars(row.examples))
        if row.margins is not None:
            arrays["margins"] = row.margins
        if arrays:
            with atomic(self.folder / f"{key}.npz") as temporary:
                np.savez(temporary, **arrays)
        write_text(self.folder / f"{key}.json", json.dumps(row.to_dict(), allow_nan=False))
