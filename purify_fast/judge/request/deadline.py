"""The time at which an evaluation ends. Every forward pass of its searches and probes asks for this time."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..._settings import digest
from ...attacks.attacked_model import check_labels, logits_of, logits_of_draws, not_logits
from ...attacks.base import ThreatModel, TimeIsOver
from ...attacks.shared_draws import TRIED_CALLS
from ...defences.stochastic import MajorityVote, undecided
from ...ops import attack_loss
from ...protocols import Classifier, FixedNoise, Passes, SharesDraws, draws_for_each_image, supports
from ...speed.agreement import FLOAT32, apart, differ
from ...speed.memory import BatchLimit
from ...speed.precision import float32_settings
from ..searches import model_tests
from ..searches.model_tests import SAMPLE, check_classes, check_model
from .config import Predict

if TYPE_CHECKING:
    from ..surrogates.copies import Surrogates


class Deadline:
    """Ends work at a time of `time.monotonic`.

    Attributes:
        until: the time at which the present work ends; infinite for work without an end, such as a judgement.
        over: whether the present work was ended. From then on it gets no further pass.
    """

    def __init__(self, device: torch.device | None = None):
        self.device = device
        self.begin()

    def begin(self, until: float = math.inf) -> None:
        """Begin work that ends at a time."""
        self.until, self.over = until, False

    def watch(self, model: Classifier) -> Classifier:
        """A model that asks for the time before each pass of the given one."""

        def watched(x: Tensor) -> Tensor:
            self.ask()
            return model(x)

        return watched

    def ask(self) -> None:
        """Raise `TimeIsOver` if the time is over."""
        # An evaluation without a limit of time needs none of what makes graphs.
        from ...speed.graphs.graphed_loop import is_tracing

        if self.until == math.inf or is_tracing():
            # The end of a trial or a capture by an error would be taken as its failure.
            return
        if self.device is not None and self.device.type == "cuda":
            # Otherwise hours of work could be launched in advance.
            torch.cuda.synchronize(self.device)
        self.over = self.over or time.monotonic() >= self.until
        if self.over:
            raise TimeIsOver


# -- defines the subject of an evaluation (the model with its images), and checks the model ----------------------------

#: Each phase of an evaluation has its own seed: the draws that choose between points, the draws of attacks, and the
#: draws that judge the chosen points. So neither an attack nor a choice knows the draws that judge. The draws that
#: `check_adversarial` compares have the seed of the judging draws of an evaluation with a far seed.
Phase = Literal["choose", "attack", "judge", "check"]
PHASES: dict[Phase, int] = {"choose": 0, "attack": 1, "judge": 2, "check": 3 * 2**30 + 2}
#: The largest number of images on which repeated predictions are compared.
TRIED = 64
#: The number of images whose answers tell models apart.
ASKED = 16
#: At least this number of draws chooses between two points of an image.
CHOOSING = 10
#: At least this number of draws judges each image of a model whose images share draws: fewer leave an error that is
#: itself uncertain.
SHARED_JUDGES = 20
#: Noise counts as fixed unless the logits of more than this share of the images differ by more than rounding. A few
#: images may differ, because rounding inside the model may move a value across a discontinuity.
FEW = 0.25


class DrawsUnderAttack(Exception):
    """A model that was taken as deterministic predicts the same attacked images differently."""


def device_of(model: Classifier, x: Tensor) -> torch.device:
    """The device of a model's first tensor, or the device of the images for a model without tensors."""
    tensors = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    return next(iter(tensors), x).device


def precision_name(model: Classifier, device: torch.device) -> str | None:
    """The precision of a model's multiplications for the report; None for float32, which the report does not name."""
    if torch.is_autocast_enabled(device.type):
        return f"autocast to {str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')}"
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if any(getattr(part, "compute_dtype", None) is torch.bfloat16 for part in parts):
        return "bfloat16"
    older, values = float32_settings()
    rounds = "tf32" in values if older is None else older != (False, "highest")
    # A CPU never uses TF32, whatever the setting is.
    return "tf32" if rounds and device.type == "cuda" else None


