"""The base class of random defences. It aggregates the logits of K samples, and controls the random noise."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._tensors import repeat_batch
from ..ops.aggregate import aggregate
from ..ops.philox import Stream, philox
from ..protocols import Classifier, SharesDraws, supports

M = TypeVar("M", bound=nn.Module)
#: If the class with the most votes does not have the largest logit, its logit is set to the largest plus this number.
LEAD = 1e-3
#: Logits are clamped to plus and minus this number, because a softmax of infinities is NaN.
LARGEST = 1e30


class StochasticDefence(nn.Module):
    """A defence that draws noise for each of ``samples`` predictions. Subclasses define `sample_logits`.

    Every call draws a new seed from PyTorch's global generator, except within `fixed_noise` and `deterministic`.
    Several threads may call a defence at the same time. But `fixed_noise`, `deterministic` and `noise_ids` hold for all
    threads: give a thread that enters one of them a ``copy.deepcopy`` of the defence.
    """

    #: The class promises other draws for each image (`purify_fast.protocols.draws_for_each_image`). Not inherited.
    draws_for_each_image: ClassVar[bool] = False
    _noise_seed: Tensor
    samples: int
    #: Attributes that do not affect predictions (`purify_fast.model_state`). ``_kept_ids`` has tensors whose memory
    #: `noise_ids` uses again.
    not_dependencies = frozenset({"_kept_ids"})
    noise_modes = frozenset({"_noise", "_noise_ids", "_seeds", "_seed_is_drawn"})

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_noise_seed", torch.zeros(1, dtype=torch.int64), persistent=False)
        self._noise, self._seed_is_drawn = "fresh", False
        self._noise_ids: Tensor | None = None
        self._seeds: torch.Generator | None = None
        self._kept_ids: dict[tuple[int, torch.device], Tensor] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """If a subclass overrides only ``forward``, replace `draw_logits`, which would not call this ``forward``."""
        super().__init_subclass__(**options)
        if "forward" in vars(cls) and "draw_logits" not in vars(cls):
            cls.draw_logits = _repeated_forward  # type: ignore[assignment, method-assign]

    # -- control over the noise ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fixed_noise(self, seed: int) -> Iterator[StochasticDefence]:
        """Within the block, all images get the same K draws, which depend only on ``seed``, in [0, 2^63)."""
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        with self._control(_noise="fixed"):
            before = self._noise_seed.clone()
            self._noise_seed.fill_(seed)
            try:
                yield self
            finally:
                self._noise_seed.copy_(before)

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[StochasticDefence]:
        """Switch the noise off within the block. There is then a single prediction per image."""
        with self._control(_noise="off"):
            yield self

    @contextlib.contextmanager
    def _control(self, **state: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        try:
            yield
        finally:
            vars(self).update(before)

    @contextlib.contextmanager
    def noise_ids(self, ids: Tensor, seeds: torch.Generator | None = None) -> Iterator[StochasticDefence]:
        """Within the block, image i gets the noise of image ``ids[i]`` (int64 ``[B]``) of a larger batch.

        ``seeds`` draws the seeds of the calls in place of PyTorch's global generator, and is on the images' device.
        """
        # A captured step reads the ids from the memory of its capture, so write new ids there.
        kept = self._kept_ids if self._noise_ids is None else {}
        memory = kept.setdefault((len(ids), ids.device), ids.clone())
        with self._control(_noise_ids=memory.copy_(ids), _seeds=seeds):
            yield self

    @contextlib.contextmanager
    def with_drawn_seed(self) -> Iterator[None]:
        """Within the block, a call takes the seed that is drawn now, for a compiled step, whose graph draws nothing."""
        if self.noise_is_fresh:
            self._noise_seed.random_(2**62, generator=self._seeds)
        with self._control(_seed_is_drawn=self.noise_is_fresh):
            yield

    def noise(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return seed, int64 ``[1]``, and sample ids: int64 ``[batch]``, or ``[1]`` if all images share the draws."""
        if self._noise == "fixed":
            # Copy the seed, because a backward pass after the block still needs it. Every image has sample id 0.
            return self._noise_seed.clone(), torch.zeros(1, dtype=torch.int64, device=device)
        drawn = self._seed_is_drawn
        seed = self._noise_seed.clone() if drawn else torch.randint(2**62, (1,), generator=self._seeds, device=device)
        if self._noise_ids is None:
            return seed, torch.arange(batch, device=device)
        if len(self._noise_ids) != batch:
            raise ValueError(f"noise_ids must have an id for each of the {batch} images, got {len(self._noise_ids)}")
        # Copy the ids, because a backward pass after the block still needs them.
        return seed, self._noise_ids.clone()

    @property
    def noise_is_off(self) -> bool:
        """Return True if the noise is off, so that nothing is drawn."""
        return self._noise == "off"

    @property
    def noise_is_fresh(self) -> bool:
        """Return True if every call draws new noise."""
        return self._noise == "fresh"

    # -- predictions --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Aggregate the logits of the K samples of images ``[B, C, H, W]`` in [0, 1]: ``[B, classes]``, float32."""
        return self.aggregate(self.sample_logits(x))

    def sample_logits(self, x: Tensor) -> Tensor:
        """Compute the logits of the K samples of images ``[B, C, H, W]`` in [0, 1]: ``[B, K, classes]``."""
        raise NotImplementedError

    def aggregate(self, logits: Tensor) -> Tensor:
        """Apply logsumexp over K, which decides like CARSO's PeeL: ``[B, K, classes] -> [B, classes]``, float32."""
        return aggregate(logits, "lse")

    def draw_sample_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute ``draws`` independent results of `sample_logits` together, ``[draws, B, K, classes]``."""
        return self.sample_logits(repeat_batch(x, draws)).unflatten(0, (draws, -1))

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute ``draws`` independent results of `forward` together, for EOT attacks: ``[draws, B, classes]``."""
        return self.aggregate(self.draw_sample_logits(x, draws).flatten(0, 1)).unflatten(0, (draws, -1))


