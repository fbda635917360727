"""Prepares an evaluation: checks its arguments, and tells facts and notes that are known before the attacks."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..._validation import Count, NormName, Range, check_types
from ..._version import __version__
from ...attacks import PGD, Attack, AttackContext, AttackResult, frozen
from ...attacks.attacked_model import check_eps
from ...attacks.base import InBall, ThreatModel
from ...attacks.objective import ApgdLoss, usable_loss
from ...defences.stochastic import WithFixedNoise, WithoutNoise
from ...ops.dispatch.records import processor
from ...ops.pgd_step import pgd_step
from ...protocols import Classifier, DeterministicMode, FixedNoise, OwnAttacks, SampleLogits, is_purifier, supports
from ...training.batches import as_tensor, check_channels, check_range
from ..searches.apgd import APGD
from ..searches.engine import EngineAttack
from ..searches.fab import FABT
from ..searches.model_tests import HEADS, AttackersHead
from ..searches.square import Square
from .config import EvaluateConfig, ProtocolName
from .deadline import Subject, precision_name

AttackFunction = Callable[[Classifier, Tensor, Tensor], Tensor]
#: The allowed rounding error of a float32 value in [0, 1]: two additions of numbers up to 2 cause less.
BALL_SLACK = 2.0**-21
LEE_KIM = "PGD-200 ce + EOT (Lee & Kim 2023)"


# -- a user's functions as attacks ------------------------------------------------------------------------------------


def as_attack(
    function: AttackFunction,
    *,
    name: str | None = None,
    eps: float | None = None,
    norm: NormName | None = None,
    revision: str | None = None,
    uses_gradients: bool = False,
) -> FunctionAttack:
    """Make an attack from a function, for `evaluate` or an `AttackSpec`.

    Args:
        function: a function ``(model, x, y) -> x_adv``. ``model`` is a module from images to logits, in evaluation
            mode. ``x`` are float32 images ``[B, C, H, W]`` in [0, 1], and ``y`` int64 labels ``[B]``, on the model's
            device. Gradients are enabled. The result must have the same shape and dtype, in [0, 1] and in the ball.
        name: name of the attack in the report; None takes the function's name.
        eps: radius of the ball in image units. None takes the evaluation's radius.
        norm: norm of the ball, "linf", "l2" or "l1"; a norm needs an eps beside it. None takes the evaluation's norm.
        revision: a name for the function's version, with which results are cached; choose another name after a change.
            None: no caching. Functions with the same module and name, such as lambdas, need different revisions.
        uses_gradients: whether the function follows gradients of the model. If it does not, and images fall to it that
            withstood the attacks with gradients, the report takes this as a sign that the gradients mislead.

    Raises:
        TypeError: function is not callable.
        ValueError: the ball is not allowed.
    """
    if isinstance(function, type) or not callable(function):
        text = "an attack must be an object of purify_fast.attacks, such as PGD(), an AttackSpec, or a function "
        raise TypeError(f"{text}(model, x, y) -> x_adv, got {function!r}")
    name = getattr(function, "__name__", type(function).__name__) if name is None else name
    attack = FunctionAttack(function=function, row_name=name, own_revision=revision, uses_gradients=uses_gradients)
    return replace(attack, eps=eps, norm=norm)


@dataclass(frozen=True, kw_only=True)
class FunctionAttack(InBall):
    """An attack that calls a function; `as_attack` makes it."""

    kind: ClassVar[str] = "function"

    function: AttackFunction
    row_name: str
    own_revision: str | None = None
    uses_gradients: bool = False  # type: ignore[misc]  # the function of each attack decides

    def name(self, context: AttackContext) -> str:
        return self.row_name

    def draws(self, context: AttackContext) -> int:
        """Return 1, because only the function itself can average over draws."""
        return 1

    def settings(self, context: AttackContext) -> dict[str, Any]:
        return self.threat_model(context)._asdict()

    def revision(self) -> str | None:
        return self.own_revision

    def identity(self) -> list[str]:
        """Return the module and the name of the function, or of the class of a callable object."""
        function: Any = self.function
        while isinstance(function, functools.partial):
            function = function.func
        named = function if inspect.isroutine(function) else type(function)
        return [str(named.__module__), named.__qualname__]

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> AttackResult:
        """Call the function on a batch, and check its result."""
        threat = self.threat_model(context)
        # `frozen` restores modes and gradient flags, which the function may change.
        with torch.enable_grad(), frozen(target):
            images = self.function(target, x.clone(), y.clone())
        check_adversarial(self.row_name, images, x, threat)
        # Because of rounding, values may be slightly outside of the ball or of [0, 1], so the images are projected.
        inside = pgd_step(images.detach(), torch.zeros_like(x), x, 0.0, threat.eps, norm=threat.norm)
        return AttackResult(inside)


def check_adversarial(name: str, images: object, x: Tensor, threat: ThreatModel) -> None:
    """Refuse attacked images that are not allowed; x are the clean images in [0, 1]."""
    if not isinstance(images, Tensor) or (images.shape, images.dtype, images.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"the attack {name!r} must return {x.dtype} images {list(x.shape)} on {x.device}")
    images, order = images.detach(), {"linf": torch.inf, "l2": 2.0, "l1": 1.0}.get(threat.norm)
    if len(images) == 0:
        return
    low, high = map(float, images.aminmax())
    # The condition is negated so that NaN is refused too.
    if not (low >= -BALL_SLACK and high <= 1 + BALL_SLACK):
        raise ValueError(f"the attack {name!r} returned values from {low:.6g} to {high:.6g}: all must be in [0, 1]")
    if order is None:
        return
    lengths = torch.linalg.vector_norm((images - x).flatten(1).double(), ord=order, dim=1)
    # The allowance for rounding is the norm of an image in which every value is the allowed rounding error.
    allowed = threat.eps * (1 + 1e-5) + BALL_SLACK * x.shape[1:].numel() ** (1 / order)
    if (length := float(lengths.amax())) > allowed:
        raise ValueError(
            f"the attack {name!r} left the ball: it changed image {int(lengths.argmax())} of the batch by "
            f"{length:.6g} in the norm {threat.norm}, which is {length - threat.eps:.3g} more than the allowed eps = "
            f"{threat.eps:.6g}"
        )


# -- an attack of an evaluation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttackSpec:
    """An attack of an evaluation, with its images and its name. It makes a row of the report.

    Args:
        attack: an attack of `purify_fast.attacks`, or a function ``(model, x, y) -> x_adv`` (see `as_attack`).
        through: another model that the attack follows. Only the evaluated model judges, in every case. An attack such
            as `purify_fast.attacks.APGD`, whose ``follows_gradients`` is True, takes its gradients from the other
            model, and the evaluated model checks every success during the search. Any other attack, such as
            `purify_fast.attacks.PGD`, attacks the other model as a whole, and the evaluated model judges the result.
        label: the name of the row; None makes a name from the other fields. Another threat model is added to it.
        max_images: the attack gets only the first images, up to this number. With None, it gets all images.
        survivors_only: whether the attack gets only images that withstood all earlier attacks in this threat model. All
            other images count as fallen in this row.
        seed: a number that is added to the evaluation's seed for this attack, for another random start.
        until: a share of all images. The attack begins with the smallest margins, and stops when at most this share of
            all images can still fall, at 95 % confidence. With None, or on a random model, every image is attacked.
        nearest: the number of images in a group. The attack begins with the group of the smallest margins after the
            earlier attacks, and goes on to the next group until a whole group has withstood it. For a random model, it
            ends after the first group. None: all images.

    Raises:
        ValueError: an option that is not allowed.
        TypeError: attack is not an attack, or through is not a model.
    """

    attack: Attack
    through: Classifier | None = None
    label: str | None = None
    max_images: Count | None = None
    survivors_only: bool = False
    seed: Annotated[int, Range(0)] = 0
    until: Annotated[float, Range(0, 1, above=True, below=True)] | None = None
    nearest: Count | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            # Users may give a function, although the field is an attack.
            object.__setattr__(self, "attack", as_attack(self.attack))
        if self.through is not None and (isinstance(self.through, type) or not callable(self.through)):
            raise TypeError(f"through must be a model, a function from images to logits, got {self.through!r}")
        check_types(self)


def as_specs(attacks: Sequence[Any]) -> list[AttackSpec]:
    """Make an `AttackSpec` from each attack or function of a list; TypeError for anything else."""
    if isinstance(attacks, (str, Attack, AttackSpec)) or not isinstance(attacks, Sequence):
        raise TypeError(f"attacks must be a list, got {attacks!r}: give a single attack as [attack]")
    return [attack if isinstance(attack, AttackSpec) else AttackSpec(attack) for attack in attacks]


def lee_kim_2023(eps: float = 8 / 255, *, leave: bool = False) -> AttackSpec:
    """The PGD + EOT of Lee & Kim, "Robust evaluation of diffusion-based adversarial purification", ICCV 2023.

    The attack is in L-inf, with the full gradient, without a random start. It takes 200 steps of length 0.007 at eps =
    8/255 (in proportion at another eps), by the sign of the mean gradient over 20 draws. Two things differ from the
    paper. The attack returns the best iterate, not the last. And an image counts as robust only if all ``n_eval``
    predictions are correct. The field ``mean`` of the row is the accuracy of single predictions.

    Args:
        eps: radius in image units.
        leave: whether the attack of an image ends once all 20 draws of a step are wrong (`LeavingPGD`).

    Raises:
        ValueError: eps is below 0 or above 1.
    """
    # Few evaluations have this attack.
    from ...attacks import LeavingPGD

    check_eps(eps, "linf")
    kind, label = (LeavingPGD, f"{LEE_KIM}, left when 20 draws are wrong") if leave else (PGD, LEE_KIM)
    attack = kind(steps=200, alpha=0.007 * eps / (8 / 255), eot_iter=20, random_start=False, eps=eps, norm="linf")
    return AttackSpec(attack, label=label)


# -- selects the attacks that a model allows, and names the rows of the report: one row for each attack ----------------

logger = logging.getLogger("purify_fast")

_NORMS = {"linf": "L-inf", "l2": "L2", "l1": "L1", "flow": "flow"}


def feasible(
    specs: Sequence[AttackSpec], subject: Subject, context: AttackContext, name: str
) -> tuple[list[AttackSpec], list[str]]:
    """Select the attacks that this model allows, without duplicates, and make notes on the others."""
    notes, plan = list[str](), list[AttackSpec]()
    for spec in specs:
        if spec.max_images is not None and spec.max_images >= len(subject.y):
            # The limit excludes no image, so it is removed. The name of the row then does not mention it.
            spec = replace(spec, max_images=None)
        if getattr(spec.attack, "version", "") == "rand" and not subject.is_random:
            notes.append(f"{name}: {row_name(spec, context)} was left out: the model is deterministic")
            continue
        # An attack that is already in the plan would find nothing new.
        if spec not in plan and not any(_repeats(spec, other, context) for other in plan):
            plan.append(spec)
    if specs and not plan:
        notes.append(f"{name}: no attack ran, so this report does not say how robust the model is")
        logger.warning(notes[-1])
    names = [row_name(spec, context) for spec in plan]
    if double := [label for label in dict.fromkeys(names) if names.count(label) > 1]:
        raise ValueError(f"attacks must have different labels, got twice {', '.join(double)}: AttackSpec(label=...)")
    return plan, notes


def _repeats(spec: AttackSpec, earlier: AttackSpec, context: AttackContext) -> bool:
    """Return True if an attack repeats an earlier attack on the same or more images, after "margin" replaced losses."""
    losses: list[Any] = [getattr(attack, "loss", "margin") for attack in (spec.attack, earlier.attack)]
    if all(usable_loss(loss, context.num_classes) == loss for loss in losses):
        return False
    if earlier.until is not None or earlier.nearest is not None or (earlier.survivors_only and not spec.survivors_only):
        return False
    attacks = [_as_it_runs(attack, context) for attack in (spec.attack, earlier.attack)]
    spec = replace(spec, until=None, nearest=None, survivors_only=earlier.survivors_only, attack=attacks[0])
    return spec == replace(earlier, attack=attacks[1])


def _as_it_runs(attack: Attack, context: AttackContext) -> Attack:
    """The attack with the options with which it runs on this model."""
    own = {field.name for field in fields(attack)}
    options = {option: value for option, value in attack.resolved_for(context)._asdict().items() if option in own}
    if "give_up" in own:
        options["give_up"] = attack.may_end_early(context)
    return replace(attack, **options)


# -- names ------------------------------------------------------------------------------------------------------------


def ball_name(norm: str, eps: float) -> str:
    """A threat model in words, such as ``L-inf 8/255``."""
    return f"{_NORMS[norm]} {short(eps)}"


def threat_name(spec: AttackSpec, context: AttackContext) -> str | None:
    """The attack's threat model in words; None if it is the threat model of the report."""
    norm, eps = spec.attack.threat_model(context)
    same = norm == context.norm and math.isclose(eps, context.eps, rel_tol=1e-6)
    return None if same else ball_name(norm, eps)


