"""The tables and single values that README and docs take from results files, between markers.

A page holds ``<!-- table: NAME -->`` ... ``<!-- end -->`` around a table, and around one number
``<!-- value: STUDY/MODEL/ATTACK -->`` ... ``<!-- end -->``. `fill` writes both again from ``benchmarks/results``, so
that no number that a results file holds is typed by hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from purify_fast import zoo as packed
from purify_fast._files import write_text
from purify_fast.evaluation.show.tables import markdown_table

from .. import RESULTS
from ..gpu import instructions, launches, roofline
from ..kept import machines
from ..options import Unfit
from ..prose import wrapped
from ..robustness import contests, pack_zoo
from ..robustness.broken import broken_tables as broken
from ..robustness.broken import code as code_of_broken
from ..robustness.studies import diffusion_table
from ..robustness.truth import truth_tables as truth
from ..speed import gradient_memory, running, sheets, shipping
from . import front_page, performance

ROOT = RESULTS.parents[1]

# A block ends at its own end marker: without this, a damaged marker would delete the text up to the next block's end.
_BODY = r"((?!<!-- (?:table|value): ).)*?"
_TABLE = re.compile(rf"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n){_BODY}(?P<end><!-- end -->)", re.S)
_VALUE = re.compile(
    rf"(?P<begin><!-- value: (?P<study>[^/>]+)/(?P<model>[^/>]+)/(?P<key>[^>]+?) -->){_BODY}(?P<end><!-- end -->)", re.S
)
_BEGIN = re.compile(r"<!-- (?:table|value): ")
#: The names of a race's contestants on a page for readers.
NAMES = {
    "ours": "**purify_fast**",
    "ours, compiled": "**purify_fast, compiled**",
    "bank": "**purify_fast, with a full bank**",
    "bank, whole run": "**purify_fast, with a bank, mean of 200 epochs**",
}


def every_page() -> list[Path]:
    """README, the project's other files for readers, and the pages of the documentation that people write."""
    project = sorted(ROOT.glob("*.md"))
    return [*project, ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pipelines(results: Path, *wanted: str) -> list[str]:
    """The contestants of some pipelines, with a column for each case.

    Args:
        results: the folder ``benchmarks/results``.
        wanted: names of pipelines.
    """
    rows = [row for row in sheets.read_csv(results / "cpu" / sheets.PIPELINES) if row["pipeline"] in wanted]
    cases = list(dict.fromkeys((row["pipeline"], row["case"], row["shape"]) for row in rows))
    times = {(row["pipeline"], row["case"], row["contestant"]): row for row in rows}
    body = []
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        line = [NAMES.get(contestant, contestant)]
        for pipeline, case, _ in cases:
            row = times.get((pipeline, case, contestant))
            line.append(f"{float(row['ms']):,.0f} ({row['speed_up']})" if row and row["ms"] else "-")
        body.append(line)
    # What follows the semicolon in a shape explains the names of cases and contestants; the page says it in a sentence.
    heads = [f"{case}: {shape.partition(';')[0]}" for _, case, shape in cases]
    return [f"{machines(rows)}. Milliseconds (speedup over the plain form).", "", *markdown_table(["", *heads], body)]


#: For each table, the function that makes its lines.
TABLES: dict[str, Callable[[Path], list[str]]] = {
    "evaluation": lambda results: contests.markdown(contests.read(results / "studies")),
    "robust": lambda results: contests.robust_markdown(contests.read(results / "studies", contests.ROBUST_FILE)),
    "ops_served": lambda results: sheets.verdicts_table(sheets.read_csv(results / "cpu" / sheets.ROWS)),
    "ops_counted": lambda _: performance.counted(),
    "pipelines_carso": lambda results: pipelines(results, "carso_inference", "carso_training"),
    "pipelines_atop": lambda results: pipelines(results, "atop_finetune"),
    "pipelines_arrest": lambda results: pipelines(results, "arrest_step"),
    "front_results": front_page.results_table,
    "front_speed": front_page.speed_table,
    "front_attacks": front_page.judges_sentences,
    "zoo": lambda _: pack_zoo.table([packed.card(name) for name in packed.list()]),
    "performance_devices": performance.devices,
    "measured": performance.chapters,
    "instructions": instructions.table,
    "launches": launches.table,
    "roofline": roofline.table,
    "broken": broken.table,
    "truth": truth.table,
    "memory": gradient_memory.table,
    "diffusion": diffusion_table.table,
    "diffusion_said": diffusion_table.said,
}
#: Pages of tables and notes on them, whose numbers no study holds.
MEASURED_PAGE = "performance.md"


def table(name: str, results: Path) -> str | None:
    """The text of a table; None if its results file is missing.

    Args:
        name: name in `TABLES`, or of a study with a file ``studies/NAME.md``.
        results: the folder ``benchmarks/results``.
    """
    try:
        if name in TABLES:
            return wrapped("\n".join(TABLES[name](results)))
        return wrapped((results / "studies" / f"{name}.md").read_text().strip())
    except FileNotFoundError:
        return None


def value(study: str, model: str, key: str, results: Path) -> str:
    """An accuracy of a study in percent, with one decimal; the mean over several seeds.

    Args:
        study: the study's name; ``cpu`` for the speed of a pipeline, whose ``model`` is "pipeline, case" and whose
            ``key`` is the contestant.
        model: the model, as in the study's table.
        key: the attack, or the key of a digits study's results.
        results: the folder ``benchmarks/results``.

    Raises:
        KeyError: the results hold no such number.
    """
    if study == "cpu":
        for row in sheets.read_csv(results / "cpu" / sheets.PIPELINES):
            if (f"{row['pipeline']}, {row['case']}", row["contestant"]) == (model, key):
                return row["speed_up"]
        raise KeyError(f"{study}: no {key} of {model}")
    folder = results / "studies"
    if (folder / f"{study}.json").is_file():
        rows = json.loads((folder / f"{study}.json").read_text())
        found = [row[key] for row in rows if row["name"] == model and key in row]
    else:
        rows = json.loads((folder / study / "report.json").read_text())["rows"]
        found = [row["accuracy"] for row in rows if (row["model"], row["attack"]) == (model, key)]
    if not found:
        raise KeyError(f"{study}: no {key} of {model}")
    return f"{100 * statistics.fmean(found):.1f}"


def filled(text: str, results: Path) -> tuple[str, list[str]]:
    """Update a page's tables and values; return the text and the names of tables whose results are missing.

    Args:
        text: text of the page.
        results: the folder ``benchmarks/results``.

    Raises:
        ValueError: a block has no name or no end.
    """
    missing: list[str] = []
    whole = len(_TABLE.findall(text)) + len(_VALUE.findall(text))
    if whole != len(_BEGIN.findall(text)):
        raise ValueError("a <!-- table: NAME --> or <!-- value: STUDY/MODEL/ATTACK --> has no <!-- end --> of its own")

    def of_table(found: re.Match[str]) -> str:
        body = table(found["name"], results)
        if body is None:
            missing.append(found["name"])
            return found[0]
        return f"{found['begin']}{body}\n{found['end']}"

    def of_value(found: re.Match[str]) -> str:
        return f"{found['begin']}{value(found['study'], found['model'], found['key'], results)}{found['end']}"

    return _VALUE.sub(of_value, _TABLE.sub(of_table, text)), missing


def fill(page: Path, results: Path) -> list[str]:
    """Write a page's tables and values again; returns the names of tables whose results are missing.

    Args:
        page: the file.
        results: the folder ``benchmarks/results``.
    """
    text, missing = filled(page.read_text(), results)
    if text != page.read_text():
        write_text(page, text)
    return missing


_CODE = re.compile(r"^```.*?^```", re.S | re.M)
_LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
_NAMED = re.compile(r"<!-- numbers from: (.*?) -->", re.S)
_EXCUSED = re.compile(r"<!-- not measured here: (.*?) -->", re.S)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_SPAN = re.compile(r"`[^`]*`")
_ADDRESS = re.compile(r"https?://\S+|arXiv \d+\.\d+")
_VERSION = re.compile(r"\b(Python|torch|triton|version)( from)? \d+(\.\d+)+")
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?![\w.]*\d)")


