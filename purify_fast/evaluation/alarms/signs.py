"""The alarms: signs that an attack was stopped by something else than robustness.

An alarm is a function that returns a verdict, the measurement, and the row or probe that shows it; None if it does not
apply to a model. To add an alarm, write it here below `alarm`. Alarms are asked in the order of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
#: The number of points by which gradients over many draws may be stronger than those over a few.
DRAWS_UNRELIABLE, DRAWS_NOTED = 0.15, 0.05
#: The share of the correctly classified images whose class may change from draw to draw.
VARYING = 0.03
#: The share of the predictions that rounding may change.
ROUNDED = 0.02
#: The least number of images that counts as a difference: one or two of a few images are a large share by luck.
MORE_THAN_LUCK = 3

#: The name of the model beside its surrogates, and of the probe that shows what gradients of a model found.
ITSELF, PROBE_OF = "the model itself", "probe: APGD by the gradients of {}"
#: Words for gradients that no attack counted.
NOT_COUNTED = "no attack counted the gradients of the model itself"

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
        of_probes: whether it judges measurements of probes alone; without probes it is not asked.
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
    "draws": "average each gradient over more draws (eot_iter=20)",
    "strong": "run the protocol strong",
}
#: The advice if all of these ran.
WRITTEN_FOR_IT = (
    "the stronger attacks of this package ran: only an attack that is written for this defence, as a function "
    "(model, x, y), may find more"
)
_OVERFLOW = "look for a division by 0, log(0) or an overflow of exp() in forward"
#: Advice for each sign that gives a reason to doubt the number.
ADVICE = {
    "finite predictions": Advice(_OVERFLOW),
    "logits": Advice("return the logits, as they are before a softmax or argmax"),
    "gradient health": Advice("look for rounding, .detach() or a backward of its own in forward", ("BPDA", "strong")),
    "missed images": Advice("the model's own gradients do not show where it falls", ("BPDA", "strong")),
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
    if finding.alarm == "missed images" and finding.row == PROBE_OF.format(ITSELF):
        return Advice("a short attack finds what the attacks of the report left", ("strong",))
    if finding.alarm != "gradient health":
        return ADVICE[finding.alarm]
    cosine = None if evidence.probes is None else evidence.probes.cosine
    if isinstance(cosine, str):
        return WITHOUT_GRADIENTS[cosine]
    counted = evidence.with_counted_gradients()
    lacking = [row.health for row in counted if row.lacked_gradients and row.health]
    if not lacking or len(lacking) < len(counted):
        return ADVICE[finding.alarm]
    return WITHOUT_GRADIENTS["not finite" if any(health["nonfinite"] for health in lacking) else "zero gradient"]


def _verdict(unreliable: bool, noted: bool = False) -> Verdict:
    return "unreliable" if unreliable else "noted" if noted else "passed"


def _surely_more(count: int, share: float, n: int) -> bool:
    """Tell whether the count among n images exceeds the share by more than luck explains."""
    return count - 1.5 * math.sqrt(count) > share * n


def _surely_above(limit: float, share: float, n: int) -> bool:
    """Tell whether a share of n images exceeds its limit by more images than luck explains."""
    return share > limit and share * n >= MORE_THAN_LUCK


# -- of rows and short attacks ----------------------------------------------------------------------------------------


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
    """Alarm if no attack through the whole model had usable gradients, or the model does not change as they say."""
    counted = evidence.with_counted_gradients()
    lacking = [row for row in counted if row.lacked_gradients]
    verdict, text, row = _of_counted(counted, lacking) if counted else ("not asked", "", "")
    if verdict == "unreliable":
        return verdict, text, row
    if evidence.probes is None:
        text = f"{text}, and were not compared with finite differences" if counted else NOT_COUNTED
        return verdict, text, row
    cosine, probe = evidence.probes.cosine, "probe: small steps in random directions"
    if cosine == "not finite" and any(each.nonfinite_predictions for each in evidence.rows):
        # predictions that are not finite are a sign of their own
        return verdict, text or MISSING[cosine], row
    if isinstance(cosine, str):
        return "unreliable", MISSING[cosine], probe
    told = f"cosine {cosine:.2f} between the changes that gradients promise and those that are measured"
    text = f"{text}; {told}" if text else told
    if cosine < WRONG_GRADIENTS:
        return "unreliable", text, probe
    noted = verdict == "noted" or not cosine >= ODD_GRADIENTS
    return _verdict(False, noted), text, row or (probe if noted else "")


def _of_counted(counted: Sequence[Row], lacking: Sequence[Row]) -> Outcome:
    """The outcome of the gradients that attacks counted.

    Args:
        counted: attacks along the model's own gradients.
        lacking: those of them that lacked usable gradients.
    """
    # Attacks without gradients, or along those of other models, are not among them.
    along = followed(counted)
    every = f"the only attack {along}" if len(counted) == 1 else f"all {len(counted)} attacks {along}"
    if not lacking:
        return "passed", f"{every} had finite gradients that moved the images", ""
    shares = f"not finite / zero / images not moved: {lacking[0].describe_health()}"
    if len(lacking) < len(counted):
        some = f"{len(lacking)} of {len(counted)} attacks {along} lacked usable ones; {shares}"
        return "noted", some, lacking[0].attack
    return "unreliable", f"{every} lacked usable ones; {shares}", lacking[0].attack


@alarm("missed images")
def missed_images(evidence: Evidence) -> Outcome:
    """Alarm if attacks along the model's own gradients leave images that other or shorter attacks break."""
    outcomes = [each for each in (_missed_by_rows(evidence), _missed_by_report(evidence)) if each is not None]
    if not outcomes:
        return "not asked", evidence.blind() or "nothing but attacks along the model's own gradients was tried", ""
    verdict, _, row = min(outcomes, key=lambda each: ("unreliable", "noted", "passed").index(each[0]))
    return verdict, "; ".join(text for said, text, _ in outcomes if said == verdict), row


