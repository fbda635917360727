"""The alarms: signs that an attack was stopped by something else than robustness.

An alarm is a function that returns a verdict, the measurement, and the row or probe that shows it; None if it does not
apply to a model. To add an alarm, write it here below `alarm`. Alarms are asked in the order of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..inputs import INSTEAD_OF_PROBABILITIES, ONE_HOT
from ..rows import GRADIENT_FREE, Row, followed
from .evidence import MISSING, Evidence, Finding, Verdict
from .probes import STEPS, Probes

#: The share of the images that may fall to something other than the model's own gradients.
MOST_MISSED = 0.03
#: Gradients are wrong if the cosine between the changes that they promise and the measured changes is below this.
WRONG_GRADIENTS, ODD_GRADIENTS = 0.6, 0.9
#: The number of points by which five random starts may be stronger than a single start, on average.
START_UNRELIABLE, START_NOTED = 0.15, 0.08
#: The share of the correctly classified images whose class may change from draw to draw.
NOISE_UNRELIABLE, NOISE_NOTED = 0.10, 0.03
#: The share of the predictions that rounding may change, and how many images a short attack may miss.
ROUNDED, FEW = 0.02, 4
#: The least number of images that counts as a difference: one or two of a few images are a large share by luck.
MORE_THAN_LUCK = 3

#: A verdict, the measurement in words, and the row or probe that shows it.
Outcome = tuple[Verdict, str, str]


#: Every alarm: its name, its function, whether this takes the probes too, and the options of its `Finding`.
ALARMS: list[tuple[str, Callable[..., Outcome | None], bool, dict[str, Any]]] = []


def alarm(
    name: str, of_probes: bool = False, **options: Any
) -> Callable[[Callable[..., Outcome | None]], Callable[..., Outcome | None]]:
    """A decorator of a function that judges evidence.

    Args:
        name: name of the alarm.
        of_probes: whether it judges measurements of probes; without probes it is not asked.
        options: ``of_answers`` and ``prominent`` of its `Finding`.
    """

    def add(judge: Callable[..., Outcome | None]) -> Callable[..., Outcome | None]:
        ALARMS.append((name, judge, of_probes, options))
        return judge

    return add


def findings(evidence: Evidence) -> list[Finding]:
    """The findings of all alarms, in order.

    A number of 0 cannot be too high, whatever stopped an attack: reasons to doubt it are then only noted, unless the
    model's answers themselves are inconsistent.

    Args:
        evidence: rows and probes of one model.
    """
    every: list[Finding] = []
    for name, judge, of_probes, options in ALARMS:
        if not of_probes or evidence.probes is not None:
            outcome = judge(evidence, evidence.probes) if of_probes else judge(evidence)
            every += [] if outcome is None else [Finding(name, *outcome, **options)]
    doubts = [finding for finding in every if finding.verdict == "unreliable"]
    every = [replace(each, advice=_advice(each, evidence)) if each in doubts else each for each in every]
    doubts = [finding for finding in every if finding.verdict == "unreliable"]
    if not evidence.nothing_left or any(finding.of_answers for finding in doubts):
        return every
    remark = "but no image is left that could fall"
    return [
        replace(each, verdict="noted", measured=f"{each.measured}; {remark}") if each in doubts else each
        for each in every
    ]


class Advice(NamedTuple):
    """Advice for a sign that gives a reason to doubt the number.

    Args:
        look: what to look for in the model.
        efforts: what to run, by the names in `EFFORTS`; only what was not tried is named. The last is "strong": until
            it ran, no advice says that the stronger attacks of this package did.
    """

    look: str
    efforts: tuple[str, ...] = ()


#: Stronger attacks, in the words of an advice. `Evidence.tried` tells which of them ran.
EFFORTS = {
    "BPDA": "attack by BPDA, which needs a defence with purify and classifier",
    "restarts": "give the attacks restarts, as PGD(restarts=5)",
    "draws": "average each gradient over more draws (eot_iter=20)",
    "strong": "run the protocol strong",
}
#: The advice if all of these ran.
WRITTEN_FOR_IT = (
    "the stronger attacks of this package ran: only an attack that is written for this defence, as a function "
    "(model, x, y), may find more"
)
_OVERFLOW = "look for a division by 0, log(0) or an overflow of exp() in forward"
_SATURATED = "look for saturated outputs, rounding or clipping"
#: Advice for each sign that gives a reason to doubt the number.
ADVICE = {
    "finite predictions": Advice(_OVERFLOW),
    "logits": Advice("return the logits, as they are before a softmax or argmax"),
    "gradient-free against gradients": Advice("the gradients mislead", ("BPDA", "strong")),
    "transfer against gradients": Advice("the gradients mislead", ("BPDA", "strong")),
    "a further attack": Advice("a short attack finds what the attacks of the report left", ("strong",)),
    "parts and softened copies": Advice("the gradients of these copies find what the model's own do not", ("strong",)),
    "huge radius": Advice(f"the attacks fail even where they must succeed: {_SATURATED}"),
    "radius sweep": Advice(f"the attack fails at the larger radius: {_SATURATED}"),
    "random start": Advice("the result depends on where an attack begins", ("restarts", "strong")),
    "gradients against differences": Advice(
        "look for rounding, .detach() or a backward of its own in forward", ("BPDA", "strong")
    ),
    "batch size": Advice("let the logits of an image depend on that image alone: is a module in training mode?"),
    "noise and seeds": Advice("set no seed in forward", ("draws", "strong")),
    "same answer again": Advice(
        "let forward keep no state, and compute the same whether gradients are recorded or not"
    ),
}
#: Advice if gradients are missing, by the reason.
WITHOUT_GRADIENTS = {
    "not finite": Advice(_OVERFLOW),
    "no gradient": Advice(
        "the output has no grad_fn: is there a torch.no_grad() or .detach() in forward, or a detour through NumPy? A "
        "diffusion defence that must save memory can use checkpointed_steps",
        ("BPDA", "strong"),
    ),
    "zero gradient": Advice("look for rounding, sign, argmax or a saturated output in forward", ("BPDA", "strong")),
}


def _advice(finding: Finding, evidence: Evidence) -> str:
    """The advice for a sign that gives a reason to doubt the number; it names only what was not tried."""
    advice, tried = _kind_of_advice(finding, evidence), evidence.tried()
    if not advice.efforts:
        return advice.look
    left = [EFFORTS[effort] for effort in advice.efforts if effort not in tried]
    return f"{advice.look}; {', or '.join(left) or WRITTEN_FOR_IT}"


def _kind_of_advice(finding: Finding, evidence: Evidence) -> Advice:
    if finding.alarm not in ("gradient health", "gradients against differences"):
        return ADVICE[finding.alarm]
    missing = "" if evidence.probes is None else evidence.probes.cosine
    if isinstance(missing, str) and missing:
        return WITHOUT_GRADIENTS[missing]
    if finding.alarm in ADVICE:
        return ADVICE[finding.alarm]
    broken = [row.health for row in evidence.with_counted_gradients() if row.lacked_gradients and row.health]
    return WITHOUT_GRADIENTS["not finite" if any(health["nonfinite"] for health in broken) else "zero gradient"]


def _verdict(unreliable: bool, noted: bool = False) -> Verdict:
    return "unreliable" if unreliable else "noted" if noted else "passed"


def _surely_more(count: int, share: float, n: int) -> bool:
    """Tell whether the count among n images exceeds the share by more than luck explains."""
    return count - 1.5 * math.sqrt(count) > share * n


def _surely_above(limit: float, share: float, n: int) -> bool:
    """Tell whether a share of n images exceeds its limit by more images than luck explains."""
    return share > limit and share * n >= MORE_THAN_LUCK


# -- of rows ----------------------------------------------------------------------------------------------------------


@alarm("better than guessing", prominent=True)
def better_than_guessing(evidence: Evidence) -> Outcome | None:
    """Alarm if the model does not classify clean images better than a guess would."""
    clean = next((row for row in evidence.rows if row.kind == "clean"), None)
    if clean is None or evidence.classes is None:
        return None
    chance = 1 / evidence.classes
    text = (
        f"{100 * clean.mean:.1f} % of the clean images are classified correctly; a guess among {evidence.classes} "
        f"classes is right for {100 * chance:.1f} %"
    )
    if clean.mean > chance + 2 * math.sqrt(chance * (1 - chance) / clean.n):
        return "passed", text, ""
    ask = "is the model trained, do the labels count as its classes do, and does it take images in [0, 1]?"
    return "noted", f"{text}: {ask}", clean.attack


@alarm("finite predictions", of_answers=True)
def finite_predictions(evidence: Evidence) -> Outcome:
    """Alarm if a prediction names no class."""
    broken = [row for row in evidence.rows if row.nonfinite_predictions]
    if not broken:
        return "passed", "every prediction names a class", ""
    worst = max(broken, key=lambda row: row.nonfinite_predictions / (row.n * row.n_eval))
    text = f"{worst.nonfinite_predictions} of {worst.n * worst.n_eval} predictions name no class; they count as wrong"
    return "unreliable", text, worst.attack


@alarm("logits")
def logits(evidence: Evidence) -> Outcome | None:
    """Alarm if the model returns the probabilities after a softmax in place of logits."""
    if evidence.probabilities is None:
        return None
    if not evidence.probabilities:
        return "passed", "the model does not return probabilities", ""
    if evidence.one_hot:
        return "unreliable", f"the model {ONE_HOT}", ""
    text = (
        "the model returns probabilities (from 0 to 1, with the sum 1). Their gradients vanish where it is sure: "
        f"{INSTEAD_OF_PROBABILITIES}"
    )
    return "unreliable", text, ""


@alarm("gradient health")
def gradient_health(evidence: Evidence) -> Outcome:
    """Alarm if no attack through the whole model had gradients to work with."""
    counted = evidence.with_counted_gradients()
    if not counted:
        return "not asked", "no attack counted the gradients of the model itself", ""
    broken = [row for row in counted if row.lacked_gradients]
    # Attacks without gradients, or along those of other models, are not among them.
    along = followed(counted)
    if not broken:
        all_of = f"the attack {along}" if len(counted) == 1 else f"all {len(counted)} attacks {along}"
        return "passed", f"{all_of} had finite gradients that moved the images", ""
    shares = f"not finite / zero / images not moved: {broken[0].describe_health()}"
    if len(broken) < len(counted):
        text = f"{len(broken)} of {len(counted)} attacks {along} lacked usable ones; {shares}"
        return "noted", text, broken[0].attack
    all_of = f"the only attack {along}" if len(counted) == 1 else f"all {len(counted)} attacks {along}"
    return "unreliable", f"{all_of} lacked usable ones; {shares}", broken[0].attack


@alarm("gradient-free against gradients")
def gradient_free_beats_gradients(evidence: Evidence) -> Outcome:
    """Alarm if an attack without gradients breaks images that attacks with gradients left."""
    return _beaten(evidence, lambda row: row.kind in GRADIENT_FREE, "without gradients")


@alarm("transfer against gradients")
def transfer_beats_gradients(evidence: Evidence) -> Outcome:
    """Alarm if images of another model, or its gradients, break images that the model's own gradients left."""
    return _beaten(evidence, lambda row: row.transferred, "on another model, or along its gradients,")


