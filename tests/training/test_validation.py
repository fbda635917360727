"""Held-out images during a training, and the best weights by them."""

import json
import math

import pytest
import torch
from small_models import Made, first_digits
from small_runs import (
    EPS,
    StopAt,
    Stopped,
    arrest_task,
    atop_task,
    batch as small_batch,
    carso_task,
    images,
    same,
    task as small_task,
)
from torch.utils.data import DataLoader, TensorDataset

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit

ATTACK = TrainingAttack(eps=0.05, steps=1, eps_warmup=1.0)
#: A training of each kind.
TASKS = {
    "carso": lambda: carso_task(optimizer="radam_lookahead", kl_delay=0.0),
    "atop": lambda: atop_task(gan_grad=True, discriminator_width=1),
    "arrest": lambda: arrest_task(ema_decay=0.5),
}


def task():
    return small_task(4, attack=ATTACK)


def watched(made):
    """The task, and the batches that it trains on and that it is validated with, these with the model's mode."""
    trained, validated = [], []
    step, validate = made.training_step, made.validate

    def see_validation(batch):
        validated.append((batch, made.model.training))
        before = len(trained)
        measured = validate(batch)
        # a validation takes the loss by a training's step
        del trained[before:]
        return measured

    made.training_step = lambda batch: trained.append(batch) or step(batch)
    made.validate = see_validation
    return made, trained, validated


def test_held_out_images_are_validated_with_and_not_trained_on(tmp_path):
    x, y = images(100)
    made, trained, validated = watched(task())
    config = FitConfig(3, 16, flip=True, validation_share=0.3, validation_every=2)
    last = fit(made, x, y, config, tmp_path, progress=False)
    seen = set(torch.cat([batch.sample_ids for batch in trained]).tolist())
    ids = [batch.sample_ids.tolist() for batch, _ in validated]
    held = [{*ids[0], *ids[1]}, {*ids[2], *ids[3]}]
    assert len(ids) == 4 and held[0] == held[1] and len(held[0]) == 30 and not seen & held[0]
    # unaugmented, in evaluation mode, as of the last epoch, with the same draws every time
    for batch, training in validated:
        assert not training and batch.epoch == 2 and batch.seed == validated[0][0].seed
        assert torch.equal((batch.x * 255).round().to(torch.uint8), x[batch.sample_ids])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["validation_loss" in row for row in rows] == [False, True, True]
    assert rows[-1]["validation_accuracy"] == last["validation_accuracy"]


class Worse(ClassifierTask):
    """The losses of its validations are given, the second the lowest."""

    def __init__(self, scores=(3.0, 1.0, 2.0, 2.5)):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 4), ClassifierConfig(attack=ATTACK))
        self.seen, self.scores = [], scores

    def validate(self, batch):
        self.seen.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return {"loss": torch.tensor(self.scores[len(self.seen) - 1])}


NAN = float("nan")


SCORES = [([3.0, 1.0, 2.0, 2.5], 1), ([NAN, 2.0, 1.0, 3.0], 2), ([NAN] * 4, 3)]


@pytest.mark.parametrize(("scores", "best"), SCORES, ids=str)
def test_the_best_weights_are_what_remains(scores, best):
    """A score that is no number is never the best; without any, the last weights remain."""
    made = Worse(scores)
    config = FitConfig(4, 16, validation_share=0.16, keep_best="loss")
    fit(made, *images(100), config, progress=False)
    assert same(made.model.state_dict(), made.seen[best])


def test_the_best_weights_survive_an_interruption(tmp_path):
    config = FitConfig(4, 16, validation_share=0.16, keep_best="loss", checkpoint_seconds=0)

    first = Worse()
    with pytest.raises(Stopped):
        # in the last of four epochs of five steps
        fit(first, *images(100), config, tmp_path, progress=False, callbacks=[StopAt(18)])
    second = Worse([2.5])
    fit(second, *images(100), config, tmp_path, progress=False)
    assert same(second.model.state_dict(), first.seen[1])
    # a finished run gives the same again
    third = Worse()
    fit(third, *images(100), config, tmp_path, progress=False)
    assert same(third.model.state_dict(), first.seen[1]) and not third.seen


def test_held_out_data_of_ones_own(tmp_path):
    x, y = images(100)
    held, config = (x[:30], y[:30]), FitConfig(1, 16)
    one = fit(task(), x, y, config, progress=False, validation=held)
    two = fit(task(), DataLoader(TensorDataset(x, y), 16), None, config, progress=False, validation=held)
    assert "validation_accuracy" in one and one.keys() == two.keys()
    with pytest.raises(ValueError, match=r"largest label is .*, but the model has"):
        fit(task(), x, y, config, progress=False, validation=(x, y + 100))
    with pytest.raises(TypeError, match="validation must be a pair of tensors"):
        fit(task(), x, y, config, progress=False, validation=DataLoader(TensorDataset(*held)))
    fit(task(), x, y, config, tmp_path, progress=False, validation=held)
    with pytest.raises(ValueError, match=r"another run|validation"):
        fit(task(), x, y, config, tmp_path, progress=False, validation=(x[30:], y[30:]))
    with pytest.raises(ValueError, match="validation must be None if validation_share is above 0"):
        fit(task(), x, y, FitConfig(1, 16, validation_share=0.2), progress=False, validation=held)


