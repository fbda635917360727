"""The alarms: the evidence that they judge, their functions, and the words of their findings.

To add an alarm, write a function in this file with an `Alarm` as its decorator, which returns an `Finding`, or None if
the alarm does not apply. The alarms run in the order of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ...attacks import objective as health
from ..request.deadline import Subject
from ..results.rows import CUT, Points, Row, worst_rows
from .probes import STEPS, Missing, Probes

Verdict = Literal["passed", "noted", "unreliable", "not asked"]

#: The report's words for each reason why gradients could not be used.
MISSING: dict[Missing, str] = {
    "not finite": "logits or gradients are not finite",
    "no gradient": "there is no gradient: PyTorch has no derivative of the output with respect to the images",
    "zero gradient": "the gradient is zero everywhere",
}

#: The meaning of each verdict, in words for the reader of a report. "The number" is the robust accuracy.
STATES = {
    "passed": "nothing speaks against the number",
    "noted": "worth knowing, and no reason to doubt the number",
    "unreliable": "a reason to doubt the number",
    "not asked": "nothing was measured that could tell",
}

#: Gradients are doubtful if more than this share withstands the attacks with them, but falls to other attacks.
MOST_MISSED = 0.03
#: Limits for the cosine between the predicted and the measured changes of the margin; exact gradients give a cosine of
#: 1. Below WRONG_GRADIENTS the robust accuracy is unreliable, below ODD_GRADIENTS the cosine is noted.
WRONG_GRADIENTS, ODD_GRADIENTS = 0.6, 0.9
#: Limits for the share of images that fall only if each step averages many draws. Above DRAWS_UNRELIABLE the robust
#: accuracy is unreliable, above DRAWS_NOTED the share is noted.
DRAWS_UNRELIABLE, DRAWS_NOTED = 0.15, 0.05
#: If the class changes from draw to draw for more than this share of the correctly classified images, this is noted.
VARYING = 0.03
#: Rounding may change at most this share of the predictions. A larger share of changes makes the accuracy unreliable.
ROUNDED = 0.02
#: A difference counts only if it is at least this number of images, because one or two images may differ by chance.
MORE_THAN_LUCK = 3

#: The name of the model itself, in a list with its surrogates.
ITSELF = "the model itself"
#: The report's words if no attack counted how many gradients of the model itself were usable.
NOT_COUNTED = "no attack counted the gradients of the model itself"
#: The advice to attack more strongly: without and with BPDA.
STRONGER = "run the protocol strong, or write an attack for this defence, as a function (model, x, y)"
BY_BPDA = f"attack by BPDA, which needs a defence with purify and classifier; {STRONGER}"


@dataclass(frozen=True)
class Finding:
    """The result of one alarm, which is a line in the table "Can this number be believed?" of a report.

    The function of an alarm gives the first four fields, and `findings` the others.

    Args:
        verdict: "passed", "noted", "unreliable" or "not asked", see `purify_fast.judge.alarms`.
        measured: the measurements, in words.
        row: the name of the attack, or of the probe, that shows the sign.
        advice: what to do; empty for the alarm's usual advice, or in a report if there is nothing to do.
        alarm: name of the alarm.
        model: the model's name.
        of_answers: whether the alarm is about missing or inconsistent predictions, which make even 0 % doubtful.
        prominent: whether the report shows the finding next to the headline even if it is only noted.
    """

    verdict: Verdict
    measured: str
    row: str = ""
    advice: str = ""
    alarm: str = ""
    model: str = ""
    of_answers: bool = False
    prominent: bool = False

    @property
    def beside_headline(self) -> bool:
        """Return True if the report shows the finding next to its headline."""
        return self.verdict == "unreliable" or (self.verdict == "noted" and self.prominent)

    @property
    def in_words(self) -> str:
        """The finding as a text, with the attack or the probe that shows it."""
        return f"{self.alarm}: {self.measured}" + (f" ({self.row})" if self.row else "")


@dataclass(frozen=True)
class Evidence:
    """The evidence about one model, which the alarms judge.

    Args:
        rows: the clean rows and the rows of attacks, as they were made; rows over several attacks are left out.
        probes: the measurements of the probes; None if there were no probes.
        subject: the model with its images; None if it is unknown.
        cosine: between the changes that gradients predict and the measured changes; None if not measured.
    """

    rows: Sequence[Row]
    probes: Probes | None = None
    subject: Subject | None = None
    cosine: float | Missing | None = None

    def attacks(self) -> list[Row]:
        """The attacks in the report's threat model."""
        return [row for row in self.rows if row.is_attack and row.threat is None]

    def with_counted_gradients(self) -> list[Row]:
        """The attacks that used the model's own gradients and counted them."""
        return [row for row in self.attacks() if row.health is not None and row.own_gradients]

    def blind(self) -> str:
        """The reason why the model's gradients could not lead to a success; empty if none is known."""
        counted = self.with_counted_gradients()
        if self.probes is not None and isinstance(self.probes.cosine, str):
            return MISSING[self.probes.cosine]
        lacked = bool(counted) and all(row.lacked_gradients for row in counted)
        return f"the attacks had no usable gradients: {counted[0].health_in_words()}" if lacked else ""

    def wrong(self, n: int) -> np.ndarray | None:
        """For each of the first n images, the largest share of wrong draws after an attack, ``[n]``, or None.

        The draws are those that choose a random model's points, because the draws that judge must stay fresh.
        """
        rows = [row for row in self.attacks() if row.n >= n]
        return Points.worst(rows, n).wrong if rows else None

    def fallen(self) -> list[tuple[Row, np.ndarray]]:
        """Return each attack with the share of wrong draws on its images, ``[images]``; 0 on others."""
        clean = [row.share_wrong for row in self.rows if row.kind == "clean"]
        right = clean[0] < 1 if clean else np.ones(max((row.n for row in self.rows), default=0), dtype=bool)
        left, fallen = right.copy(), []
        for row in self.attacks():
            wrong = np.pad(row.share_wrong, (0, len(right) - row.n))
            fallen.append((row, np.where(left if row.of_survivors else right, wrong, 0.0)))
            left &= wrong < 1
        return fallen