def broken_links(page: Path) -> list[str]:
    """Local links of a page that lead nowhere; pages of the API reference count as there, if the module is public.

    Args:
        page: the file.
    """
    found = []
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        place = (page.parent / path) if path else page
        if place.parent == ROOT / "docs" / "api":
            # The site's build writes a page for each public module.
            module = place.stem.removeprefix("purify_fast").replace(".", "/")
            home = ROOT / f"purify_fast{module}"
            if not (home.with_suffix(".py").is_file() or (home / "__init__.py").is_file()):
                found.append(f"{page.name}: {target} is the page of no module")
        elif not place.exists():
            found.append(f"{page.name}: {target} does not exist")
        elif anchor and anchor not in anchors(place):
            found.append(f"{page.name}: {target} names no heading of {place.name}")
    return found


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings can be linked, as GitHub makes them.

    Args:
        page: the file.
    """
    heads = re.findall(r"^#+ (.+)$", _CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def typed_numbers(page: Path, results: Path) -> list[str]:
    """Numbers in a page's sentences that are neither in its generated tables nor in the results that it names.

    Only numbers with decimals are checked, outside code, generated tables and generated values. Two comments name a
    number's source: ``<!-- numbers from: carso_mnist, atop_digits -->`` names studies, and
    ``<!-- not measured here: 0.25, 1.1 -->`` the numbers that are no measurements of this package, such as settings,
    versions and figures of papers.

    Args:
        page: the file.
        results: the folder ``benchmarks/results``.
    """
    text = page.read_text()
    named = [name for names in _NAMED.findall(text) for name in re.split(r"[,\s]+", names)]
    named += [found[1] for found in _TABLE.findall(text)]
    known = {number for name in named for number in _measured(name, results)}
    known |= {number for line in _EXCUSED.findall(text) for number in re.split(r"[^\d.]+", line)}
    for pattern in (_CODE, _TABLE, _VALUE, _COMMENT, _SPAN, _LINK, _ADDRESS, _VERSION):
        text = pattern.sub(" ", text)
    numbers = dict.fromkeys(number.replace(",", "") for number in _NUMBER.findall(text))
    return [
        f"{page.name}: {number} stands in no results that the page names" for number in numbers if number not in known
    ]


@functools.cache
def _measured(name: str, results: Path) -> frozenset[str]:
    """Every number with decimals in a table and in its results, the latter in percent with one decimal."""
    text = table(name, results) or ""
    found = {number.replace(",", "") for number in re.findall(r"\d[\d,]*\.\d+", text)}
    whole = results / "studies" / f"{name}.json"
    for row in json.loads(whole.read_text()) if whole.is_file() else ():
        found |= {f"{100 * cell:.1f}" for cell in row.values() if isinstance(cell, float)}
    return frozenset(found)


def check(results: Path) -> list[str]:
    """The faults of README and docs.

    These are tables and values that differ from the results, contests made with other attacks or weights than the
    package has, broken links and typed numbers.

    Args:
        results: the folder ``benchmarks/results``.
    """
    found = []
    for page in every_page():
        text, missing = filled(page.read_text(), results)
        if text != page.read_text():
            found.append(f"{page.name}: not what the results say; run `python -m benchmarks report`")
        found += [f"{page.name}: no results for the table {name}" for name in missing]
        found += broken_links(page)
        if page.name not in (MEASURED_PAGE, "CHANGELOG.md"):
            found += typed_numbers(page, results)
    return found + contests.outdated(results) + truth.outdated(results) + code_of_broken.outdated(results)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks report``."""
    parser.add_argument("folders", nargs="*", type=Path, help="folders of results; benchmarks/results/* by default")
    parser.add_argument("--count", action="store_true", help="count the launches of training steps again")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and tell whether README and docs agree with the results"
    )