@pytest.mark.parametrize("name", TASKS)
def test_every_training_can_be_validated_and_goes_on_as_if_it_had_not_been(name):
    made = [TASKS[name](), TASKS[name]()]
    for task, every in zip(made, (1, 9), strict=True):
        config = FitConfig(3, 16, validation_share=0.2, validation_every=every)
        assert math.isfinite(fit(task, *first_digits(80), config, progress=False)["validation_loss"])
    assert same(*made)


def test_the_best_weights_need_held_out_images_and_a_quantity_that_is_measured():
    with pytest.raises(ValueError, match="keep_best 'loss' needs held-out images: give validation_share"):
        fit(task(), *images(100), FitConfig(1, 16, keep_best="loss"), progress=False)
    config = FitConfig(1, 16, validation_share=0.2, keep_best="accuracy")
    with pytest.raises(ValueError, match="keep_best must be one of off, loss for this training, got 'accuracy'"):
        fit(Worse(), *images(100), config, progress=False)


def test_an_epoch_is_not_lost_if_its_validation_fails(tmp_path):
    """The next start begins with the validation, and ends as if the first had not failed."""
    config = FitConfig(3, 16, validation_share=0.2, keep_best="accuracy", checkpoint_seconds=1000)

    def run(folder, fails=False):
        made, trained, _ = watched(task())
        validate = made.validate

        def failing(batch):
            if fails and len(trained) == 10:  # after the second epoch
                raise Stopped
            return validate(batch)

        made.validate = failing
        try:
            fit(made, *images(100), config, tmp_path / folder, progress=False)
        except Stopped:
            return made, [batch.step for batch in trained], None
        rows = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        measured = [{name: row[name] for name in row if "loss" in name or "accuracy" in name} for row in rows]
        return made, [batch.step for batch in trained], measured

    whole, steps, wanted = run("whole")
    assert steps == list(range(15)) and len(wanted) == 3 and run("cut", fails=True)[1] == list(range(10))
    resumed, steps, found = run("cut")
    assert steps == list(range(10, 15)) and found == wanted and same(whole, resumed)


def test_carso_is_validated_with_a_last_batch_too_small_to_attack(tmp_path):
    found = []
    for reduction in ("mean", "sum"):
        made = carso_task(reduction=reduction, learning_rate=0.0, kl_delay=0.0)
        config = FitConfig(1, 16, validation_share=0.4)  # 16 and 5 images
        found.append(fit(made, *first_digits(53), config, tmp_path / reduction, progress=False))
        assert (tmp_path / reduction / "checkpoint.safetensors").is_file()
    mean, total = found
    # per image, however the training's loss is reduced
    assert total["validation_loss"] == pytest.approx(mean["validation_loss"])
    assert total["loss"] == pytest.approx(16 * mean["loss"])


def overfitted(self, x):
    """Wrong where an image is a little brighter, and right again where a whole step of eps leads to."""
    brighter = (x - 0.5).mean((1, 2, 3)) / EPS
    wrong = self.scale * brighter * (0.85 - brighter)
    return torch.stack([torch.zeros_like(wrong), wrong], 1)


def test_a_validation_is_by_pgd():
    """A model that overfitted to one step withstands that, and not ten."""
    given = small_batch()
    given = type(given)(torch.full_like(given.x, 0.5), torch.zeros_like(given.y), given.sample_ids, given.seed, 0, 10)
    # a step as long as the ball is wide, so that every image ends where the model withstands
    attack = TrainingAttack(eps=EPS, steps=1, alpha=2 * EPS)
    model = Made(overfitted, scale=torch.nn.Parameter(torch.tensor(10.0)))
    made = ClassifierTask(model, ClassifierConfig(attack=attack))
    assert made.training_step(given)[1]["accuracy"] == 1 and made.validate(given)["accuracy"] == 0


def test_a_training_attack_of_many_steps_validates_too():
    attack = TrainingAttack(eps=EPS, steps=20, norm="l2", eps_warmup=0.5)
    assert attack.of_validations() is attack
    assert TrainingAttack(eps=EPS, steps=9, norm="l2").of_validations() == TrainingAttack(eps=EPS, steps=10, norm="l2")
    # clean training is validated on clean images
    made, given = ClassifierTask(SmallCNN(width=4), ClassifierConfig()), small_batch()
    assert made.config.attack.eps == 0
    assert made.validate(given)["accuracy"] == (made.model(given.x).argmax(1) == given.y).float().mean()