# -- alarms -----------------------------------------------------------------------------------------------------------


OVERFLOW = "look for a division by 0, log(0) or an overflow of exp() in forward"
#: The advice for each reason why gradients are missing.
WITHOUT_GRADIENTS = {
    "not finite": OVERFLOW,
    "no gradient": (
        "the output has no grad_fn: does forward use torch.no_grad(), .detach() or NumPy? A diffusion defence that "
        f"must save memory can use checkpointed_steps; {BY_BPDA}"
    ),
    "zero gradient": f"look for rounding, sign, argmax or a saturated output in forward; {BY_BPDA}",
}


#: The function of an alarm. Its arguments are the evidence, and the probes if `Alarm.of_probes` is True. The function
#: returns None if the alarm does not apply to the model.
AlarmRule = Callable[..., Finding | None]


@dataclass(frozen=True)
class Alarm:
    """The properties of an alarm, whose object decorates the alarm's function.

    With ``of_probes``, the function also gets the probes, and the alarm is left out of an evaluation without probes.
    """

    name: str
    advice: str = ""
    of_probes: bool = False
    of_answers: bool = False
    prominent: bool = False

    def __call__(self, rule: AlarmRule) -> AlarmRule:
        ALARMS[self] = rule
        return rule


#: The alarms with their functions, in the order of this file.
ALARMS: dict[Alarm, AlarmRule] = {}


def findings(evidence: Evidence) -> list[Finding]:
    """Run all alarms, and return their findings in order.

    If every image has fallen, "unreliable" becomes "noted", because the robust accuracy cannot be too high, unless a
    finding is about missing or inconsistent predictions.

    Args:
        evidence: rows and probes of one model.
    """
    every: list[Finding] = []
    for alarm, rule in ALARMS.items():
        if alarm.of_probes and (evidence.probes is None or not evidence.probes.whole):
            continue
        finding = rule(evidence, evidence.probes) if alarm.of_probes else rule(evidence)
        if finding is not None:
            advice = (finding.advice or alarm.advice) if finding.verdict == "unreliable" else ""
            named = replace(finding, alarm=alarm.name, advice=advice)
            every.append(replace(named, of_answers=alarm.of_answers, prominent=alarm.prominent))
    doubts = [finding for finding in every if finding.verdict == "unreliable"]
    # An image has fallen to an attack or to a probe, on a random model in at least one draw.
    fallen = [] if evidence.probes is None else evidence.probes.fallen()
    worst = [row.robust for row in worst_rows(evidence.rows) if row.attack == "worst"]
    if any(finding.of_answers for finding in doubts) or all(np.delete(robust, fallen).any() for robust in worst):
        return every
    draws = any(row.n_eval > 1 for row in evidence.attacks())
    remark = f"; but no image is left that {'is right in all draws' if draws else 'could fall'}"
    noted = {finding: replace(finding, verdict="noted", measured=finding.measured + remark) for finding in doubts}
    return [noted.get(finding, finding) for finding in every]


