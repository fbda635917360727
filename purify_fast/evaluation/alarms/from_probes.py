"""Alarms that probes of the model raise."""

from __future__ import annotations

import math

from .finding import Evidence, Finding, Verdict
from .probes import ITSELF, STEPS

#: Cosine between the changes that gradients promise and those that are measured, below which they are wrong.
WRONG_GRADIENTS, ODD_GRADIENTS = 0.6, 0.9
#: By how many points five random starts may be stronger than one, on average.
START_UNRELIABLE, START_NOTED = 0.15, 0.08
#: The share of the correctly classified images whose class may change from draw to draw.
NOISE_UNRELIABLE, NOISE_NOTED = 0.10, 0.03
#: The share of the predictions that rounding may change, and how many images a short attack may miss.
ROUNDED, FEW = 0.02, 4
#: The share of the images that a short attack may find beyond the report.
MOST_MISSED = 0.03
#: So many images at least must make a difference: one or two of a few images are a large share by luck.
MORE_THAN_LUCK = 3
PROBE = "probe: "


def huge_radius(evidence: Evidence) -> Finding | None:
    """Whether anything is left where every image may become any other."""
    p = evidence.probes
    if p is None:
        return None
    accuracy, radius = p.eps[-1][1], p.eps[-1][0]
    allowed = p.chance + 2 * math.sqrt(p.chance * (1 - p.chance) / p.n)
    text = f"{100 * accuracy:.0f} % at eps {radius:.3g}, where at most chance, {100 * p.chance:.0f} %, can be left"
    # of many classes chance is less than one image: a few that a short attack missed prove nothing
    bad = accuracy > allowed and (accuracy - p.chance) * p.n >= FEW
    return Finding("huge radius", _verdict(bad), text, f"{PROBE}PGD at eps {radius:.3g}")


def radius_sweep(evidence: Evidence) -> Finding | None:
    """Whether a larger radius ever leaves more."""
    p = evidence.probes
    if p is None:
        return None
    rises = [(b[1] - a[1], a, b) for a, b in zip(p.eps, p.eps[1:], strict=False)]
    rise, a, b = max(rises, key=lambda entry: entry[0])
    text = "accuracy falls with the radius: " + ", ".join(f"{100 * acc:.0f} % at {eps:.3g}" for eps, acc in p.eps)
    bad = rise > 2 * math.sqrt(max(rise, 0) / p.n) and rise * p.n >= MORE_THAN_LUCK
    if bad:
        text = f"from eps {a[0]:.3g} to {b[0]:.3g} accuracy rises from {100 * a[1]:.0f} % to {100 * b[1]:.0f} %"
    return Finding("radius sweep", _verdict(bad), text, f"{PROBE}PGD at eps {b[0]:.3g}" if bad else "")


def random_start(evidence: Evidence) -> Finding | None:
    """Whether it matters where an attack begins."""
    p = evidence.probes
    if p is None:
        return None
    gain = p.one_start - p.all_starts
    text = f"five random starts leave {100 * p.all_starts:.0f} %, one leaves {100 * p.one_start:.0f} % on average"
    strong = _surely_above(START_UNRELIABLE, gain, p.n)
    weaker = _weaker(evidence, p.all_starts, p.n) if strong else ""
    verdict: Verdict = "unreliable" if strong and not weaker else "noted" if gain > START_NOTED else "passed"
    return Finding("random start", verdict, text + weaker, f"{PROBE}five random starts")


def _weaker(evidence: Evidence, accuracy: float, n: int) -> str:
    """That the attacks of the report left less than a short attack; empty where they did not.

    The troubles of an attack that is weaker than those of the report do not show that these had any.
    """
    left = evidence.left(n)
    if left is None or left >= accuracy:
        return ""
    return f"; the attacks of the report leave {100 * left:.0f} % of the same images, which is less"


def finite_differences(evidence: Evidence) -> Finding | None:
    """Whether the model changes as its gradients say."""
    p = evidence.probes
    if p is None:
        return None
    row = f"{PROBE}small steps in random directions"
    if p.cosine is None:
        text = "logits or gradients are not finite, or there is no gradient"
        return Finding("gradients against differences", "unreliable", text, row)
    text = f"cosine {p.cosine:.2f} between the changes that gradients promise and those that are measured"
    verdict: Verdict = "passed" if p.cosine >= ODD_GRADIENTS else "noted"
    return Finding("gradients against differences", "unreliable" if p.cosine < WRONG_GRADIENTS else verdict, text, row)


