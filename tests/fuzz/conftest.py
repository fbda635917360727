"""The files of this folder are imported by each other; and how many examples they tried is told at the end."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mangling import DONE

EXAMPLES = "fuzzed examples"


@pytest.fixture(autouse=True)
def counted(request):
    """Notes the examples of a test with its result, which also a process of pytest-xdist passes on."""
    before = DONE[0]
    yield
    request.node.user_properties.append((EXAMPLES, DONE[0] - before))


def pytest_terminal_summary(terminalreporter):
    """Tells how many examples there were."""
    reports = [report for kind in ("passed", "failed", "error") for report in terminalreporter.stats.get(kind, [])]
    # the examples stand in the report of a test's end, which is listed only if something went wrong in it
    counts = {
        report.nodeid: number
        for report in [*reports, *terminalreporter.stats.get("", [])]
        for name, number in report.user_properties
        if name == EXAMPLES and number
    }
    failed = len(terminalreporter.stats.get("failed", []))
    terminalreporter.write_line(f"fuzzing: {sum(counts.values())} examples in {len(counts)} tests, {failed} findings")