def _verdict(unreliable: bool, noted: bool = False) -> Verdict:
    return "unreliable" if unreliable else "noted" if noted else "passed"


def _surely_more(count: int, share: float, n: int) -> bool:
    """Return True if ``count`` exceeds the share ``share`` of n images by more than chance."""
    return count - 1.5 * math.sqrt(count) > share * n


def _surely_above(limit: float, share: float, n: int) -> bool:
    """Return True if the measured share of n images is above the limit, and is at least `MORE_THAN_LUCK` images."""
    return share > limit and share * n >= MORE_THAN_LUCK


# -- alarms from rows and short attacks -------------------------------------------------------------------------------


@Alarm("better than guessing", prominent=True)
def better_than_guessing(evidence: Evidence) -> Finding | None:
    """Alarm if the model's accuracy on clean images is not above that of a random guess."""
    clean = next((row for row in evidence.rows if row.kind == "clean"), None)
    if clean is None or evidence.subject is None:
        return None
    classes = evidence.subject.num_classes
    chance = 1 / classes
    what = "clean images" if clean.n_eval == 1 else "single draws on clean images"
    text = f"{100 * clean.mean:.1f} % of the {what} are classified correctly; "
    text += f"a guess among {classes} classes is right for {100 * chance:.1f} %"
    if clean.mean > chance + 2 * math.sqrt(chance * (1 - chance) / clean.n):
        return Finding("passed", text)
    question = "is the model trained, are the labels numbered like its classes, and does it take images in [0, 1]?"
    return Finding("noted", f"{text}: {question}", clean.attack)


@Alarm("finite predictions", OVERFLOW, of_answers=True)
def finite_predictions(evidence: Evidence) -> Finding:
    """Alarm if a prediction has no class because of NaN or infinite logits."""
    worst = max(evidence.rows, key=lambda row: row.nonfinite_predictions / (row.n * row.n_eval), default=None)
    if worst is None or not worst.nonfinite_predictions:
        return Finding("passed", "every prediction names a class")
    text = f"{worst.nonfinite_predictions} of {worst.n * worst.n_eval} predictions name no class; they count as wrong"
    return Finding("unreliable", text, worst.attack)


@Alarm("logits", "return the logits, as they are before a softmax or argmax")
def logits(evidence: Evidence) -> Finding | None:
    """Alarm if the model returns probabilities instead of logits."""
    if evidence.subject is None:
        return None
    if mistake := evidence.subject.mistake:
        return Finding("unreliable", f"the model {mistake}")
    return Finding("passed", "the model does not return probabilities")


@Alarm("gradient health", f"look for rounding, .detach() or a custom backward in forward; {BY_BPDA}")
def gradient_health(evidence: Evidence) -> Finding:
    """Alarm if no attack had usable gradients, or if the model does not change as its gradients predict."""
    counted = _of_counted(evidence)
    cosine = evidence.cosine if evidence.probes is None else evidence.probes.cosine
    advice = WITHOUT_GRADIENTS[cosine] if isinstance(cosine, str) else counted.advice
    if counted.verdict == "unreliable":
        return replace(counted, advice=advice)
    text, probe = counted.measured, "probe: small steps in random directions"
    if cosine is None:
        words = f"{text}; the gradients were not compared with finite differences" if text else NOT_COUNTED
        return replace(counted, measured=words)
    if cosine == "not finite" and any(row.nonfinite_predictions for row in evidence.rows):
        # Predictions that are not finite are already reported by the alarm "finite predictions".
        return replace(counted, measured=text or MISSING[cosine])
    if isinstance(cosine, str):
        return Finding("unreliable", MISSING[cosine], probe, advice)
    compared = f"cosine {cosine:.2f} between the changes that gradients predict and the measured changes"
    text = f"{text}; {compared}" if text else compared
    if cosine < WRONG_GRADIENTS:
        return Finding("unreliable", text, probe)
    noted = counted.verdict == "noted" or not cosine >= ODD_GRADIENTS
    return Finding(_verdict(False, noted), text, counted.row or (probe if noted else ""))


def _of_counted(evidence: Evidence) -> Finding:
    counted = evidence.with_counted_gradients()
    if not counted:
        return Finding("not asked", "")
    lacking, along = [row for row in counted if row.lacked_gradients], "along the model's own gradients"
    every = f"the only attack {along}" if len(counted) == 1 else f"all {len(counted)} attacks {along}"
    if not lacking:
        return Finding("passed", f"{every} had finite gradients that moved the images")
    shares = lacking[0].health_in_words()
    if len(lacking) < len(counted):
        some = f"{len(lacking)} of {len(counted)} attacks {along} could not use them: {shares}"
        return Finding("noted", some, lacking[0].attack)
    finite = not any(row.health["nonfinite"] for row in lacking if row.health)
    advice = WITHOUT_GRADIENTS["zero gradient" if finite else "not finite"]
    return Finding("unreliable", f"{every} could not use them: {shares}", lacking[0].attack, advice)


