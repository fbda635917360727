"""Which attacks are run: protocols by name, each a function from what is known of the model to a list of attacks.

To add one, write its function and name it in `PROTOCOLS` and `ProtocolName`. Cheap attacks come first: what has fallen
is attacked no more, so that the costly ones see few images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from .._validation import check_literal
from ..attacks import APGD, FABT, PGD, Attack, AutoAttack, Square
from ..attacks.autoattack import implementation
from ..attacks.heads import HEADS, AttackersHead, Head
from ..attacks.losses import ApgdLoss
from ..protocols import AuthorsEvaluation, Classifier, DeterministicMode, FixedNoise, SampleLogits, supports
from .specs import AttackSpec
from .surrogates import Surrogate, surrogates

ProtocolName = Literal["fast", "standard", "rand", "strong", "official", "authors"]

#: How "authors" calls the one row of a model that does not say how its authors evaluate it.
AS_A_CLASSIFIER = "as ARREST's paper evaluates a classifier: AutoAttack standard"
#: Draws that "rand" averages per step, as AutoAttack's version of that name.
RAND_DRAWS = 20
#: Further random starts of "strong", each a row of its own, so that the gain of the last one is seen.
RESTARTS = 2


@dataclass(frozen=True)
class AttackedModel:
    """What a protocol may know of the model.

    Args:
        model: images to logits; any callable.
        some: a few of the images ``[B, C, H, W]``, on the model's device.
        num_classes: of its logits.
        is_random: whether two predictions differ.
        eps: radius of the report's ball, in image units.
        base: an undefended classifier to transfer from, if one was given.
    """

    model: Classifier
    some: Tensor
    num_classes: int
    is_random: bool
    eps: float
    base: Classifier | None = None


def protocol_attacks(name: str, attacked: AttackedModel) -> list[AttackSpec]:
    """The attacks of a protocol, in their order.

    Args:
        name: of the protocol, one of `ProtocolName`.
        attacked: what is attacked.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: "official" or "authors" without the package pyautoattack.
    """
    check_literal("protocol", name, ProtocolName)
    attacks = PROTOCOLS[name](attacked)
    # an evaluation of others has no such row
    if attacked.base is not None and name != "authors":
        attacks.append(_left(PGD(), "transfer from the base", target=attacked.base))
    return attacks


def _left(attack: Attack, label: str | None = None, **options: Any) -> AttackSpec:
    """An attack on what the ones before it left."""
    return AttackSpec(attack, label=label, survivors_only=True, **options)


def _fast(attacked: AttackedModel) -> list[AttackSpec]:
    return [_left(APGD(steps=25)), _left(APGD(loss="dlr_targeted", give_up=True))]


def _standard(attacked: AttackedModel) -> list[AttackSpec]:
    four = APGD(give_up=True), APGD(loss="dlr_targeted", give_up=True), FABT(give_up=True), Square(give_up=True)
    return [_left(attack) for attack in four] + _without_noise(attacked)


def _without_noise(attacked: AttackedModel) -> list[AttackSpec]:
    """For a random model: what its deterministic version falls to, tried on the model itself."""
    if not (attacked.is_random and supports(attacked.model, DeterministicMode)):
        return []
    return [_transferred(surrogate) for surrogate in _surrogates(attacked) if surrogate.kind == "without noise"]


def _surrogates(attacked: AttackedModel) -> list[Surrogate]:
    return surrogates(attacked.model, attacked.some, attacked.num_classes)


def _rand(attacked: AttackedModel) -> list[AttackSpec]:
    losses: tuple[ApgdLoss, ...] = ("ce", "dlr")
    return [_left(APGD(loss=loss, eot_iter=RAND_DRAWS, give_up=True)) for loss in losses]


def _strong(attacked: AttackedModel) -> list[AttackSpec]:
    # every search to its end: what the other protocols give up is looked at here
    attacks = [_left(APGD()), _left(APGD(loss="dlr_targeted"))]
    every = APGD(loss="margin_targeted", n_target_classes=None, precision="float32")
    attacks.append(_left(every, "APGD-T margin, every target, float32"))
    attacks.append(_left(APGD(loss="dlr_targeted", precision="bfloat16"), "APGD-T, gradients in bfloat16"))
    if supports(attacked.model, SampleLogits):
        attacks += [_head(attacked.model, head) for head in HEADS]
    attacks += [_transferred(surrogate) for surrogate in _surrogates(attacked)]
    attacks += [_left(FABT(n_target_classes=None)), _left(Square())]
    again = APGD(loss="dlr_targeted", n_target_classes=None, precision="float32")
    for i in range(RESTARTS):
        attacks.append(_left(again, f"APGD-T, every target, random start {i + 2} of {RESTARTS + 1}", seed=i + 1))
    return attacks


def _head(model: Classifier, head: Head) -> AttackSpec:
    """An attacker's own aggregation of the samples; the defence judges by its own."""
    seen = AttackersHead(cast(SampleLogits, model), head)
    return _left(APGD(loss="dlr_targeted"), f"APGD-T through the samples' {head}", gradients_from=seen)


def _transferred(surrogate: Surrogate) -> AttackSpec:
    label = f"APGD-T by the gradients of {surrogate.name}"
    return _left(APGD(loss="dlr_targeted", precision="float32"), label, gradients_from=surrogate.model)


def _official(attacked: AttackedModel) -> list[AttackSpec]:
    # if it is missing, no work is begun
    implementation()
    if not attacked.is_random:
        return [AttackSpec(AutoAttack())]
    quiet: list[AttackSpec] = []
    if supports(attacked.model, FixedNoise):
        quiet = [AttackSpec(AutoAttack(), "fixed")]
    elif supports(attacked.model, DeterministicMode):
        quiet = [AttackSpec(AutoAttack(), "deterministic")]
    return [*quiet, AttackSpec(AutoAttack(version="rand"))]


def _authors(attacked: AttackedModel) -> list[AttackSpec]:
    # if it is missing, no work is begun
    implementation()
    if supports(attacked.model, AuthorsEvaluation):
        return list(cast(AuthorsEvaluation, attacked.model).authors_attacks(attacked.eps))
    return [AttackSpec(AutoAttack(), label=AS_A_CLASSIFIER, judge=attacked.model)]


def notes_of_protocol(name: str | None, model: Classifier) -> list[str]:
    """What a report must say of its protocol: of "authors", whose evaluation it is, and why there is no headline.

    Args:
        name: of the protocol; None for a list of attacks.
        model: what was attacked.
    """
    if name != "authors":
        return []
    whose = "the evaluation that its authors published"
    if not supports(model, AuthorsEvaluation):
        whose = (
            "AutoAttack standard, as ARREST's paper evaluates a classifier, since the model has no authors_attacks() "
            "that says how its own authors evaluate it"
        )
    return [
        f"the protocol 'authors' repeats {whose}: its rows are for comparison with published numbers, they are no "
        "judgement of this package, and there is no headline"
    ]


#: Every protocol by its name.
PROTOCOLS: dict[str, Callable[[AttackedModel], list[AttackSpec]]] = {
    "fast": _fast,
    "standard": _standard,
    "rand": _rand,
    "strong": _strong,
    "official": _official,
    "authors": _authors,
}