def row_name(spec: AttackSpec, context: AttackContext) -> str:
    """The name of the attack's row in the report."""
    threat, name = threat_name(spec, context), spec.label
    if name is None:
        # The name of another model is its class, or the name of a function.
        through = getattr(spec.through, "__name__", type(spec.through).__name__)
        name = spec.attack.name(context) + ("" if spec.through is None else f" through {through}")
        name += "" if spec.nearest is None else f", from the {spec.nearest} nearest"
        name += "" if spec.max_images is None else f", first {spec.max_images}"
    return name + (f", {threat}" if threat is not None and threat not in name else "")


def short(eps: float) -> str:
    """Write a radius as a short decimal or as a multiple of 1/255, such as 0.5 or 8/255."""
    if float(f"{eps:.2g}") == eps:
        return f"{eps:.2g}"
    levels = 255 * eps
    return f"{levels:.0f}/255" if math.isclose(levels, round(levels), rel_tol=1e-5) else f"{eps:.3g}"


# -- the attacks of a model itself -------------------------------------------------------------------------------------

#: The names that a model may give in place of an `AttackSpec`, because what trains does not import what judges.
MAKERS: dict[Any, Callable[..., AttackSpec]] = {"AttackSpec": AttackSpec, "lee_kim_2023": lee_kim_2023}


