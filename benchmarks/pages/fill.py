"""Write tables and single numbers from the results files into README and docs, and check these pages.

In a page, a table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. A number stands between
``<!-- value: STUDY/MODEL/ATTACK -->`` and ``<!-- end -->``. `fill` writes tables and numbers again from
``benchmarks/results``, so that nobody types measured numbers by hand.
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

from .. import RESULTS
from ..prose import wrapped
from ..robustness import answer, contests, pack_zoo
from ..robustness.broken import run_broken as broken
from ..robustness.studies import papers_questions
from ..robustness.truth import run_truth as truth
from ..speed import sheets
from ..speed.elsewhere import measuring as elsewhere, small_networks
from . import front_page, methods_table, performance

ROOT = RESULTS.parents[1]

# The body of a block must not contain the beginning of another block. Otherwise a block with a damaged end marker would
# reach to the end of the next block, and all text between the blocks would be lost.
_BODY = r"(?:(?!<!-- (?:table|value): ).)*?"
_TABLE = re.compile(rf"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n){_BODY}(?P<end><!-- end -->)", re.S)
_VALUE = re.compile(
    rf"(?P<begin><!-- value: (?P<study>[^/>]+)/(?P<model>[^/>]+)/(?P<key>[^>]+?) -->){_BODY}(?P<end><!-- end -->)", re.S
)
_BEGIN = re.compile(r"<!-- (?:table|value): .*")


def every_page() -> list[Path]:
    """Return the paths of all Markdown pages that people write: in the root, in examples and in docs."""
    project = sorted(ROOT.glob("*.md"))
    return [*project, ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


#: For each table, the function that makes its lines. The table of a finished study is a page in results/studies.
TABLES: dict[str, Callable[[Path], list[str]]] = {
    "robust": lambda results: contests.markdown(contests.read(results / "studies")),
    "ops_speed": lambda results: sheets.verdicts_table(sheets.read_csv(results / "cpu" / sheets.ROWS)),
    "answer": lambda results: answer.markdown(answer.read(results / "studies")),
    "methods": methods_table.table,
    "speed_claim": front_page.claim,
    "pipelines": lambda results: performance.explained(results / "cpu"),
    "pipelines_avx2": lambda results: performance.pipelines(results / "cpu" / sheets.PIPELINES_AVX2),
    "front_attacks": front_page.judges_sentences,
    "zoo": lambda _: pack_zoo.table([packed.card(name) for name in packed.list()]),
    "performance_devices": performance.devices,
    "measured": performance.chapters,
    "broken": broken.table,
    "truth": truth.table,
    "elsewhere": elsewhere.table,
    **{f"papers_{part}": functools.partial(papers_questions.table, part) for part in papers_questions.PARTS},
    "elsewhere_small": lambda results: small_networks.table(results / "cpu"),
}
#: A page whose sentences may contain numbers that are in no results file. `check` does not look for these numbers.
MEASURED_PAGE = "performance.md"


def table(name: str, results: Path) -> str | None:
    """Return the text of a table, or None if its results file is missing."""
    try:
        if name in TABLES:
            return wrapped("\n".join(TABLES[name](results)))
        return wrapped((results / "studies" / f"{name}.md").read_text().strip())
    except FileNotFoundError:
        return None


def value(study: str, model: str, key: str, results: Path) -> str:
    """Return a number for a page: a study's accuracy in percent, the mean over the seeds."""
    if (results / f"studies/{study}.json").is_file():
        place = f"studies/{study}.json"
        rows = json.loads((results / place).read_text())
        found = [row[key] for row in rows if row["name"] == model and key in row]
    else:
        place = f"studies/{study}/report.json"
        rows = json.loads((results / place).read_text())["rows"]
        found = [row["accuracy"] for row in rows if (row["model"], row["attack"]) == (model, key)]
    if not found:
        raise ValueError(f"{study}/{model}/{key} names no number in results/{place}")
    return f"{100 * statistics.fmean(found):.1f}"