def _beaten(evidence: Evidence, other: Callable[[Row], bool], kind: str) -> Outcome:
    fallen = evidence.fallen()
    own = [(row, mask) for row, mask in fallen if row.own_gradients and row.health is not None]
    others = [(row, mask) for row, mask in fallen if other(row)]
    if not own or not others:
        missing = "along the model's own gradients" if others else kind
        return "not asked", f"no attack {missing} ran", ""
    full = max(row.n for row, _ in fallen)
    by_gradients, by_others = np.zeros(full, dtype=bool), np.zeros(full, dtype=bool)
    for row, mask in own:
        by_gradients[: row.n] |= mask
    for row, mask in others:
        by_others[: row.n] |= mask
    count = int((by_others & ~by_gradients).sum())
    best = max(others, key=lambda pair: int((pair[1] & ~by_gradients[: pair[0].n]).sum()))[0]
    text = f"{count} of {full} images fell to such an attack and withstood every one by the model's own gradients"
    verdict = _verdict(_surely_more(count, MOST_MISSED, full), noted=count > 0.01 * full)
    return verdict, text, best.attack if count else ""


# -- of probes --------------------------------------------------------------------------------------------------------


@alarm("a further attack", of_probes=True)
def further_attack(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if a short attack breaks images that the attacks of the report left."""
    if probes.further is None:
        return "not asked", "no image was left", ""
    return _unless_blind(evidence, *_missed({"the model itself": probes.further}, probes.n))


def _unless_blind(evidence: Evidence, verdict: Verdict, text: str, row: str) -> Outcome:
    """The outcome of attacks along the model's gradients; without gradients they could not have found anything."""
    blind = evidence.blind()
    return ("not asked", f"{blind}; {text}", row) if blind and verdict != "unreliable" else (verdict, text, row)


@alarm("parts and softened copies", of_probes=True)
def softened_copies(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if gradients of the model's parts or of softened copies break images that its own gradients left."""
    reasons: dict[str, list[str]] = {}
    for name, reason in probes.absent.items():
        reasons.setdefault(reason, []).append(name)
    absent = "; ".join(f"{', '.join(names)} could not be made: {reason}" for reason, names in reasons.items())
    if not probes.missed:
        none = (
            "no image was left" if probes.further is None else "the model has no parts or copies with other gradients"
        )
        return ("noted", absent, "") if absent else ("not asked", none, "")
    verdict, text, row = _missed(probes.missed, probes.n)
    if absent:
        return _verdict(verdict == "unreliable", noted=True), f"{text}; {absent}", row
    return verdict, text, row


def _missed(missed: dict[str, int], n: int) -> Outcome:
    """Images that short attacks broke and the report's attacks left, by the model whose gradients were followed."""
    count, best = sum(missed.values()), max(missed, key=lambda name: missed[name])
    gradients = f"{STEPS} steps of APGD along the gradients of {best}" + (" and others" if len(missed) > 1 else "")
    text = f"{count} of {n} images withstood every attack of the report, but fell to {gradients}"
    if not count:
        text = f"{gradients} broke none of the first {n} images that the report's attacks had left"
    verdict = _verdict(_surely_more(count, MOST_MISSED, n), noted=count > 1)
    return verdict, text, f"probe: APGD by the gradients of {best}" if count else ""


@alarm("huge radius", of_probes=True)
def huge_radius(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if images are left at a radius at which every image may become any other."""
    (radius, accuracy), chance = probes.eps[-1], probes.chance
    allowed = chance + 2 * math.sqrt(chance * (1 - chance) / probes.n)
    text = f"{100 * accuracy:.0f} % of {probes.n} images at eps {radius:.3g}"
    # With many classes, chance is less than one image: a few images that a short attack missed prove nothing.
    bad = accuracy > allowed and (accuracy - chance) * probes.n >= FEW
    if bad:
        text = f"{text}, where at most chance, {100 * chance:.0f} %, can be left"
    else:
        text = f"{text}, {'within luck of' if accuracy > chance else 'no more than'} chance ({100 * chance:.0f} %)"
    return _unless_blind(evidence, _verdict(bad), text, f"probe: PGD at eps {radius:.3g}")


@alarm("radius sweep", of_probes=True)
def radius_sweep(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if a larger radius leaves more images."""
    rises = [(b[1] - a[1], a, b) for a, b in zip(probes.eps, probes.eps[1:], strict=False)]
    rise, a, b = max(rises, key=lambda entry: entry[0])
    if rise > 2 * math.sqrt(max(rise, 0) / probes.n) and rise * probes.n >= MORE_THAN_LUCK:
        text = f"from eps {a[0]:.3g} to {b[0]:.3g} accuracy rises from {100 * a[1]:.0f} % to {100 * b[1]:.0f} %"
        return "unreliable", text, f"probe: PGD at eps {b[0]:.3g}"
    curve = ", ".join(f"{100 * accuracy:.0f} % at {eps:.3g}" for eps, accuracy in probes.eps)
    return _unless_blind(evidence, "passed", f"accuracy does not rise with the radius: {curve}", "")


@alarm("random start", of_probes=True)
def random_start(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if the random start of an attack matters."""
    gain = probes.one_start - probes.all_starts
    one, five = 100 * probes.one_start, 100 * probes.all_starts
    text = f"five random starts leave {five:.0f} %, one leaves {one:.0f} % on average"
    strong = _surely_above(START_UNRELIABLE, gain, probes.n)
    weaker = _weaker(evidence, probes.all_starts, probes.n) if strong else ""
    verdict = _verdict(strong and not weaker, noted=gain > START_NOTED)
    return _unless_blind(evidence, verdict, text + weaker, "probe: five random starts")


def _weaker(evidence: Evidence, accuracy: float, n: int) -> str:
    """A remark that the attacks of the report left less than a short attack; empty if they did not.

    Troubles of an attack that is weaker than those of the report do not show that the report's attacks had any.
    """
    left = evidence.left(n)
    if left is None or left >= accuracy:
        return ""
    return f"; the attacks of the report leave {100 * left:.0f} % of the same images, which is less"


@alarm("gradients against differences", of_probes=True)
def finite_differences(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if the model does not change as its gradients say."""
    row = "probe: small steps in random directions"
    if isinstance(probes.cosine, str):
        # The alarm on gradient health covers the gradients that attacks counted.
        counted = evidence.with_counted_gradients()
        told = bool(counted) and all(each.lacked_gradients for each in counted)
        return "not asked" if told else "unreliable", MISSING[probes.cosine], row
    text = f"cosine {probes.cosine:.2f} between the changes that gradients promise and those that are measured"
    return _verdict(probes.cosine < WRONG_GRADIENTS, noted=not probes.cosine >= ODD_GRADIENTS), text, row


@alarm("batch size", of_probes=True, of_answers=True)
def batch_size(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if an image's class depends on the images beside it."""
    changes, row = probes.batch_changes, "probe: the same images alone and in a batch"
    if changes is None:
        return "not asked", "the model is random, with no fixed_noise() that fixes it", row
    text = f"{100 * changes:.0f} % of the predictions change with the batch"
    return _verdict(changes > ROUNDED, noted=changes > 0), text, row


@alarm("noise and seeds", of_probes=True)
def noise(evidence: Evidence, probes: Probes) -> Outcome | None:
    """Alarm if an image withstands only because predictions and gradients are drawn anew."""
    if probes.sets_seed:
        text = "the model sets the seed of torch's generator itself: its noise, if it has any, is always the same"
        return "unreliable", text, "probe: the generator's state after two seeds"
    if not probes.eot:
        return None
    (few, by_few), (many, by_many) = probes.eot[0], probes.eot[-1]
    gain = by_few - by_many
    text = (
        f"the class of {100 * probes.varying:.0f} % of the correctly classified images changes from draw to draw; "
        f"gradients over {many:.0f} draws leave {100 * by_many:.0f} %, over {few:.0f} {100 * by_few:.0f} %"
    )
    varies = _surely_above(NOISE_UNRELIABLE, probes.varying, probes.n)
    gains = _surely_above(START_UNRELIABLE, gain, probes.n)
    weaker = _weaker(evidence, by_many, probes.n) if gains and not varies else ""
    verdict = _verdict(varies or (gains and not weaker), noted=probes.varying > NOISE_NOTED or gain > 0.05)
    return verdict, text + weaker, f"probe: gradients over {many:.0f} draws"


@alarm("same answer again", of_probes=True, of_answers=True)
def same_answer_again(evidence: Evidence, probes: Probes) -> Outcome:
    """Alarm if the model answers differently when it is asked often, or while gradients are recorded."""
    row = "probe: the clean images again, after all attacks"
    if probes.watched_changes:
        share = probes.watched_changes
        text = f"the logits of {100 * share:.0f} % of the images are others while gradients are recorded"
        return _verdict(share > ROUNDED, noted=True), text, "probe: the images with gradients recorded"
    if probes.later_changes > 0:
        share = probes.later_changes
        text = f"{100 * share:.0f} % of the predictions on clean images are others than before the attacks"
        return _verdict(share > ROUNDED, noted=True), text, row
    if probes.state_changed:
        text = "weights, buffers or attributes are others than before the attacks, the predictions are the same"
        return "noted", text, row
    return "passed", "the predictions on clean images are the same as before the attacks", row
