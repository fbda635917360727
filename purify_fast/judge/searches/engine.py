"""The engine of the searches: the judge's settings, the rows that are searched together, and the attacks' base.

A row is an image with one target class and one restart. The model itself must confirm its success, by fresh draws if it
is random: among a hundred steps, some draw is misclassified by luck. Then all rows of the image are removed. A new
batch size takes time, so a shrinking batch has only sizes from a fixed list, and rows of fallen images fill it up.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._library import section
from ..._validation import Count, GradientPrecision, check_counts
from ...attacks.attacked_model import frozen, logits_of
from ...attacks.base import AttackContext, AttackResult, Ball, InBall, keeping, sample_in_ball, times
from ...attacks.objective import FAULTS, GradientHealth, Objective, better_of
from ...attacks.shared_draws import drawn_once_per_call
from ...protocols import Classifier
from ...speed.graphs.step_loop import State, StepFunction, Steps, begin_steps
from ...speed.watch import FEWEST_WEIGHTS, matrix_weights


@dataclass(frozen=True, kw_only=True)
class JudgeContext(AttackContext):
    """The settings of an attack whose images are judged.

    Args:
        judge_draws: number of fresh predictions that check a success on a random model. None takes the number of
            predictions that a step averages.
        judge_share: the share of these fresh predictions that must be wrong for a success.
        gradients_from: another model from which attacks with `Attack.follows_gradients` take their gradients. The
            attacked model still checks every success. With None, the attacked model gives the gradients.
        batch_size: the largest number of images in one batch of a search; a search with another target or restart takes
            the place of an image. None stands for 64, or for the number of images if that is larger.
        copies: the `Copies` of an evaluation, which an attack with the precision "auto" attacks; None: the model.

    Raises:
        ValueError: a count that is not allowed.
    """

    seed: int = 0
    judge_draws: int | None = None
    judge_share: float = 1.0
    gradients_from: Classifier | None = None
    batch_size: int | None = None
    copies: Any = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(judge_draws=self.judge_draws, batch_size=self.batch_size)

    @classmethod
    def of(cls, context: AttackContext) -> JudgeContext:
        """Return the context itself, or a judge's context with the same settings."""
        if isinstance(context, cls):
            return context
        return cls(**{field.name: getattr(context, field.name) for field in fields(context)})

    def judges(self, draws: int) -> int:
        """Return how many fresh predictions judge an image, for an attack whose steps average ``draws`` draws."""
        return (self.judge_draws or draws) if self.draws_differ else 1

    def source(self, model: Classifier, x: Tensor, precision: GradientPrecision) -> Classifier:
        if self.copies is None or precision == "float32" or not len(x):
            return super().source(model, x, precision)
        return self.copies.copy_for(model, precision)


# -- the sizes of batches, and the judge of claims --------------------------------------------------------------------

#: From this number of draws on, one more row takes a CPU longer than a change of the batch size.
MANY_DRAWS = 4
#: The number of batch sizes per doubling on a CPU, which prepares for a new size in milliseconds.
PER_DOUBLING = 4
#: SMALLEST: the smallest batch size on a GPU, because a smaller batch takes the same time. FINER_FROM: from this size
#: on there are two sizes per doubling, because the arithmetic then takes longer than the launches of kernels.
SMALLEST, FINER_FROM = 16, 128


def takes_every_size(device: torch.device) -> bool:
    """Return True if a device prepares for a new batch size in almost no time, as a CPU does."""
    return device.type == "cpu"


def bucket(items: int, device: torch.device, costly: bool = False) -> int:
    """The smallest allowed batch size that holds ``items`` items.

    On a CPU every size below 8 or with ``costly`` is allowed, and else the powers of two times 1, 5/4, 6/4 and 7/4. On
    a GPU the allowed sizes are 16, 32, 64, and from 128 on the powers of two times 1 and 3/2.
    """
    if takes_every_size(device):
        return items if costly or items <= 2 * PER_DOUBLING else _rounded_up(items, PER_DOUBLING)
    return max(SMALLEST, _rounded_up(items, 2 if items > FINER_FROM else 1))