def _repeated_forward(defence: nn.Module, x: Tensor, draws: int) -> Tensor:
    """The results of ``draws`` calls of ``forward``, ``[draws, B, classes]``, by one call with the repeated batch."""
    return defence(repeat_batch(x, draws)).unflatten(0, (draws, -1))


def with_samples(defence: M, samples: int) -> M:
    """Return a copy of a defence that predicts from ``samples`` samples. It shares the parts and their weights."""
    other: Any = copy.copy(defence)
    other.samples = samples
    return other


def undecided(logits: Tensor) -> Tensor:
    """Tell which predictions decide for no class: those with a NaN, or with several infinite largest logits."""
    top = logits.topk(min(2, logits.shape[-1]), -1).values
    shared = (top[..., 0] == top[..., -1]) & top[..., 0].isinf() & (logits.shape[-1] > 1)
    return logits.isnan().any(-1) | shared


def majority(logits: Tensor) -> Tensor:
    """Combine the logits of several draws by a majority vote over the predicted classes."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(undecided(logits)[..., None], torch.nan).clamp(-LARGEST, LARGEST)
    soft = logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
    votes = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    first = soft.detach().masked_fill(votes < votes.amax(1, keepdim=True), -torch.inf).argmax(1, keepdim=True)
    behind = soft.detach().amax(1, keepdim=True) - soft.detach().gather(1, first)
    return soft.scatter_add(1, first, torch.where(behind > 0, behind + LEAD, 0.0))


# -- random models without their randomness: with the same noise in every call, or with their noise off ----------------


class _WithSameAnswer(nn.Module):
    """The base of models that always predict the same, although the model inside is random."""

    #: The name of a method of the model inside, which makes the context of a call.
    mode: str

    def __init__(self, model: Classifier, *arguments: int):
        super().__init__()
        if not supports(model, self.mode):
            raise TypeError(f"model must have a method {self.mode}(), got {type(model).__name__}")
        self.model, self.arguments = model, arguments
        # The mode of a module inside is not changed.
        self.training = isinstance(model, nn.Module) and model.training

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images ``[B, C, H, W]`` in [0, 1]."""
        with getattr(self.model, self.mode)(*self.arguments):
            return self.model(x)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute the logits of ``draws`` draws, ``[draws, B, classes]``, by a single call."""
        return self(x).expand(draws, -1, -1)


class WithoutNoise(_WithSameAnswer):
    """Predicts with a random model whose noise is off.

    `purify_fast.evaluation.evaluate` attacks and judges it like any other model. It is not the model as it is deployed.

    Args:
        model: a model with a method ``deterministic()``, see `purify_fast.protocols.DeterministicMode`.

    Raises:
        TypeError: a model without this method.
    """

    mode = "deterministic"
    #: The words by which a report names the rule.
    judged_as = "without noise: not the model as it is deployed"

    def __init__(self, model: Classifier):
        super().__init__(model)


class WithFixedNoise(_WithSameAnswer):
    """Predicts with a random model that has the same noise in every call.

    `purify_fast.evaluation.evaluate` attacks and judges it like any other model, so the attack knows the noise.

    Args:
        model: a model with a method ``fixed_noise(seed)``, see `purify_fast.protocols.FixedNoise`.
        seed: the seed of the noise.

    Raises:
        TypeError: a model without this method.
    """

    mode = "fixed_noise"
    judged_as = "with fixed noise, which the attacks know"

    def __init__(self, model: Classifier, seed: int = 0):
        super().__init__(model, seed)


# -- modules around a random model: with another aggregation, and with a majority vote ---------------------------------


def _with_part(module: M, name: str, part: Any) -> M:
    """Copy a module, which may have hooks and may be of a subclass, with another attribute."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    setattr(other, name, part)
    return other


