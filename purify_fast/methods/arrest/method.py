"""The description of ARREST, and the options of its training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ...training import FitConfig
from ..trainings import FollowsRecipe, Method, OnClassifier
from .config import ArrestConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from ...data import DataSet
    from . import ArrestTask


@dataclass(frozen=True)
class TrainArrest(FollowsRecipe, OnClassifier):
    """Finetune a standard classifier adversarially by ARREST, so that its representation changes little.

    The result is a classifier, which `evaluate` can attack, and which `train carso` and `train atop` can use. An
    interrupted training continues if the same command is run again.

    Args:
        layers: Names of the layers whose outputs are the representation. Default: the last map before pooling.
    """

    called: ClassVar[str] = "train arrest"

    out: Path = Path("runs/arrest")
    classifier: str = "runs/standard"
    layers: tuple[str, ...] = ()
    method: ArrestConfig = field(default_factory=ArrestConfig)
    loop: FitConfig = field(default_factory=lambda: FitConfig(epochs=20))

    @classmethod
    def of_recipe(cls, name: str | None, official_code: bool, batch_size: int | None = None) -> Self:
        made = super().of_recipe(name, official_code, batch_size)
        if name is not None or batch_size is None:
            return made
        rate = made.method.learning_rate * batch_size / made.loop.batch_size
        return replace(made, method=replace(made.method, learning_rate=rate))

    def task(self, images: DataSet, classifier: Any) -> ArrestTask:
        from . import ArrestTask

        return ArrestTask(classifier, self.method, images.image_shape, self.layers or None)


METHOD = Method((TrainArrest,), recipes=True)
