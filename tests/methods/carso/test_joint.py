"""Ours on top of the paper: free bits, a classifier trained with the purifier, and what is saved then."""

import copy

import pytest
import torch
from torch import nn

import purify_fast
from purify_fast import data
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.carso.losses import pipeline_step, published_step, training_loss
from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import Batch, FitConfig, fit
from purify_fast.training.config import TrainingAttack


def defence():
    torch.manual_seed(0)
    return Carso(SmallCNN(width=4), ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)


def batch(n=16):
    digits = data.load_dataset("digits")
    return Batch(data.to_float(digits.x_train[:n]), digits.y_train[:n], torch.arange(n), 7, 9, 10)


def gradients(made, config):
    made.zero_grad()
    loss, terms = published_step(made, batch(), config)
    loss.backward()
    return loss.detach(), terms, [p.grad.clone() for p in made.posterior_encoder.log_variance.parameters()]


def test_free_bits_charge_only_what_is_above_them():
    made = defence()
    plain, terms, _ = gradients(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2)))
    kl = float(terms["kl"])
    below, _, _ = gradients(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2), free_bits=0.5 * kl))
    torch.testing.assert_close(below, plain)
    above, _, _ = gradients(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2), free_bits=2 * kl))
    torch.testing.assert_close(above, plain + kl, rtol=1e-4, atol=1e-3)  # a constant in place of the term
    unpaid = gradients(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2), free_bits=2 * kl))[2]
    free = gradients(made, CarsoConfig(attack=TrainingAttack(eps=0.2, steps=2), beta=0.0))[2]
    for a, b in zip(unpaid, free, strict=True):
        torch.testing.assert_close(a, b)


def test_free_bits_keep_the_latent_alive():
    kl = {}
    for free_bits in (0.0, 3.0):
        made, digits = defence(), data.load_dataset("digits")
        config = CarsoConfig(attack=TrainingAttack(eps=0.2, steps=1), free_bits=free_bits, kl_delay=0.0)
        last = fit(CarsoTask(made, config), digits.x_train[:512], digits.y_train[:512], FitConfig(16, 64))
        kl[free_bits] = last["kl"]
    assert kl[3.0] > 2 * kl[0.0]


def test_joint_training_moves_the_defences_classifier_and_not_the_callers():
    torch.manual_seed(0)
    classifier = SmallCNN(width=4)
    before = copy.deepcopy(classifier.state_dict())
    made = Carso(classifier, ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)
    digits = data.load_dataset("digits")
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1), joint=True)
    fit(CarsoTask(made, config), digits.x_train[:64], digits.y_train[:64], FitConfig(1, 32))
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not torch.equal(made.classifier.conv1.weight, before["conv1.weight"])
    assert not made.classifier.training


@pytest.mark.parametrize("joint", [True, False])
def test_saved_with_its_own_classifier_only_if_that_was_trained(tmp_path, joint):
    torch.manual_seed(0)
    classifier = SmallCNN(width=4)
    made = Carso(classifier, ["conv2", "hidden"], (1, 16, 16), 8, 4, 2, decoder_width=2)
    digits = data.load_dataset("digits")
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1), joint=joint)
    fit(CarsoTask(made, config), digits.x_train[:64], digits.y_train[:64], FitConfig(1, 32), tmp_path / "run")
    made.save(tmp_path / "saved")
    again = purify_fast.load_defence(tmp_path / "saved", classifier)
    x = batch().x
    with made.deterministic(), again.deterministic():
        assert torch.equal(made(x), again(x))
    names = purify_fast.training.checkpoint.read_model(tmp_path / "saved")[1]
    assert any(name.startswith("classifier.") for name in names) == joint
    other = SmallCNN(width=4)
    nn.init.normal_(other.conv1.weight)
    if joint:  # its own weights replace whatever came
        loaded = purify_fast.load_defence(tmp_path / "saved", other)
        with made.deterministic(), loaded.deterministic():
            assert torch.equal(made(x), loaded(x))
    else:
        with pytest.raises(ValueError, match="its weights"):
            purify_fast.load_defence(tmp_path / "saved", other)


def test_joint_runs_resume(tmp_path):
    digits = data.load_dataset("digits")
    config = CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1), joint=True)

    def train(folder, epochs_twice):
        made = defence()
        if epochs_twice:  # a first process that was stopped: the second starts from the first classifier again
            task = CarsoTask(made, config)
            step, done = task.training_step, []

            def stop(batch):
                if len(done) == 3:
                    raise KeyboardInterrupt
                done.append(1)
                return step(batch)

            task.training_step = stop
            with pytest.raises(KeyboardInterrupt):
                fit(task, digits.x_train[:64], digits.y_train[:64], FitConfig(2, 32), folder)
            made = defence()
        fit(CarsoTask(made, config), digits.x_train[:64], digits.y_train[:64], FitConfig(2, 32), folder)
        return made.state_dict()

    whole, resumed = train(tmp_path / "a", False), train(tmp_path / "b", True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_attack_leaves_the_classifier_trainable():
    made = defence()
    CarsoTask(made, CarsoConfig(attack_target="pipeline", joint=True))
    loss, _ = pipeline_step(
        made.train(),
        batch(),
        CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1), joint=True),
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.classifier.parameters())


def test_a_released_classifier_is_frozen_again_by_a_task_that_is_not_joint():
    made = defence()
    CarsoTask(made, CarsoConfig(attack_target="pipeline", joint=True))
    before = made.classifier.head.weight.clone()
    task = CarsoTask(made, CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1)))
    task.training_step(batch())[0].backward()
    task.optimizer.step()
    assert torch.equal(made.classifier.head.weight, before)
    assert all(p.grad is None for p in made.classifier.parameters())


def test_joint_training_that_would_not_reach_the_classifier_is_refused():
    made, config = defence(), CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.2, steps=1), joint=True)
    with pytest.raises(ValueError, match=r"after release_classifier\(\)"):
        training_loss(made, batch(), config)
    with pytest.raises(ValueError, match=r"accelerate\(None\) first"):
        made.accelerate().release_classifier()
    made.accelerate(None).release_classifier()
    with pytest.raises(ValueError, match="not accelerated"):
        training_loss(made.accelerate(), batch(), config)


def test_refusals():
    with pytest.raises(ValueError, match=r"free_bits 2\.0 is of attack_target 'classifier'"):
        CarsoConfig(attack_target="pipeline", free_bits=2.0)
    with pytest.raises(ValueError, match="joint training needs attack_target='pipeline'"):
        CarsoConfig(joint=True)
    with pytest.raises(ValueError, match="targets 'classifier' needs attack_target='pipeline'"):
        CarsoConfig(targets="classifier")
    with pytest.raises(ValueError, match="targets 'classifier' needs a frozen classifier"):
        CarsoConfig(attack_target="pipeline", targets="classifier", joint=True)
    with pytest.raises(ValueError, match="targets must be"):
        CarsoConfig(attack_target="pipeline", targets="teacher")
    with pytest.raises(ValueError, match="free_bits must be at least 0, got -1"):
        CarsoConfig(free_bits=-1)
