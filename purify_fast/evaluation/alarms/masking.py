"""Signs of masked gradients, measured before the attacks: they decide how far the attacks search."""

from __future__ import annotations

from .probes import Probes
from .signs import MOST_MISSED, WRONG_GRADIENTS, _surely_above, _surely_more

#: The largest share of images that may lack a usable gradient before gradients count as masked.
#: `purify_fast.attacks.GradientHealth` uses the same limit for a row.
MOST_WITHOUT = 0.05


def signs_of_masking(asked: Probes, is_random: bool) -> list[str]:
    """The signs, in words, that gradients do not show where a model falls; an honest model has none.

    Args:
        asked: measurements made before the attacks.
        is_random: whether the model's predictions differ from call to call.
    """
    n, signs = asked.n, []
    if _surely_above(MOST_WITHOUT, asked.without_gradient, n):
        signs.append(f"{100 * asked.without_gradient:.0f} % of the images have no usable gradient")
    elif isinstance(asked.cosine, str):
        signs.append("gradients are missing or not finite")
    elif asked.cosine < WRONG_GRADIENTS:
        signs.append(f"the model does not change as its gradients say (cosine {asked.cosine:.2f})")
    fell = [sum(each) for each in asked.copies.values()]
    # On a random model every further attack breaks some images by chance. So only the best surrogate counts there, and
    # not the sum over all surrogates.
    missed = max(fell, default=0) if is_random else sum(fell)
    if _surely_more(missed, MOST_MISSED, n):
        signs.append(f"{missed} of {n} images withstand short attacks by the model's own gradients and fall to others")
    return signs
