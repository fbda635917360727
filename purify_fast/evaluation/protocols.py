"""Which attacks are run: protocols by name, each a function from what is known of the model to a list of attacks.

To add one, write its function and name it in `PROTOCOLS` and `ProtocolName`. Cheap attacks come first: what has fallen
is attacked no more, so that the costly ones see few images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .._validation import check_literal
from ..attacks import APGD, FAB, PGD, Attack, AutoAttack, Square
from ..attacks.autoattack import implementation
from ..protocols import Classifier, DeterministicMode, FixedNoise, SampleLogits, supports
from .specs import AttackSpec, Variant
from .surrogates import Surrogate, surrogates

ProtocolName = Literal["fast", "standard", "rand", "strong", "official"]

#: Draws that "rand" averages per step, as AutoAttack's version of that name.
RAND_DRAWS = 20
#: Further random starts of "strong", each a row of its own, so that the gain of the last one is seen.
RESTARTS = 2
#: The attacker's aggregations of a defence's samples; its own is attacked in any case.
HEADS = ("lse", "mean", "mean_sigmoid")


@dataclass(frozen=True)
class AttackedModel:
    """What a protocol may know of the model.

    Args:
        model: images to logits; any callable.
        some: a few of the images ``[B, C, H, W]``, on the model's device.
        num_classes: of its logits.
        is_random: whether two predictions differ.
        base: an undefended classifier to transfer from, if one was given.
    """

    model: Classifier
    some: Tensor
    num_classes: int
    is_random: bool
    base: Classifier | None = None


def protocol_attacks(name: str, attacked: AttackedModel) -> list[AttackSpec]:
    """The attacks of a protocol, in their order.

    Args:
        name: of the protocol, one of `ProtocolName`.
        attacked: what is attacked.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: "official" without the package pyautoattack or autoattack.
    """
    check_literal("protocol", name, ProtocolName)
    found = PROTOCOLS[name](attacked)
    if attacked.base is not None:
        found.append(_left(PGD(), "transfer from the base", target=attacked.base))
    return found


def _left(attack: Attack, label: str | None = None, *, target: Classifier | None = None) -> AttackSpec:
    """An attack on what the ones before it left."""
    return AttackSpec(attack, label=label, target=target, survivors_only=True)


def _fast(attacked: AttackedModel) -> list[AttackSpec]:
    return [_left(APGD(steps=25)), _left(APGD(loss="dlr_targeted"))]


def _standard(attacked: AttackedModel) -> list[AttackSpec]:
    own = [_left(APGD()), _left(APGD(loss="dlr_targeted")), _left(FAB()), _left(Square())]
    return own + _without_noise(attacked)


def _without_noise(attacked: AttackedModel) -> list[AttackSpec]:
    """For a random model: what its deterministic version falls to, tried on the model itself."""
    if not (attacked.is_random and supports(attacked.model, DeterministicMode)):
        return []
    quiet = [s for s in surrogates(attacked.model, attacked.some, attacked.num_classes) if "noise" in s.name]
    return [_transferred(surrogate) for surrogate in quiet]


def _rand(attacked: AttackedModel) -> list[AttackSpec]:
    return [_left(APGD(eot_iter=RAND_DRAWS)), _left(APGD(loss="dlr", eot_iter=RAND_DRAWS))]


def _strong(attacked: AttackedModel) -> list[AttackSpec]:
    found = [_left(APGD()), _left(APGD(loss="dlr_targeted"))]
    found.append(_left(APGD(loss="margin_targeted", n_target_classes=None, precision="float32")))
    if supports(attacked.model, SampleLogits):
        found += [
            AttackSpec(APGD(loss="margin_targeted"), aggregation=head, survivors_only=True)
            for head in HEADS
        ]
    found += [_transferred(s) for s in surrogates(attacked.model, attacked.some, attacked.num_classes)]
    found.append(_left(APGD(loss="dlr_targeted", precision="bfloat16"), "APGD-T, gradients in bfloat16"))
    found += [_left(FAB()), _left(Square())]
    starts = [f"APGD-T from another random start, {i + 2} of {RESTARTS + 1}" for i in range(RESTARTS)]
    again = APGD(loss="dlr_targeted", n_target_classes=None, precision="float32")
    return found + [_left(_Reseeded(again, i + 1), label) for i, label in enumerate(starts)]


def _transferred(surrogate: Surrogate) -> AttackSpec:
    # a copy is fooled first, and the model later: its image goes on when the copy has fallen
    attack = APGD(loss="dlr_targeted", leave_when_fallen=False)
    return _left(attack, f"APGD-T on {surrogate.name}, tried on the model", target=surrogate.model)


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


#: Every protocol by its name.
PROTOCOLS: dict[str, Callable[[AttackedModel], list[AttackSpec]]] = {
    "fast": _fast,
    "standard": _standard,
    "rand": _rand,
    "strong": _strong,
    "official": _official,
}
