"""ARREST: adversarial finetuning with representation-guided distillation and noisy replay (arXiv 2308.16454)."""

from .ablation import AblationConfig, ablate
from .config import ArrestConfig
from .task import ArrestTask, Teacher

__all__ = ["AblationConfig", "ArrestConfig", "ArrestTask", "Teacher", "ablate"]