def main(chosen: argparse.Namespace) -> bool | None:
    """``python -m benchmarks report``; with --check, tell whether README and docs agree with the results."""
    if chosen.check:
        problems = check(RESULTS)
        print("\n".join(problems) or "README and docs agree with the results files; their local links lead somewhere")
        return not problems
    try:
        for path in chosen.folders or sorted({path.parent for path in RESULTS.glob("*/*.csv")}):
            print(*sheets.report(path), sep="\n")
    except FileNotFoundError as error:
        raise Unfit(str(error)) from error
    if chosen.count:
        print(launches.write(RESULTS))
    # The pages show only the committed results.
    if any(RESULTS not in path.resolve().parents for path in chosen.folders):
        return None
    front_page.picture(RESULTS, ROOT / "docs" / "pictures" / "claim.png")
    publish()
    return None


def publish() -> None:
    """Write the results that ship with the package, and the tables of all pages."""
    print(shipping.write_races(RESULTS))
    for page in every_page():
        for name in fill(page, RESULTS):
            print(f"{page} wants the table {name}, whose results are not there yet", file=sys.stderr)


def ship(chosen: argparse.Namespace) -> Path:
    """``python -m benchmarks ship``."""
    try:
        path = shipping.take(chosen.device, RESULTS / running.device_class(chosen.device))
    except FileNotFoundError as error:
        raise Unfit(str(error)) from error
    publish()
    return path
