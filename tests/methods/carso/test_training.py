"""CARSO's training: the paper's schedules and batches, and the losses."""

import copy
import dataclasses

import pytest
import torch
from small_models import carso, first_digits

from purify_fast import data
from purify_fast.attacks import FGSM, PGD, AttackResult
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack


def batch(n=16, epoch=5, epochs=10):
    x, y = first_digits(n)
    return Batch(data.to_float(x), y, torch.arange(n), 7, epoch, epochs)


@pytest.mark.parametrize(
    ("size", "fraction", "clean", "atom"),
    [(640, 0.5, 320, 80), (640, 0.15, 544, 24), (128, 0.01, 128, 0), (128, 0.04, 124, 1), (1024, 0.01, 1016, 2)],
)
def test_fact_12_batch_layouts(size, fraction, clean, atom, monkeypatch):
    calls = []

    def record(attack, model, x, y, context):
        calls.append(context.eps.tolist())
        return AttackResult(x + 10)

    for kind in (PGD, FGSM):
        monkeypatch.setattr(kind, "run", record)
    x, y = torch.rand(size, 1, 2, 2), torch.zeros(size, dtype=torch.int64)
    attack = TrainingAttack(eps=0.2, steps=40)
    config = CarsoConfig(attack=attack, adversarial_fraction=fraction, allow_no_adversarial=True)
    out = CarsoTask(carso(), config).balanced_batch(Batch(x, y, torch.arange(size), 0), config)
    assert torch.equal(out[:clean], x[:clean]) and torch.equal(out[clean:], x[clean:] + 10)
    assert calls == ([pytest.approx([0.1] * atom + [0.2] * atom)] * 2 if atom else [])
    assert clean + 4 * atom == size


def test_without_adversarial_examples_only_if_asked():
    made, b = carso(), batch(16)
    config = CarsoConfig(attack=TrainingAttack(eps=0.2, steps=1), adversarial_fraction=0.01)
    with pytest.raises(ValueError, match=r"0\.01 of 16 images is too few for 4 attacks"):
        CarsoTask(made, config).training_step(b)
    config = dataclasses.replace(config, allow_no_adversarial=True)
    x = CarsoTask(made, config).balanced_batch(b, config)
    assert torch.equal(x, b.x)
    assert CarsoTask(made, config).training_step(b)[0].isfinite()


def test_published_loss_is_reconstruction_plus_weighted_kl():
    made, b = carso(), batch(epoch=0)
    loss, terms = CarsoTask(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2))).training_step(b)
    torch.testing.assert_close(loss.detach(), terms["reconstruction"])  # epoch 0: no KL yet
    loss, terms = CarsoTask(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2), beta=0.5)).training_step(
        batch(epoch=9)
    )
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + 0.5 * terms["kl"])
    assert terms["kl"] > 0


def test_official_code_attacks_with_a_larger_eps_and_the_same_step(monkeypatch):
    seen = []
    monkeypatch.setattr(CarsoTask, "balanced_batch", lambda self, batch, config: seen.append(config) or batch.x)
    torch.manual_seed(0)
    statistics = {"mean": (0.4, 0.4, 0.4), "std": (0.25, 0.2, 0.3)}
    made = Carso(SmallCNN(3, 10, (16, 16), 4), ["conv2"], (3, 16, 16), 8, 4, 2, decoder_width=2, **statistics)
    b = batch()
    colour = dataclasses.replace(b, x=b.x.expand(-1, 3, -1, -1))
    config = CarsoConfig(attack=TrainingAttack(eps=0.1, steps=2, alpha=0.2), eps_mode="official_code")
    CarsoTask(made, config).training_step(colour)
    CarsoTask(made, dataclasses.replace(config, eps_mode="paper")).training_step(colour)
    assert [c.attack.eps for c in seen] == pytest.approx([0.1 * 3 / 0.75, 0.1])
    assert all(c.attack.step_size(c.attack.eps) == 0.2 for c in seen)


def test_the_pipeline_loss_reaches_what_inference_uses_and_keeps_mode_samples_and_statistics():
    made = carso().train()
    state = copy.deepcopy(made.state_dict())
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=2), train_samples=3)
    CarsoTask(made, config).training_step(batch())[0].backward()
    for name, p in made.named_parameters():
        inference = name.startswith(("condition_encoder", "decoder"))
        assert (p.grad is not None) == inference, name
    assert made.training and made.samples == 2
    assert all(torch.equal(state[k], v) for k, v in made.state_dict().items())


def test_pipeline_examples_are_made_against_the_whole_defence(monkeypatch):
    seen, run = [], PGD.run
    monkeypatch.setattr(PGD, "run", lambda attack, model, *given: seen.append(model) or run(attack, model, *given))
    made = carso()
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1))
    CarsoTask(made, config).training_step(batch())
    CarsoTask(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=1))).training_step(batch())
    assert seen[0].decoder is made.decoder and seen[0].samples == 1 and seen[1] is made.classifier
