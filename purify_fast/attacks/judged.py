"""What the strong attacks share: they search on a fast copy of the model, and the model itself judges every success.

A success of a search is a claim, which the model confirms in its own precision, a random one by fresh draws. Images
that have fallen leave the batch.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._validation import GradientPrecision, Norm, check_literal
from ..protocols import Classifier
from .answers import drawn_once_per_call
from .arguments import check_at_least_one, check_switch
from .ball import Ball
from .base import AttackContext, BallAttack, Run, times
from .engine.gradient_copy import COMPARED, gradient_copy
from .engine.judge import Judge
from .engine.rows import Waves
from .frozen_model import frozen
from .objective import Objective


@dataclass(frozen=True)
class Session:
    """One batch under attack, within `frozen(judge.model)`.

    Args:
        run: what the attack was told.
        x: clean images ``[B, ...]``.
        y: labels, int64 ``[B]``.
        ids: names the images, int64 ``[B]``.
        ball: around the images.
        judge: the model under attack.
        draws: averaged per step.
    """

    run: Run
    x: Tensor
    y: Tensor
    ids: Tensor
    ball: Ball
    judge: Judge
    draws: int


@dataclass(frozen=True, kw_only=True)
class EngineAttack(BallAttack):
    """The options of the attacks that judge every success by the model itself: `apgd`, `fab_t` and `square`.

    Args:
        restarts: runs (for each target), each for the images that have not fallen yet.
        eot_iter: draws of a random model averaged per step: in one batch, or each in a call of its own where the model
            draws once per call. None: the report's.
        precision: what the search computes in: "float32", "bfloat16" (a copy of the model) or "auto" (such a copy where
            it pays). A success is judged by the model itself.
        eps: radius of another ball than the report's, in image units; None: the report's.
        norm: norm of another ball than the report's: "linf", "l2" or "l1"; None: the report's. It needs an eps.
        give_up: whether searches end that would not succeed even at several times their recent pace. That is decided
            after 40, 60 and 80 % of the steps, if there are 50 or more, or from the 1,500th query on. Auto-PGD never
            does so in the l1 ball or where fallen images stay, and Square with several draws.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    restarts: int = 1
    eot_iter: int | None = None
    precision: GradientPrecision = "auto"
    eps: float | None = None
    norm: Norm | None = None
    give_up: bool = False

    def __post_init__(self) -> None:
        check_literal("precision", self.precision, GradientPrecision)
        check_at_least_one(restarts=self.restarts, eot_iter=self.eot_iter)
        check_switch("give_up", self.give_up)
        self.check_ball()

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        ball = self.ball(x, y, context)
        if len(x) == 0:
            return x.clone()
        x = x.detach().clone()
        ids = torch.arange(len(x), device=x.device) if context.sample_ids is None else context.sample_ids
        draws, most = self.draws(context), context.max_forward_batch
        judges = context.judges(draws)
        with frozen(target):
            apart = drawn_once_per_call(target, x, max(judges, draws), most)
            judge = Judge(target, judges, most, apart)
            return self.explore(Session(context, x, y, ids, ball=ball, judge=judge, draws=draws))

    @abc.abstractmethod
    def explore(self, session: Session) -> Tensor:
        """Adversarial images of one batch, shape and dtype of its clean ones."""

    @contextlib.contextmanager
    def objective(self, session: Session, loss: str) -> Iterator[Objective]:
        """The loss that the search raises, on what it follows: another model, a fast copy, or the model itself."""
        run, most, apart = session.run, session.run.max_forward_batch, session.judge.apart
        source = run.gradients_from if self.follows_gradients else None
        followed = source is not None
        if source is None:
            source = gradient_copy(session.judge.model, session.x[:COMPARED], self.precision, run.copies)
        with frozen(source):
            if followed:
                apart = drawn_once_per_call(source, session.x, session.draws, most)
            yield Objective(source, loss, session.draws, most, run.graphs, apart=apart)


@dataclass(frozen=True, kw_only=True)
class TargetedAttack(EngineAttack):
    """The options of those that try one wrong class after the other.

    Args:
        steps: gradient steps of a run; None: as the subclass says.
        n_target_classes: wrong classes that are tried, those of highest logit on the image, a run for each; None, or
            more than there are: all.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    #: The usual number of wrong classes that are tried, AutoAttack's.
    usual_targets: ClassVar[int] = 9

    steps: int | None = None
    n_target_classes: int | None = usual_targets

    def __post_init__(self) -> None:
        check_at_least_one(steps=self.steps, n_target_classes=self.n_target_classes)
        super().__post_init__()

    def full_name(self, name: str, targeted: bool = True) -> str:
        """A name with the number of target classes where that is not the usual one, and of restarts."""
        count = self.n_target_classes
        if targeted and count != self.usual_targets:
            name += f", {'all' if count is None else count} targets"
        return name + times(self.restarts)

    def targets(self, context: AttackContext) -> int | None:
        """How many wrong classes are tried; None for a loss without a target."""
        return min(self.n_target_classes or context.num_classes, context.num_classes - 1)

    def settings(self, context: AttackContext) -> dict[str, Any]:
        return super().settings(context) | {"n_target_classes": self.targets(context)}

    def waves(self, session: Session, goals: tuple[Tensor | None, ...], at_image: bool = False) -> Waves:
        """The runs towards some goals; how many images fell to each is noted by `Waves.add_counts`."""
        run = session.run
        return Waves(
            session.x, session.y, session.ball, goals, self.restarts,
            seed=run.seed, ids=session.ids, most=run.batch_size, at_image=at_image,
        )  # fmt: skip
