"""Trainings attack a frozen copy that has the weights of the moment, and train the model itself."""

import pytest
import small_runs
import torch
from small_models import NotCopied, images_and_labels
from torch import nn

from purify_fast.models.classifiers import SmallCNN
from purify_fast.speed.frozen_copy import AttackedCopy, FrozenCopy
from purify_fast.training import Batch, ClassifierConfig, FitConfig, TrainingAttack, fit
from purify_fast.training.classifier import ClassifierTask

SHAPE = (1, 16, 16)


def task(objective):
    torch.manual_seed(0)
    attack = TrainingAttack(eps=0.1, steps=3)
    return ClassifierTask(SmallCNN(1, 10, SHAPE[1:], 8), ClassifierConfig(objective=objective, attack=attack))


def batch():
    return Batch(*images_and_labels(8, SHAPE, 10), torch.arange(8), 7, 0, 1)


@pytest.mark.parametrize("objective", [None, "trades", "mart"])
def test_every_step_attacks_the_present_weights(objective, monkeypatch):
    monkeypatch.setattr("purify_fast.speed.frozen_copy.FEWEST_WEIGHTS", 1)
    seen, original = [], TrainingAttack.run

    def run(self, model, *given, **options):
        seen.append((model, model(batch().x).detach()))
        return original(self, model, *given, **options)

    monkeypatch.setattr(TrainingAttack, "run", run)
    made = task(objective)
    for _ in range(3):
        made.train()
        with torch.no_grad():
            wanted = made.model.eval()(batch().x)
            made.train()
        loss, _ = made.training_step(batch())
        loss.backward()
        assert isinstance(seen[-1][0], FrozenCopy) and not torch.equal(seen[-1][1], wanted * 0)
        torch.testing.assert_close(seen[-1][1], wanted, rtol=1e-4, atol=1e-5)
        made.optimizer.step()
    assert len({id(model) for model, _ in seen}) == 1
    assert not torch.allclose(seen[0][1], seen[-1][1], atol=1e-4)


def test_small_models_and_models_without_a_copy_are_attacked_themselves():
    odd = NotCopied(lambda self, x: self.fc(x.flatten(1)), fc=nn.Linear(256, 1000))
    small, x = SmallCNN(1, 10, SHAPE[1:], 8), torch.rand(2, *SHAPE)
    assert AttackedCopy(small, torch.float32).now(x) is small
    assert AttackedCopy(small, torch.bfloat16).now(x).dtype == torch.bfloat16
    with pytest.warns(RuntimeWarning, match="NotCopied is attacked itself, .* no copies"):
        assert AttackedCopy(odd, torch.float32).now(x) is odd


def test_a_resumed_run_attacks_a_copy_of_the_form_in_its_checkpoint(tmp_path, monkeypatch):
    """The comparison depends on the weights, so the same run could choose another form later."""
    monkeypatch.setattr("purify_fast.speed.frozen_copy.FEWEST_WEIGHTS", 1)
    config, images = FitConfig(2, 16, checkpoint_seconds=0), small_runs.images()
    original = small_runs.task(attack=TrainingAttack(eps=0.1, steps=1))
    with pytest.raises(small_runs.Stopped):
        fit(original, *images, config, tmp_path, callbacks=[small_runs.StopAt(3)])
    assert original.attacked.decision == ["torch.float32", False]
    resumed = small_runs.task(attack=TrainingAttack(eps=0.1, steps=1))
    monkeypatch.setattr("purify_fast.speed.frozen_copy._compared", None)
    fit(resumed, *images, config, tmp_path)
    assert resumed.attacked.now(images[0][:1].float()).plain is False
    for decision in ("model", ["torch.bfloat16", True]):
        chosen = AttackedCopy(resumed.model, torch.bfloat16)
        chosen.decision = decision
        made = chosen.now(images[0][:1].float() / 255)
        assert made is resumed.model if decision == "model" else made.dtype == torch.bfloat16 and made.plain
