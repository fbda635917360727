"""The rows that are searched at once, and the images that are still attacked.

A search works on rows. Each row belongs to an image; several rows belong to the same image where several targets or
restarts are tried at once. When a row's point makes its image fall, every row of the image leaves. One misclassified
draw says little about a random model: of a hundred steps one is lucky. So a success of a search is only a claim until
fresh draws of the model itself have confirmed it.

A new batch size costs time: a convolution library prepares its kernels for it, a compiler may compile again, a CUDA
graph is captured. So a shrinking batch only takes sizes of a fixed list, and images that have fallen fill it up. On a
CPU one more image of a large model, or with many draws, takes longer than a new batch size: there the batch shrinks by
every image that falls.

Most of the time of a strong attack goes into images that it never moves near a border: towards the ninth target class,
or by the last of 5,000 squares. The gain of a search per step hardly ever rises again, so several times its recent pace
tells how far it can still come. Rows that would not reach their border even then can be given up. That is experience
and not a law: a search that stands still is given up too, although it might continue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...protocols import Classifier
from ..attacked_model import ask
from ..ball import Ball, projected, sample_in_ball
from ..context import AttackContext
from ..gradient_copy import FEWEST_WEIGHTS, matrix_weights
from ..objective import Gradients, Objective
from ..search import GradientHealth, better_of, faults

#: The number of classes, those of highest logit, for which the distance to the border is computed. An attack with more
#: targets computes it for as many as it has.
CANDIDATES = 20
#: The order of the dual norm for each ball's norm. The dual norm of a gradient tells how much a linear function changes
#: within the ball.
DUAL = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
#: At least so many rows are searched at once, if there are enough runs, because a small batch is slow.
FEWEST_ROWS = 64
#: With this many draws or more, one more image costs a CPU more time than a new batch size, whatever the model.
MANY_DRAWS = 4
#: The number of batch sizes per doubling on a CPU, which prepares for a new size in milliseconds.
PER_DOUBLING = 4
#: SMALLEST: the smallest batch size on a GPU, which needs as much time for fewer images. FINER_FROM: from this size on
#: there are two sizes per doubling, because the arithmetic then takes longer than the launches.
SMALLEST, FINER_FROM = 16, 128
#: Attacks by gradients may give rows up after these SHARES of the steps. A row is given up if it would not reach its
#: border even at TIMES its recent pace. On the models of docs/evaluation.md no image is lost by this rule, and few
#: would be lost after a quarter of the steps.
SHARES, TIMES = (0.4, 0.6, 0.8), 8.0
#: A run with fewer steps never gives rows up.
FEWEST_STEPS = 50
#: After EARLY_SHARE of the steps, a row is given up if its distance to the border is more than GAINS times the most
#: that any row of the same attack gained after that share. The rule needs the gains of FEWEST_GAINS rows.
EARLY_SHARE, GAINS, FEWEST_GAINS = 0.15, 2.0, 16
#: The batch may shrink after these steps, and later every SHRINK_EVERY steps. Each check for fallen images waits for
#: the device once.
SHRINK_AFTER, SHRINK_EVERY = (1, 2, 3, 4, 6, 8), 5


def takes_every_size(device: torch.device) -> bool:
    """Tell whether a device prepares for a new batch size in almost no time, as a CPU does."""
    return device.type == "cpu"


def bucket(items: int, device: torch.device, costly: bool = False) -> int:
    """The smallest batch size of the list that holds so many items, at least 1.

    On a CPU the sizes are every number below 8, and then the powers of two times 1, 5/4, 6/4 and 7/4. If items are
    costly, every number is a size, because one more item takes longer than a new size. On a GPU the sizes are 16, 32,
    64, and from 128 on the powers of two times 1 and 3/2.
    """
    if takes_every_size(device):
        return items if costly or items <= 2 * PER_DOUBLING else _rounded_up(items, PER_DOUBLING)
    return max(SMALLEST, _rounded_up(items, 2 if items > FINER_FROM else 1))


def _rounded_up(items: int, parts: int) -> int:
    """The next power of two, or multiple of the one before it over ``parts``."""
    step = (1 << ((items - 1).bit_length() - 1)) // parts if items > 1 else 1
    return -(-items // step) * step


def _repeated_to(index: Tensor, size: int) -> Tensor:
    """An index with its first elements repeated until it has ``size`` elements; it has at least one."""
    return index.repeat(-(-size // len(index)))[:size] if size > len(index) else index


def has_fallen(share: Tensor, enough: float = 1.0) -> Tensor:
    """Tell which images have fallen, bool ``[B]``: those whose share of misclassified draws is at least ``enough``."""
    return share >= enough - 1e-6


@dataclass(frozen=True)
class Judge:
    """Confirms or refuses the successes that a search claims.

    Args:
        model: the model under attack itself, not a copy of it.
        draws: fresh draws of a random model; 1 for one that predicts the same every time.
        max_forward_batch: the most images in one forward pass; None: no limit.
        apart: whether each draw takes a separate forward pass, because the model draws once per call.
        enough: the share of the draws that must be misclassified for an image to fall.
    """

    model: Classifier
    draws: int = 1
    max_forward_batch: int | None = None
    apart: bool = False
    enough: float = 1.0

    def shares(self, x: Tensor, y: Tensor) -> Tensor:
        """The share of fresh draws of images that are misclassified, ``[B]``."""
        if len(x) == 0:
            return torch.zeros_like(y, dtype=torch.float32)
        objective = Objective(self.model, "margin", self.draws, self.max_forward_batch, apart=self.apart)
        return objective.score(x, y)[0]

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """One prediction of each image, ``[B, classes]``."""
        return torch.cat([ask(self.model, part) for part in x.split(self.max_forward_batch or max(1, len(x)))])

    def is_costly(self) -> bool:
        """Tell whether a CPU needs longer for a step of one image than to prepare for another batch size."""
        large = isinstance(self.model, nn.Module) and matrix_weights(self.model) >= FEWEST_WEIGHTS
        return large or self.draws >= MANY_DRAWS


@dataclass(frozen=True)
class Rows:
    """The rows that are searched at once; every field has an entry per row.

    Args:
        owner: the image of each row, int64 ``[R]``.
        x: the clean images, ``[R, ...]``.
        labels: int64 ``[R]``, or ``[R, 2]`` labels and targets.
        ball: around the images.
        begin: where the rows begin, ``[R, ...]``.
        run: the number of the run that each row belongs to, int64 ``[R]``.
    """

    owner: Tensor
    x: Tensor
    labels: Tensor
    ball: Ball
    begin: Tensor
    run: Tensor

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, by an index int64."""
        values = (getattr(self, field.name) for field in fields(self))
        taken: Any = (value.take(index) if isinstance(value, Ball) else value[index] for value in values)
        return Rows(*taken)


