"""Tables of an evaluation, for Markdown and for the terminal."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Sequence

from ..attacks.engine.reach import FEWEST_STEPS
from ..attacks.square import GIVEN_UP_AFTER
from .alarms import GUESSING, STATES, Evidence, Finding
from .outlook import Outlook
from .rows import AUTHORS, Row, attack_names, model_names
from .specs import LEE_KIM

#: Characters in a line of a terminal's legend.
LINE = 120
UNRELIABLE, NOT_FINITE = "unreliable", "not finite"
#: How an unreliable number is marked in Markdown.
RED_UNRELIABLE = f'**<span style="color:red">{UNRELIABLE}</span>**'
_WITH = {"fixed": "fixed noise", "deterministic": "its noise off"}
COLUMNS = ["model", "attack", "variant", "EOT", "n", "accuracy", "mean", "worst", "gradients", "", "seed", "s"]
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


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table.

    Args:
        head: the titles of the columns.
        body: the cells of each line, as many as there are columns.
    """
    lines = [head, ["---"] * len(head), *body]
    return ["| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines]


def _escaped(cell: str) -> str:
    """A cell in which a bar ends no column and a name such as ``<lambda>`` is no tag."""
    return cell.replace("|", "\\|").replace("<lambda>", "&lt;lambda&gt;")


def terminal_table(head: Sequence[str], body: Iterable[Sequence[str]], color: bool) -> str:
    """The same in columns of equal width; with ``color``, cells that must not be overlooked are red."""
    table = [list(head), *(list(line) for line in body)]
    width = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines = []
    for line in table:
        cells = [cell.ljust(w) for cell, w in zip(line, width, strict=True)]
        if color:
            cells = [f"\033[31m{cell}\033[0m" if UNRELIABLE in cell or NOT_FINITE in cell else cell for cell in cells]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * (sum(width) + 2 * len(width) - 2), *lines[1:]])


def color_is_welcome() -> bool:
    """Whether standard output is a terminal, and NO_COLOR (https://no-color.org) is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def percent(row: Row) -> str:
    """A row's accuracy and its standard error, in percent."""
    return f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"


def about_zero_errors(rows: Iterable[Row]) -> list[str]:
    """What a reader must know of standard errors of 0, in one sentence; nothing where there are none.

    Args:
        rows: of a table.
    """
    if all(row.n == 0 or row.standard_error > 0 for row in rows):
        return []
    return [
        "± 0.0 is no certainty: the standard error is estimated from the images of the row, and is 0 where all of "
        "them, or the only one, had the same outcome."
    ]


def draws(row: Row) -> str:
    """How many draws the attack averaged per step."""
    # reports that the release before wrote have the old name of the setting
    return str(row.settings.get("eot_iter", row.settings.get("eot", "-")))


def remark(row: Row, unreliable: str = UNRELIABLE) -> str:
    """A warning about a row's number; empty for most.

    Args:
        row: the row.
        unreliable: how to write that the attack lacked gradients.
    """
    remarks = [f"{row.nonfinite_predictions} predictions {NOT_FINITE}"] if row.nonfinite_predictions else []
    if row.nothing_to_attack:
        remarks.append("nothing to attack")
    if not row.reliable:
        remarks.append(unreliable)
    return ", ".join(remarks)


def row_cells(row: Row, unreliable: str = UNRELIABLE) -> list[str]:
    """One line of the table of all rows; its titles are `COLUMNS`."""
    return [
        row.model,
        row.attack,
        row.describe_variant(),
        draws(row),
        f"{row.n} ({row.settings['attacked']})" if _survivors_only(row) else str(row.n),
        percent(row),
        single_predictions(row),
        "-" if row.kind == "worst" else f"{100 * row.worst:.1f} ({row.n_eval})",
        row.describe_health(),
        remark(row, unreliable),
        str(row.seed),
        f"{row.seconds:.1f}",
    ]