def filled(text: str, results: Path) -> tuple[str, list[str]]:
    """Update the tables and values in the text of a page."""
    missing: list[str] = []
    complete = {block.start() for pattern in (_TABLE, _VALUE) for block in pattern.finditer(text)}
    for begin in _BEGIN.finditer(text):
        if begin.start() not in complete:
            raise ValueError(f"{begin[0]!r} must have a name, and an <!-- end --> of its own")

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
    """Write the tables and values of a page again. Return the names of the tables whose results are missing."""
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
    """Return a message for each broken local link of a page.

    A link to a page of the API reference is valid if the module of this page exists.
    """
    found = []
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        if place.parent == ROOT / "docs" / "api":
            # The API pages are not in the repository. The build of the site writes a page for each public module.
            module = ROOT / f"purify_fast{place.stem.removeprefix('purify_fast').replace('.', '/')}"
            valid = module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()
        else:
            valid = place.exists() and (not anchor or anchor in anchors(place))
        if not valid:
            found.append(f"{page.name}: the link {target} names no file, no heading or no module of purify_fast")
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", _CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def typed_numbers(page: Path, results: Path) -> list[str]:
    """Return a message for each number in a page's sentences that has no source in the results.

    A number has a source if it is in a generated table of the page, or in results that the page names. Only numbers
    with decimals are checked, and only outside of code, generated tables and generated values. A page names results in
    the comment ``<!-- numbers from: carso_mnist, cifar10 -->``. Numbers that this package did not measure, such as
    settings, versions and figures of papers, need no source. They are listed in the comment
    ``<!-- not measured here: 0.25, 1.1 -->``.
    """
    text = page.read_text()
    named = [name for names in _NAMED.findall(text) for name in re.split(r"[,\s]+", names)]
    named += [found["name"] for found in _TABLE.finditer(text)]
    known = {number for name in named for number in _measured(name, results)}
    known |= {number for line in _EXCUSED.findall(text) for number in re.split(r"[^\d.]+", line)}
    for pattern in (_CODE, _TABLE, _VALUE, _COMMENT, _SPAN, _LINK, _ADDRESS, _VERSION):
        text = pattern.sub(" ", text)
    numbers = dict.fromkeys(number.replace(",", "") for number in _NUMBER.findall(text))
    unknown = (number for number in numbers if number not in known)
    return [f"{page.name}: the number {number} is not in the results that the page names" for number in unknown]


@functools.cache
def _measured(name: str, results: Path) -> frozenset[str]:
    """Return all numbers with decimals in a table, and the numbers of its results file as percentages."""
    text = table(name, results) or ""
    found = {number.replace(",", "") for number in re.findall(r"\d[\d,]*\.\d+", text)}
    whole = results / "studies" / f"{name}.json"
    for row in json.loads(whole.read_text()) if whole.is_file() else ():
        found |= {f"{100 * cell:.1f}" for cell in row.values() if isinstance(cell, float)}
    return frozenset(found)


def check(results: Path) -> list[str]:
    """Return a message for each fault of README and docs."""
    found = []
    for page in every_page():
        text, missing = filled(page.read_text(), results)
        if text != page.read_text():
            found.append(f"{page.name}: tables differ from the results. Run `python -m benchmarks report`.")
        found += [f"{page.name}: the results of the table {name} are missing" for name in missing]
        found += broken_links(page)
        if page.name not in (MEASURED_PAGE, "CHANGELOG.md"):
            found += typed_numbers(page, results)
    parts = (contests, answer, truth, broken)
    return found + [line for part in parts for line in part.outdated(results)]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks report``."""
    parser.add_argument("--check", action="store_true", help="write nothing; compare README and docs with the results")


def main(chosen: argparse.Namespace) -> bool | None:
    """Run ``python -m benchmarks report``. With --check, return True if README and docs agree with the results."""
    if chosen.check:
        problems = check(RESULTS)
        print("\n".join(problems) or "README and docs agree with the results files, and their local links are valid.")
        return not problems
    for folder in sorted({path.parent for path in RESULTS.glob("*/*.csv")}):
        sheets.report(folder)
    front_page.pictures(RESULTS, ROOT / "docs" / "pictures")
    for page in every_page():
        for name in fill(page, RESULTS):
            print(f"{page}: the results of the table {name} are missing, so the table was not written", file=sys.stderr)
    return None
