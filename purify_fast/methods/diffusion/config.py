"""The settings of a denoiser's training, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..._validation import AtLeast0, Positive, Precision, Range, ShareBelow1, check_types
from ...training.config import TrainingAttack


@dataclass(frozen=True)
class DiffusionConfig:
    """How a denoiser is trained. "Paper" is Ho et al., NeurIPS 2020, arXiv 2006.11239; "own" is this package's choice.

    Two trainings share these settings. Without an attack the denoiser learns to predict what the diffusion added to
    clean images (paper). With one a trained denoiser is fine-tuned inside a purifier, on images that are attacked
    through the whole purification (own; `purify_fast.methods.diffusion.task`).

    Args:
        attack: eps 0 for the first training, above 0 for the second, whose attack it is.
        noise_schedule: "linear" (paper), "cosine" or "vp", see `purify_fast.methods.diffusion.schedule`.
        prediction: what the denoiser predicts: "noise" (paper), "x0" or "v".
        last_time: the time, as a share of the process, up to which the denoiser is trained (paper: 1). A purifier asks
            for no time after its t*, and a small denoiser that is trained for these alone removes their noise better
            (own).
        denoising_weight: weight of the first training's loss beside the cross-entropy in the second (own); it has no
            effect in the first.
        ema_decay: decay of a moving average of the weights, which is the result (paper: 0.9999); 0 for none. Its first
            steps keep less, (1 + n) / (10 + n) after n of them (own).
        learning_rate: the highest rate of a one-cycle schedule (own; paper: 2e-4, constant).
        weight_decay: of AdamW (own; paper: Adam without any).
        precision: "float32", which on a GPU is that of IEEE too; "tf32" (own), which there rounds what is multiplied
            to ten bits of mantissa, while `purify_fast.training.fit` trains; or "bfloat16" within matrix products
            (own).

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    attack: TrainingAttack = TrainingAttack(eps=0.0, steps=5)
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
