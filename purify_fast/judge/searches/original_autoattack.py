"""AutoAttack (Croce & Hein, ICML 2020) from the package ``pyautoattack`` or ``autoattack``.

The package also replaces Python's trace function, which this module restores.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ..._validation import Count
from ...attacks.attacked_model import frozen
from ...attacks.base import AttackContext, AttackResult, InBall, Resolved, ball_around, projected
from ...attacks.objective import GradientHealth, Objective
from ...protocols import Classifier
from .engine import JudgeContext
from .model_tests import SAMPLE, check_model

OriginalVersion = Literal["standard", "rand"]
#: The authors' values. STEPS: steps of APGD and FAB. DRAWS: draws of the version "rand". QUERIES: queries of Square.
STEPS, DRAWS, QUERIES = 100, 20, 5000
#: The smallest number of classes with which all attacks of a version can run.
FEWEST_CLASSES = {"standard": 4, "rand": 3}


def implementation() -> Any:
    """The class ``AutoAttack`` of the installed package; ModuleNotFoundError if no such package is installed."""
    for package in ("pyautoattack", "autoattack"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(package).AutoAttack
    advice = "run pip install 'purify-fast[eval]', or use protocol standard, our versions of the four attacks"
    raise ModuleNotFoundError(f"AutoAttack is not installed: {advice}")


@dataclass(frozen=True, kw_only=True)
class OriginalAutoAttack(InBall):
    """AutoAttack, as its authors' package runs it. It draws from torch's global generator, which the caller must fork.

    Args:
        version: "standard" for a model that predicts the same every time, or "rand", which averages over draws.
        steps: number of steps of its APGD and FAB. None stands for 100, as in the authors' code.
        n_queries: number of queries of its Square; the authors' code has 5000.
        eot_iter: number of draws averaged per step of the version "rand". None stands for 20, as in the authors' code.

    Raises:
        ValueError: a setting that is not allowed; or the model has too few classes: "standard" needs 4, and "rand" 3.
    """

    kind: ClassVar[str] = "autoattack"
    usual_steps: ClassVar[int | None] = STEPS

    version: OriginalVersion = "standard"
    steps: Count | None = None
    n_queries: Count = QUERIES

    def name(self, context: AttackContext) -> str:
        steps = f", {self.steps} steps" if self.steps not in (None, STEPS) else ""
        queries = f", {self.n_queries} queries" if self.version == "standard" and self.n_queries != QUERIES else ""
        return f"AutoAttack {self.version}{steps}{queries}"

    def draws(self, context: AttackContext) -> int:
        return (self.eot_iter or DRAWS) if context.draws_differ and self.version == "rand" else 1

    def revision(self) -> str:
        """The version of this class, and the installed package with its version."""
        package = implementation().__module__.partition(".")[0]
        # A package without metadata, such as a folder on the path, has no version.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package += f" {importlib.metadata.version(package)}"
        return f"2, {package}"

    def resolved_for(self, context: AttackContext) -> Resolved:
        classes, fewest = context.num_classes, FEWEST_CLASSES[self.version]
        if 0 < classes < fewest:
            advice = "use protocol standard, whose attacks allow any number of classes"
            raise ValueError(f"AutoAttack {self.version} needs at least {fewest} classes, got {classes}: {advice}")
        return super().resolved_for(context)

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Attack an ``nn.Module`` batch by batch, by float32 images on its device.

        An image that withstood AutoAttack is returned clean. The result has AutoAttack's warnings.

        Raises:
            ModuleNotFoundError: AutoAttack is not installed.
            ValueError: the model has too few classes.
        """
        if len(x) == 0:
            return AttackResult(x.clone())
        (norm, eps), warnings = self.threat_model(context), list[str]()
        size = JudgeContext.of(context).batch_size
        with frozen(target):
            classes = context.num_classes or check_model(target, x[:SAMPLE])
            steps, draws, *_ = self.resolved_for(replace(context, num_classes=classes))
            with _listening(warnings):
                how = {"norm": norm.capitalize(), "eps": eps, "seed": context.seed, "device": x.device}
                adversary = implementation()(target, version=self.version, **how)
                adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = min(9, classes - 1)
                for part in (adversary.apgd, adversary.apgd_targeted):
                    part.n_iter = part.n_iter_orig = steps
                    # APGD's constructor has computed these lengths of its intervals from the old number of steps.
                    lengths = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
                    part.n_iter_2, part.n_iter_min, part.size_decr = lengths
                adversary.apgd.eot_iter, adversary.fab.n_iter, adversary.square.n_queries = draws, steps, self.n_queries
                # The package autoattack prints, names the batch size `bs`, and returns only the images. pyautoattack
                # does not print, names the batch size `batch_size`, and returns a tuple.
                adversary.verbose = False
                word = "batch_size" if type(adversary).__module__.startswith("pyautoattack") else "bs"
                result = adversary.run_standard_evaluation(x, y, **{word: size or len(x)})
            images = result[0] if isinstance(result, tuple) else result
            # Because of rounding, AutoAttack's points may lie slightly outside of the ball.
            points = projected(x, images.detach(), ball_around(x, eps, norm))
            # The package gives no gradients. These are of its cross-entropy, where it began and where it ended.
            objective = Objective(target, partial(F.cross_entropy, reduction="none"), max_forward_batch=size)
            health = GradientHealth()
            for images in (x, points):
                health.see_gradient(objective.gradient(images, y).image)
        return AttackResult(points, health, warnings)


@contextlib.contextmanager
def _listening(warnings: list[str]) -> Iterator[None]:
    """Collect AutoAttack's warnings instead of printing them, and restore Python's trace function at the end."""

    def collect(record: logging.LogRecord) -> bool:
        text = record.getMessage().split(" See flags_doc")[0]
        # AutoAttack warns of a dynamic defence at a compiled model's first call, which does not apply.
        if record.levelno >= logging.WARNING and "dynamic defense" not in text and text not in warnings:
            warnings.append(text)
        return False

    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    logger.addFilter(collect)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.settrace(trace)
        logger.removeFilter(collect)
