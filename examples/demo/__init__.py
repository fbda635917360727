"""The demonstration: train defences on digits and attack them with adaptive attacks, in minutes on a CPU.

By default, a network of each method is trained for a short time, and attacked beside the zoo's model of the same
method (`beside_zoo`). With ``whole``, ten models are trained in full (`ten_models`).
"""

from __future__ import annotations

from pathlib import Path

from . import beside_zoo, ten_models
from .setting import Budget, Workspace


def run(out: Path = Path("runs/demo"), whole: bool = False, seed: int = 0) -> None:
    """Train and attack models on digits. Write ``report.md``, and reports as pages with pictures.

    Parts that an earlier run has finished are not computed again.

    Args:
        out: folder of the results. With ``whole``, it is ``out`` with ``-whole`` appended.
        whole: whether to train ten models in full, in place of four models for a short time.
        seed: seed of all random draws.
    """
    if whole:
        ten_models.run(Workspace(out.with_name(out.name + "-whole"), Budget(), seed))
    else:
        beside_zoo.run(out, seed)