def strong_attacks(model: Any, norm: str, eps: float) -> list[AttackSpec] | None:
    """Return the attacks that the protocol "strong" adds for a model; None if the model has none of its own."""
    if not supports(model, OwnAttacks):
        return None
    own = cast(OwnAttacks, model).strong_attacks(norm, eps)
    return as_specs([MAKERS[item[0]](**item[1]) if type(item) is tuple and item[0] in MAKERS else item for item in own])


# -- attack lists ------------------------------------------------------------------------------------------------------

#: Steps of the first attack of "fast" and "standard". Most images fall within the first few steps.
FIRST_STEPS = 10
#: Steps of the targeted attack of "fast" on many images. With 100 steps only 1 more image in 500 fell, and the attack
#: took a fifth longer.
FAST_STEPS = 60
#: An attack of "fast" or "standard" stops early when hardly any of the images that it has not reached can still fall,
#: namely at most this share of all images.
FAST_SHARE, STANDARD_SHARE = 0.01, 0.002
#: The images with the smallest margins decide the accuracy, so they are attacked again, in groups of NEAREST images.
#: RANDOM_NEAREST: the number of images of the first FAB-T of "standard" on a random model.
NEAREST, RANDOM_NEAREST = 10, 24
#: Square's number of queries per image in "fast", and in the first of two runs of Square in "standard".
SHORT_QUERIES = 1000
#: The number of draws that "rand" averages per step, as AutoAttack's version "rand" does.
RAND_DRAWS = 20
#: The name of the attack of "official" on a random model with fixed noise, or with its noise off.
AUTO = "AutoAttack standard through the model"
#: The attacks along the gradients of a surrogate.
TRANSFER = APGD(loss="dlr_targeted", precision="float32")
SHORT_TRANSFER = APGD(loss="margin", steps=20, precision="float32")
#: The long attacks of "fast" on a random model, along the gradients of this number of surrogates.
FAST_TRANSFER = APGD(loss="margin_targeted", steps=50, n_target_classes=4, precision="float32")
QUICK_TRANSFERS = 2
#: Further random starts of "strong", each in its own row: it shows how many images still fall to the last.
RESTARTS = 2