def take_rows(state: object, index: Tensor, by_column: Sequence[str] = ()) -> None:
    """Continue a search with some of its rows.

    Args:
        state: the search. Every tensor among its attributes has an entry per row, and so have `Ball`, `Rows` and
            `PaceMonitor`.
        index: the rows, int64.
        by_column: the attributes of shape ``[n, R]``; all other tensors are ``[R, ...]``.
    """
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(state, name, value[:, index] if name in by_column else value[index])
        elif isinstance(value, (Ball, Rows, PaceMonitor)):
            setattr(state, name, value.take(index))


@dataclass
class Gains:
    """The distance by which the rows of an attack came nearer to their borders after its first steps.

    Args:
        largest: the most that any row gained, in the unit of the loss or distance.
        rows: the number of rows that were searched beyond the first check of their pace.
    """

    largest: float = 0.0
    rows: int = 0

    def see(self, gained: Tensor) -> None:
        """Remember the largest gain of the rows, ``[R]``; waits for the device."""
        if len(gained):
            self.largest = max(self.largest, float(gained.nan_to_num(0.0, 0.0, 0.0).amax()))

    def out_of_reach(self, missing: Tensor) -> Tensor | None:
        """Tell which rows are further from their borders than any row came, bool ``[R]``; None: not known yet."""
        if self.rows < FEWEST_GAINS:
            return None
        return missing.isfinite() & (missing > GAINS * self.largest)