class WithAggregation(nn.Module):
    """Calls a defence with another aggregation, with or without noise, for attacks and comparisons.

    Args:
        defence: module with a method ``sample_logits(x) -> [B, K, classes]``, such as a `StochasticDefence`. If
            deterministic is True, it also needs a method ``deterministic()``. Its method ``draw_sample_logits``, if
            any, is used.
        aggregation: a method of `purify_fast.ops.aggregate`.
        deterministic: whether to run the defence without noise.
    """

    defence: Any

    def __init__(self, defence: nn.Module, aggregation: str = "lse", deterministic: bool = False):
        super().__init__()
        self.defence, self.aggregation, self.without_noise = defence, aggregation, deterministic

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        with self._mode():
            return self.aggregate(self.defence.sample_logits(x))

    def aggregate(self, logits: Tensor) -> Tensor:
        """Aggregate logits ``[B, K, classes]``: ``[B, classes]``."""
        return aggregate(logits, self.aggregation)

    def draw_logits(self, x: Tensor, draws: int) -> Tensor:
        """Compute the logits of ``draws`` independent calls together, ``[draws, B, classes]``, for attacks with EOT."""
        if not supports(self.defence, "draw_sample_logits"):
            return self(repeat_batch(x, draws)).unflatten(0, (draws, -1))
        with self._mode():
            logits = self.defence.draw_sample_logits(x, draws)
            return self.aggregate(logits.flatten(0, 1)).unflatten(0, (draws, -1))

    def around(self, replace: Callable[[Classifier], Classifier]) -> WithAggregation:
        """Make a copy of this object that calls ``replace(defence)``."""
        return _with_part(self, "defence", replace(self.defence))

    def _mode(self) -> contextlib.AbstractContextManager[Any]:
        return self.defence.deterministic() if self.without_noise else contextlib.nullcontext()


class MajorityVote(nn.Module):
    """Predicts with the `majority` of several draws of a random model.

    Args:
        model: function or module from images ``[B, C, H, W]`` to logits ``[B, classes]``. If the model has a method
            ``draw_logits``, this method is used.
        draws: number of draws, at least 1.
    """

    def __init__(self, model: Classifier, draws: int):
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.model, self.draws = model, draws

    @property
    def judged_as(self) -> str:
        """The words by which a report names the rule."""
        return f"by the majority vote of {self.draws} draws"

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``[B, classes]``, in float32, or in float64 if the model computes in float64."""
        if supports(self.model, SharesDraws):
            return majority(cast(SharesDraws, self.model).draw_logits(x, self.draws))
        # Call the model separately for each draw, because it may use the same draw for all images of a call.
        return majority(torch.stack([self.model(x) for _ in range(self.draws)]))

    def around(self, replace: Callable[[Classifier], Classifier]) -> MajorityVote:
        """Make a copy of this object that calls ``replace(model)``."""
        return _with_part(self, "model", replace(self.model))


# -- classifies noisy copies of an image: a baseline for purifiers, and the model of randomized smoothing --------------


class NoisyEnsemble(StochasticDefence):
    """Classifies K noisy copies of an image, and aggregates their logits as CARSO does: a baseline for purifiers.

        x_k = clamp(x + sigma n_k, 0, 1),  n_k ~ N(0, I);   logits_i = logsumexp_k classifier(x_k)_i

    With one copy and without the clamp, the majority of its predictions is the smoothed classifier of Cohen et al.
    (ICML 2019), which `purify_fast.evaluation.certify` certifies.

    Within `deterministic`, the image itself is classified.

    Args:
        classifier: any module from images ``[B, C, H, W]`` in [0, 1] to logits. It is copied and frozen.
        sigma: standard deviation of the noise in image units, at least 0.
        samples: number K of copies, at least 1.
        clamp: whether the copies are clamped to [0, 1].
    """

    def __init__(self, classifier: nn.Module, sigma: float, samples: int = 8, clamp: bool = True):
        super().__init__()
        if not sigma >= 0 or samples < 1:
            raise ValueError(f"sigma must be at least 0 and samples at least 1, got sigma={sigma}, samples={samples}")
        self.classifier = copy.deepcopy(classifier).requires_grad_(False).eval()
        self.sigma, self.samples, self.clamp = float(sigma), samples, clamp

    def train(self, mode: bool = True) -> NoisyEnsemble:
        super().train(mode)
        self.classifier.eval()
        return self

    train.sets_modes_only = True  # type: ignore[attr-defined]

    def sample_logits(self, x: Tensor) -> Tensor:
        copies = x[:, None]
        if not self.noise_is_off:
            seed, ids = self.noise(len(x), x.device)
            stream, count = Stream.TRANSFORM_NOISE, x[0].numel()
            noise = philox(seed, ids, count, stream=stream, distribution="normal", draws=self.samples)
            copies = copies + self.sigma * noise.view(-1, self.samples, *x.shape[1:])
            copies = copies.clamp(0, 1) if self.clamp else copies
        return self.classifier(copies.flatten(0, 1)).float().unflatten(0, (len(x), -1))
