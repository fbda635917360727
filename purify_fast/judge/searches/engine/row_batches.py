"""The rows that are searched together, and the images that are still attacked.

A row is an image with one target class and one restart. The model itself must confirm its success, by fresh draws if it
is random: among a hundred steps, some draw is misclassified by luck. Then all rows of the image are removed. A new
batch size takes time, so a shrinking batch has only sizes from a fixed list, and rows of fallen images fill it up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...._library import section
from ....attacks.attacked_model import logits_of
from ....attacks.context import Ball, sample_in_ball
from ....attacks.objective import FAULTS, GradientHealth, Objective, better_of
from ....protocols import Classifier
from ....speed.graphs.step_loop import State, StepFunction, Steps, begin_steps
from ....speed.watch import FEWEST_WEIGHTS, matrix_weights
from ..judge_context import JudgeContext

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
    """Records by how much the rows of an attack came nearer to their borders after their early steps (their gains)."""

    largest: float = 0.0
    rows: int = 0

    def see(self, gained: Tensor) -> None:
        """Update the largest gain with the gains of some rows, ``[R]``. This waits for the device."""
        if len(gained):
            self.largest = max(self.largest, float(gained.nan_to_num(0.0, 0.0, 0.0).amax()))

    def out_of_reach(self, missing: Tensor) -> Tensor | None:
        """Tell which rows exceed `GAINS` times the largest gain, bool ``[R]``; None while too few gains are known."""
        if self.rows < FEWEST_GAINS:
            return None
        return missing.isfinite() & (missing > GAINS * self.largest)


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
        return any(self.last_step < mark <= step for check in self.checks for mark in (check // 2, check))

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
            return self.gains.out_of_reach(missing)
        if step > self.early_step:
            self.gains.see(self.early - missing)
            if self.last_step < self.checks[0] <= step:
                self.gains.rows += len(missing)
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
        self.draws_differ = context.draws_differ
        self.costly = judge.is_costly()
        self.best, self.score = x.clone(), torch.full((2, len(x)), -torch.inf, device=x.device)
        self.tried = torch.zeros_like(y, dtype=torch.bool)
        self.gains = Gains()
        self.health = GradientHealth() if context.counts_health else None
        self.fallen = torch.zeros_like(self.tried)
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
        if len(claims) == 0:
            return share, False
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
        if size >= len(owner):
            return None
        return gone.to(torch.int8).argsort(stable=True)[:size]

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

    def advance(self) -> None:
        """Do a step, in which the objective takes a gradient of each row."""
        self.loop.advance()
        self.gradients += len(self.rows.owner)

    def count_gradients(self) -> None:
        """Add the counts of gradients in the state to the counts of the attack, at the end of the search."""
        if self.health is not None:
            nonfinite, zero, exempt = (self.loop.state[name] for name in FAULTS)
            self.health.add(gradients=self.gradients - exempt, nonfinite=nonfinite, zero=zero)

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
