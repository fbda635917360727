"""The work of a study's job, for processes of its own to import."""

import time
from pathlib import Path

from benchmarks.robustness.studies import Job


def work(job: Job, folder: Path, root: Path) -> dict:
    """Each run is written to a file. It fails, or waits, if its settings say so."""
    with (root / "log").open("a") as log:
        log.write(f"{job.name} {job.seed}\n")
    if job.settings.get("fail") and not (root / "mended").exists():
        raise RuntimeError("no luck")
    time.sleep(job.settings.get("wait", 0))
    return {"saw": [job.result(root, need)["name"] for need in job.needs]}
