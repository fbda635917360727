"""Small data for the command line, and what it printed."""

import numpy as np
import pytest

from purify_fast import cli


@pytest.fixture(scope="session")
def write_bars():
    """Writes a data set of a user's own: two classes, grey, one light in its upper half and one in its lower half."""

    def write(path, count, held_out, height, width):
        state = np.random.RandomState(0)

        def split(n):
            y = np.arange(n) % 2
            x = state.randint(0, 120, (n, height, width))
            x[y == 0, : height // 2] += 100
            x[y == 1, height // 2 :] += 100
            return x.astype(np.uint8), y

        (x, y), (x_test, y_test) = split(count), split(held_out)
        np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
        return str(path)

    return write


@pytest.fixture(scope="session")
def bars(tmp_path_factory, write_bars):
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