def _rounded_up(items: int, parts: int) -> int:
    """Round ``items`` up to a multiple of p / ``parts``, where p is the largest power of two below ``items``."""
    step = (1 << ((items - 1).bit_length() - 1)) // parts if items > 1 else 1
    return -(-items // step) * step


def repeated_to(index: Tensor, size: int) -> Tensor:
    """Extend an index to ``size`` elements by repeating its first elements; the index must not be empty."""
    return index.repeat(-(-size // len(index)))[:size] if size > len(index) else index


def has_fallen(share: Tensor, enough: float = 1.0) -> Tensor:
    """Tell which images have fallen, bool ``[B]``: those whose share of misclassified draws is at least ``enough``."""
    return share >= enough - 1e-6


@dataclass(frozen=True)
class Judge:
    """Confirms a search's claims: the share ``enough`` of fresh ``draws`` of the model itself must be misclassified."""

    model: Classifier
    draws: int = 1
    max_forward_batch: int | None = None
    apart: bool = False
    enough: float = 1.0

    def shares(self, x: Tensor, y: Tensor) -> Tensor:
        """The share of fresh draws that misclassify each image, ``[B]``."""
        if len(x) == 0:
            return torch.zeros_like(y, dtype=torch.float32)
        objective, count = Objective(self.model, "margin", self.draws, self.max_forward_batch, apart=self.apart), len(x)
        if self.draws == 1 and not takes_every_size(x.device):
            rows = repeated_to(torch.arange(count, device=x.device), bucket(count, x.device))
            x, y = x[rows], y[rows]
        with section("judge"):
            return objective.score(x, y)[0, :count]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of one draw for each image, ``[B, classes]``."""
        return torch.cat([logits_of(self.model, part) for part in x.split(self.max_forward_batch or max(1, len(x)))])

    def is_costly(self) -> bool:
        """Return True if one step of one image takes longer on a CPU than the change to another batch size."""
        large = isinstance(self.model, nn.Module) and matrix_weights(self.model) >= FEWEST_WEIGHTS
        return large or self.draws >= MANY_DRAWS


# -- pace --------------------------------------------------------------------------------------------------------------

#: Attacks with gradients may give rows up after these SHARES of the steps. A row is given up if it would not reach its
#: border even at TIMES its recent pace. On the models of docs/evaluation.md this rule misses no adversarial image. A
#: check after a quarter of the steps would miss a few.
SHARES, TIMES = (0.4, 0.6, 0.8), 8.0
#: A run with fewer steps never gives rows up.
FEWEST_STEPS = 50
#: The first EARLY_SHARE of the steps are the early steps. The gain of a row is the distance by which it came nearer to
#: its border after its early steps. A row is given up at the end of its early steps if its distance to the border is
#: more than GAINS times the largest gain of earlier rows of the same attack. The rule is used once FEWEST_GAINS rows
#: were searched.
EARLY_SHARE, GAINS, FEWEST_GAINS = 0.15, 2.0, 16


@dataclass
class Gains:
    """By how much the rows of an attack came nearer to their borders after their early steps (their gains)."""

    largest: float = 0.0
    rows: int = 0


class PaceMonitor:
    """Watches the distance of each row from its border, and decides at the steps ``checks`` which rows are given up.

    At step n, the pace is measured from step n / 2 on, and is assumed to rise by at most the factor ``times``.
    """

    def __init__(self, checks: Iterable[int], steps: int, times: float, gains: Gains | None = None):
        self.checks, self.steps, self.times, self.gains = sorted(set(checks)), steps, times, gains
        #: The step after which gains are measured, and the distance of each row from its border at that step, ``[R]``.
        self.early_step, self.early = round(EARLY_SHARE * steps), torch.tensor(torch.nan, device="cpu")
        #: A dict from the step of a check to the earlier step at which distances were noted, and these distances.
        self.notes: dict[int, tuple[int, Tensor]] = {}
        #: True for rows whose pace was above 0 at the last check, and for all rows at the end of the early steps.
        self.came_nearer = torch.tensor(False, device="cpu")
        self.last_step = 0

    def due(self, step: int) -> bool:
        """Return True if `lost` has work at this step: to note distances, or to measure the pace."""
        return any(self.last_step < point <= step for check in self.checks for point in (check // 2, check))

    def lost(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are out of reach of their borders, bool ``[R]``; None if nothing is decided at this step."""
        lost = self._beyond_gains(step, missing)
        for check in self.checks:
            if self.last_step < check // 2 <= step:
                self.notes[check] = step, missing
            if self.last_step < check <= step < self.steps and check in self.notes:
                noted_at, before = self.notes.pop(check)
                if step > noted_at:
                    pace = (before - missing) / (step - noted_at)
                    beyond = missing.isfinite() & (missing > self.times * pace * (self.steps - step))
                    lost = beyond if lost is None else lost | beyond
                    self.came_nearer = pace > 0
        self.last_step = step
        return lost

    def _beyond_gains(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are given up because of earlier rows' gains; after the early steps, record the gains."""
        if self.gains is None:
            return None
        if self.last_step < self.early_step <= step:
            self.early, self.came_nearer = missing, torch.ones_like(missing, dtype=torch.bool)
            beyond = missing.isfinite() & (missing > GAINS * self.gains.largest)
            return beyond if self.gains.rows >= FEWEST_GAINS else None
        if step > self.early_step and len(missing):
            # This waits for the device.
            gained = (self.early - missing).nan_to_num(0.0, 0.0, 0.0).amax()
            self.gains.largest = max(self.gains.largest, float(gained))
            self.gains.rows += len(missing) * (self.last_step < self.checks[0] <= step)
        return None

    def take(self, index: Tensor) -> PaceMonitor:
        """Continue with some of the rows, selected by an int64 index."""
        self.early = self.early[index] if self.early.dim() else self.early
        self.notes = {check: (at, missing[index]) for check, (at, missing) in self.notes.items()}
        return self


def some_of(lost: Tensor | None) -> Tensor | None:
    """Return ``lost``, bool ``[R]``, or None if no element is True. This waits for the device."""
    return lost if lost is not None and bool(lost.any()) else None


# -- the rows that are searched together, and the images that are still attacked ---------------------------------------

#: Without a batch size, runs of few images are searched together, up to this many rows: small batches are slow.
FEWEST_ROWS = 64
#: The batch may shrink after these steps, then every SHRINK_EVERY steps. Each check waits for the device once.
SHRINK_AFTER, SHRINK_EVERY = (1, 2, 3, 4, 6, 8), 5


class Rows(NamedTuple):
    """The rows that are searched together; every field has an entry per row.

    ``labels`` are int64 ``[R]``, or labels and targets ``[R, 2]``; ``begin`` are first points; ``owner`` the images'
    indices.
    """

    owner: Tensor
    x: Tensor
    labels: Tensor
    ball: Ball
    begin: Tensor

    def take(self, index: Tensor) -> Rows:
        """Return some of the rows, selected by an int64 index."""
        taken: Any = (value.take(index) if isinstance(value, Ball) else value[index] for value in self)
        return Rows(*taken)


def take_rows(search: object, index: Tensor) -> None:
    """Continue a search with some of its rows."""
    for name, value in vars(search).items():
        if isinstance(value, (Tensor, Ball, Rows, PaceMonitor)):
            setattr(search, name, value[index] if isinstance(value, Tensor) else value.take(index))


class ActiveSet:
    """The images of one attack, the best known point of each image, and the images that have fallen.

    Without ``leave``, every image is attacked to the end, and ``fallen`` remains False. ``score`` is the share of
    misclassified draws and the loss of the best point, ``[2, N]``.
    ``tried`` is True for images with a complete search, or a search that came nearer to the border before it was given
    up. ``ended_blind``: a run ended with its first steps, because all gradients were zero or not finite.
    """

    def __init__(self, x: Tensor, y: Tensor, ball: Ball, judge: Judge, context: JudgeContext):
        self.x, self.y, self.ball, self.judge = x, y, ball, judge
        self.ids = torch.arange(len(x), device=x.device) if context.sample_ids is None else context.sample_ids
        self.draws_differ, self.costly, self.gains = context.draws_differ, judge.is_costly(), Gains()
        self.best, self.score = x.clone(), torch.full((2, len(x)), -torch.inf, device=x.device)
        self.tried, self.fallen = torch.zeros((2, len(x)), dtype=torch.bool, device=x.device)
        self.health = GradientHealth() if context.counts_health else None
        self.ended_blind = False

    def judge_clean_images(self, leave: bool = True) -> None:
        """Judge the clean images; with ``leave``, a misclassified clean image has fallen already."""
        fallen = has_fallen(self.judge.shares(self.x, self.y), self.judge.enough)
        self.leave, self.correct = leave, ~fallen
        self.fallen = fallen if leave else torch.zeros_like(fallen)

    @cached_property
    def logits(self) -> Tensor:
        """One prediction of each clean image, ``[N, classes]``."""
        return self.judge.logits(self.x)

    def left(self) -> Tensor:
        """Indices of images that need another run, int64 ``[n]``. This waits for the device.

        With ``leave`` they are the images that have not fallen, and otherwise those with a best point that some draw
        classifies correctly.
        """
        stands = ~self.fallen if self.leave else self.score[0] < 1
        return stands.nonzero()[:, 0]

    def confirm_successes(self, owner: Tensor, points: Tensor, share: Tensor) -> tuple[Tensor, bool]:
        """Let the judge check the rows whose search claims a success. This waits for the device once to three times."""
        claims = (has_fallen(share, self.judge.enough) & ~self.fallen[owner]).nonzero()[:, 0]
        won = claims
        if len(claims):
            judged = self.judge.shares(points[claims], self.y[owner[claims]])
            share = share.index_copy(0, claims, judged.to(share.dtype))
            won = claims[has_fallen(judged, self.judge.enough)]
        if len(won) == 0:
            return share, False
        # Keep the first row of an image that succeeds: assigning two values to the same index is undefined.
        first = torch.full_like(self.y, len(owner)).scatter_reduce(0, owner[won], won, "amin")
        won = won[first[owner[won]] == won]
        self.best[owner[won]] = points[won]
        self.fallen[owner[won]] = True
        return share, True

    def rows_to_keep(self, owner: Tensor, lost: Tensor | None = None) -> Tensor | None:
        """Choose the rows with which the search continues. This waits for the device once."""
        if lost is not None:
            stays = (~(self.fallen[owner] | lost)).nonzero()[:, 0]
            if takes_every_size(owner.device) or len(stays) == 0:
                return stays
            return repeated_to(stays, min(bucket(len(stays), owner.device), len(owner)))
        gone = self.fallen[owner]
        left = len(owner) - int(gone.sum())
        size = bucket(left, owner.device, self.costly) if left else 0
        return None if size >= len(owner) else gone.to(torch.int8).argsort(stable=True)[:size]

    def keep_best(self, owner: Tensor, points: Tensor, score: Tensor) -> Tensor:
        """For each image that has not fallen, store the point of its best row if it is better than the stored point.

        All stored points are returned.
        """
        rank = torch.empty_like(owner)
        by_loss = score[1].nan_to_num(nan=-torch.inf).argsort(stable=True)
        rank[by_loss[score[0][by_loss].argsort(stable=True)]] = torch.arange(len(owner), device=owner.device)
        top = torch.full_like(self.y, -1).scatter_reduce(0, owner, rank, "amax")
        best = ((rank == top[owner]) & ~self.fallen[owner]).nonzero()[:, 0]
        image = owner[best]
        self.best[image], self.score[:, image] = better_of(
            self.best[image], self.score[:, image], points[best], score[:, best].to(self.score.dtype)
        )
        return self.best

    def judge_points(self, owner: Tensor, points: Tensor, loss: Tensor, claimed: Tensor | None = None) -> None:
        """Let the judge check the points that may be successes, by default all of them, and keep the best points."""
        share, _ = self.confirm_successes(owner, points, torch.ones_like(loss) if claimed is None else claimed)
        self.keep_best(owner, points, torch.stack([share, loss]))


Goals = Sequence[Tensor | None]


def waves(
    active: ActiveSet, goals: Goals, restarts: int, context: JudgeContext, at_image: bool = False
) -> Iterator[Rows]:
    """Yield the rows of an attack in groups ("waves"), each with only images that have not fallen in earlier waves.

    The first wave has a single run, because most images fall to any run. On a CPU a wave consists of complete runs. On
    a GPU copies of its first rows fill a wave up to the size of `bucket`, so that most waves have the same size.
    """
    x, y, count = active.x, active.y, len(active.x)
    padded = not takes_every_size(x.device)
    most = context.batch_size or max(FEWEST_ROWS, count)
    # Rows are numbered: image i in run r has the number r * count + i.
    firsts = torch.arange(restarts * len(goals), device=x.device)[:, None] * count
    is_first, following = True, 0
    while len(left := active.left()):
        rows_left = (firsts + left).flatten()
        rows_left = rows_left[rows_left >= following]
        if len(rows_left) == 0:
            break
        fits = max(most, len(left)) if padded else max(1, most // len(left)) * len(left)
        wave = rows_left[: len(left) if is_first else fits]
        numbers = wave.tolist()
        following = numbers[-1] + 1
        owner, runs = wave % count, Counter(number // count for number in numbers)
        begins, labels = [], []
        for run, images in zip(runs, owner.split(list(runs.values())), strict=True):
            clean, goal = x[images], goals[run % len(goals)]
            if not (at_image and run < len(goals)):
                ball, ids = active.ball.take(images), active.ids[images]
                clean = sample_in_ball(clean, ball, seed=context.seed + run, sample_ids=ids)
            begins.append(clean)
            labels.append(y[images] if goal is None else torch.stack([y, goal], 1)[images])
        ball = active.ball.take(owner)
        rows = Rows(owner, x[owner], torch.cat(labels), ball=ball, begin=torch.cat(begins))
        if padded:
            size = max(len(wave), min(bucket(len(wave), x.device), fits))
            rows = rows.take(repeated_to(torch.arange(len(wave), device=x.device), size))
        yield rows
        is_first = False


class RowSearch:
    """A search that moves a batch of rows along gradients, from one start. Its tensors are the state of ``loop``."""

    step: StepFunction
    loop: Steps

    def __init__(self, objective: Objective, active: ActiveSet, rows: Rows, steps: int, *, give_up: bool = False):
        self.objective, self.active, self.rows, self.steps = objective, active, rows, steps
        judged = give_up and steps >= FEWEST_STEPS
        checks = [round(share * steps) for share in SHARES]
        self.monitor = PaceMonitor(checks, steps, TIMES, active.gains) if judged else None
        self.health, self.gradients = active.health, 0

    def begin(self, step: StepFunction, state: State) -> None:
        """Begin the loop of a step."""
        self.step, self.loop = step, begin_steps(self.objective.graphs, step, state)

    def run(self) -> None:
        """Take all steps, or stop when no row is left, and count the gradients of the rows."""
        try:
            for step in range(1, self.steps + 1):
                self.loop.advance()
                self.gradients += len(self.rows.owner)
                if self.ends_after(step):
                    break
                if len(self.rows.owner) == 0:
                    return
        finally:
            if self.health is not None:
                nonfinite, zero, exempt = (self.loop.state[name] for name in FAULTS)
                self.health.add(gradients=self.gradients - exempt, nonfinite=nonfinite, zero=zero)
        self.finish()

    def ends_after(self, step: int) -> bool:
        """Do what follows this number of steps. Return True if the run ends."""
        raise NotImplementedError

    def finish(self) -> None:
        """Do what follows the last step."""
        raise NotImplementedError

    @staticmethod
    def shrinks_after(step: int) -> bool:
        """Return True if the batch may shrink after this number of steps."""
        return step in SHRINK_AFTER or step % SHRINK_EVERY == 0

    def take(self, index: Tensor) -> None:
        """Continue with some of the rows, selected by an int64 index."""
        take_rows(self, index)
        state = self.loop.values()
        # Otherwise the new loop would first copy the old loop's state out of the buffers of their CUDA graph.
        self.loop = Steps(self.step, state)
        for name, value in state.items():
            if name == "best_score":
                state[name] = value[:, index]
            elif value.dim():
                # A gradient may have another layout than the points. Graphs are found by the layouts.
                state[name] = value[index].contiguous()
        self.begin(self.step, state)

    def out_of_reach(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are given up."""
        lost = None if self.monitor is None else self.monitor.lost(step, missing)
        lost = None if lost is None else some_of(lost & self.may_end() & ~self.active.fallen[self.rows.owner])
        if lost is not None and self.monitor is not None:
            self.active.tried.index_fill_(0, self.rows.owner[lost & self.monitor.came_nearer], True)
        return lost

    def may_end(self) -> Tensor | bool:
        """Tell which rows may be given up, bool ``[R]``, or True for all rows."""
        return True


# -- the base of attacks that search on a copy of the model, and the target classes of such attacks --------------------

#: The number of wrong classes that AutoAttack's targeted attacks try.
USUAL_TARGETS = 9
#: The distance to the border is computed for this number of wrong classes: those with the highest logits. An attack
#: with more target classes than this computes the distance for as many classes as it has target classes.
CANDIDATES = 20
#: The order of the dual norm for each ball's norm. Within the ball a linear function changes by at most the radius
#: times the dual norm of its gradient.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
#: The warning of a search whose gradients were useless.
BLIND = "runs ended after their first steps, because all of their gradients were zero or not finite"


@dataclass(frozen=True, kw_only=True)
class EngineAttack(InBall):
    """The options of attacks that search on a fast copy of the model, such as `APGD`, `FABT` and `Square`.

    A success on the copy is only a claim. The model itself must confirm it in its own precision, and a random model by
    fresh draws. The image then has fallen, and leaves the batch.

    Args:
        restarts: number of runs for each target; a run attacks only the images that have not fallen yet.
        precision: precision of the search: "float32", "bfloat16" (on a copy of the model) or "auto" (bfloat16 if the
            device is faster in it and the model is large enough). Every success is checked on the model itself.
        give_up: whether the search of an image stops early if it would not reach the decision boundary even at several
            times its recent pace. Attacks with gradients check this after 40, 60 and 80 % of at least 50 steps. After
            15 % of the steps they also stop if the distance to the boundary is much larger than the largest progress of
            earlier searches after their first 15 %. Square checks the pace from query 500 on. Auto-PGD ignores the
            option in the l1 ball and with ``leave_when_fallen=False``. Square ignores it with several draws.
    """

    restarts: Count = 1
    precision: GradientPrecision = "auto"
    give_up: bool = False

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        ball = self.ball(x, y, context)
        if ball.eps.dim() > 1 or isinstance(ball.clip_min, Tensor) or isinstance(ball.clip_max, Tensor):
            raise ValueError(f"eps, clip_min and clip_max must be numbers, or eps [B], for {type(self).__name__}")
        if len(x) == 0:
            return AttackResult(x.clone())
        x = x.detach().clone()
        _, draws, loss, _ = self.resolved_for(context)
        context = JudgeContext.of(context)
        judges, most = context.judges(draws), context.max_forward_batch
        source = context.gradients_from if self.follows_gradients else None
        with frozen(target):
            apart = context.shares_draws or drawn_once_per_call(target, x, max(judges, draws), most)
            judge = Judge(target, judges, most, apart, context.judge_share)
            active = ActiveSet(x, y, ball, judge, context)
            if source is None:
                source = context.source(target, x, self.precision)
            with frozen(source):
                if source is context.gradients_from:
                    apart = context.shares_draws or drawn_once_per_call(source, x, draws, most)
                loss, graphs, toward = context.loss_function or loss, context.graphs, context.toward
                objective = Objective(source, loss, draws, most, graphs=graphs, apart=apart, toward=toward)
                with keeping(lambda: active.best):
                    active.judge_clean_images(leave=getattr(self, "leave_when_fallen", True))
                    self.explore(active, objective, context)
        gave_up = (~active.fallen & ~active.tried).sum()
        return AttackResult(active.best, active.health, [BLIND] * active.ended_blind, gave_up)

    def may_end_early(self, context: AttackContext) -> bool:
        return self.give_up and self.resolved_for(context).steps >= FEWEST_STEPS

    @abc.abstractmethod
    def explore(self, active: ActiveSet, objective: Objective, context: JudgeContext) -> None:
        """Search for an adversarial image of each clean image in ``active``, by the loss ``objective``."""


def targets_and_times(attack: Any) -> str:
    """Return the end of an attack's name: the number of targets if it is not the usual number, and the restarts."""
    count = attack.n_target_classes
    return ("" if count == USUAL_TARGETS else f", {count or 'all'} targets") + times(attack.restarts)


def likeliest_wrong(logits: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """Return the ``count`` wrong classes of highest logit (None: all), in descending order, each int64 ``[B]``."""
    classes = logits.shape[1]
    wrong = logits.masked_fill(F.one_hot(y, classes).bool(), -torch.inf)
    return wrong.topk(min(count or classes, classes - 1), 1).indices.unbind(1)


def nearest_borders(active: ActiveSet, objective: Objective, count: int | None) -> tuple[Tensor, ...]:
    """Find the classes whose borders are nearest to each image, by the linear approximation at the clean image.

    The distance to a border is the difference of the two logits, divided by the dual norm of its gradient (MALT:
    Melamed, Yehudai & Shamir, NeurIPS 2024, arXiv 2407.02240). It is computed for `CANDIDATES` or ``count`` classes of
    highest logit.
    """
    left, by_margin = active.left(), replace(objective, loss="margin_targeted")
    x, y, logits = active.x[left], active.y[left], active.logits[left]
    count = min(count or logits.shape[1], logits.shape[1] - 1)
    candidates = likeliest_wrong(logits, y, max(count, CANDIDATES))
    goals = torch.zeros((len(active.y), count), dtype=torch.int64, device=active.y.device)
    if len(left):
        distances = []
        for candidate in candidates:
            at_image = by_margin.gradient(x, torch.stack([y, candidate], 1))
            slope = torch.linalg.vector_norm(at_image.image.flatten(1), ord=DUAL[active.ball.norm], dim=1)
            # The gradient is a sum over the draws, but the loss is a mean. The loss is negative while the label has the
            # higher logit.
            distances.append(-objective.eot_iter * at_image.loss / slope.clamp_min(torch.finfo(slope.dtype).tiny))
        ranked = torch.stack(distances, 1).nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
        goals[left] = torch.stack(candidates, 1).gather(1, ranked[:, :count])
    return goals.unbind(1)
