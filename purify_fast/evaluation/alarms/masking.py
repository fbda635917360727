"""Signs of masked gradients, which are measured before the attacks.

If there are such signs, every attack gets all images that have not fallen, and takes all of its steps.
"""

from __future__ import annotations

from .probes import Probes
from .signs import MOST_MISSED, WRONG_GRADIENTS, _surely_above, _surely_more

#: The gradients of a model are taken as masked if more than this share of the images has no usable gradient.
#: `purify_fast.attacks.GradientHealth` has the same limit for zero gradients of an attack.
MOST_WITHOUT = 0.05


def signs_of_masking(asked: Probes, is_random: bool) -> list[str]:
    """Describe the signs that a model's gradients do not lead to its adversarial images; the list may be empty.

    Args:
        asked: the probes' measurements before the attacks.
        is_random: whether two predictions of the model on the same images differ.
    """
    n, signs = asked.n, []
    if _surely_above(MOST_WITHOUT, asked.without_gradient, n):
        signs.append(f"{100 * asked.without_gradient:.0f} % of the images have no usable gradient")
    elif isinstance(asked.cosine, str):
        signs.append("gradients are missing or not finite")
    elif asked.cosine is not None and asked.cosine < WRONG_GRADIENTS:
        signs.append(f"the model does not change as its gradients predict (cosine {asked.cosine:.2f})")
    fell = [sum(each) for each in asked.copies.values()]
    # On a random model each further attack makes images fall by chance, so only the surrogate with most images counts.
    missed = max(fell, default=0) if is_random else sum(fell)
    if _surely_more(missed, MOST_MISSED, n):
        signs.append(
            f"{missed} of {n} images withstand short attacks with the model's own gradients, but fall to short attacks "
            "with other gradients"
        )
    return signs
