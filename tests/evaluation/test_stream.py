"""A data loader's images have the report of the same images in memory."""

import numpy as np
import pytest
import torch
from evaluating import evaluate
from small_models import labelled
from torch.utils.data import DataLoader, TensorDataset

from purify_fast.attacks import APGD, FGSM, PGD, Square
from purify_fast.evaluation import AttackSpec

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
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    report = evaluate(model, loader, **options, out=tmp_path)
    for row, other in zip(report.rows, whole.rows, strict=True):
        assert (row.attack, row.n, row.health, row.reliable) == (other.attack, other.n, other.health, other.reliable)
        assert np.array_equal(row.robust, other.robust) and row.settings == other.settings
        assert (row.mean, row.accuracy, row.data) == (other.mean, other.accuracy, other.data)
        assert np.array_equal(row.margins, other.margins)
    assert [vars(finding) for finding in report.findings] == [vars(finding) for finding in whole.findings]
    assert report.curves == whole.curves
    made_rows.clear()
    again = evaluate(model, loader, **options, out=tmp_path)
    assert not made_rows and [row.data for row in again.rows] == [row.data for row in report.rows]


def test_a_bad_label_of_a_later_batch_is_named_by_its_place(plain):
    model, x, y = plain
    labels = y.clone()
    labels[133] = 12
    with pytest.raises(ValueError, match=r"y\[133\] is 12"):
        evaluate(model, zip(x.split(10), labels.split(10), strict=True), eps=0.1, attacks=[], batch_size=16)