def single_predictions(row: Row) -> str:
    """The share of single predictions that are right, in percent; of a row named worst, which has none, -."""
    return "-" if row.kind == "worst" else f"{100 * row.mean:.1f}"


def comparison(rows: Sequence[Row], unreliable: str = UNRELIABLE) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table with the attacks down and the models across."""
    models = model_names(rows)
    found = {(row.attack, row.model): row for row in rows}

    def cell(attack: str, model: str) -> str:
        row = found.get((attack, model))
        return "-" if row is None else f"{percent(row)} {remark(row, unreliable)}".strip()

    return ["attack", *models], [[attack, *(cell(attack, m) for m in models)] for attack in attack_names(rows)]


def column_legend(rows: Sequence[Row]) -> list[str]:
    """What the columns of a table of all rows mean, a paragraph each.

    Args:
        rows: of the table. What none of them has is not explained: a row named worst, searches that end early.
    """
    return [
        *COLUMN_LEGEND,
        *([WORST_LEGEND] if any(row.kind == "worst" for row in rows) else []),
        *([] if all(row.deployed for row in rows) else [VARIANT_LEGEND]),
        *([AUTHORS_LEGEND] if any(row.kind == AUTHORS for row in rows) else []),
        *_given_up_legend(rows),
        *_lee_kim_legend(rows),
    ]


def _given_up_legend(rows: Sequence[Row]) -> list[str]:
    """Which attacks may have ended searches early; nothing where none could."""
    names = list(dict.fromkeys(row.attack for row in rows if _may_end_early(row)))
    if not names:
        return []
    return [
        f"These attacks ended a search early where success was out of reach even at several times its recent pace: "
        f"{'; '.join(names)}. The protocol strong ends no search early."
    ]


def _lee_kim_legend(rows: Sequence[Row]) -> list[str]:
    """How often the rows of Lee and Kim's attack were judged; nothing where there are none."""
    counts = sorted({row.n_eval for row in rows if row.attack.startswith(LEE_KIM)})
    return [
        f"{LEE_KIM}: an image counts only if all of its predictions after the attack are right, here {n} of {n}. The "
        "column mean counts single predictions."
        for n in counts
    ]


def _may_end_early(row: Row) -> bool:
    """Whether a search of a row may have ended early, by the row's settings."""
    told = row.settings
    if not told.get("give_up"):
        return False
    if row.kind == "square":
        return told["n_queries"] > GIVEN_UP_AFTER[0] and told["eot_iter"] == 1
    return told["steps"] >= FEWEST_STEPS and (row.kind, told["norm"]) != ("apgd", "l1")


def terminal_legend(rows: Sequence[Row], findings: Sequence[Finding] = ()) -> list[str]:
    """What the columns of the table for a terminal mean, in lines of its usual width.

    Args:
        rows: of the table.
        findings: of the alarms, where there are some.
    """
    known = [*column_legend(rows), *([] if all(row.reliable for row in rows) else [UNRELIABLE_LEGEND])]
    known += [f"noted: {STATES['noted']}."] if any(finding.verdict == "noted" for finding in findings) else []
    return [textwrap.fill(text, LINE, break_on_hyphens=False) for text in (*known, *about_zero_errors(rows))]


def verdict(model: str, row: Row, findings: Sequence[Finding], threat: str | None = None) -> str:
    """One sentence on the lowest number of a model, which says what the signs say.

    Args:
        model: its name.
        row: the lowest row.
        findings: of the alarms, about this model.
        threat: the report's threat model, such as ``L-inf 8/255``: a row of attacks within another one may be lower.
            None: not known.
    """
    line = f"{model}: {100 * row.accuracy:.1f} % of {row.n} images withstand every attack"
    line += "" if threat is None else f" within {threat}"
    more = remark(row)
    if not row.reliable:
        return f"{line}; {more}: {means(row)}."
    if more:
        return f"{line}; {more}."
    if beside_headline(findings):
        return f"{line}; this says little:"
    asked = any(finding.verdict != "not asked" for finding in findings)
    return f"{line}. {signs(findings)}" if asked else f"{line}."


