"""The files of this folder are imported by each other; at the end the number of tried examples is printed."""

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
    reports = [report for found in terminalreporter.stats.values() for report in found]
    counts, failed = dict[str, int](), set[str]()
    for report in reports:
        for name, number in getattr(report, "user_properties", ()):
            # it stands in the report of a test's end
            if name == EXAMPLES and number:
                counts[report.nodeid] = number
                failed |= {report.nodeid} if report.failed else set()
    failed |= {report.nodeid for report in terminalreporter.stats.get("failed", []) if report.nodeid in counts}
    if counts:
        text = f"fuzzing: {sum(counts.values())} examples, {len(counts)} tests, {len(failed)} findings"
        terminalreporter.write_line(text)
