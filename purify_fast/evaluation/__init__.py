"""Evaluates the robustness of any model from images in [0, 1] to logits, and writes a report with alarms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_exports

if TYPE_CHECKING:
    from ..judge.certificates.certificates import Certificates as Certificates, read_log as read_log
    from ..judge.certificates.certification import certify as certify, refute as refute
    from ..judge.request.config import EvaluateConfig as EvaluateConfig
    from ..judge.request.preparation import (
        AttackSpec as AttackSpec,
        as_attack as as_attack,
        lee_kim_2023 as lee_kim_2023,
    )
    from ..judge.results.rows import Examples as Examples, Row as Row
    from ..judge.runner import evaluate as evaluate
    from ..judge.show.report import (
        Adversarial as Adversarial,
        CheckedAdversarial as CheckedAdversarial,
        Paired as Paired,
        Report as Report,
        check_adversarial as check_adversarial,
    )
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