@Alarm("missed images", BY_BPDA)
def missed_images(evidence: Evidence) -> Finding:
    """Alarm if images withstand the attacks with the model's own gradients, but fall to other attacks or probes."""
    said = [*filter(None, [_missed_by_rows(evidence), _missed_by_report(evidence)])]
    if not said:
        return Finding("not asked", evidence.blind() or "only attacks along the model's own gradients were tried")
    gravest = min(said, key=lambda finding: ("unreliable", "noted", "passed").index(finding.verdict))
    same = [finding.measured for finding in said if finding.verdict == gravest.verdict]
    return replace(gravest, measured="; ".join(same))


def _missed_by_rows(evidence: Evidence) -> Finding | None:
    """Judge how many images fell only to attacks without the model's own gradients; None without either kind."""
    fallen = evidence.fallen()
    own = [wrong for row, wrong in fallen if row.own_gradients and row.health is not None]
    others = {row.attack: wrong for row, wrong in fallen if not row.own_gradients}
    if not own or not others:
        return None
    full, by_own = max(row.n for row, _ in fallen), np.maximum.reduce(own)
    # On a random model, a difference of a few draws is chance. So at least half of the draws must differ.
    more = {name: wrong - by_own >= 0.5 for name, wrong in others.items()}
    count = int(np.logical_or.reduce(list(more.values())).sum())
    best = max(more, key=lambda name: int(more[name].sum()))
    text = f"{count} of {full} images withstood every attack along the model's own gradients and fell to another attack"
    if any(row.wrong is not None for row in evidence.rows):
        text += ", which made at least half more of their draws wrong"
    verdict = _verdict(_surely_more(count, MOST_MISSED, full), noted=count > 0.01 * full)
    return Finding(verdict, text, best if count else "")


def _missed_by_report(evidence: Evidence) -> Finding | None:
    """Judge how many images withstood the report's attacks, but fell to a short attack; None if there is none."""
    probes = evidence.probes
    if probes is None or not any(probes.left):
        return None
    reasons = {why: [name for name, other in probes.absent.items() if other == why] for why in probes.absent.values()}
    absent = "; ".join(f"{', '.join(names)} could not be made: {reason}" for reason, names in reasons.items())
    missed = {name: len(probes.fallen(fell)) for name, fell in probes.copies.items()}
    # If it found no image, the model's gradients may be masked, so it is no evidence.
    if own := len(probes.fallen(probes.fell)):
        missed = {ITSELF: own} | missed
    if not missed:
        return Finding("noted", absent) if absent else None
    count, best = sum(missed.values()), max(missed, key=lambda name: missed[name])
    gradients = f"{STEPS} steps of APGD along the gradients of {best}" + (" and others" if len(missed) > 1 else "")
    gradients += "" if probes.points is None else " in most draws"
    some = f"{count} of {probes.n} images withstood every attack of the report, but fell to {gradients}"
    none = f"none of the first {probes.n} images withstood the report's attacks but fell to {gradients}"
    text = (some if count else none) + (f"; {absent}" if absent else "")
    verdict = _verdict(_surely_more(count, MOST_MISSED, probes.n), noted=count > 1 or bool(absent))
    row = f"probe: APGD by the gradients of {best}" if count else ""
    return Finding(verdict, text, row, STRONGER if best == ITSELF else "")


@Alarm("nearest images", STRONGER)
def nearest_images(evidence: Evidence) -> Finding | None:
    """Alarm if images still fell in the last group that an attack on the nearest images tried."""
    nearest = [row for row in evidence.attacks() if row.settings.get("nearest")]
    falling = [row for row in nearest if row.last_fallen]
    if not falling:
        if any(CUT in row.warnings for row in nearest):
            return Finding("not asked", "the time was over during these attacks")
        text = "the last group that each attack on the nearest images tried withstood it"
        return Finding("passed", text) if nearest else None
    text = "; ".join(f"{row.last_fallen} of the last images that {row.attack} tried fell to it" for row in falling)
    return Finding(_verdict(nearest[-1].last_fallen >= MORE_THAN_LUCK, noted=True), text, falling[-1].attack)


