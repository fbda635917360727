"""Defines the subject of an evaluation (the model with its images), and checks the model."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..._memory import ran_out_of_memory
from ..._tensors import digest
from ...attacks.attacked_model import TRIED_CALLS, TRIED_ROWS, drawn_once_per_call, logits_of, logits_of_draws
from ...attacks.base import ThreatModel
from ...attacks.losses import margin
from ...attacks.outputs import are_one_hot, are_probabilities
from ...defences.stochastic import undecided
from ...defences.wrappers import MajorityVote
from ...protocols import Classifier, Passes, SharesDraws, draws_for_each_image, supports
from ...speed.agreement import BFLOAT16, FLOAT32, apart, differ
from ...speed.memory import BatchLimit
from ...speed.precision import float32_settings
from ..searches.model_tests import (
    SAMPLE,
    check_classes,
    check_leaves_images,
    check_model,
    draws_elsewhere,
    predicts_otherwise,
)
from ..surrogates.copies import Surrogates, surrogates
from .config import Predict
from .deadline import Deadline

#: The mode in which a model is attacked and judged: as it is, within ``fixed_noise(seed)``, or within
#: ``deterministic()``.
Variant = Literal["random", "fixed", "deterministic"]
#: Each phase of an evaluation has its own seed: the draws that choose between points, the draws of attacks, and the
#: draws that judge the chosen points. So neither an attack nor a choice knows the draws that judge.
Phase = Literal["choose", "attack", "judge"]
PHASES: dict[Phase, int] = {"choose": 0, "attack": 1, "judge": 2}
#: The largest number of images on which repeated predictions are compared.
TRIED = 64
#: At least this number of draws chooses between two points of an image.
CHOOSING = 10
#: A variant is refused only if the logits of more than this share of the images differ by more than rounding. A few
#: images may differ, because rounding inside the model may move a value across a discontinuity.
FEW = 0.25


class DrawsUnderAttack(Exception):
    """A model that was taken as deterministic predicts the same attacked images differently."""


@dataclass(frozen=True)
class Fault:
    """The reason why a variant cannot be attacked. ``repeats``: the fault shows only in other batches or contexts."""

    reason: str
    repeats: bool


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

    ``model`` is the judged model, which is ``base_model`` or the vote over its draws. ``batch_limit`` limits the number
    of images in a pass once memory has run out. ``draws`` is True if the model is known to draw random numbers for some
    images.
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
        self.model, self.num_classes = model, check_model(model, self.sample_images())
        for i, label in enumerate(y.tolist()):
            if not 0 <= label < self.num_classes:
                raise ValueError(f"y[{i}] is {label}, but the model has {self.num_classes} classes, from 0 on")
        check_leaves_images(self.model, self.sample_images()[:1])
        one, other = self.logits(self.model, self.sample_images()), self.logits(self.model, self.sample_images())
        self.is_random = differ(one, other) or self.answers_vary(self.model, elsewhere=True) or draws
        # A class may promise what a few draws do not show.
        self.is_random |= predict is not None and draws_for_each_image(self.model)
        self.draws_once_per_call = self.is_random and drawn_once_per_call(self.model, self.sample_images(), TRIED_ROWS)
        self.has_probabilities = are_probabilities(one) and are_probabilities(other)
        self.has_one_hot = self.has_probabilities and are_one_hot(one) and are_one_hot(other)
        #: The predictions that judged images.
        self.passes = Passes()
        self._faults: dict[Variant, Fault | None] = {}
        self._surrogates: dict[ThreatModel, tuple[Surrogates, dict[str, str]]] = {}
        if predict is not None and not self.is_random:
            raise ValueError(f"predict={predict!r} needs a random model: leave predict out")
        self.base_model = self.model
        #: The number of predictions that choose between two points of an image.
        self.choosing = {None: CHOOSING, "worst_of": max(CHOOSING, n_eval), "votes": CHOOSING // 2}[predict]
        if predict == "votes":
            self.model, self.n_eval = MajorityVote(self.base_model, n_eval), 1

    def asked(self, x: Tensor) -> Tensor:
        """The logits of images by the judged model, for a probe, whose time may be over."""
        return self.deadline.watch(self.model)(x)

    @property
    def batch_size(self) -> int:
        """The largest number of images in a forward pass: the number asked for, or fewer if memory is too small."""
        return self.batch_limit.at_most(self._batch_size)

    def logits(self, model: Classifier, x: Tensor) -> Tensor:
        """The model's logits ``[B, classes]``. Raises a ValueError if they have another shape."""
        return check_classes(logits_of(model, x), self.num_classes)

    def judged_model(self, variant: Variant) -> Classifier:
        """The model whose predictions count in a variant; a variant without randomness needs no vote over draws."""
        return self.model if variant == "random" else self.base_model

    def sample_images(self) -> Tensor:
        """A copy of a few images, for tests of models."""
        return self.x[:SAMPLE].to(self.device, copy=True)

    def surrogates(self, ball: ThreatModel) -> tuple[Surrogates, dict[str, str]]:
        """Surrogates, which an adaptive attacker would attack, by name; and the reason why others are missing."""
        if ball not in self._surrogates:
            absent = dict[str, str]()
            given = self.base_model, self.sample_images(), self.num_classes, ball
            made = surrogates(*given, absent, self.deadline.ask)
            self._surrogates[ball] = made, absent
        return self._surrogates[ball]

    def answers_vary(self, model: Classifier, elsewhere: bool) -> bool:
        """Return True if predictions of the same images differ. Two may be equal by chance, so more are made."""
        one = model(self.sample_images())
        if differ(one, model(self.sample_images())):
            return True
        # The generators are restored, so that later draws do not depend on the number of trials.
        with self._forked_generators():
            if any(differ(one, model(self.sample_images())) for _ in range(TRIED_CALLS - 2)):
                return True
            return elsewhere and self._draws_elsewhere(model)

    def _draws_elsewhere(self, model: Classifier) -> bool:
        some = self.x[:TRIED].to(self.device)
        try:
            return draws_elsewhere(model, some, self.batch_size)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
        # So many images fit into memory, because they were just predicted together.
        return draws_elsewhere(model, some, len(self.sample_images()))

    def check_repeats(self, x: Tensor, variant: Variant) -> None:
        """Raise DrawsUnderAttack if the model, which was taken as deterministic, predicts images differently again."""
        if self.is_random or len(x) == 0:
            return
        some, model = x[:TRIED].to(self.device), self.judged_model(variant)
        with self._forked_generators(), self.variant(variant):
            if self.batch_limit.within(lambda: predicts_otherwise(model, some, self.batch_size)):
                raise DrawsUnderAttack

    def _forked_generators(self) -> contextlib.AbstractContextManager[None]:
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def variant(self, name: Variant) -> contextlib.AbstractContextManager[Any]:
        """A context in which the model is in the variant's mode."""
        if name == "random" or not self.is_random:
            return contextlib.nullcontext()
        model: Any = self.base_model
        return model.fixed_noise(self.seed) if name == "fixed" else model.deterministic()

    def fault(self, name: Variant) -> Fault | None:
        """The fault of a variant of the model; None if the variant has no fault, and always None for "random"."""
        if name == "random" or not self.is_random:
            return None
        if name not in self._faults:
            # The generators are restored, so that the trials do not change later draws.
            with self._forked_generators():
                self._faults[name] = self._find_fault(name)
        return self._faults[name]

    def _find_fault(self, variant: Variant) -> Fault | None:
        """Test whether a variant of a random model really is without randomness; return the first fault, or None."""
        model, x = self.base_model, self.sample_images()
        # The test needs two positions in a batch, so a single image is doubled.
        x = x if len(x) > 1 else torch.cat([x, x])
        with self.variant(variant):
            first, again = model(x), model(x)
            moved = model(x.roll(1, 0)).roll(-1, 0)
            parts = torch.cat([model(x[:1]), model(x[1:])])
        with self.variant(variant):
            anew = model(x)
        for what, other, strength in (
            ("two calls give different logits", again, FLOAT32),
            ("the logits differ when the block is entered again", anew, FLOAT32),
            ("the logits of an image depend on its place in the batch", moved, BFLOAT16),
            ("the logits of an image depend on how the batch is split", parts, BFLOAT16),
        ):
            count = int(apart(first, other, strength).sum())
            if count > FEW * len(x):
                block = "fixed_noise(seed)" if variant == "fixed" else "deterministic()"
                reason = f"within a block of {block}, {what}, for {count} of {len(x)} images"
                return Fault(reason, repeats=other is not again)
        return None

    def judges(self, variant: Variant) -> int:
        """The number of predictions that judge an image."""
        return self.n_eval if variant == "random" and self.is_random else 1

    def reseed(self, phase: Phase) -> None:
        """Seed the random generators for a phase."""
        torch.manual_seed(3 * self.seed + PHASES[phase])

    def judge(
        self,
        x: Tensor,
        variant: Variant,
        phase: Literal["choose", "judge"],
        by: Classifier | None = None,
        index: Tensor | None = None,
    ) -> Judgement:
        """Predict some of the images, clean or attacked, and compare the predictions with the labels."""
        y = self.y[: len(x)] if index is None else self.y[index]
        model, draws = (self.judged_model(variant), self.judges(variant)) if by is None else (by, 1)
        draws = self.choosing if phase == "choose" else draws

        def predict() -> Judgement:
            self.reseed(phase)
            right, named, leads, nonfinite = [], [], torch.zeros(len(x), device="cpu"), 0
            with self.variant(variant):
                # Only a class that promises independent draws predicts several in one call: if they had a part in
                # common, they would agree too often.
                together = draws if draws_for_each_image(model) or supports(model, SharesDraws) else 1
                for _ in range(draws // together):
                    parts = [part.to(self.device, copy=True) for part in x.split(max(1, self.batch_size // together))]
                    calls = [logits_of_draws(model, part, together).unflatten(0, (together, -1)) for part in parts]
                    for logits in torch.cat(calls, 1):
                        check_classes(logits, self.num_classes)
                        decided, nameless = logits.argmax(1), undecided(logits)
                        leads += -margin(logits.float(), y.to(logits.device)).cpu()
                        nonfinite += int(nameless.sum())
                        right.append(((decided == y.to(decided.device)) & ~nameless).cpu().numpy())
                        named.append(decided.masked_fill(nameless, -1).cpu().numpy())
            self.passes += Passes(draws * len(x))
            all_right = np.stack(right)
            first_wrong = np.stack(named)[all_right.argmin(0), np.arange(len(x))]
            return Judgement(all_right, nonfinite, (leads / len(right)).numpy(), first_wrong)

        return self.batch_limit.within(predict)
