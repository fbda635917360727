"""What the trainings of purifiers have in common."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from .._tensors import weights_fingerprint
from ..defences.base import Defence
from ..training.config import settings
from ..training.task import Task, check_labels, check_shape

D = TypeVar("D", bound=Defence)


class PurifierTask(Task, Generic[D]):
    """Trains the purifier of a defence; its classifier stays as it is, unless a method says otherwise.

    Args:
        defence: what is trained.
        config: how, a dataclass with a ``precision``.
        origin: what the purifier starts from, if not from scratch; a run is resumed only with the same one.
    """

    #: the method's name in checkpoints
    name: ClassVar[str]

    def __init__(self, defence: D, config: Any, origin: str):
        self.defence, self.config, self.origin = defence, config, origin
        self.model = defence
        # as it is at the start: a method may train it too
        self.classifier = weights_fingerprint(defence.classifier)
        self.tf32 = config.precision == "tf32"

    @property
    def result(self) -> D:
        return self.defence

    def describe(self) -> dict[str, Any]:
        facts = {"defence": self.defence.arguments, "classifier": self.classifier}
        return {"task": self.name, **settings(self.config), **facts, "origin": self.origin}

    def finish(self) -> None:
        super().finish()
        self.defence.refresh()

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        check_shape(shape, self.defence.image_shape)
        check_labels(classes, self.defence.num_classes)