def signs(findings: Sequence[Finding]) -> str:
    """What the signs say of a number, in a sentence.

    Args:
        findings: of the alarms, about one model.
    """
    asked = [finding for finding in findings if finding.verdict != "not asked"]
    named = {
        state: [finding.alarm for finding in asked if finding.verdict == state] for state in ("unreliable", "noted")
    }
    against = [f"{state}: {', '.join(alarms)}" for state, alarms in named.items() if alarms]
    if not named["unreliable"]:
        against.insert(0, "none gives a reason to doubt the number")
    return f"{len(asked)} of {len(findings)} signs could be looked at; {'; '.join(against)}."


def about_gradients(rows: Sequence[Row]) -> str:
    """Whether the attacks on a model had usable gradients, in a sentence that agrees with the sign on them.

    Args:
        rows: of the model.
    """
    counted = [row for row in Evidence(rows).attacks() if row.health is not None and row.follows_own_gradients]
    lacked = sum(row.lacked_gradients for row in counted)
    if not counted:
        return "No attack counted the gradients of the model itself."
    if not lacked:
        return "The attack had usable gradients." if len(counted) == 1 else "The attacks had usable gradients."
    if lacked == len(counted):
        return "The attack lacked usable gradients." if lacked == 1 else "The attacks lacked usable gradients."
    return f"{lacked} of {len(counted)} attacks lacked usable gradients; the others had them."


def about_variants(rows: Sequence[Row]) -> list[str]:
    """The lowest number of each variant of a model, in sentences: they stand beside the number of the deployed one.

    Args:
        rows: of the model.
    """
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
    """What a reader of the lowest number must know of what the alarms found, each with the row that tells.

    Args:
        findings: of the alarms.
    """
    unreliable = [finding for finding in findings if finding.verdict == UNRELIABLE]
    guesses = [finding for finding in findings if finding.verdict == "noted" and finding.alarm == GUESSING]
    return [
        f"{finding.alarm}: {finding.measured}" + (f" ({finding.row})" if finding.row else "")
        for finding in unreliable + guesses
    ]


def believable(findings: Sequence[Finding], outlooks: Sequence[Outlook]) -> list[str]:
    """The part of a report that says whether its numbers can be believed, and what it would take to go lower.

    Args:
        findings: of the alarms.
        outlooks: of the models.
    """
    lines = []
    if findings:
        body = [
            [f.model, f.alarm, RED_UNRELIABLE if f.verdict == UNRELIABLE else f.verdict, f.measured, f.row or "-"]
            for f in findings
        ]
        table = markdown_table(["model", "alarm", "verdict", "measured", "row that tells"], body)
        lines += ["", "## Can this number be believed?", "", *table, "", SIGNS_LEGEND]
    if outlooks:
        lines += ["", "## What it would take to go lower", ""]
        lines += [f"- {o.model}: {'; '.join(o.sentences)}." for o in outlooks]
    return lines


def headline(
    model: str, threat: str | None, row: Row, over_all: Row | None = None, findings: Sequence[Finding] = ()
) -> str:
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
    guesses = any(finding.alarm == GUESSING and finding.verdict == "noted" for finding in findings)
    line += "; **clean images are classified no better than by guessing**" if guesses else ""
    more = remark(row, RED_UNRELIABLE)
    if not more:
        return line
    doubts = f" ({', '.join(row.settings['doubts'])})" if row.settings.get("doubts") else ""
    return f"{line}; {more}{doubts}" + ("" if row.reliable else f": {means(row)}")


def means(row: Row) -> str:
    """What it means that a number is unreliable.

    Args:
        row: an unreliable one.
    """
    return "the true number may be lower" if row.accuracy > 0 else "the number says nothing about the model"


def _survivors_only(row: Row) -> bool:
    # reports that the release before wrote have the old name of the setting
    return bool(row.settings.get("survivors_only", row.settings.get("survivors")))
