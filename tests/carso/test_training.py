"""CARSO's training: the paper's schedules and batches, the two losses, what is trained and what is not."""

import copy

import pytest
import torch

from purify_fast import data
from purify_fast.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.carso.training import atom_size, balanced_batch, kl_weight, pipeline_step, published_step
from purify_fast.nn import SmallCNN
from purify_fast.training import Batch, FitConfig, fit


def defence():
    torch.manual_seed(0)
    return Carso(SmallCNN(width=4), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)


def batch(n=16, epoch=5, epochs=10):
    digits = data.load("digits")
    return Batch(data.to_float(digits.x_train[:n]), digits.y_train[:n], torch.arange(n), 7, epoch, epochs)


@pytest.mark.parametrize(
    ("epochs", "epoch", "want"),
    # fact 7 of the specification, read off the official code
    [
        *[(200, 24, 0), (200, 25, 0), (200, 26, 0.1111), (200, 33, 0.8889), (200, 34, 1), (200, 199, 1)],
        *[(250, 32, 0), (250, 33, 0.0909), (250, 42, 0.9091), (250, 43, 1)],
    ],
)
def test_fact_7_kl_weight(epochs, epoch, want):
    assert kl_weight(epoch, epochs) == pytest.approx(want, abs=5e-5)


@pytest.mark.parametrize(("size", "fraction", "atom"), [(640, 0.5, 80), (640, 0.15, 24), (128, 0.04, 1)])
def test_fact_12_atoms(size, fraction, atom):
    assert atom_size(size, fraction) == atom


@pytest.mark.parametrize(("size", "fraction"), [(128, 0.01), (7, 0.5), (64, 0.0)])
def test_never_silently_without_adversarial_examples(size, fraction):
    with pytest.raises(ValueError, match="leaves no adversarial example"):
        atom_size(size, fraction)


def test_the_balanced_batch_is_clean_then_pgd_then_fgsm_weak_before_strong():
    made, b, eps = defence(), batch(32), 0.2
    config = CarsoConfig(eps=eps, steps=10)
    x = balanced_batch(made.classifier, b.x, b.y, config, seed=1, sample_ids=b.sample_ids)
    distance = (x - b.x).flatten(1).abs().amax(1)
    assert torch.equal(x[:16], b.x[:16])
    for rows, bound in ((slice(16, 20), eps / 2), (slice(20, 24), eps), (slice(24, 28), eps / 2), (slice(28, 32), eps)):
        assert (distance[rows] <= bound + 1e-6).all() and (distance[rows] > 0.99 * bound).all()
    steps = (x - b.x)[24:].flatten(1).abs()  # FGSM: every free pixel moves by exactly eps
    assert ((steps < 1e-6) | (steps > 0.0)).all() and x.min() >= 0 and x.max() <= 1


def test_the_balanced_batch_raises_the_classifiers_loss():
    made, b = defence(), batch(64)
    x = balanced_batch(made.classifier, b.x, b.y, CarsoConfig(eps=0.2, steps=10), seed=1, sample_ids=b.sample_ids)
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(made.classifier(b.x[32:]), b.y[32:])
        after = torch.nn.functional.cross_entropy(made.classifier(x[32:]), b.y[32:])
    assert after > before


def test_published_loss_is_reconstruction_plus_weighted_kl():
    made, b = defence(), batch(epoch=0)
    loss, terms = published_step(made, b, CarsoConfig(eps=0.2, steps=2))
    torch.testing.assert_close(loss.detach(), terms["reconstruction"])  # epoch 0: no KL yet
    loss, terms = published_step(made, batch(epoch=9), CarsoConfig(eps=0.2, steps=2, beta=0.5))
    torch.testing.assert_close(loss.detach(), terms["reconstruction"] + 0.5 * terms["kl"])
    assert terms["kl"] > 0


def test_the_published_loss_reaches_every_part_of_the_purifier_but_not_the_classifier():
    made = defence()
    published_step(made, batch(), CarsoConfig(eps=0.2, steps=2))[0].backward()
    for name, p in made.named_parameters():
        assert (p.grad is None) == name.startswith("classifier."), name


def test_the_pipeline_loss_reaches_what_inference_uses_and_keeps_mode_samples_and_statistics():
    made = defence().train()
    state = copy.deepcopy(made.state_dict())
    pipeline_step(made, batch(), CarsoConfig(attack_target="pipeline", eps=0.2, steps=2, train_samples=3))[0].backward()
    for name, p in made.named_parameters():
        inference = name.startswith(("condition_encoder", "decoder"))
        assert (p.grad is not None) == inference, name
    assert made.training and made.samples == 2
    assert all(torch.equal(state[k], v) for k, v in made.state_dict().items())


def test_pipeline_examples_are_made_against_the_whole_defence(monkeypatch):
    import purify_fast.carso.training as module

    seen = []
    for name in ("pgd", "pgd_and_fgsm"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda model, *a, f=original, **k: seen.append(model) or f(model, *a, **k))
    made = defence()
    pipeline_step(made, batch(), CarsoConfig(attack_target="pipeline", eps=0.2, steps=1))
    published_step(made, batch(), CarsoConfig(eps=0.2, steps=1))
    assert seen == [made, made.classifier]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attack_target": "both"}, "attack_target must be one of classifier, pipeline"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"train_samples": 0}, "train_samples must be at least 1"),
        ({"adversarial_fraction": 1.5}, r"adversarial_fraction must be in \[0, 1\]"),
    ],
)
def test_config_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        CarsoConfig(**wrong)


def test_training_lowers_the_loss_and_leaves_the_classifier(tmp_path):
    digits, made = data.load("digits"), defence()
    before = copy.deepcopy(made.classifier.state_dict())
    task = CarsoTask(made, CarsoConfig(eps=0.2, steps=2))
    one = fit(task, digits.x_train, digits.y_train, FitConfig(1, 64), tmp_path / "one")
    made2 = defence()
    six = fit(CarsoTask(made2, task.config), digits.x_train, digits.y_train, FitConfig(6, 64), tmp_path / "six")
    assert six["reconstruction"] < 0.9 * one["reconstruction"]
    assert all(torch.equal(before[k], v) for k, v in made.classifier.state_dict().items())


def test_a_loop_of_ones_own():
    made = defence().train()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 1e-2)
    losses = []
    for step in range(12):
        b = batch(32)
        loss = made.training_step(Batch(b.x, b.y, b.sample_ids, step), CarsoConfig(eps=0.2, steps=2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
