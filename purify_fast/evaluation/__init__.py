"""Evaluates the robustness of any model from images in [0, 1] to logits, and writes a report with alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from .certificates.certificates import Certificates as Certificates
    from .certificates.certification import certify as certify
    from .certificates.refute import refute as refute
    from .request.config import EvaluateConfig as EvaluateConfig
    from .request.specs import AttackSpec as AttackSpec
    from .request.specs import as_attack as as_attack
    from .request.specs import lee_kim_2023 as lee_kim_2023
    from .results.rows import Examples as Examples
    from .results.rows import Paired as Paired
    from .results.rows import Row as Row
    from .runner import evaluate as evaluate
    from .show.adversarial import Adversarial as Adversarial
    from .show.adversarial import CheckedAdversarial as CheckedAdversarial
    from .show.adversarial import check_adversarial as check_adversarial
    from .show.report import Report as Report
    from .show.report import merge as merge
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
