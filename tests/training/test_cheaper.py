"""Cheaper forms of adversarial training, each against its algorithm written plainly; the watch for a collapse."""

import logging

import pytest
import torch
from small_runs import batch, images, same
from torch.nn import functional as F

from purify_fast.models.classifiers import SmallCNN
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit
from purify_fast.training.checkpoint import CHECKPOINT, GOOD, read_tree
from purify_fast.training.loop import train_step
from purify_fast.training.loss_watch import Diverged
from purify_fast.training.single_step import n_fgsm, nuclear_norm, nuclear_step

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 0.1
FORMS = {"n_fgsm": 1, "nuat": 1, "free": 3}


def task(form, eps=EPS, **options):
    torch.manual_seed(0)
    config = ClassifierConfig(attack=TrainingAttack(eps=eps, steps=FORMS[form]), adversarial=form, **options)
    return ClassifierTask(SmallCNN(width=4), config)


def gradient(loss, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


@pytest.mark.parametrize("alpha", [None, 0.07])
def test_n_fgsm_is_one_step_from_noise_without_projection(alpha):
    made, given = task("n_fgsm"), batch()
    model, attack = made.model.eval(), TrainingAttack(eps=EPS, steps=1, alpha=alpha)
    attacked, still = n_fgsm(model, given, attack), n_fgsm(model, given, TrainingAttack(eps=EPS, steps=1, alpha=1e-9))
    # with hardly a step what is left is the noise: in twice the ball, and spread over it
    noise = still - given.x
    assert EPS < noise.abs().max() <= 2 * EPS + 1e-6 and noise.abs().mean() > 0.5 * EPS
    step = (EPS if alpha is None else alpha) * gradient(lambda x: F.cross_entropy(model(x), given.y), still).sign()
    torch.testing.assert_close(attacked, (still + step).clamp(0, 1), rtol=0, atol=1e-6)
    assert 2 * EPS < (attacked - given.x).abs().max() <= 3 * EPS + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1


def test_noise_is_that_of_an_image_and_its_step():
    """Whatever the batch: ranks and resumed runs agree."""
    made, given = task("n_fgsm"), batch()
    whole = n_fgsm(made.model, given, made.config.attack)
    part = type(given)(given.x[5:9], given.y[5:9], given.sample_ids[5:9], given.seed, 0, 10)
    torch.testing.assert_close(n_fgsm(made.model, part, made.config.attack), whole[5:9], rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1])
