"""Defines the protocols, which are functions from the model and the ball to a list of attacks. Cheap attacks are first.

To add a protocol, write its function and add its name to `PROTOCOLS` and `ProtocolName`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from ...attacks import PGD, Attack
from ...attacks.base import ThreatModel
from ...attacks.losses import ApgdLoss
from ...defences.modes import WithFixedNoise, WithoutNoise
from ...protocols import Classifier, DeterministicMode, FixedNoise, OwnAttacks, SampleLogits, is_purifier, supports
from ..searches.apgd import APGD
from ..searches.engine.engine_attack import EngineAttack
from ..searches.fab import FABT
from ..searches.model_tests import HEADS, AttackersHead
from ..searches.square import Square
from ..surrogates.copies import in_order
from .config import ProtocolName
from .deadline import Subject
from .naming import AttackSpec, as_specs, lee_kim_2023

#: The names that a model may give in place of an `AttackSpec`, because what trains does not import what judges.
MAKERS: dict[Any, Callable[..., AttackSpec]] = {"AttackSpec": AttackSpec, "lee_kim_2023": lee_kim_2023}


def strong_attacks(model: Any, norm: str, eps: float) -> list[AttackSpec] | None:
    """Return the attacks that the protocol "strong" adds for a model; None if the model has none of its own."""
    if not supports(model, OwnAttacks):
        return None
    attacks = cast(OwnAttacks, model).strong_attacks(norm, eps)
    return as_specs(
        [MAKERS[item[0]](**item[1]) if type(item) is tuple and item[0] in MAKERS else item for item in attacks]
    )


# -- attack lists ------------------------------------------------------------------------------------------------------

#: Steps of the first attack of "fast" and "standard". Most images fall within the first few steps.
FIRST_STEPS = 10
#: Steps of the targeted attack of "fast" on many images. With 100 steps only 1 more image in 500 fell, and the attack
#: took a fifth longer.
FAST_STEPS = 60
#: An attack of "fast" or "standard" stops early when hardly any of the images that it has not reached can still fall,
#: namely at most this share of all images.
FAST_SHARE, STANDARD_SHARE = 0.01, 0.002
#: The images with the smallest margins decide the accuracy, so they are attacked again, at most so many of them, and in
#: groups (`NearestRule`). NEAREST: for FAB-T of "standard", RANDOM_NEAREST: the same on a random model, without groups.
#: FEWEST_NEAREST: for the slower attacks, and for "fast".
NEAREST, RANDOM_NEAREST, FEWEST_NEAREST = 20, 24, 10
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


def _nearest(attack: Attack, images: int = FEWEST_NEAREST) -> AttackSpec:
    """Specify an attack on the few images with the smallest margins, from another random start."""
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
    return [
        _left(APGD(loss="margin", steps=FIRST_STEPS)),
        *(_left(attack, until=STANDARD_SHARE) for attack in searches),
        *_without_noise(subject, ball),
        *_slow(subject.is_random),
    ]


def _slow(random: bool) -> list[AttackSpec]:
    """Specify the attacks of `_standard` on the nearest images. On a random model they run to the end."""
    every = APGD(loss="margin_targeted", n_target_classes=None, precision="float32", restarts=2, give_up=not random)
    again = APGD(steps=50, precision="float32", restarts=20, give_up=not random)
    fab, square = FABT(n_target_classes=None, give_up=not random), Square(give_up=True)
    if random:
        return [_nearest(FABT(give_up=True), RANDOM_NEAREST), *map(_nearest, (every, again, fab, square))]
    return [_nearest(fab, NEAREST), *map(_nearest, (every, again, square))]


def _without_noise(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    """Specify, for a random model, an attack with the gradients of the model without noise."""
    if not (subject.is_random and supports(subject.base_model, DeterministicMode)):
        return []
    return [_transferred(*pair) for pair in subject.surrogates(ball)[0] if isinstance(pair[1], WithoutNoise)]


def _rand(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    losses: tuple[ApgdLoss, ...] = ("ce", "dlr")
    predictions = -(-RAND_DRAWS // subject.votes)
    return [_left(APGD(loss=loss, eot_iter=predictions, give_up=True)) for loss in losses]


def _strong(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    # In contrast to other protocols, every attack here gets all remaining images, and takes all of its steps.
    attacks = [_left(APGD()), _left(APGD(loss="dlr_targeted"))]
    every = APGD(loss="margin_targeted", n_target_classes=None, precision="float32")
    attacks.append(_left(every, "APGD-T margin, every target, float32"))
    attacks.append(_left(APGD(loss="dlr_targeted", precision="bfloat16"), "APGD-T, gradients in bfloat16"))
    attacks += [replace(spec, survivors_only=True) for spec in _of_its_kind(subject, ball)]
    attacks += _through_heads(subject)
    attacks += [_transferred(*pair) for pair in subject.surrogates(ball)[0]]
    attacks += [_left(FABT(n_target_classes=None)), _left(Square())]
    again = APGD(loss="dlr_targeted", n_target_classes=None, precision="float32")
    for i in range(RESTARTS):
        attacks.append(_left(again, f"APGD-T, every target, random start {i + 2} of {RESTARTS + 1}", seed=i + 1))
    return attacks


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
    surrogates = in_order(subject.surrogates(ball)[0], order)
    joined = [_transferred(*pair) for pair in surrogates]
    if subject.is_random:
        long = [_transferred(*pair, FAST_TRANSFER) for pair in surrogates[:QUICK_TRANSFERS]] if quick else joined
        joined = [*(_transferred(*pair, SHORT_TRANSFER) for pair in surrogates), *long]
    labels = {spec.label for spec in joined}
    own = [_without_early_stop(spec) for spec in attacks if spec.label not in labels]
    at = next((i for i, spec in enumerate(own) if isinstance(spec.attack, (FABT, Square))), len(own))
    return [*own[:at], *joined, *own[at:]]


def _without_early_stop(spec: AttackSpec) -> AttackSpec:
    attack = spec.attack
    if isinstance(attack, EngineAttack):
        attack = replace(attack, give_up=False)
    return replace(spec, attack=attack, until=None, nearest=None)


def _through_heads(subject: Subject) -> list[AttackSpec]:
    """Specify attacks along the gradients of other combinations of the samples; the defence itself judges them."""
    if not supports(subject.base_model, SampleLogits):
        return []
    model, attack = cast(SampleLogits, subject.base_model), APGD(loss="dlr_targeted")
    with torch.no_grad():
        samples = model.sample_logits(subject.sample_images()[:1]).shape[1]
    if samples == 1:
        # With a single sample all aggregations are about the same.
        return []
    return [_left(attack, f"APGD-T through the samples' {head}", through=AttackersHead(model, head)) for head in HEADS]


def _transferred(name: str, surrogate: Classifier, attack: APGD = TRANSFER) -> AttackSpec:
    kind = f"APGD-{attack.steps}" if attack is SHORT_TRANSFER else "APGD-T"
    return _left(attack, f"{kind} by the gradients of {name}", through=surrogate)


def _official(subject: Subject, ball: ThreatModel) -> list[AttackSpec]:
    from ..searches.original_autoattack import OriginalAutoAttack

    model, standard = subject.base_model, OriginalAutoAttack()
    if not subject.is_random:
        return [AttackSpec(standard)]
    # The version standard is only for models without randomness.
    through: list[AttackSpec] = []
    if supports(model, FixedNoise):
        through = [AttackSpec(standard, through=WithFixedNoise(model, subject.seed), label=f"{AUTO}, fixed noise")]
    elif supports(model, DeterministicMode):
        through = [AttackSpec(standard, through=WithoutNoise(model), label=f"{AUTO}, noise off")]
    return [*through, AttackSpec(OriginalAutoAttack(version="rand"))]


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
