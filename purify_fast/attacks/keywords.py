"""The keywords of the attacks as functions, for editors and type checkers. They are explained at the attack's class."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack as Unpack

from .._validation import AtLeast0, Count, GradientPrecision, NormName, Share
from ..protocols import Classifier
from ..speed.graphs.step_loop import CapturesSteps
from .context import LossFunction
from .losses import ApgdLoss, Loss
from .search import GradientHealth


class AttackOptions(TypedDict, total=False):
    """The options of every attack: the fields of `AttackContext`, and those that `purify_fast.attacks.pgd` explains."""

    norm: NormName
    clip_min: float | Tensor
    clip_max: float | Tensor
    num_classes: int
    eot_iter: Count | None
    votes: int
    draws_differ: bool
    judge_draws: int | None
    judge_share: float
    seed: int | Tensor | None
    sample_ids: Tensor | None  # int64 [B]
    gradients_from: Classifier | None
    max_forward_batch: int | None
    batch_size: int | None
    graphs: CapturesSteps | None
    generator: torch.Generator | None
    health: GradientHealth | None


class FgsmOptions(AttackOptions, total=False):
    """The options of `purify_fast.attacks.fgsm`."""

    loss: Loss | LossFunction
    precision: GradientPrecision
    targeted: Tensor | None  # int64 [B]
    mode: Literal["eval", "keep"]


class PgdOptions(FgsmOptions, total=False):
    """The options of `purify_fast.attacks.pgd`."""

    steps: Count | None
    random_start: bool
    keep_best: bool
    restarts: Count
    alpha: float | Tensor | None  # [B]
    start_std: AtLeast0 | None


class EngineOptions(AttackOptions, total=False):
    """The options of attacks whose successes the model itself confirms."""

    restarts: Count
    precision: GradientPrecision
    give_up: bool


class ApgdOptions(EngineOptions, total=False):
    """The options of `purify_fast.attacks.apgd`."""

    loss: ApgdLoss | LossFunction
    targeted: Tensor | None  # int64 [B]
    steps: Count | None
    n_target_classes: Count | None
    rho: Share
    leave_when_fallen: bool


class FabOptions(EngineOptions, total=False):
    """The options of `purify_fast.attacks.fab_t`."""

    steps: Count | None
    n_target_classes: Count | None


class SquareOptions(EngineOptions, total=False):
    """The options of `purify_fast.attacks.square`."""

    n_queries: Count


class StAdvOptions(AttackOptions, total=False):
    """The options of `purify_fast.attacks.stadv`."""

    loss: Loss
    targeted: Tensor | None  # int64 [B]
    steps: Count | None
    random_start: bool
    keep_best: bool
    restarts: Count
    rate: AtLeast0
    smoothness: AtLeast0
