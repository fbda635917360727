"""Evaluates the robustness of any model from images in [0, 1] to logits, and writes a report with alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from ..judge.certificates.certificates import Certificates as Certificates
    from ..judge.certificates.certificates import read_log as read_log
    from ..judge.certificates.certification import certify as certify
    from ..judge.certificates.refute import refute as refute
    from ..judge.request.config import EvaluateConfig as EvaluateConfig
    from ..judge.request.naming import AttackSpec as AttackSpec
    from ..judge.request.naming import as_attack as as_attack
    from ..judge.request.naming import lee_kim_2023 as lee_kim_2023
    from ..judge.results.rows import Examples as Examples
    from ..judge.results.rows import Paired as Paired
    from ..judge.results.rows import Row as Row
    from ..judge.runner import evaluate as evaluate
    from ..judge.show.adversarial import Adversarial as Adversarial
    from ..judge.show.adversarial import CheckedAdversarial as CheckedAdversarial
    from ..judge.show.adversarial import check_adversarial as check_adversarial
    from ..judge.show.report import Report as Report
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
