"""The settings of a denoiser's training, with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..._validation import Positive, Precision, Range, ShareBelow1, check_types

#: The solvers that remove the noise; see `purify_fast.methods.diffusion.process`.
Solver = Literal["ddpm", "ddim", "vp_sde", "ode", "one_shot"]


@dataclass(frozen=True)
class DiffusionConfig:
    """The settings of a denoiser's training.

    "Paper" is Ho et al., NeurIPS 2020, arXiv 2006.11239; "own" is this package's choice. The denoiser learns to predict
    the noise that was added to clean images (paper).

    Args:
        noise_schedule: "linear" (paper), "cosine" or "vp", see `purify_fast.methods.diffusion.schedule`.
        prediction: quantity that the denoiser predicts: "noise" (paper), "x0" or "v".
        last_time: the last time for which the denoiser is trained, as a share of the process (paper: 1). A purifier
            only uses times up to its t*, the time up to which it adds noise. A small denoiser removes this noise better
            if it is trained only up to t* (own).
        ema_decay: decay of a moving average of the weights, which is the result (paper: 0.9999). 0 means no moving
            average. The decay is at most (1 + n) / (10 + n) after n steps (own).
        learning_rate: highest learning rate of a one-cycle schedule (own; paper: 2e-4, constant).
        weight_decay: weight decay of AdamW (own; paper: Adam without weight decay).
        precision: "float32", with full IEEE precision on a GPU too; "tf32" (own), which on a GPU rounds the factors of
            products to ten bits of mantissa during the training; or "bfloat16" for matrix products (own).

    Raises:
        ValueError: a setting is out of range; the message names the setting.
    """

    noise_schedule: Literal["linear", "cosine", "vp"] = "linear"
    prediction: Literal["noise", "x0", "v"] = "noise"
    last_time: Annotated[float, Range(0, 1, above=True)] = 1.0
    ema_decay: ShareBelow1 = 0.999
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Range(0, below=True)] = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_types(self)
