"""What a report says in sentences: headlines, verdicts, and the meaning of its columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from ...attacks.engine.rows import FEWEST_STEPS
from ...attacks.square import GIVEN_UP_AFTER
from ..alarms import STATES, Evidence, Finding, Outlook
from ..rows import AUTHORS, Row
from .tables import RED_UNRELIABLE, markdown_table, percent, table_of_findings, warning

#: Characters in a line of a terminal's legend.
LINE = 120
_WITH = {"fixed": "fixed noise", "deterministic": "its noise off"}
#: What the columns mean, for every form of a report.
COLUMN_LEGEND = (
    "n: images; in brackets those attacked, where earlier attacks had left only these. accuracy: % of the images that "
    "are classified correctly, ± standard error; after an attack, in every one of the repeated predictions. mean: % of "
    "all single predictions that are right; those of an image that was not attacked, because it was misclassified or "
    "had fallen before, count as wrong. worst: % of the images that are right in every prediction; in brackets, how "
    "many predictions each had. Of a deterministic model, which is asked once, the three are the same.",
    "variant: the model as it is, which is deterministic (the same answer every time) or random (drawn anew every "
    "time); or a random one with fixed noise, or with its noise off. EOT: draws averaged for each gradient. gradients: "
    "% not finite / zero / images not moved, which must be near 0. s: seconds.",
)
WORST_LEGEND = (
    "The row worst counts an image only if it withstood every attack of the same threat model in the rows above it. "
    "It has no predictions of its own: its mean and worst are -."
)
VARIANT_LEGEND = (
    "A row with fixed noise, or with the noise off, is about a mode of the model that nobody deploys, and enters no "
    'worst of the model as it is. What its attack found is tried on the model as it is, by fresh draws: the row "tried '
    'on the deployed defence" enters worst.'
)
AUTHORS_LEGEND = (
    'Rows that are named "as ..." repeat an evaluation of others. The attack and the model that is attacked are '
    "theirs, every image is attacked, misclassified ones included, and one prediction decides. They are in no headline "
    "and in no worst: they say what such an evaluation finds, not what the defence withstands."
)
UNRELIABLE_LEGEND = (
    "unreliable: the attack lacked usable gradients and left some images, or a sign gives a reason to doubt the number."
)
SIGNS_LEGEND = "What a sign says: " + "; ".join(f"{state}: {meaning}" for state, meaning in STATES.items()) + "."
LEGEND = [
    "An attack of another norm or radius than the report's has it at the end of its name: L1, L2, L-inf, or the flow"
    " that moves pixels (StAdv; half the image is 1). It counts for no headline and no worst but its own. worst: image"
    " by image over every row of one threat model on the same images, transferred ones included. BPDA: through"
    " the purifier as if it changed nothing. On the classifier alone: made without the defence, then tried on it, which"
    " says little about an attacker who knows the defence.",
    "",
    f"{RED_UNRELIABLE}: the attack lacked usable gradients (any non-finite one, more than 5 % zero ones, or more than 1"
    " % of the correctly classified images not moved) and left some images, so its number measures the gradients, not"
    " the model. A worst is marked where a sign gives a reason to doubt it, and where no attack is known to have had"
    " usable gradients of the deployed model, as of functions of your own.",
]


def about_zero_errors(rows: Iterable[Row]) -> list[str]:
    """What a reader must know of standard errors of 0, in one sentence; nothing where there are none."""
    if all(row.n == 0 or row.standard_error > 0 for row in rows):
        return []
    return [
        "± 0.0 is no certainty: the standard error is estimated from the images of the row, and is 0 where all of "
        "them, or the only one, had the same outcome."
    ]


def column_legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of a table of all rows mean, a paragraph each; what no row has is not explained."""
    legend = list(COLUMN_LEGEND)
    legend += [WORST_LEGEND] if any(row.kind == "worst" for row in rows) else []
    legend += [] if all(row.deployed for row in rows) else [VARIANT_LEGEND]
    legend += [AUTHORS_LEGEND] if any(row.kind == AUTHORS for row in rows) else []
    early = list(dict.fromkeys(row.attack for row in rows if _may_end_early(row)))
    if early:
        legend.append(
            f"These attacks ended a search early where success was out of reach even at several times its recent pace: "
            f"{'; '.join(early)}. The protocol strong ends no search early."
        )
    published = dict.fromkeys((row.attack, row.n_eval) for row in rows if row.settings.get("published"))
    legend += [
        f"{attack}: an image counts only if all of its predictions after the attack are right, here {n} of {n}. The "
        "column mean counts single predictions."
        for attack, n in published
    ]
    return legend


def _may_end_early(row: Row) -> bool:
    """Whether a search of a row may have ended early, by the row's settings."""
    settings = row.settings
    if not settings.get("give_up"):
        return False
    if row.kind == "square":
        return settings["n_queries"] > GIVEN_UP_AFTER[0] and settings["eot_iter"] == 1
    return settings["steps"] >= FEWEST_STEPS and (row.kind, settings["norm"]) != ("apgd", "l1")


