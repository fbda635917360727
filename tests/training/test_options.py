"""The options of a classifier's training: smoothed labels, and what cannot be combined."""

import pytest
import torch
from small_runs import images
from torch import nn
from torch.nn import functional as F

from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit

pytestmark = pytest.mark.usefixtures("one_thread")
ATTACK = TrainingAttack(0.1, 2)


def task(classes=2, **options):
    torch.manual_seed(0)
    return ClassifierTask(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.SiLU(), nn.Linear(8, classes)), ClassifierConfig(**options)
    )


def test_labels_are_smoothed_in_the_training_and_not_in_a_validation():
    made, seen = task(label_smoothing=0.2), []
    step = made.training_step
    made.training_step = lambda batch: seen.append((batch, made.model(batch.x).detach())) or step(batch)
    last = fit(made, *images(), FitConfig(1, 48, validation_share=0.25), progress=False)
    ((batch, logits),) = seen
    plain, smoothed = (float(F.cross_entropy(logits, batch.y, label_smoothing=share)) for share in (0.0, 0.2))
    assert last["loss"] == pytest.approx(smoothed) != pytest.approx(plain)
    logits = made.model(batch.x).detach()
    assert float(made.validate(batch)["loss"]) == pytest.approx(float(F.cross_entropy(logits, batch.y)))


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="objective 'trades' needs attacked images: eps must be above 0"):
        ClassifierConfig(objective="trades")
    with pytest.raises(ValueError, match=r"beta needs the objective .* got beta=2"):
        ClassifierConfig(attack=ATTACK, beta=2.0)