@dataclass(frozen=True)
class Judgement:
    """Repeated predictions on the same images.

    ``right`` is bool ``[draws, n]``. ``nonfinite`` predictions have no class and count as wrong. ``margins`` are
    averaged over the predictions. ``classes`` are from the first wrong prediction, or else from the first; -1 without a
    class.
    """

    right: np.ndarray
    nonfinite: int
    margins: np.ndarray
    classes: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """The share of wrong predictions on each image, float64 ``[n]``."""
        return 1 - self.right.mean(0)


class Subject:
    """A model with the images on which it is attacked.

    ``model`` is the judged model. ``base_model`` is the model whose draws a `MajorityVote` counts, or else ``model``.
    ``batch_limit`` limits the number of images in a pass once memory has run out. ``draws`` is True if the model is
    known to draw random numbers for some images.
    """

    def __init__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int,
        n_eval: int,
        seed: int,
        predict: Predict | None = None,
        draws: bool = False,
    ):
        self.x, self.y, self.draws = x, y, draws
        self._batch_size, self.n_eval, self.seed = batch_size, n_eval, seed
        self.device = device_of(model, x)
        #: The time for passes of searches and probes; nothing limits the passes that judge.
        self.deadline = Deadline(self.device)
        self.batch_limit = BatchLimit(min(batch_size, len(x)), self.device)
        self.data = digest(x, y)
        torch.manual_seed(seed)
        # The draws of a vote are tested, because votes that agree do not show them.
        self.model, self.base_model = model, model.model if isinstance(model, MajorityVote) else model
        base = self.base_model
        #: The number of draws in a prediction.
        self.votes = model.draws if isinstance(model, MajorityVote) else 1
        self.num_classes = check_model(base, self.sample_images())
        check_labels("y", y.cpu(), self.num_classes)
        model_tests.check_leaves_images(base, self.sample_images()[:1])
        first, second = (logits_of(base, self.sample_images()) for _ in range(2))
        if first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr():
            raise ValueError("model must return new logits in each call, but two calls use the same memory: clone them")
        self.is_random = differ(first, second) or self.answers_vary(base, elsewhere=True) or draws
        # A class may promise what a few draws do not show.
        self.is_random |= (base is not model or predict is not None) and draws_for_each_image(base)
        #: Whether the predictions of a call have a random part in common. No promise of a class is trusted here,
        #: because a part of the model may break it.
        self.shares_draws = self.is_random and model_tests.images_share_draws(base, self.sample_images())
        #: What the model returns instead of logits, and what to do; empty if it returns logits.
        self.mistake = not_logits(first, second)
        #: The predictions that judged images.
        self.passes = Passes()
        self._surrogates: dict[ThreatModel, tuple[Surrogates, dict[str, str]]] = {}
        if predict is not None and not self.is_random:
            raise ValueError(f"predict={predict!r} needs a random model: leave predict out")
        #: The number of predictions that choose between two points of an image.
        self.choosing = CHOOSING // 2 if base is not model else max(CHOOSING, n_eval if predict == "worst_of" else 0)

    def asked(self, x: Tensor) -> Tensor:
        """The logits of images by the judged model, for a probe, whose time may be over."""
        return self.deadline.watch(self.model)(x)

    @property
    def batch_size(self) -> int:
        """The largest number of images in a forward pass: the number asked for, or fewer if memory is too small."""
        return self.batch_limit.at_most(self._batch_size)

    def sample_images(self) -> Tensor:
        """A copy of a few images, for tests of models."""
        return self.x[:SAMPLE].to(self.device, copy=True)

    def asked_images(self) -> Tensor:
        """A copy of images from all places of the data, whose answers tell models apart."""
        return self.x[:: max(1, len(self.x) // ASKED)][:ASKED].to(self.device, copy=True)

    def surrogates(self, ball: ThreatModel, order: Sequence[str] = ()) -> tuple[Surrogates, dict[str, str]]:
        """Surrogates, which an adaptive attacker would attack, by name; and the reason why others are missing.

        They are sorted by the ``order`` of their names; others come last.
        """
        # Most evaluations of a list of attacks make no surrogates.
        from ..surrogates.copies import surrogates

        if ball not in self._surrogates:
            some = self.sample_images()
            self._surrogates[ball] = surrogates(self.base_model, some, self.num_classes, ball, self.deadline.ask)
        pairs, absent = self._surrogates[ball]
        return sorted(pairs, key=lambda pair: [*order, pair[0]].index(pair[0])), absent

    def answers_vary(self, model: Classifier, elsewhere: bool) -> bool:
        """Return True if predictions of the same images differ. Two may be equal by chance, so more are made."""
        first = model(self.sample_images())
        if differ(first, model(self.sample_images())):
            return True
        # The generators are restored, so that later draws do not depend on the number of trials.
        with self._forked_generators():
            if any(differ(first, model(self.sample_images())) for _ in range(TRIED_CALLS - 2)):
                return True
            if not elsewhere:
                return False
            some = self.x[:TRIED].to(self.device)
            return self.batch_limit.within(lambda: model_tests.draws_elsewhere(model, some, self.batch_size))

    def check_repeats(self, x: Tensor) -> None:
        """Raise DrawsUnderAttack if the model, which was taken as deterministic, predicts images differently again."""
        if self.is_random or len(x) == 0:
            return
        some = x[:TRIED].to(self.device)
        with self._forked_generators():
            if self.batch_limit.within(lambda: model_tests.predicts_otherwise(self.model, some, self.batch_size)):
                raise DrawsUnderAttack

    def _forked_generators(self) -> contextlib.AbstractContextManager[None]:
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    @functools.cached_property
    def can_repeat(self) -> bool:
        """Return True if the model always predicts the same, a random model at least within its ``fixed_noise``."""
        if not self.is_random or not supports(self.base_model, FixedNoise):
            return not self.is_random
        x = self.sample_images()
        # The generators are restored, so that the trials do not change later draws.
        with self._forked_generators(), self._fixed():
            return int(apart(self.base_model(x), self.base_model(x), FLOAT32).sum()) <= FEW * len(x)

    def repeating(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which a random model has fixed noise, if it can predict the same again."""
        return self._fixed() if self.is_random and self.can_repeat else contextlib.nullcontext()

    def _fixed(self) -> contextlib.AbstractContextManager[Any]:
        return cast(FixedNoise, self.base_model).fixed_noise(self.seed)

    @property
    def judges(self) -> int:
        """The number of predictions that judge an image."""
        if self.shares_draws:
            return max(self.n_eval, SHARED_JUDGES)
        return self.n_eval if self.is_random else 1

    def reseed(self, phase: Phase) -> None:
        """Seed the random generators for a phase."""
        torch.manual_seed(3 * self.seed + PHASES[phase])

    def judge(self, x: Tensor, phase: Phase, index: Tensor | None = None) -> Judgement:
        """Predict some of the images, clean or attacked, and compare the predictions with the labels."""
        model, y = self.model, self.y[: len(x)] if index is None else self.y[index]
        draws = {"choose": self.choosing, "judge": self.judges}.get(phase, max(self.choosing, self.n_eval))

        def predict() -> Judgement:
            self.reseed(phase)
            named, leads = list[Tensor](), torch.zeros(len(x), device="cpu")
            # Only a class that promises independent draws predicts several in one call: if they had a part in
            # common, they would agree too often.
            promised = draws_for_each_image(model) or supports(model, SharesDraws)
            together = draws if promised and not self.shares_draws else 1
            for _ in range(draws // together):
                parts = [part.to(self.device, copy=True) for part in x.split(max(1, self.batch_size // together))]
                calls = [logits_of_draws(model, part, together).unflatten(0, (together, -1)) for part in parts]
                for logits in torch.cat(calls, 1):
                    check_classes(logits, self.num_classes)
                    leads += -attack_loss(logits.float(), y.to(logits.device), "margin")[1].cpu()
                    named.append(logits.argmax(1).masked_fill(undecided(logits), -1).cpu())
            self.passes += Passes(draws * len(x))
            # A prediction without a class is -1, which is no label.
            classes, all_right = torch.stack(named).numpy(), (torch.stack(named) == y.cpu()).numpy()
            first_wrong = classes[all_right.argmin(0), np.arange(len(x))]
            return Judgement(all_right, int((classes == -1).sum()), (leads / draws).numpy(), first_wrong)

        return self.batch_limit.within(predict)
