"""What the files of this folder share: they import from each other, and start processes that train together."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

SCRIPT = Path(__file__).with_name("together.py")


@pytest.fixture(scope="session")
def together():
    """Runs actions of together.py in several processes; exit statuses and errors."""

    def run(folder, world, *actions, store=None, first=0, rest=20, **environment):
        """Actions are (name, function, arguments). It ends ``rest`` seconds after the process ``first`` has ended."""
        folder.mkdir(exist_ok=True)
        (folder / "store").unlink(missing_ok=True)
        store = folder / "store" if store is None else store
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), **environment}
        files = [open(folder / f"errors-{rank}", "w+") for rank in range(world)]  # noqa: SIM115
        started = [
            subprocess.Popen(
                [sys.executable, SCRIPT, str(rank), str(world), store, folder, repr(actions)],
                env=environment,
                stderr=files[rank],
            )
            for rank in range(world)
        ]
        try:
            started[first].wait(timeout=120)
            # one that hangs is not waited for
            end = time.monotonic() + rest
            while any(process.poll() is None for process in started) and time.monotonic() < end:
                time.sleep(0.05)
        finally:
            for process in started:
                process.kill()
        codes = [process.wait() for process in started]
        for file in files:
            file.close()
        return codes, [(folder / f"errors-{rank}").read_text() for rank in range(world)]

    return run


@pytest.fixture
def torchrun(tmp_path):
    """Starts the command line by torchrun on 40 images: words of torchrun, and words of the command."""
    x, y = np.random.RandomState(0).randint(0, 256, (40, 12, 8)).astype(np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)

    def start(how, *words, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "purify_fast", "train", *words]
        command += ["--data", str(tmp_path / "small.npz"), "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **pipes)

    return start
