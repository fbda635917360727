"""AutoAttack (Croce & Hein, ICML 2020) from the package ``pyautoattack`` or ``autoattack``.

It draws from torch's global generator and traces Python calls once: the caller forks the generator, the trace is put
back here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .._validation import Count
from ..protocols import Classifier
from .attacked_model import frozen
from .ball import ball_around, projected
from .base import AttackContext, AttackResult, BallAttack
from .objective import Objective
from .pgd import PGD
from .search import GradientHealth

Version = Literal["standard", "rand"]
#: Its authors' own steps of APGD and FAB, draws of the version "rand", and queries of Square.
STEPS, DRAWS, QUERIES = 100, 20, 5000


def implementation() -> Any:
    """The class ``AutoAttack`` of the package that is installed; ModuleNotFoundError says how to get one."""
    for package in ("pyautoattack", "autoattack"):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(package).AutoAttack
    raise ModuleNotFoundError(
        "AutoAttack is not installed: pip install 'purify-fast[eval]' brings pyautoattack. The protocol standard runs "
        "its four attacks without it"
    )


def parts(version: str, classes: int) -> tuple[list[str], str | None]:
    """AutoAttack's attacks that can run with so many classes, and the attack that a margin attack must replace.

    The DLR loss needs 3 classes, its targeted form 4.
    """
    if version == "rand":
        return (["apgd-ce", "apgd-dlr"], None) if classes >= 3 else (["apgd-ce"], "apgd-dlr")
    if classes >= 4:
        return ["apgd-ce", "apgd-t", "fab-t", "square"], None
    return ["apgd-ce", *(["apgd-dlr"] if classes == 3 else []), "fab-t", "square"], "apgd-t"


@dataclass(frozen=True, kw_only=True)
class AutoAttack(BallAttack):
    """AutoAttack, as a row of an evaluation. It draws from torch's global generator: the caller forks that.

    Args:
        version: "standard", for a model that predicts the same every time, or "rand", whose gradients are averaged over
            the draws.
        steps: steps of its APGD and FAB; None: 100, as its authors take.
        n_queries: queries of its Square; its authors take 5000.
        eot_iter: draws of a random model averaged per step of the version "rand"; None: 20, as its authors take.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "autoattack"
    usual_steps: ClassVar[int | None] = STEPS

    version: Version = "standard"
    steps: Count | None = None
    n_queries: Count = QUERIES

    def name(self, context: AttackContext) -> str:
        name = f"AutoAttack {self.version}"
        if self.steps not in (None, STEPS):
            name += f", {self.steps} steps"
        if self.version == "standard" and self.n_queries != QUERIES:
            name += f", {self.n_queries} queries"
        run, replaced = parts(self.version, context.num_classes)
        if replaced is not None:
            name += f" ({' + '.join(run)}; PGD margin for {replaced}: {context.num_classes} classes)"
        return name

    def draws(self, context: AttackContext) -> int:
        differ = context.draws_differ and self.version == "rand"
        return context.predictions(self.eot_iter or DRAWS) if differ else 1

    def revision(self) -> str:
        """The version of this class's code, and the installed package with its version."""
        package = implementation().__module__.partition(".")[0]
        # an installation without metadata, such as a folder on the path, has no version
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package += f" {importlib.metadata.version(package)}"
        return f"2, {package}"

    def settings(self, context: AttackContext) -> dict[str, Any]:
        run, replaced = parts(self.version, context.num_classes)
        return super().settings(context) | {"attacks": run, "replaced_by_pgd_margin": replaced}

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Attack the model batch by batch.

        Args:
            target: an ``nn.Module``, which AutoAttack requires.
            x: float32 images ``[B, C, H, W]`` in [0, 1], on the model's device.
            y: labels, int64 ``[B]``.
            context: the settings besides the attack's own options.

        Returns:
            Adversarial images, the clean image where AutoAttack found none, and its warnings.

        Raises:
            ModuleNotFoundError: AutoAttack is not installed.
        """
        if len(x) == 0:
            return AttackResult(x.clone())
        threat, warnings = self.threat_model(context), list[str]()
        health = GradientHealth() if context.counts_health else None
        with frozen(target):
            with _listening(warnings):
                points = self._packaged(target, x, y, context)
            if parts(self.version, context.num_classes)[1] is not None:
                points = self._with_margin(target, x, y, points, context)
            # AutoAttack rounds a little past the ball
            points = projected(x, points.detach(), ball_around(x, threat.eps, threat.norm))
            if health is not None:
                for a, b, c in zip(*(whole.split(context.batch_size) for whole in (x, points, y)), strict=True):
                    for point in (a, b):
                        health.see_gradient(Objective(target).direction(point, c))
        return AttackResult(points, health, warnings)

    def _packaged(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        """The images that the installed package finds."""
        norm, eps = self.threat_model(context)
        steps, draws, _ = self.decided(context)
        adversary = implementation()(
            target, norm=norm.capitalize(), eps=eps, seed=context.seed, version=self.version, device=x.device
        )
        adversary.attacks_to_run = parts(self.version, context.num_classes)[0]
        targets = min(9, context.num_classes - 1)
        adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = targets
        for part in (adversary.apgd, adversary.apgd_targeted):
            part.n_iter = part.n_iter_orig = steps
            # APGD derives its checkpoints from the number of steps when it is made
            part.n_iter_2, part.n_iter_min, part.size_decr = (max(int(r * steps), 1) for r in (0.22, 0.06, 0.03))
        adversary.fab.n_iter = steps
        adversary.square.n_queries = self.n_queries
        if self.version == "rand":
            adversary.apgd.eot_iter = draws
        # the package autoattack prints, has another name for the batch size, and returns only the images
        adversary.verbose = False
        size = "batch_size" if type(adversary).__module__.startswith("pyautoattack") else "bs"
        result = adversary.run_standard_evaluation(x, y, **{size: context.batch_size})
        return result[0] if isinstance(result, tuple) else result

    def _with_margin(self, target: Classifier, x: Tensor, y: Tensor, points: Tensor, context: AttackContext) -> Tensor:
        """The points that succeed; PGD on the margin searches the images of all others."""
        steps, draws, _ = self.decided(context)
        margin = PGD(loss="margin", steps=steps, eot_iter=draws, eps=self.eps, norm=self.norm)
        with torch.no_grad():
            left = [
                part[target(points[part]).argmax(1) == y[part]]
                for part in torch.arange(len(x), device=x.device).split(context.batch_size)
            ]
        for part in torch.cat(left).split(context.batch_size):
            alone = replace(context, sample_ids=part, counts_health=False, graphs=None)
            stronger = margin.search(target, x[part], y[part], alone).images
            with torch.no_grad():
                wrong = target(stronger).argmax(1) != y[part]
            points[part[wrong]] = stronger[wrong]
        return points


@contextlib.contextmanager
def _listening(warnings: list[str]) -> Iterator[None]:
    """Collect AutoAttack's warnings instead of printing them, and restore the trace function that it replaces."""

    def collect(record: logging.LogRecord) -> bool:
        text = record.getMessage().split(" See flags_doc")[0]
        # AutoAttack takes a compiled model's first call for a dynamic defence. Losses that cannot run are replaced.
        known = "dynamic defense" in text or "it is not possible to use the" in text
        if record.levelno >= logging.WARNING and not known and text not in warnings:
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
