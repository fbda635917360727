"""The page of reliability: every test it names is there, and its figures are those of the soak's report."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
REPORT = (ROOT / "benchmarks" / "results" / "soak.md").read_text()


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(tests/[\w/]+(?:\.py)?)`", PAGE)
    assert len(named) > 20 and all((ROOT / name).exists() for name in named), named
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    single = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(single) > 15
    for file, test in single:
        assert f"def {test}(" in files[file], f"{file}::{test}"


def test_its_figures_are_the_reports():
    kills, losses = re.findall(r"(\d+) of the faults are SIGKILLs", REPORT), re.findall(r"(\d+) losses", REPORT)
    bits = re.findall(r"(\d+) single bits were changed", REPORT)
    assert kills and sum(map(int, kills)) >= 100 and set(losses) == {"0"}
    told = re.search(r"(\d+) SIGKILLs", PAGE)
    assert told is not None and int(told[1]) == sum(map(int, kills))
    flipped = re.search(r"(\d+) single bits, all refused", PAGE)
    assert flipped is not None and int(flipped[1]) == sum(map(int, bits))
    for number in bits:
        assert (
            f"{number} single bits were changed, anywhere in checkpoints and saved models: {number} changed" in REPORT
        )