def protocol_attacks(
    name: ProtocolName, subject: Subject, ball: ThreatModel, base: Classifier | None = None, steps: int | None = None
) -> list[AttackSpec]:
    """The attacks of a protocol, in their order."""
    attacks = PROTOCOLS[name](subject, ball)
    if steps is not None and name in SEARCHES:
        attacks = [_shortened(spec, steps) for spec in attacks]
    if base is not None:
        attacks.append(_left(PGD(), "transfer from the base", through=base))
    return attacks


def _shortened(spec: AttackSpec, steps: int) -> AttackSpec:
    attack = spec.attack
    if isinstance(attack, APGD) and attack.steps is not None and attack.steps > max(steps, FIRST_STEPS):
        return replace(spec, attack=replace(attack, steps=steps))
    return spec


def _left(attack: Attack, label: str | None = None, **options: Any) -> AttackSpec:
    """Specify an attack on the images that withstood all earlier attacks."""
    return AttackSpec(attack, label=label, survivors_only=True, **options)


def _nearest(attack: Attack, images: int = NEAREST) -> AttackSpec:
    """Specify an attack on the images with the smallest margins, from another random start."""
    return _left(attack, nearest=images, seed=1)


def _fast(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    first = _left(APGD(loss="margin", steps=FIRST_STEPS))
    if subject.is_random:
        return [first, _left(APGD(loss="margin_targeted", steps=50, n_target_classes=4, give_up=True))]
    return [
        first,
        _left(APGD(loss="margin_targeted", steps=FAST_STEPS, give_up=True), until=FAST_SHARE),
        _nearest(APGD(loss="dlr_targeted", give_up=True)),
        _nearest(APGD(steps=30, restarts=10)),
        _nearest(Square(n_queries=SHORT_QUERIES, give_up=True)),
    ]


def _standard(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    losses: tuple[ApgdLoss, ...] = ("margin_targeted", "ce", "dlr_targeted")
    searches = [*(APGD(loss=loss, give_up=True) for loss in losses), Square(n_queries=SHORT_QUERIES, give_up=True)]
    attacks = [_left(APGD(loss="margin", steps=FIRST_STEPS))]
    attacks += [_left(attack, until=STANDARD_SHARE) for attack in searches]
    if (random := subject.is_random) and supports(subject.base_model, DeterministicMode):
        pairs = subject.surrogates(ball)[0]
        attacks += [_transferred(*pair) for pair in pairs if isinstance(pair[1], WithoutNoise)]
    # On a random model, the attacks on the nearest images run to the end.
    every = APGD(loss="margin_targeted", n_target_classes=None, precision="float32", restarts=2, give_up=not random)
    again = APGD(steps=50, precision="float32", restarts=20, give_up=not random)
    fab, square = FABT(n_target_classes=None, give_up=not random), Square(give_up=True)
    if random:
        return [*attacks, _nearest(FABT(give_up=True), RANDOM_NEAREST), *map(_nearest, (every, again, fab, square))]
    return [*attacks, *map(_nearest, (fab, every, again, square))]


def _rand(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    attack = APGD(loss="ce", eot_iter=-(-RAND_DRAWS // subject.votes), give_up=True)
    return [_left(attack), _left(replace(attack, loss="dlr"))]


def _strong(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    # In contrast to other protocols, every attack here gets all remaining images, and takes all of its steps.
    every = APGD(loss="margin_targeted", n_target_classes=None, precision="float32")
    rounded = APGD(loss="dlr_targeted", precision="bfloat16")
    attacks = [_left(APGD()), _left(APGD(loss="dlr_targeted")), _left(every, "APGD-T margin, every target, float32")]
    attacks += [_left(rounded, "APGD-T, gradients in bfloat16")]
    attacks += [replace(spec, survivors_only=True) for spec in _of_its_kind(subject, ball)]
    attacks += _through_heads(subject)
    attacks += [_transferred(*pair) for pair in subject.surrogates(ball)[0]]
    attacks += [_left(FABT(n_target_classes=None)), _left(Square())]
    again = APGD(loss="dlr_targeted", n_target_classes=None, precision="float32")
    label = "APGD-T, every target, random start"
    return [*attacks, *(_left(again, f"{label} {i + 1} of {RESTARTS + 1}", seed=i) for i in range(1, RESTARTS + 1))]


def _of_its_kind(subject: Subject, ball: ThreatModel) -> Sequence[AttackSpec]:
    """Return the attacks that the model's class defines, or Lee and Kim's PGD for other random purifiers."""
    model = subject.base_model
    own = strong_attacks(model, ball.norm, ball.eps)
    if own is not None:
        return own
    # A purifier with several samples is attacked with other aggregations of the samples instead.
    bare = is_purifier(model) and not supports(model, SampleLogits)
    return [lee_kim_2023(ball.eps, leave=True)] if bare and subject.is_random and ball.norm == "linf" else []


def without_early_stops(
    attacks: Sequence[AttackSpec], subject: Subject, ball: ThreatModel, order: Sequence[str], quick: bool = False
) -> list[AttackSpec]:
    """Give every attack all remaining images and all of its steps, and add attacks with the gradients of surrogates.

    The surrogates come in the ``order`` of their names. On a random model each has a short attack first, so that few
    images are left for the long ones. With ``quick``, only the first of them have a long attack.
    """
    surrogates, _ = subject.surrogates(ball, order)
    joined = [_transferred(*pair) for pair in surrogates]
    if subject.is_random:
        long = [_transferred(*pair, FAST_TRANSFER) for pair in surrogates[:QUICK_TRANSFERS]] if quick else joined
        joined = [*(_transferred(*pair, SHORT_TRANSFER) for pair in surrogates), *long]
    labels = {spec.label for spec in joined}
    own = [_without_early_stop(spec) for spec in attacks if spec.label not in labels]
    at = next((i for i, spec in enumerate(own) if isinstance(spec.attack, (FABT, Square))), len(own))
    return [*own[:at], *joined, *own[at:]]


def _without_early_stop(spec: AttackSpec) -> AttackSpec:
    attack = replace(spec.attack, give_up=False) if isinstance(spec.attack, EngineAttack) else spec.attack
    return replace(spec, attack=attack, until=None, nearest=None)


def _through_heads(subject: Subject) -> list[AttackSpec]:
    """Specify attacks along the gradients of other combinations of the samples; the defence itself judges them."""
    if not supports(subject.base_model, SampleLogits):
        return []
    model, attack = cast(SampleLogits, subject.base_model), APGD(loss="dlr_targeted")
    with torch.no_grad():
        # With a single sample all aggregations are about the same.
        if model.sample_logits(subject.sample_images()[:1]).shape[1] == 1:
            return []
    return [_left(attack, f"APGD-T through the samples' {head}", through=AttackersHead(model, head)) for head in HEADS]


def _transferred(name: str, surrogate: Classifier, attack: APGD = TRANSFER) -> AttackSpec:
    kind = f"APGD-{attack.steps}" if attack is SHORT_TRANSFER else "APGD-T"
    return _left(attack, f"{kind} by the gradients of {name}", through=surrogate)


def _official(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    from ..searches.original_autoattack import OriginalAutoAttack

    model, standard, rand = subject.base_model, OriginalAutoAttack(), AttackSpec(OriginalAutoAttack(version="rand"))
    if not subject.is_random:
        return [AttackSpec(standard)]
    # The version standard is only for models without randomness.
    if supports(model, FixedNoise):
        still = WithFixedNoise(model, subject.seed)
        return [AttackSpec(standard, through=still, label=f"{AUTO}, fixed noise"), rand]
    if supports(model, DeterministicMode):
        return [AttackSpec(standard, through=WithoutNoise(model), label=f"{AUTO}, noise off"), rand]
    return [rand]


#: The protocols that `without_early_stops` changes if probes find signs of masked gradients before the attacks.
SEARCHES = ("fast", "standard", "rand", "strong")
#: The protocols by name.
PROTOCOLS: dict[str, Callable[[Subject, ThreatModel], list[AttackSpec]]] = {
    "fast": _fast,
    "standard": _standard,
    "rand": _rand,
    "strong": _strong,
    "official": _official,
}


# -- prepares an evaluation: checks its arguments, and tells facts and notes that are known before the attacks ---------

#: The allowed dtypes of labels.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: The settings that change no attack of a protocol, or that a report tells in other places.
APART = {"protocol", "n_eval", "predict", "batch_size", "max_forward_batch", "cuda_graphs", "cudnn_benchmark", "seed"}
APART |= {"claim", "dataset_name", "together"}
#: The largest number of modules that a note names.
_NAMED = 3


# -- the arguments ----------------------------------------------------------------------------------------------------


def of_loader(x: Any, y: Any) -> tuple[Any, Any]:
    """Gather the batches ``(images, labels)`` of a DataLoader, if no labels are given beside it."""
    if y is not None or isinstance(x, (Tensor, np.ndarray)) or not isinstance(x, Iterable):
        return x, y
    batches = [batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else () for batch in x]
    if not batches or not all(batches):
        raise ValueError("x without y must be a loader of batches (images, labels), got other batches or none")
    images, labels = zip(*batches, strict=True)
    return torch.cat([*map(torch.as_tensor, images)]), torch.cat([*map(torch.as_tensor, labels)])


def collect(x: Any, y: Any) -> tuple[Tensor, Tensor, list[str]]:
    """Check and convert images and labels."""
    x, y = as_tensor("x", x), as_tensor("y", y)
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"x must be [N, C, H, W] with at least one image, got {list(x.shape)}")
    check_channels("x", x)
    if y.shape != (len(x),) or y.dtype not in INTEGERS:
        raise ValueError(f"y must be integer labels [N] = [{len(x)}], got {y.dtype} {list(y.shape)}")
    # Tensors made in inference mode cannot take part in gradients.
    y = y.clone() if y.is_inference() else y
    if x.dtype == torch.uint8:
        return x.float() / 255, y.to(torch.int64), []
    if not x.is_floating_point():
        raise ValueError(f"x must be uint8 or floating point, got {x.dtype}: if x is in 0..255, give x.byte()")
    x = x.float()
    least, most = map(float, x.detach().aminmax())
    check_range("x", least, most)
    x, notes = x.clone() if x.is_inference() else x.detach(), list[str]()
    if least < 0 or most > 1:
        beyond = max(-least, most - 1)
        notes.append(f"values of the images outside [0, 1] by rounding, by at most {beyond:.1g}, were clamped")
        x = x.clamp(0, 1)
    return x, y.to(torch.int64), notes


def read_attacks(
    config: EvaluateConfig,
    attacks: Sequence[Attack | AttackSpec | AttackFunction] | None,
    ball: ThreatModel,
    pixels: int,
) -> tuple[EvaluateConfig, list[AttackSpec]]:
    """Return the config with the protocol that runs (None if attacks are given), and the attacks' specifications."""
    if config.protocol is not None and attacks is not None:
        raise ValueError(f"protocol and attacks exclude each other, got protocol={config.protocol!r} and attacks")
    if config.protocol is None and attacks is None:
        config = replace(config, protocol="standard")
    specs = [] if attacks is None else as_specs(attacks)
    # If the package of an attack is missing, its error is raised here, before any work.
    for spec in specs:
        spec.attack.revision()
    if config.protocol == "official":
        # The other protocols need none of what calls the original AutoAttack.
        from ..searches.original_autoattack import implementation

        implementation()
    if ball.eps == 0 and (specs or config.protocol or config.probes):
        raise ValueError("eps must be above 0, got 0; for the accuracy on clean images only, give attacks=[]")
    # An attack with a radius of its own may not have a ball that contains every image.
    for attack in (spec.attack for spec in specs):
        own: Any = attack
        if attack.norms and own.eps is not None:
            check_eps(own.eps, own.norm or ball.norm, pixels=pixels)
    return config, specs


# -- the model --------------------------------------------------------------------------------------------------------


def changes(config: EvaluateConfig) -> str:
    """The settings that change the attacks or the probes of a protocol, such as "steps 5"; may be empty."""
    # Every protocol has probes by default.
    usual, config = EvaluateConfig(), replace(config, probes=None) if config.probes else config
    changed = {n: value for n, value in vars(config).items() if n not in APART and value != getattr(usual, n)}
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in changed.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def processor_of(device: torch.device) -> str:
    """The name of a GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def facts(config: EvaluateConfig, ball: ThreatModel, model: Classifier, device: torch.device) -> dict[str, str]:
    """The facts about all rows, for `Report.about`."""
    values = {
        "threat": ball_name(*ball),
        "version": f"purify_fast {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
        "seed": str(config.seed),
        # Code that was typed, into a notebook or after -c, has no command that repeats it.
        "command": None if "ps1" in vars(sys) or sys.argv[0] == "-c" else shlex.join(["python", *sys.orig_argv[1:]]),
        "processor": processor_of(device),
        "precision": precision_name(model, device),
        "claim": None if config.claim is None else f"{config.claim:g}",
        "dataset": config.dataset_name,
        "protocol": config.protocol,
        "changed": (config.protocol and changes(config)) or None,
        "predict": config.predict and f"the worst of {config.n_eval} draws",
        "judged": getattr(model, "judged_as", None),
    }
    return {name: value for name, value in values.items() if value is not None}


def note_of_modes(model: Classifier, name: str, strays: Sequence[nn.Module] = ()) -> list[str]:
    """Notes and warnings on modules in training mode inside a model in evaluation mode, or on those that ran outside.

    Args:
        model: the model, in the modes that its user gave it.
        name: the model's name.
        strays: modules in training mode that ran in the model and are no part of it, see `strays_frozen`.
    """
    own = [*model.named_modules()] if isinstance(model, nn.Module) and not model.training else []
    inside = [f"{place} ({type(part).__name__})" for place, part in own if part.training and not [*part.children()]]
    outside = [type(part).__name__ for net in strays for part in net.modules() if not [*part.children()]]
    put = "they were put into evaluation mode"
    stayed = "they stayed so, because they belong to a function; if this is not intended, call .eval() on them"
    notes = list[str]()
    kept = f"{put}; to keep them as they are, give a function: lambda x: model(x)"
    unregistered = f"no part of it is registered, so {put}" if isinstance(model, nn.Module) else stayed
    for names, what in (([] if strays else inside, kept), (outside, unregistered)):
        if names:
            named = ", ".join([*dict.fromkeys(names)][:_NAMED])
            notes.append(f"{name} has modules in training mode, {named}: {what}")
            logger.warning(notes[-1])
    return notes
