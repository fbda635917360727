"""ARREST: adversarial finetuning with representation-guided distillation and noisy replay (arXiv 2308.16454)."""

from .ablation import AblationConfig, ablate
from .task import ArrestConfig, ArrestTask, Teacher

__all__ = ["AblationConfig", "ArrestConfig", "ArrestTask", "Teacher", "ablate"]
