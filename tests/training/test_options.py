"""The options of a classifier's training: accumulated gradients, smoothed labels, and noise."""

import pytest
import torch
from small_runs import atop_task, images
from torch import nn
from torch.nn import functional as F

from purify_fast.ops import Stream, philox
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit
from purify_fast.training.task import Batch

ATTACK = TrainingAttack(0.1, 2)


def task(classes=2, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.SiLU(), nn.Linear(8, classes))
    return ClassifierTask(model, ClassifierConfig(**options))


def gradients(made):
    """The norms of the gradients with which the optimizer steps, and the sizes of the parts of a batch."""
    norms, sizes, step, train = [], [], made.optimizer.step, made.training_step

    def seen():
        norms.append(float(sum(weight.grad.square().sum() for weight in made.model.parameters()).sqrt()))
        return step()

    made.optimizer.step = seen
    made.training_step = lambda batch: sizes.append(len(batch.x)) or train(batch)
    return norms, sizes


def test_parts_of_a_batch_give_the_weights_of_the_whole_batch():
    usual, parts = task(attack=ATTACK), task(attack=ATTACK)
    wanted = fit(usual, *images(60), FitConfig(2, 20), progress=False)
    norms, sizes = gradients(parts)
    found = fit(parts, *images(60), FitConfig(2, 20, accumulate=3), progress=False)
    assert len(norms) == 6 and sizes[-3:] == [7, 7, 6]
    assert found == pytest.approx(wanted, rel=1e-4)
    for one, other in zip(parts.model.parameters(), usual.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_update_follows_all_parts_of_the_update_before():
    """AToP with a discriminator has two updates a step."""
    made, order = atop_task(gan_grad=True, discriminator_width=1), []
    for name, optimizer in made.optimizers.items():
        optimizer.step = lambda step=optimizer.step, name=name: order.append(name) or step()
    x, y = torch.randint(0, 256, (32, 1, 16, 16), dtype=torch.uint8), torch.arange(32) % 10
    fit(made, x, y, FitConfig(1, 16, accumulate=2), progress=False)
    assert len(order) == 4 and order[:2] == order[2:] and set(order) == set(made.optimizers)


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


def test_noise_is_added_to_the_images_of_steps_and_validations():
    made, x, y = task(attack=TrainingAttack(eps=0.0, steps=1), noise=0.25), *images()
    batch = Batch(x[:8].float() / 255, y[:8].long(), torch.arange(8), seed=3)
    key = torch.tensor([3])
    noise = philox(key, batch.sample_ids, x[0].numel(), stream=Stream.SMOOTHING, distribution="normal")
    with torch.no_grad():
        expected = float(F.cross_entropy(made.model(batch.x + 0.25 * noise.view(batch.x.shape)), batch.y))
        assert expected != pytest.approx(float(F.cross_entropy(made.model(batch.x), batch.y)))
    for loss in (made.training_step(batch)[0], made.training_step(batch)[0], made.validate(batch)["loss"]):
        assert float(loss.detach()) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"noise needs clean images, eps 0, got noise=0.25"):
        ClassifierConfig(attack=ATTACK, noise=0.25)
