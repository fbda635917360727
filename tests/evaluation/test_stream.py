"""A data loader's images go through the attacks part by part: the report is the same, and memory does not grow."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluating import evaluate
from small_models import labelled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from purify_fast.attacks import APGD, FGSM, PGD, Square
from purify_fast.evaluation import AttackSpec
from purify_fast.evaluation.inputs import in_chunks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain():
    model, x, y = labelled(150)
    # some are misclassified as they are
    return model, x, torch.where(torch.arange(150) % 7 == 0, (y + 1) % 10, y)


def test_the_report_is_that_of_the_images_in_memory(plain, tmp_path, made_rows):
    model, x, y = plain
    left = [AttackSpec(attack, survivors_only=True) for attack in (APGD(steps=5), Square(n_queries=20))]
    some = [AttackSpec(PGD(steps=3), max_images=n) for n in (10, 100)]
    options = {"eps": 0.08, "attacks": [FGSM(), *left, *some], "probes": True}
    options |= {"batch_size": 16, "progress": False}
    whole = evaluate(model, x, y, **options)
    # parts of 70, 70 and 10 images
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    report = evaluate(model, loader, **options, out=tmp_path)
    for row, other in zip(report.rows, whole.rows, strict=True):
        assert (row.attack, row.n, row.health, row.reliable) == (other.attack, other.n, other.health, other.reliable)
        assert np.array_equal(row.robust, other.robust) and row.settings == other.settings
        assert (row.mean, row.worst) == (pytest.approx(other.mean), pytest.approx(other.worst))
        assert (row.margins is None) == (other.margins is None)
        assert row.margins is None or np.allclose(row.margins, other.margins, atol=1e-5)
    assert [vars(finding) for finding in report.findings] == [vars(finding) for finding in whole.findings]
    assert len({row.data for row in report.rows}) == 1 and report.curves == whole.curves
    made_rows.clear()
    again = evaluate(model, loader, **options, out=tmp_path)
    assert not made_rows and [row.data for row in again.rows] == [row.data for row in report.rows]


def test_the_batches_are_not_held_while_their_part_is_attacked(plain):
    _, x, y = plain
    given = []

    def batches():
        for part in range(3):
            images = x[50 * part : 50 * part + 50].clone()
            given.append(weakref.ref(images))
            yield images, y[:50]

    chunks = in_chunks(batches(), None, 50)
    next(chunks)
    # the next one was read, to know that it is there
    assert [images() is None for images in given] == [True, False]


def test_what_was_left_out_is_summed_over_the_parts(plain):
    model, x, y = plain
    attacks = [FGSM(), AttackSpec(APGD(steps=5), survivors_only=True, until=0.2)]
    options = {"eps": 0.02, "attacks": attacks, "batch_size": 16, "progress": False}
    parts = [(x[:75], y[:75]), (x[75:], y[75:])]
    each = [evaluate(model, *part, **options).rows[2].unsearched for part in parts]
    row = evaluate(model, parts, **options).rows[2]
    assert row.unsearched == sum(each) > 0


def test_parts_of_a_random_model_have_noise_of_their_own(plain):
    model, x, y = plain
    seen = []

    def noisy(images):
        noise = torch.randn(len(images), 10)
        seen.append(noise[0, 0].item())
        return model(images) + noise

    evaluate(noisy, zip(x.split(75), y.split(75), strict=True), eps=0.1, attacks=[], batch_size=16, progress=False)
    # of each part the last predictions on five batches, five times
    assert len(set(seen[-50:])) == 50


def test_a_bad_label_of_a_later_part_is_named_by_its_place(plain):
    model, x, y = plain
    labels = y.clone()
    labels[133] = 12
    with pytest.raises(ValueError, match=r"y\[133\] is 12"):
        evaluate(model, zip(x.split(10), labels.split(10), strict=True), eps=0.1, attacks=[], batch_size=16)


def test_memory_of_a_stream_of_20000_images_is_flat():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc")
    torch.manual_seed(0)
    model, resident = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), []

    def batches():
        for _ in range(80):
            resident.append(int(statm.read_text().split()[1]) * 4096 / 2**20)
            yield torch.rand(250, 3, 32, 32), torch.randint(10, (250,))

    report = evaluate(model, batches(), eps=0.01, attacks=[FGSM(), APGD(steps=2)], progress=False)
    assert [row.n for row in report.rows] == [20_000] * 4
    # all images together are 234 MiB
    growth = max(resident[40:]) - max(resident[:20])
    assert growth < 40, f"{growth:.0f} MiB more"
