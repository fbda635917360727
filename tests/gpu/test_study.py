"""Jobs of the study on CIFAR-10 on a device: models are trained where the images are, saved, read and judged there."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from on_device import DEVICE

from benchmarks.robustness.studies import RESULT, cifar10
from benchmarks.robustness.studies.cifar10 import models
from benchmarks.robustness.studies.cifar10 import study as names

pytestmark = pytest.mark.gpu
#: The jobs. Each job follows the jobs that it needs.
WANTED = (
    names.BASE,
    names.STANDARD,
    names.CARSO,
    names.GENERATOR,
    names.search_name(5.0, 30.0),
    names.ARREST_EMA,
    names.judged_name(names.BASE, "fast"),
)


def test_jobs_run_on_the_device(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (80, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(80) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    quick = names.budget_of("quick")
    budget = replace(quick, training=SimpleNamespace(**vars(quick.training) | {"train_images": 32}))
    root = tmp_path / "runs"
    listed = {job.name: job for job in cifar10.jobs(str(tmp_path), budget, str(DEVICE)) if job.seed == 0}
    for name in WANTED:
        job = listed[name]
        assert job.ready(root), f"{job.name} needs {job.needs}"
        folder = job.folder(root)
        folder.mkdir(parents=True)
        (folder / RESULT).write_text(json.dumps(job.work(job, folder, root)))
    job = cifar10.jobs(str(tmp_path), budget, str(DEVICE))[0]
    for name in (names.BASE, names.CARSO, names.GENERATOR):
        model = models.model_of(job, root, name)
        assert {value.device.type for value in model.state_dict().values()} == {DEVICE.type}
