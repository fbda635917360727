"""The finished batches of a row that is not finished yet, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._fingerprint import digest
from .kept_file import read_arrays, write_arrays


@dataclass
class Batch:
    """What the attack on one batch left behind.

    Args:
        found: the images it found, ``[B, C, H, W]``.
        health: counts of the gradients, by name.
        generators: the states of torch's random generators after it: the CPU's, and that of the model's GPU if any.
        seconds: how long it took.
        warnings: what the attack told.
        fallen: how many images fell to what, by name.
    """

    found: Tensor
    health: dict[str, int]
    generators: list[Tensor]
    seconds: float
    warnings: list[str] = field(default_factory=list)
    fallen: dict[str, int] = field(default_factory=dict)


class PartialRow:
    """The batches of one row in a folder of their own, which goes when the row is finished.

    Args:
        folder: made when the first batch is kept; None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def read(self, ids: Tensor) -> Batch | None:
        """The batch of these images, if it was finished and its file is not damaged.

        Args:
            ids: the images' indices, int64.
        """
        found = None if self.folder is None else read_arrays(self._path(ids))
        if found is None:
            return None
        plain = json.loads(str(found["plain"]))
        states = [torch.from_numpy(found[f"generator{i}"]) for i in range(plain.pop("generators"))]
        return Batch(found=torch.from_numpy(found["found"]), generators=states, **plain)

    def keep(self, ids: Tensor, batch: Batch) -> None:
        """Keep a finished batch; its file is whole or absent.

        Args:
            ids: the images' indices, int64.
            batch: what was found.
        """
        if self.folder is None:
            return
        plain: dict[str, Any] = {
            "generators": len(batch.generators),
            "health": batch.health,
            "seconds": batch.seconds,
            "warnings": batch.warnings,
            "fallen": batch.fallen,
        }
        arrays = {f"generator{i}": state.numpy() for i, state in enumerate(batch.generators)}
        arrays |= {"found": batch.found.cpu().numpy(), "plain": np.array(json.dumps(plain))}
        write_arrays(self._path(ids), arrays)

    def remove(self) -> None:
        """Forget the batches: the row is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, ids: Tensor) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest(ids.cpu())}.npz"