def _missed_by_rows(evidence: Evidence) -> Outcome | None:
    """Images that fell to attacks without the model's own gradients alone; None unless both kinds of attacks ran."""
    fallen = evidence.fallen()
    own = [(row, mask) for row, mask in fallen if row.own_gradients and row.health is not None]
    others = [(row, mask) for row, mask in fallen if row.kind in GRADIENT_FREE or row.transferred]
    if not own or not others:
        return None
    full = max(row.n for row, _ in fallen)

    def any_of(masks: Iterable[np.ndarray]) -> np.ndarray:
        found = np.zeros(full, dtype=bool)
        for mask in masks:
            found[: len(mask)] |= mask
        return found

    by_own = any_of(mask for _, mask in own)
    more = {row.attack: mask & ~by_own[: row.n] for row, mask in others}
    count = int(any_of(more.values()).sum())
    best = max(more, key=lambda name: int(more[name].sum()))
    text = (
        f"{count} of {full} images withstood every attack along the model's own gradients and fell to an attack "
        "without them"
    )
    return _verdict(_surely_more(count, MOST_MISSED, full), noted=count > 0.01 * full), text, best if count else ""


def _missed_by_report(evidence: Evidence) -> Outcome | None:
    """Images that all attacks left and a short attack before them broke; None if no other gradients were tried."""
    probes = evidence.probes
    if probes is None:
        return None
    reasons: dict[str, list[str]] = {}
    for name, reason in probes.absent.items():
        reasons.setdefault(reason, []).append(name)
    absent = "; ".join(f"{', '.join(names)} could not be made: {reason}" for reason, names in reasons.items())
    missed = dict(probes.missed)
    # a short attack along the model's own gradients proves nothing where it finds nothing
    if probes.further:
        missed = {ITSELF: probes.further} | missed
    if not missed:
        return ("noted", absent, "") if absent else None
    count, best = sum(missed.values()), max(missed, key=lambda name: missed[name])
    gradients = f"{STEPS} steps of APGD along the gradients of {best}" + (" and others" if len(missed) > 1 else "")
    text = f"{count} of {probes.n} images withstood every attack of the report, but fell to {gradients}"
    if not count:
        text = f"{gradients} broke none of the first {probes.n} images that the report's attacks had left"
    text = f"{text}; {absent}" if absent else text
    verdict = _verdict(_surely_more(count, MOST_MISSED, probes.n), noted=count > 1 or bool(absent))
    return verdict, text, PROBE_OF.format(best) if count else ""


# -- of probes --------------------------------------------------------------------------------------------------------


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
    """Alarm if the model sets seeds, or an image withstands only because each gradient averages few draws."""
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
    strong = _surely_above(DRAWS_UNRELIABLE, gain, probes.n)
    weaker = _weaker(evidence, by_many, probes.n) if strong else ""
    verdict = _verdict(strong and not weaker, noted=probes.varying > VARYING or gain > DRAWS_NOTED)
    return verdict, text + weaker, f"probe: gradients over {many:.0f} draws"


def _weaker(evidence: Evidence, accuracy: float, n: int) -> str:
    """A remark that the attacks of the report left less than a short attack; empty if they did not.

    Troubles of an attack that is weaker than those of the report do not show that the report's attacks had any.
    """
    left = evidence.left(n)
    if left is None or left >= accuracy:
        return ""
    return f"; the attacks of the report leave {100 * left:.0f} % of the same images, which is less"


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
