"""How studies keep a defence: with its classifier inside."""

from __future__ import annotations

from pathlib import Path

from purify_fast.methods.atop import Atop
from purify_fast.methods.carso import Carso
from purify_fast.training import save_classifier


def save_whole(defence: Carso | Atop, folder: Path) -> None:
    """Write a defence and its classifier.

    Args:
        defence: on one of this package's classifiers.
        folder: where to; the classifier goes into ``classifier`` inside.
    """
    defence.save(folder)
    save_classifier(defence.classifier, folder / "classifier")
