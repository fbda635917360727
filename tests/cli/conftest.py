"""Small data for the command line, and what it printed."""

import pytest
from pictures import write_bars

from purify_fast import cli


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("bars") / "bars.npz", 32, 8, 16, 16)


@pytest.fixture
def run(capsys):
    """Runs a command line; (exit status, what it printed), without a frame's lines and line ends."""

    def command(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, " ".join((printed.err + printed.out).replace("│", " ").split())

    return command
