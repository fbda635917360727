"""The settings of a denoiser's training, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..._validation import AtLeast0, Positive, Precision, Range, ShareBelow1, check_types
from ...training.config import TrainingAttack


@dataclass(frozen=True)
class DiffusionConfig:
    """The settings of a denoiser's training.

    "Paper" is Ho et al., NeurIPS 2020, arXiv 2006.11239; "own" is this package's choice. Three trainings share these
    settings. Without an attack, the denoiser learns to predict the noise that the diffusion added to clean images
    (paper). With an attack, a trained denoiser is fine-tuned inside a purifier, on images that are attacked through the
    whole purification (own; `purify_fast.methods.diffusion.task`). With intervals, a trained denoiser is distilled into
    a denoiser that needs only one evaluation (`purify_fast.methods.diffusion.ConsistencyTask`).

    Args:
        attack: attack of the fine-tuning, with eps above 0. eps 0 selects another training.
        intervals: number of intervals into which the distillation divides the process up to ``last_time``. 0 selects
            another training.
        noise_schedule: "linear" (paper), "cosine" or "vp", see `purify_fast.methods.diffusion.schedule`.
        prediction: quantity that the denoiser predicts: "noise" (paper), "x0" or "v".
        last_time: the last time for which the denoiser is trained, as a share of the process (paper: 1). A purifier
            only uses times up to its t*, the time up to which it adds noise. A small denoiser removes this noise better
            if it is trained only up to t* (own).
        denoising_weight: weight of the loss on clean images in the fine-tuning, where this loss is added to the
            cross-entropy (own). No effect in the other trainings.
        ema_decay: decay of a moving average of the weights, which is the result (paper: 0.9999). 0 means no moving
            average. The decay is at most (1 + n) / (10 + n) after n steps (own).
        learning_rate: highest learning rate of a one-cycle schedule (own; paper: 2e-4, constant).
        weight_decay: weight decay of AdamW (own; paper: Adam without weight decay).
        precision: "float32", with full IEEE precision on a GPU too; "tf32" (own), which on a GPU rounds the
            factors of products to ten bits of mantissa while `purify_fast.training.fit` trains; or "bfloat16" for
            matrix products (own).

    Raises:
        ValueError: a setting is out of range, or there are an attack and intervals; the message names the settings.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=5)
    intervals: Annotated[int, Range(0)] = 0
    noise_schedule: Literal["linear", "cosine", "vp"] = "linear"
    prediction: Literal["noise", "x0", "v"] = "noise"
    last_time: Annotated[float, Range(0, 1, above=True)] = 1.0
    denoising_weight: AtLeast0 = 1.0
    ema_decay: ShareBelow1 = 0.999
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Range(0, below=True)] = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        if self.intervals and self.attack.eps > 0:
            raise ValueError(f"intervals must be 0 if the attack's eps is {self.attack.eps}, got {self.intervals}")