def test_nuclear_attack_is_one_step_from_a_corner(step):
    made, given = task("nuat"), batch()
    x = given.x.clone()
    x[:, :, 0], x[:, :, 1] = 0.0, 1.0
    given = type(given)(x, given.y, given.sample_ids, given.seed, 0, 10, step)
    model, weight = made.model.eval(), 3.0
    corner = nuclear_step(model, given, TrainingAttack(eps=EPS, steps=1, alpha=1e-9), weight)
    moved = (corner - x).abs()
    assert torch.allclose(moved[:, :, 2:].clamp(max=EPS / 2 + 1e-6), moved[:, :, 2:]) and moved[:, :, 2:].mean() > 0.04
    # of pixels at the end of their range about a half can move
    for row in (0, 1):
        assert 0.3 < (moved[:, :, row] > 0.01).float().mean() < 0.7

    def loss(point):
        logits = model(point)
        change = (logits - model(x)).double()
        norm = torch.linalg.svdvals(change).sum() / len(x) if step == 1 else 0.0
        return F.cross_entropy(logits, given.y) + weight * norm

    wanted = (corner + EPS * gradient(loss, corner).sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    got = nuclear_step(model, given, made.config.attack, weight)
    assert ((got - wanted).abs() < 1e-5).float().mean() > 0.999
    assert (got - x).abs().max() <= EPS + 1e-6


def test_nuclear_training_lowers_cross_entropy_of_clean_images_and_the_norm():
    made, x = task("nuat", nuclear_weight=9.0), batch()
    weights = []
    for epoch in (0, 3, 9):
        given = type(x)(x.x, x.y, x.sample_ids, x.seed, epoch, 10, 1)
        made.model.train()
        loss, metrics = made.training_step(given)
        rest = loss - F.cross_entropy(made.model(x.x), x.y)
        weights.append(float(rest.detach() / metrics["nuclear_norm"]))
    # risen by 9 in the first nine of ten epochs
    assert weights == pytest.approx([0, 3, 9], abs=1e-3)
    change = torch.randn(6, 3, dtype=torch.float64)
    assert float(nuclear_norm(change)) == pytest.approx(float(torch.linalg.svdvals(change).sum()) / 6, rel=1e-6)


def test_free_training_moves_weights_and_images_by_one_backward_pass():
    made, plain, given = task("free"), task("free"), batch()
    start = task("free", eps=EPS)
    passes = []
    made.model.register_full_backward_hook(lambda *_: passes.append(1))
    train_step(made, given)
    assert len(passes) == 3

    points = []
    start.model.register_forward_pre_hook(lambda _, inputs: points.append(inputs[0].detach()))
    train_step(start, given)
    point = points[0]
    plain.model.train()
    for seen in points:
        torch.testing.assert_close(point, seen, rtol=0, atol=1e-6)
        leaf = seen.clone().requires_grad_()
        plain.optimizer.zero_grad()
        F.cross_entropy(plain.model(leaf), given.y).backward()
        plain.optimizer.step()
        point = (leaf.detach() + EPS * leaf.grad.sign()).clamp(given.x - EPS, given.x + EPS).clamp(0, 1)
    assert same(made, start)
    for one, other in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_form_learns_and_goes_on_to_the_bit(tmp_path, form, precision):
    def made():
        torch.manual_seed(0)
        attack = TrainingAttack(eps=0.01, steps=FORMS[form])
        config = ClassifierConfig(attack=attack, adversarial=form, precision=precision, nuclear_weight=1.0)
        return ClassifierTask(SmallCNN(1, 2, (8, 8), 4), config)

    class Ended(Exception):
        pass

    class End:
        def on_step(self, state):
            pass

        def on_epoch(self, state):
            if state.epoch == 4:
                raise Ended

    # one class is brighter than the other
    x, y = images()
    x = (x // 2 + 100 * y.to(torch.uint8)[:, None, None, None]).contiguous()
    config = FitConfig(10, 16, validation_share=0.25)
    whole, parts = made(), made()
    last = fit(whole, x, y, config, progress=False)
    assert last["accuracy"] > 0.9 and last["validation_accuracy"] > 0.9
    with pytest.raises(Ended):
        fit(parts, x, y, config, tmp_path, progress=False, callbacks=[End()])
    parts = made()
    fit(parts, x, y, config, tmp_path, progress=False)
    assert same(whole, parts)


class Overfitted(torch.nn.Module):
    """Wrong where an image is a little brighter, and right again where a whole step of eps leads to."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        brighter = (x - 0.5).mean((1, 2, 3)) / EPS
        wrong = self.scale * brighter * (0.85 - brighter)
        return torch.stack([torch.zeros_like(wrong), wrong], 1)


@pytest.mark.parametrize(
    "config",
    [
        task("n_fgsm").config,
        # a step as long as the ball is wide, so that every image ends where the model withstands
        ClassifierConfig(attack=TrainingAttack(eps=EPS, steps=1, alpha=2 * EPS)),
        ClassifierConfig(attack=TrainingAttack(eps=EPS, steps=2, alpha=EPS)),
    ],
    ids=["N-FGSM", "FGSM-RS", "PGD-2"],
)
def test_a_validation_is_by_pgd(config):
    """A model that overfitted to one step withstands that, and not ten."""
    given = batch()
    given = type(given)(torch.full_like(given.x, 0.5), torch.zeros_like(given.y), given.sample_ids, given.seed, 0, 10)
    made = ClassifierTask(Overfitted(), config)
    assert made.training_step(given)[1]["accuracy"] == 1
    assert made.validate(given)["accuracy"] == 0


def test_a_training_attack_of_many_steps_validates_too():
    attack = TrainingAttack(eps=EPS, steps=20, norm="l2", eps_warmup=0.5)
    assert attack.of_validations() is attack
    assert TrainingAttack(eps=EPS, steps=9, norm="l2").of_validations() == TrainingAttack(eps=EPS, steps=10, norm="l2")
    # clean training is validated on clean images
    made, given = ClassifierTask(SmallCNN(width=4), ClassifierConfig()), batch()
    assert made.config.attack.eps == 0
    assert made.validate(given)["accuracy"] == (made.model(given.x).argmax(1) == given.y).float().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adversarial": "n_fgsm", "attack": TrainingAttack(eps=EPS, steps=2)}, r"attack\.steps.* got steps=2"),
        ({"adversarial": "nuat", "attack": TrainingAttack(eps=1.0, steps=1, norm="l2")}, "norm='linf'"),
        (
            {"adversarial": "free", "attack": TrainingAttack(eps=EPS, steps=2, random_start=False)},
            "uniform random start",
        ),
        ({"adversarial": "free"}, "attack.eps above 0, got eps=0"),
        ({"adversarial": "fgsm"}, "adversarial must be one of"),
        ({"nuclear_weight": -1.0}, "nuclear_weight must be at least 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**options)


# -- the watch ---------------------------------------------------------------------------------------------------------


class Collapsing(ClassifierTask):
    """Its accuracy falls to nothing in an epoch, while its learning rate is above a limit."""

    def __init__(self, epoch, limit):
        torch.manual_seed(0)
        super().__init__(SmallCNN(1, 2, (8, 8), 2), ClassifierConfig())
        self.epoch, self.limit, self.now, self.rate, self.good = epoch, limit, 0, 1.0, {}

    def learning_rate(self, progress, epoch, epochs):
        self.now = epoch
        return 1e-3

    def validate(self, batch):
        collapsed = self.now >= self.epoch and self.optimizer.param_groups[0]["lr"] > self.limit
        return {"loss": torch.tensor(1.0), "accuracy": torch.tensor(0.3 if collapsed else 0.7)}


CONFIG = {"epochs": 4, "batch_size": 16, "validation_share": 0.25}


def test_a_run_that_collapses_goes_on_from_the_last_good_checkpoint(tmp_path, caplog):
    task = Collapsing(2, limit=0.3e-3)
    with caplog.at_level(logging.WARNING, "purify_fast"):
        last = fit(task, *images(), FitConfig(**CONFIG, on_collapse="back_off"), tmp_path, progress=False)
    assert caplog.text.count("the accuracy on held-out images fell to 0.300") == 2
    assert "from step 6 with 0.25 of the learning rate" in caplog.text
    saved = read_tree(tmp_path / CHECKPOINT)
    assert last["validation_accuracy"] == pytest.approx(0.7) and saved["rate"] == 0.25
    assert [row["epoch"] for row in saved["rows"]] == [0, 1, 2, 3]
    assert read_tree(tmp_path / GOOD)["step"] == saved["step"] == 12


def test_the_good_checkpoint_is_of_before_the_collapse(tmp_path):
    """A checkpoint in the middle of the bad epoch is not what the run returns to."""
    seen = []

    class Watched(Collapsing):
        def training_step(self, batch):
            seen.append((batch.step, float(next(self.model.parameters()).detach().sum())))
            return super().training_step(batch)

    config = FitConfig(**CONFIG, on_collapse="back_off", checkpoint_seconds=0)
    fit(Watched(2, limit=0.6e-3), *images(), config, tmp_path, progress=False)
    steps = [step for step, _ in seen]
    assert steps == [*range(9), *range(6, 12)]
    # the weights of step 6 are the same both times
    assert seen[6][1] == seen[9][1] and seen[7][1] != seen[10][1]


def test_a_run_gives_up_after_five_times_and_says_what_it_needs(tmp_path):
    config = FitConfig(**CONFIG, on_collapse="back_off")
    with pytest.raises(Diverged, match=r"training collapsed.* at 0\.03125 of the learning rate"):
        fit(Collapsing(1, limit=0.0), *images(), config, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"on_collapse 'back_off'.* folder=None"):
        fit(Collapsing(1, limit=0.0), *images(), config, progress=False)
    with pytest.raises(ValueError, match=r"on_collapse 'back_off'.*validation_share"):
        fit(Collapsing(1, limit=0.0), *images(), FitConfig(3, 16, on_collapse="back_off"), tmp_path, progress=False)


def test_a_task_that_measures_no_accuracy_is_refused(tmp_path):
    class Silent(Collapsing):
        def validate(self, batch):
            return {"loss": torch.tensor(1.0)}

    with pytest.raises(ValueError, match=r"on_collapse 'back_off' needs .*accuracy; this training measures loss"):
        fit(Silent(1, 0.0), *images(), FitConfig(**CONFIG, on_collapse="back_off"), tmp_path, progress=False)
