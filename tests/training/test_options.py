"""`fit` accumulates and clips gradients, smooths labels, stops early and takes soft labels."""

import pytest
import torch
from small_runs import Listener, StopAt, Stopped, atop_task, images, same
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


def test_long_gradients_are_shortened_and_short_ones_are_not():
    usual, long, short = task(), task(), task()
    (norms, _), (clipped, _) = gradients(usual), gradients(long)
    fit(usual, *images(), FitConfig(1, 16), progress=False)
    fit(long, *images(), FitConfig(1, 16, clip_gradients=min(norms) / 2), progress=False)
    assert clipped == pytest.approx([min(norms) / 2] * 4, rel=1e-3)
    fit(short, *images(), FitConfig(1, 16, clip_gradients=2 * max(norms)), progress=False)
    assert same(usual, short)


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


class Scored(ClassifierTask):
    scores = (3.0, 1.0, 2.0, 2.5, 0.5, 0.4)

    def validate(self, batch):
        self.count = getattr(self, "count", -1) + 1
        return {"loss": torch.tensor(self.scores[self.count])}


@pytest.mark.parametrize(("patience", "every", "epochs"), [(1, 1, 3), (2, 1, 4), (3, 1, 6), (1, 2, 6), (None, 1, 6)])
def test_a_run_ends_after_validations_that_are_not_better(patience, every, epochs, tmp_path):
    config = FitConfig(6, 16, validation_share=0.25, validation_every=every, keep_best="loss", patience=patience)
    made, state = task(), []
    made.__class__ = Scored
    callback = Listener()
    callback.on_end = state.append
    fit(made, *images(), config, tmp_path, progress=False, callbacks=[callback])
    assert state[0].step == 3 * epochs and state[0].epoch == epochs - 1
    # a finished run does not go on
    again = task()
    again.__class__ = Scored
    again.training_step = lambda batch: pytest.fail("a step was taken")
    fit(again, *images(), config, tmp_path, progress=False)
    assert same(made, again)


def test_an_early_end_is_the_same_after_a_kill(tmp_path):
    config = FitConfig(9, 16, validation_share=0.25, keep_best="accuracy", patience=2, checkpoint_seconds=0)
    whole, resumed = task(), task()
    last = fit(whole, *images(), config, tmp_path / "whole", progress=False)
    with pytest.raises(Stopped):
        fit(task(), *images(), config, tmp_path / "cut", progress=False, callbacks=[StopAt(4)])
    assert fit(resumed, *images(), config, tmp_path / "cut", progress=False) == last and same(whole, resumed)


@pytest.mark.parametrize(("objective", "loader"), [(None, True), ("trades", False)])
def test_probabilities_as_labels(objective, loader):
    """Those that are certain train like the classes, and mixed labels train otherwise."""
    x, y = images()

    def trained(labels):
        made = task(attack=ATTACK, objective=objective)
        given = ([(a, b) for a, b in zip(x.split(16), labels.split(16), strict=True)], None) if loader else (x, labels)
        last = fit(made, *given, FitConfig(2, 16), progress=False, validation=(x, labels))
        return torch.cat([weight.detach().flatten() for weight in made.model.parameters()]), last

    certain = F.one_hot(y, 2).float()
    (weights, last), (soft, of_soft), (mixed, _) = map(trained, (y, certain, 0.7 * certain + 0.15))
    torch.testing.assert_close(weights, soft, rtol=1e-4, atol=1e-5)
    assert last == pytest.approx(of_soft, rel=1e-3) and (weights - mixed).norm() > 1e-2


def test_what_cannot_be_combined_is_refused_before_any_step(tmp_path):
    (x, y), options = images(), {"progress": False}
    with pytest.raises(ValueError, match="objective 'trades' needs attacked images: eps must be above 0"):
        ClassifierConfig(objective="trades")
    with pytest.raises(ValueError, match=r"beta needs the objective .* got beta=2"):
        ClassifierConfig(attack=ATTACK, beta=2.0)
    with pytest.raises(ValueError, match="patience needs keep_best"):
        FitConfig(1, patience=1)
    soft = F.one_hot(y, 2).float()
    with pytest.raises(ValueError, match=r"y must be int64 .* or probabilities, .* sums are 1, got torch.float32"):
        fit(task(), x, 2 * soft, FitConfig(1, 16), **options)
    with pytest.raises(ValueError, match=r"y must be int64 \[N\] = \[64\], got torch.float32"):
        fit(task(attack=ATTACK, objective="mart"), x, soft, FitConfig(1, 16), **options)
    with pytest.raises(ValueError, match=r"the labels of batch 0 of x must be int64 \[N\] = \[64\], or prob"):
        fit(task(), [(x, -soft)], None, FitConfig(1), **options)
    with pytest.raises(ValueError, match=r"the model has 2 classes"):
        fit(task(), x, F.one_hot(y, 3).float(), FitConfig(1, 16), **options)
