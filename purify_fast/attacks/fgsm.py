"""FGSM (Goodfellow et al., ICLR 2015), a single step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import Tensor

from .._classifier import Classifier
from .._validation import GradientPrecision
from .base import AttackResult, InBall
from .context import AttackContext
from .losses import Loss
from .pgd import PGD


@dataclass(frozen=True, kw_only=True)
class FGSM(InBall):
    """One step of length eps from the image itself.

    Args:
        loss: "ce", "margin", "scaled_margin" or "dlr". With fewer than 3 classes "margin" replaces "dlr".
        precision: precision of the step, see `PGD`.
    """

    kind: ClassVar[str] = "fgsm"
    code_version: ClassVar[str] = "3"

    loss: Loss = "ce"
    precision: GradientPrecision = "auto"

    def name(self, context: AttackContext) -> str:
        return f"FGSM {self.resolved_for(context).loss}"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        # The length of the first step is eps.
        one = PGD(steps=1, random_start=False, keep_best=False, **asdict(self))
        return one.search(target, x, y, context)