class PaceMonitor:
    """Watches the distance of each row from its border.

    Args:
        checks: the steps after which rows are given up; the pace is measured over the last half of the steps before.
        steps: the steps of the whole search.
        times: the factor by which the pace may still rise.
        gains: the gains of the rows that the attack has searched before; None: the pace alone decides.
    """

    def __init__(self, checks: Iterable[int], steps: int, times: float, gains: Gains | None = None):
        self.checks, self.steps, self.times, self.gains = sorted(set(checks)), steps, times, gains
        #: The step after which gains are measured, and the distance of each row from its border at that step, ``[R]``.
        self.early_step, self.early = round(EARLY_SHARE * steps), torch.tensor(torch.nan)
        #: For each check: the step at which the distances were noted, and these distances.
        self.notes: dict[int, tuple[int, Tensor]] = {}
        #: True for the rows that came nearer between the note and the last check, bool ``[R]``.
        self.came_nearer = torch.tensor(False)
        self.last_step = 0

    def due(self, step: int) -> bool:
        """Tell whether `lost` would note or decide anything at a step; a search with cheap steps calls it only then."""
        return any(self.last_step < mark <= step for check in self.checks for mark in (check // 2, check))

    def lost(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are out of reach, bool ``[R]``; None if nothing is decided at this step.

        A row with a distance that is NaN or infinite is never out of reach.

        Args:
            step: the number of steps that were taken; it grows with every call.
            missing: the distance of each row from its border, in the unit of the loss or distance, ``[R]``. It is at
                most 0 across the border, and never grows.
        """
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
        """Tell which rows are given up by the gains of other rows; the gains of these rows are noted."""
        if self.gains is None:
            return None
        if self.last_step < self.early_step <= step:
            self.early, self.came_nearer = missing, torch.ones_like(missing, dtype=torch.bool)
            return self.gains.out_of_reach(missing)
        if step > self.early_step:
            self.gains.see(self.early - missing)
            if self.last_step < self.checks[0] <= step:
                self.gains.rows += len(missing)
        return None

    def take(self, index: Tensor) -> PaceMonitor:
        """Continue with some of the rows, by an index int64."""
        self.early = self.early[index] if self.early.dim() else self.early
        self.notes = {check: (at, missing[index]) for check, (at, missing) in self.notes.items()}
        return self


def some_of(lost: Tensor | None) -> Tensor | None:
    """The rows out of reach, bool ``[R]``, or None if there are none; waits for the device."""
    return lost if lost is not None and bool(lost.any()) else None


class ActiveSet:
    """The images of one attack: those that have fallen, and the best known point of each.

    Args:
        x: clean images ``[N, ...]``.
        y: labels, int64 ``[N]``.
        ball: around the images.
        judge: the model under attack.
        ids: int64 ``[N]``; an image's random numbers depend on a seed and its id alone.

    Attributes:
        leave: whether fallen images leave. If not, every image is attacked to the end. It keeps the point that most
            draws misclassify, and of equal ones the point of highest loss.
        best: the best known point of each image, ``[N, ...]``; x at first.
        score: the share of misclassified draws and the loss of this point, ``[2, N]``; minus infinity at first.
        fallen: bool ``[N]``, True for fallen images; always False if they do not leave.
        felled_by: int64 ``[N]``, the number of the run to which an image fell; -1 if it has not fallen.
        correct: bool ``[N]``, True for clean images that have not fallen by themselves.
        costly: whether a batch on a CPU may shrink to every size.
        tried: bool ``[N]``, True for images with a search that reached its end, or that came nearer until it was given
            up.
        gains: the gains of the rows after their first steps.
        fell_to: the number of images that fell to each target and restart, by its name.
        health: counts the gradients and the movement of all searches; None: nothing is counted.
    """

    def __init__(self, x: Tensor, y: Tensor, ball: Ball, judge: Judge, ids: Tensor):
        self.x, self.y, self.ball, self.judge, self.ids = x, y, ball, judge, ids
        self.costly = judge.is_costly()
        self.best, self.score = x.clone(), torch.full((2, len(x)), -torch.inf, device=x.device)
        self.felled_by = torch.full_like(y, -1)
        self.tried = torch.zeros_like(y, dtype=torch.bool)
        self.gains, self.fell_to = Gains(), dict[str, int]()
        self.health: GradientHealth | None = None

    def judge_clean_images(self, leave: bool = True) -> None:
        """Judge the clean images first: a misclassified one needs no attack."""
        fallen = has_fallen(self.judge.shares(self.x, self.y), self.judge.enough)
        self.leave, self.correct = leave, ~fallen
        self.fallen = fallen if leave else torch.zeros_like(fallen)

    @cached_property
    def logits(self) -> Tensor:
        """One prediction of each clean image, ``[N, classes]``."""
        return self.judge.logits(self.x)

    def left(self) -> Tensor:
        """Indices of the images that need another run, int64 ``[n]``; waits for the device.

        They are the images that have not fallen. If images do not leave, they are those with a correct draw.
        """
        stands = ~self.fallen if self.leave else self.score[0] < 1
        return stands.nonzero()[:, 0]

    def confirm_successes(
        self, owner: Tensor, points: Tensor, share: Tensor, run: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        """Judge the rows that claim a success.

        It waits for the device once, and a second time if there are claims.

        Args:
            owner: the image of each row, int64 ``[R]``.
            points: the points ``[R, ...]``.
            share: the share of the search's own draws that misclassify each point, ``[R]``.
            run: the number of each row's run, int64 ``[R]``; None: all rows belong to run 0.

        Returns:
            The shares ``[R]``, replaced by those of the judge for the claims; and whether an image has fallen.
        """
        claims = (has_fallen(share, self.judge.enough) & ~self.fallen[owner]).nonzero()[:, 0]
        if len(claims) == 0:
            return share, False
        judged = self.judge.shares(points[claims], self.y[owner[claims]])
        share = share.index_copy(0, claims, judged.to(share.dtype))
        won = claims[has_fallen(judged, self.judge.enough)]
        if len(won) == 0:
            return share, False
        # If several rows of one image succeed, keep the first. Writing two values to one index in one assignment is
        # undefined.
        first = torch.full_like(self.y, len(owner)).scatter_reduce(0, owner[won], won, "amin")
        won = won[first[owner[won]] == won]
        self.best[owner[won]] = points[won]
        self.fallen[owner[won]] = True
        self.felled_by[owner[won]] = torch.zeros_like(won) if run is None else run[won]
        return share, True

    def rows_to_keep(self, owner: Tensor, lost: Tensor | None = None) -> Tensor | None:
        """Choose the rows that stay; waits for the device once.

        Args:
            owner: the image of each row, int64 ``[R]``.
            lost: True for rows that are given up, bool ``[R]``; None: no row is.

        Returns:
            Indices int64 of the rows that stay; None if the batch keeps its size. If no row is given up, `bucket` gives
            their number: all rows of images that have not fallen come first, then some of fallen images. If rows are
            given up, only the rows that stay are searched: on a CPU each row once, on a GPU with the first rows
            repeated up to the size that `bucket` gives.
        """
        if lost is not None:
            stays = (~(self.fallen[owner] | lost)).nonzero()[:, 0]
            if takes_every_size(owner.device) or len(stays) == 0:
                return stays
            return _repeated_to(stays, min(bucket(len(stays), owner.device), len(owner)))
        gone = self.fallen[owner]
        left = len(owner) - int(gone.sum())
        size = bucket(left, owner.device, self.costly) if left else 0
        if size >= len(owner):
            return None
        return gone.to(torch.int8).argsort(stable=True)[:size]

    def keep_best(self, owner: Tensor, points: Tensor, score: Tensor) -> None:
        """Keep the best row's point of every image that has not fallen, if it is better than the known one.

        Args:
            owner: the image of each row, int64 ``[R]``.
            points: the points ``[R, ...]``.
            score: the share of misclassified draws and the loss of each point, ``[2, R]``.
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


Goals = Sequence[Tensor | None]


def waves(
    active: ActiveSet, goals: Goals, restarts: int, context: AttackContext, at_image: bool = False
) -> Iterator[Rows]:
    """The rows of an attack, one wave after the other; a wave has the images that are left by then.

    The first wave has one run, because most images fall to any run. A later wave has as many rows as fit. On a CPU it
    has whole runs. On a GPU it may have a part of a run, and copies of the first rows fill it up to the size that
    `bucket` gives, so that most waves have the same size. Each wave waits for the device a few times.

    Args:
        active: the images.
        goals: the target of each run, int64 ``[N]``; None for a run without one.
        restarts: the number of times that all of these runs are taken.
        context: has the seed of the random starts, to which each run adds its number; the most rows at once, its
            resources' ``batch_size``; and the points at which the very first run begins unless ``at_image``.
        at_image: whether the first run for each target begins at the images themselves.
    """
    x, y, count, begin = active.x, active.y, len(active.x), context.begin
    padded = not takes_every_size(x.device)
    most = context.resources.batch_size or max(FEWEST_ROWS, count)
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
            if begin is not None and run == 0 and not at_image:
                clean = projected(clean, begin[images], active.ball.take(images))
            elif not (at_image and run < len(goals)):
                ball, ids = active.ball.take(images), active.ids[images]
                clean = sample_in_ball(clean, ball, seed=context.seed + run, sample_ids=ids)
            begins.append(clean)
            labels.append(y[images] if goal is None else torch.stack([y, goal], 1)[images])
        ball = active.ball.take(owner)
        rows = Rows(owner, x[owner], torch.cat(labels), ball=ball, begin=torch.cat(begins), run=wave // count)
        if padded:
            size = max(len(wave), min(bucket(len(wave), x.device), fits))
            rows = rows.take(_repeated_to(torch.arange(len(wave), device=x.device), size))
        yield rows
        is_first = False
    for number in active.felled_by[active.felled_by >= 0].tolist():
        restart, target = divmod(number, len(goals))
        name = f"restart {restart + 1}" if goals[target] is None else f"target {target + 1}"
        if goals[target] is not None and restarts > 1:
            name += f", restart {restart + 1}"
        active.fell_to[name] = active.fell_to.get(name, 0) + 1


def likeliest_wrong(logits: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, ...]:
    """The wrong classes of highest logit, the highest first, each int64 ``[B]``; a count of None: all."""
    classes = logits.shape[1]
    wrong = logits.masked_fill(F.one_hot(y, classes).bool(), -torch.inf)
    return wrong.topk(min(count or classes, classes - 1), 1).indices.unbind(1)


def cost_of_borders(count: int | None, classes: int, draws: int) -> int:
    """The forward passes per image of `nearest_borders`, for a model with so many classes."""
    searched = min(max(count or classes, CANDIDATES), classes - 1)
    return 1 + (searched * draws if searched > 1 else 0)


def nearest_borders(active: ActiveSet, objective: Objective, count: int | None) -> tuple[Tensor, ...]:
    """The classes whose borders are nearest to each image, by the linear approximation at the clean image.

    The distance is the difference of the logits over the norm of its gradient. MALT orders target classes by it
    (Melamed, Yehudai & Shamir, NeurIPS 2024, arXiv 2407.02240). The norm here is the dual of the ball's norm. The
    distance is computed for the classes of highest logit and for images that have not fallen; each takes a gradient.

    Args:
        active: the images.
        objective: the model that the search follows, with any loss.
        count: the number of classes; None: all.

    Returns:
        The nearest class of each image first, then the next, each int64 ``[N]``.
    """
    left, by_margin = active.left(), replace(objective, loss="margin_targeted")
    x, y = active.x[left], active.y[left]
    logits = active.logits[left]
    count = min(count or logits.shape[1], logits.shape[1] - 1)
    candidates = likeliest_wrong(logits, y, max(count, CANDIDATES))
    goals = torch.zeros((len(active.y), count), dtype=torch.int64, device=active.y.device)
    if len(left):
        distances = []
        for candidate in candidates:
            at_image = by_margin.gradient(x, torch.stack([y, candidate], 1))
            slope = torch.linalg.vector_norm(at_image.image.flatten(1), ord=DUAL[active.ball.norm], dim=1)
            # The gradient is a sum over the draws, and the loss is a mean. The loss is negative where the label is
            # ahead.
            distances.append(-objective.eot_iter * at_image.loss / slope.clamp_min(torch.finfo(slope.dtype).tiny))
        ranked = torch.stack(distances, 1).nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
        goals[left] = torch.stack(candidates, 1).gather(1, ranked[:, :count])
    return goals.unbind(1)


class RowSearch:
    """One run of a search by gradients over a batch of rows, which leave it as their images fall.

    Args:
        objective: the loss, on the model that gives the gradients.
        active: the images. It keeps the fallen ones and the best points of the others.
        rows: the rows that are searched.
        steps: the steps of the run.
        give_up: whether rows out of reach leave.
    """

    def __init__(self, objective: Objective, active: ActiveSet, rows: Rows, steps: int, *, give_up: bool = False):
        self.objective, self.active, self.rows, self.steps = objective, active, rows, steps
        self.point = rows.begin
        self.gradients = Gradients(objective, self.point, rows.labels)
        judged = give_up and steps >= FEWEST_STEPS
        checks = [round(share * steps) for share in SHARES]
        self.monitor = PaceMonitor(checks, steps, TIMES, active.gains) if judged else None
        # faulty: for each row, the number of gradients that were not finite and the number that were zero. counted: the
        # number of gradients of each row so far.
        self.health, self.faulty, self.counted = active.health, torch.zeros((2, len(rows.x)), device=rows.x.device), 0

    @staticmethod
    def shrinks_after(step: int) -> bool:
        """Tell whether the batch may shrink after so many steps."""
        return step in SHRINK_AFTER or step % SHRINK_EVERY == 0

    def take(self, index: Tensor) -> None:
        """Continue with some of the rows, by an index int64."""
        take_rows(self, index, by_column=("faulty", "score"))
        if len(index):
            # Delete the old loop first. While it exists, a new loop would copy the old state out of the graph's
            # buffers.
            del self.gradients
            self.gradients = Gradients(self.objective, self.point, self.rows.labels)

    def see_gradient(self, gradient: Tensor, fooled: Tensor | None = None) -> None:
        """Count the gradients of one step, as `GradientHealth.see_gradient` does, without waiting for the device."""
        if self.health is not None:
            faulty = torch.stack(faults(gradient, fooled))
            self.faulty, self.counted = self.faulty + faulty, self.counted + 1
            nonfinite, zero = faulty.sum(1)
            self.health.add(gradients=len(gradient), nonfinite=nonfinite, zero=zero)

    def see_given_up(self, index: Tensor) -> None:
        """Count the gradients that some rows, int64, will not take, without waiting for the device.

        A row that is given up counts as if it had taken every step, with the same share of faulty gradients as before.
        Otherwise the rows that are searched to the end, such as those without gradients, would count more than others.
        """
        if self.health is not None:
            left = self.steps - self.counted
            nonfinite, zero = (self.faulty[:, index].sum(1) * left / self.counted).round().long()
            self.health.add(gradients=len(index) * left, nonfinite=nonfinite, zero=zero)

    def out_of_reach(self, step: int, missing: Tensor) -> Tensor | None:
        """Tell which rows are given up.

        Args:
            step: the number of steps that were taken.
            missing: the distance of each row from its border, as `PaceMonitor.lost` takes it, ``[R]``.

        Returns:
            bool ``[R]``; None if no row is given up.
        """
        lost = None if self.monitor is None else self.monitor.lost(step, missing)
        lost = None if lost is None else some_of(lost & self.may_end() & ~self.active.fallen[self.rows.owner])
        if lost is not None and self.monitor is not None:
            self.active.tried.index_fill_(0, self.rows.owner[lost & self.monitor.came_nearer], True)
        return lost

    def may_end(self) -> Tensor | bool:
        """Tell which rows may be given up, bool ``[R]``."""
        return True
