"""The signs that are asked before the attacks, and that decide how far these search."""

from __future__ import annotations

from .probes import AskedBefore
from .signs import MOST_MISSED, WRONG_GRADIENTS, _surely_above, _surely_more

#: The share of the images that may be without a gradient, as of a row (`purify_fast.attacks.GradientHealth`).
MOST_WITHOUT = 0.05


def signs_of_masking(asked: AskedBefore, is_random: bool) -> list[str]:
    """The signs, in words, that gradients do not show where a model falls; none for an honest model.

    Args:
        asked: what was measured before the attacks.
        is_random: whether the model's predictions differ from call to call.
    """
    n, signs = len(asked.fell), []
    if _surely_above(MOST_WITHOUT, asked.without_gradient, n):
        signs.append(f"{100 * asked.without_gradient:.0f} % of the images have no usable gradient")
    elif isinstance(asked.cosine, str):
        signs.append("gradients are missing or not finite")
    elif asked.cosine < WRONG_GRADIENTS:
        signs.append(f"the model does not change as its gradients say (cosine {asked.cosine:.2f})")
    fell = [sum(each) for each in asked.copies.values()]
    # each further attack on a random model fells some images by luck: one surrogate alone must find many
    missed = max(fell, default=0) if is_random else sum(fell)
    if _surely_more(missed, MOST_MISSED, n):
        signs.append(f"{missed} of {n} images withstand short attacks by the model's own gradients and fall to others")
    return signs