# -- alarms from probes -----------------------------------------------------------------------------------------------


@Alarm(
    "batch size",
    "let the logits of an image depend on that image alone: is a module in training mode?",
    of_probes=True,
    of_answers=True,
)
def batch_size(evidence: Evidence, probes: Probes) -> Finding:
    """Alarm if an image's class depends on the other images of its batch."""
    changes, row = probes.batch_changes, "probe: the same images alone and in a batch"
    if changes is None:
        return Finding("not asked", "the model is random, and has no fixed_noise() that fixes its noise", row)
    text = f"{100 * changes:.0f} % of the predictions change with the batch"
    return Finding(_verdict(changes > ROUNDED, noted=changes > 0), text, row)


@Alarm(
    "noise and seeds",
    f"average each gradient over more draws (eot_iter=20), because the noise hides where images fall; {STRONGER}",
    of_probes=True,
)
def noise(evidence: Evidence, probes: Probes) -> Finding | None:
    """Alarm if the model sets seeds, or if images withstand only because each gradient averages few draws."""
    if probes.sets_seed:
        text = "the model sets the seed of torch's generator itself: its noise, if it has any, is always the same"
        remove = "remove the seed from forward: while the noise repeats, more draws per gradient change nothing"
        return Finding("unreliable", text, "probe: the generator's state after two seeds", remove)
    if not probes.eot:
        return None
    (few, by_few), (many, by_many) = probes.eot[0], probes.eot[-1]
    gain, n = by_few - by_many, probes.n
    text = (
        f"the class of {100 * probes.varying:.0f} % of the correctly classified images changes from draw to draw; "
        f"a short attack with gradients over {many:.0f} draws leaves {n * by_many:.0f} of {n} images right in most "
        f"draws, and with gradients over {few:.0f} it leaves {n * by_few:.0f}"
    )
    strong, wrong = _surely_above(DRAWS_UNRELIABLE, gain, n), evidence.wrong(n)
    # The report's attacks are stronger than this probe. If they found more images, they had enough draws.
    if strong and wrong is not None and (left := float((wrong <= 0.5).mean())) < by_many:
        strong = False
        text += f"; the attacks of the report leave {n * left:.0f} of the same images, which is less"
    verdict = _verdict(strong, noted=probes.varying > VARYING or gain > DRAWS_NOTED)
    return Finding(verdict, text, f"probe: gradients over {many:.0f} draws")


@Alarm(
    "same answer again",
    "let forward keep no state, and compute the same whether gradients are recorded or not",
    of_probes=True,
    of_answers=True,
)
def same_answer_again(evidence: Evidence, probes: Probes) -> Finding:
    """Alarm if the predictions change after many calls, or while gradients are recorded."""
    row = "probe: the clean images again, after all attacks"
    if share := probes.watched_changes:
        text = f"the logits of {100 * share:.0f} % of the images differ while gradients are recorded"
        return Finding(_verdict(share > ROUNDED, noted=True), text, "probe: the images with gradients recorded")
    if share := probes.later_changes:
        text = f"{100 * share:.0f} % of the predictions on clean images differ from those before the attacks"
        return Finding(_verdict(share > ROUNDED, noted=True), text, row)
    if probes.state_changed:
        text = "weights or buffers differ from those before the attacks; the predictions are the same"
        return Finding("noted", text, row)
    return Finding("passed", "the predictions on clean images are the same as before the attacks", row)


def signs_of_masking(probes: Probes, is_random: bool) -> list[str]:
    """Describe the signs that a model's gradients do not lead to its adversarial images; the list may be empty.

    Args:
        probes: the probes' measurements before the attacks.
        is_random: whether two predictions of the model on the same images differ.
    """
    n, signs = probes.n, []
    if _surely_above(health.MAX_ZERO, probes.without_gradient, probes.compared or n):
        signs.append(f"{100 * probes.without_gradient:.0f} % of the images have no usable gradient")
    elif isinstance(probes.cosine, str):
        signs.append("gradients are missing or not finite")
    elif probes.cosine is not None and probes.cosine < WRONG_GRADIENTS:
        signs.append(f"the model does not change as its gradients predict (cosine {probes.cosine:.2f})")
    fell = [sum(images) for images in probes.copies.values()]
    # On a random model each further attack makes images fall by chance, so only the surrogate with most images counts.
    missed = max(fell, default=0) if is_random else sum(fell)
    if _surely_more(missed, MOST_MISSED, n):
        signs.append(
            f"{missed} of {n} images withstand short attacks with the model's own gradients, but fall to short attacks "
            "with other gradients"
        )
    return signs