def terminal_legend(rows: Sequence[Row], findings: Sequence[Finding] = ()) -> list[str]:
    """What the columns of the table for a terminal mean, in lines of its usual width."""
    known = [*column_legend(rows), *([] if all(row.reliable for row in rows) else [UNRELIABLE_LEGEND])]
    known += [f"noted: {STATES['noted']}."] if any(finding.verdict == "noted" for finding in findings) else []
    return [textwrap.fill(text, LINE, break_on_hyphens=False) for text in (*known, *about_zero_errors(rows))]


def verdict(model: str, row: Row, findings: Sequence[Finding], threat: str | None = None) -> str:
    """One sentence on the lowest number of a model within a threat model, which says what the signs say."""
    line = f"{model}: {100 * row.accuracy:.1f} % of {row.n} images withstand every attack"
    line += "" if threat is None else f" within {threat}"
    remark = str(warning(row))
    if not row.reliable:
        return f"{line}; {remark}: {means(row)}."
    if remark:
        return f"{line}; {remark}."
    if beside_headline(findings):
        return f"{line}; this says little:"
    asked = any(finding.verdict != "not asked" for finding in findings)
    return f"{line}. {signs(findings)}" if asked else f"{line}."


def signs(findings: Sequence[Finding]) -> str:
    """What the signs say of a number, in a sentence."""
    asked = [finding for finding in findings if finding.verdict != "not asked"]
    named = {
        state: [finding.alarm for finding in asked if finding.verdict == state] for state in ("unreliable", "noted")
    }
    against = [f"{state}: {', '.join(alarms)}" for state, alarms in named.items() if alarms]
    if not named["unreliable"]:
        against.insert(0, "none gives a reason to doubt the number")
    return f"{len(asked)} of {len(findings)} signs could be looked at; {'; '.join(against)}."


def about_gradients(rows: Sequence[Row]) -> str:
    """Whether the attacks on a model had usable gradients, in a sentence that agrees with the sign on them."""
    counted = Evidence(rows).with_counted_gradients()
    lacked = sum(row.lacked_gradients for row in counted)
    if not counted:
        return "No attack counted the gradients of the model itself."
    if not lacked:
        return "The attack had usable gradients." if len(counted) == 1 else "The attacks had usable gradients."
    if lacked == len(counted):
        return "The attack lacked usable gradients." if lacked == 1 else "The attacks lacked usable gradients."
    return f"{lacked} of {len(counted)} attacks lacked usable gradients; the others had them."


def about_variants(rows: Sequence[Row]) -> list[str]:
    """The lowest number of each variant of a model, in sentences: they stand beside the number of the deployed one."""
    apart = [row for row in rows if (row.is_attack or row.kind == "worst") and not (row.threat or row.deployed)]
    lowest = [
        min((row for row in apart if row.variant == variant), key=lambda row: (row.accuracy, row.kind != "worst"))
        for variant in dict.fromkeys(row.variant for row in apart)
    ]
    return [
        f"With {_WITH[row.variant]}, which is not the model as it is deployed: {percent(row)} % ({row.attack})."
        for row in lowest
    ]


def beside_headline(findings: Sequence[Finding]) -> list[str]:
    """What a reader of the lowest number must know of the alarms, with the row that tells; doubts first."""
    told = sorted((finding for finding in findings if finding.beside_headline), key=lambda f: f.verdict != "unreliable")
    return [f"{finding.alarm}: {finding.measured}" + (f" ({finding.row})" if finding.row else "") for finding in told]


def believable(findings: Sequence[Finding], outlooks: Sequence[Outlook]) -> list[str]:
    """The part of a report that says whether its numbers can be believed, and what it would take to go lower."""
    lines = []
    if findings:
        head, body = table_of_findings(findings)
        table = markdown_table(head, [[*line[:-1], line[-1] or "-"] for line in body])
        lines += ["", "## Can this number be believed?", "", *table, "", SIGNS_LEGEND]
    if outlooks:
        lines += ["", "## What it would take to go lower", ""]
        lines += [f"- {outlook.model}: {'; '.join(outlook.sentences)}." for outlook in outlooks]
    return lines


def headline(model: str, threat: str | None, row: Row, over_all: Row | None, findings: Sequence[Finding]) -> str:
    """One line of Markdown: the lowest number of a model under a threat model.

    Args:
        model: its name.
        threat: the threat model, None for the report's own.
        row: the lowest row.
        over_all: the worst over all images, told beside a lowest row on fewer of them.
        findings: of the alarms, about this model.
    """
    what = f"**{model}: {percent(row)} %**" if threat is None else f"{model}, {threat}: {percent(row)} %"
    line = f"- {what} robust, the lowest of all attacks ({row.attack}, n = {row.n})"
    if over_all is not None and over_all.n > row.n:
        line += f"; on all {over_all.n} images, without what attacked fewer, {percent(over_all)} %"
    guesses = any(finding.prominent and finding.verdict == "noted" for finding in findings)
    line += "; **clean images are classified no better than by guessing**" if guesses else ""
    remark = warning(row).written(RED_UNRELIABLE)
    if not remark:
        return line
    doubts = f" ({', '.join(row.settings['doubts'])})" if row.settings.get("doubts") else ""
    return f"{line}; {remark}{doubts}" + ("" if row.reliable else f": {means(row)}")


def means(row: Row) -> str:
    """What it means that a number is unreliable."""
    return "the true number may be lower" if row.accuracy > 0 else "the number says nothing about the model"
