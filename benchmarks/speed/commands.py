"""Runs a command in a process of its own, and measures its time and the peak of its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from purify_fast._memory import peak_resident_memory


def called(
    words: list[str], folder: str, *, module: str = "purify_fast", kill_after: Path | None = None
) -> tuple[str, float, float]:
    """Run ``purify-fast`` or another module in a process.

    Args:
        words: the words after ``purify-fast``.
        folder: the working folder of the process.
        module: the module that is run, as by ``python -m``.
        kill_after: a file of the process. As soon as the file exists, the process is killed by SIGKILL. None kills
            nothing.

    Returns:
        The printed text, the seconds, and the peak of the process's memory in bytes.

    Raises:
        RuntimeError: the command failed, or ended before it could be killed.
    """
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    began, shown = time.monotonic(), Path(folder) / "printed.txt"
    with shown.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words], cwd=folder, env=environment, stdout=output, stderr=output
        )
        memory = 0
        while process.poll() is None:
            # A process that has ended no longer tells its peak.
            memory = max(memory, peak_resident_memory(process.pid))
            if kill_after is not None and kill_after.is_file():
                process.kill()
            time.sleep(0.005)
    seconds = time.monotonic() - began
    if process.returncode != (0 if kill_after is None else -signal.SIGKILL):
        name = "purify-fast" if module == "purify_fast" else module
        raise RuntimeError(f"{name} {' '.join(words)} ended with {process.returncode}:\n{shown.read_text()}")
    return shown.read_text(), seconds, memory