def batch_size(evidence: Evidence) -> Finding | None:
    """Whether an image's class depends on the images beside it."""
    p = evidence.probes
    if p is None:
        return None
    row = f"{PROBE}the same images alone and in a batch"
    if p.batch_changes is None:
        return Finding("batch size", "not asked", "the model is random, with no fixed_noise() that fixes it", row)
    text = f"{100 * p.batch_changes:.0f} % of the predictions change with the batch"
    verdict: Verdict = "unreliable" if p.batch_changes > ROUNDED else "noted" if p.batch_changes > 0 else "passed"
    return Finding("batch size", verdict, text, row)


def noise(evidence: Evidence) -> Finding | None:
    """Whether an image withstands because predictions are drawn anew, and gradients with them."""
    p = evidence.probes
    if p is not None and p.sets_seed:
        text = "the model sets the seed of torch's generator itself: its noise, if it has any, is always the same"
        return Finding("noise and seeds", "unreliable", text, f"{PROBE}the generator's state after two seeds")
    if p is None or not p.eot:
        return None
    first, last = p.eot[0], p.eot[-1]
    gain = first[1] - last[1]
    text = (
        f"the class of {100 * p.varying:.0f} % of the correctly classified images changes from draw to draw; gradients "
        f"over {last[0]:.0f} draws leave {100 * last[1]:.0f} %, over {first[0]:.0f} {100 * first[1]:.0f} %"
    )
    varies, gains = _surely_above(NOISE_UNRELIABLE, p.varying, p.n), _surely_above(START_UNRELIABLE, gain, p.n)
    weaker = _weaker(evidence, last[1], p.n) if gains and not varies else ""
    strong = varies or (gains and not weaker)
    verdict: Verdict = "unreliable" if strong else "noted" if p.varying > NOISE_NOTED or gain > 0.05 else "passed"
    return Finding("noise and seeds", verdict, text + weaker, f"{PROBE}gradients over {last[0]:.0f} draws")


def calls(evidence: Evidence) -> Finding | None:
    """Whether the model answers otherwise when it is asked often, or by who watches gradients."""
    p = evidence.probes
    if p is None:
        return None
    row = f"{PROBE}the clean images again, after all attacks"
    if p.watched_changes:
        text = f"the logits of {100 * p.watched_changes:.0f} % of the images are others while gradients are recorded"
        verdict: Verdict = "unreliable" if p.watched_changes > ROUNDED else "noted"
        return Finding("same answer again", verdict, text, f"{PROBE}the images with gradients recorded")
    if p.later_changes > 0:
        text = f"{100 * p.later_changes:.0f} % of the predictions on clean images are others than before the attacks"
        return Finding("same answer again", "unreliable" if p.later_changes > ROUNDED else "noted", text, row)
    if p.state_changed:
        text = "weights, buffers or attributes are others than before the attacks, the predictions are the same"
        return Finding("same answer again", "noted", text, row)
    return Finding(
        "same answer again", "passed", "the predictions on clean images are the same as before the attacks", row
    )


def further_attack(evidence: Evidence) -> Finding | None:
    """Whether a short attack finds what the attacks of the report left."""
    return _missed(evidence, "a further attack", itself=True)


def softened_copies(evidence: Evidence) -> Finding | None:
    """Whether the gradients of the model's parts and of softened copies find what its own gradients left."""
    return _missed(evidence, "parts and softened copies", itself=False)


def _missed(evidence: Evidence, alarm: str, itself: bool) -> Finding | None:
    p = evidence.probes
    if p is None:
        return None
    found = {name: count for name, count in p.missed.items() if (name == ITSELF) == itself}
    if not found:
        return Finding(alarm, "not asked", "no image was left" if not p.missed else "the model has none")
    count, best = sum(found.values()), max(found, key=lambda name: found[name])
    gradients = f"{STEPS} steps of APGD along the gradients of {best}" + (" and others" if len(found) > 1 else "")
    text = f"{count} of {p.n} images withstood every attack of the report, but fell to {gradients}"
    if not count:
        text = f"of {p.n} images, {gradients} broke none that the report's attacks had left"
    # a few images are luck
    surely = count - 1.5 * math.sqrt(count)
    verdict: Verdict = "unreliable" if surely > MOST_MISSED * p.n else "noted" if count > 1 else "passed"
    return Finding(alarm, verdict, text, f"{PROBE}APGD by the gradients of {best}" if count else "")


def _surely_above(limit: float, share: float, n: int) -> bool:
    """Whether a share of n images is above its limit, and of more images than luck explains."""
    return share > limit and share * n >= MORE_THAN_LUCK


def _verdict(bad: bool) -> Verdict:
    return "unreliable" if bad else "passed"


PROBE_ALARMS = (
    further_attack,
    softened_copies,
    huge_radius,
    radius_sweep,
    random_start,
    finite_differences,
    batch_size,
    noise,
    calls,
)
