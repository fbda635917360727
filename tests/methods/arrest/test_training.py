"""ARREST's training: the specification's numbers, the parts of a step by hand, what is trained and what is not."""

import copy
import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from direct import direct
from small_models import Made, bars_and_classifier, configured, first_digits
from small_runs import same
from torch import nn
from torch.nn import functional as F

from purify_fast import cli, data
from purify_fast._settings import weights_fingerprint
from purify_fast.attacks import pgd
from purify_fast.cli.command import parse
from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.methods.arrest.task import pool
from purify_fast.methods.recipes import recipe
from purify_fast.models.classifiers import PreActResNet18, SmallCNN
from purify_fast.ops import representation_distance
from purify_fast.training import Batch, load_classifier
from purify_fast.training.loop import train_step

SHAPE = (1, 16, 16)
EPS = 0.2


def cnn(seed=0):
    torch.manual_seed(seed)
    return SmallCNN(width=4)


def resnet(seed=0):
    torch.manual_seed(seed)
    return PreActResNet18(in_channels=1, width=4)


def arrest(model=None, layers=None, teacher=None, shape=SHAPE, **options):
    config = configured(ArrestConfig, **{"eps": EPS, "steps": 2, "alpha": 0.1, **options})
    return ArrestTask(cnn() if model is None else model, config, shape, layers, teacher)


def batch(n=8, epoch=0, epochs=20):
    x, y = first_digits(n)
    return Batch(data.to_float(x), y, torch.arange(n) + 100, 7, epoch, epochs)


def moved(model, by=0.3):
    """The model with other weights, so that its representation differs from what it was."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * p.std().nan_to_num(1) * torch.randn(p.shape, generator=generator))
    return model


def states(model):
    return copy.deepcopy(model.state_dict())


def frozen_to(monkeypatch, task, drift):
    """The drift test says ``drift`` whatever the images."""
    monkeypatch.setattr(task, "drift", lambda x, of_teacher: torch.as_tensor(drift, dtype=torch.float32))


def vector(*values):
    """The same vector for every image."""
    how = lambda self, x: self.values + 0 * x.flatten(1).mean(1, keepdim=True)  # noqa: E731
    return Made(how, values=nn.Parameter(torch.tensor(values)))


def fixed(*values):
    """Logits (2, 1, 0) and a given representation."""
    parts = {"features": vector(*values), "logits": vector(2.0, 1.0, 0.0)}
    return Made(lambda self, x: self.logits(x) + 0 * self.features(x).sum(), **parts)


def given(student, teacher, **options):
    task = arrest(fixed(*student), ["features"], fixed(*teacher), **options)
    step = dataclasses.replace(batch(4), y=torch.zeros(4, dtype=torch.int64))
    return task, step


def test_fact_3_thresholds():
    for angle, tau in ((30, 0.1339745962), (10, 0.0151922470), (20, 0.0603073792), (45, 0.2928932188), (60, 0.5)):
        assert ArrestConfig(angle=angle).threshold == pytest.approx(tau, abs=1e-10)
    assert ArrestConfig(distance="angular").threshold == pytest.approx(1 / 6)
    assert ArrestConfig(distance="cosine", angle=60).threshold == pytest.approx(0.5)
    assert ArrestConfig(tau=0.3, distance="l2").threshold == ArrestConfig(tau=0.3).threshold == 0.3


@pytest.mark.parametrize(("distance", "want"), [("abs_cosine", 2.4076059644), ("angular", 4.9243294945)])
def test_fact_6_total_loss(distance, want):
    task, step = given((3.0, 4.0), (4.0, 3.0), distance=distance)
    loss, metrics = task.training_step(step)
    assert loss.item() == pytest.approx(want, abs=2e-6)
    assert metrics["cross_entropy"].item() == pytest.approx(0.4076059644, abs=1e-6)
    assert 50 * metrics["distance"].item() == pytest.approx(want - 0.4076059644, abs=2e-6) and metrics["accuracy"] == 1
    loss, _ = given((3.0, 4.0), (4.0, 3.0), distillation_weight=25.0)[0].training_step(step)
    assert loss.item() == pytest.approx(1.4076059644, abs=1e-6)


def test_replay_only_where_the_drift_is_above_the_threshold_and_in_its_share_of_the_epochs(monkeypatch):
    task, step = arrest(tau=0.25), batch(3)
    frozen_to(monkeypatch, task, [0.25, 0.2500001, 0.2499])  # 0.25 has no rounding: strictly above
    adversarial = task.attack(step, task.config.attack)
    x, _ = task.inputs(step, [])
    assert [torch.equal(a, b) for a, b in zip(x, adversarial, strict=True)] == [True, False, True]
    config = ArrestConfig(replay_share=0.3)
    assert [config.replays(epoch, 10) for epoch in range(10)] == [True] * 3 + [False] * 7
    for hundredths in range(101):  # in floating point 0.07 * 100 is above 7
        config, share = ArrestConfig(replay_share=hundredths / 100), Fraction(hundredths, 100)
        for epochs in (1, 3, 7, 20, 25, 100, 150):
            assert sum(config.replays(epoch, epochs) for epoch in range(epochs)) == math.ceil(share * epochs)
    assert not ArrestConfig(replay=False).replays(0, 10) and not ArrestConfig(replay_share=0.0).replays(0, 10)


@pytest.mark.parametrize("make", [cnn, resnet])
def test_fact_8_nothing_drifts_at_the_start(make):
    """At its start the student is the teacher: no drift, no replay, and a distillation whose gradient is exactly 0."""
    task, step = arrest(make().eval()), batch()
    of_teacher = task.teacher(step.x)
    assert torch.equal(task.drift(step.x, of_teacher), torch.zeros(8)) and task.inputs(step, of_teacher)[1] == 0
    distance = 50 * task.distance(task.forward(step.x)[1], of_teacher).sum()
    assert distance == 0
    found = torch.autograd.grad(distance, list(task.model.parameters()), allow_unused=True)
    assert any(g is not None for g in found) and all(g is None or not g.any() for g in found)
    assert task.loss(task.attack(step, task.config.attack), step.y, of_teacher)[1]["distance"] > 0


def test_fact_9_learning_rates():
    want = [0.025] * 11 + [0.02] * 2 + [0.01] * 2 + [0.005] * 2 + [0.0025] * 2 + [0.00125]
    task = arrest()
    assert [task.learning_rate(e / 20, e, 20) for e in range(20)] == pytest.approx(want)
    assert [arrest(learning_rate=1.0).learning_rate(e / 20, e, 20) for e in (0, 11)] == pytest.approx([1.0, 0.8])
    assert {arrest(schedule="constant").learning_rate(e / 20, e, 20) for e in range(20)} == {0.025}
    one_cycle = [arrest(schedule="one_cycle").learning_rate(p, 0, 20) for p in (0.0, 0.2, 0.999)]
    assert one_cycle == pytest.approx([0.001, 0.025, 0.000025], rel=0.01)


def test_fact_10_noise_bounds(monkeypatch):
    eps = 8 / 255
    grey = dataclasses.replace(batch(64), x=torch.full((64, *SHAPE), 0.5))
    task = arrest(eps=eps, alpha=None)
    frozen_to(monkeypatch, task, [1.0] * 64)
    noise = task.inputs(grey, [])[0] - 0.5
    assert noise.abs().max() <= eps + 1e-7 and noise.abs().max() > 0.99 * eps
    border, _ = task.inputs(batch(64), [])  # digits are 0 and 1 in most places
    assert border.min() >= 0 and border.max() <= 1 and (border - batch(64).x).abs().max() <= eps + 1e-7


def test_only_examples_that_are_not_replayed_are_attacked(monkeypatch):
    """And to the same images as if all were, in float64, where rounding turns no sign of a gradient."""
    task = arrest(cnn().double(), steps=3)
    step = dataclasses.replace(batch(8), x=batch(8).x.double())
    drift = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0])
    frozen_to(monkeypatch, task, drift)
    seen = []
    task.classifier.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    x, share = task.inputs(step, [])
    assert seen == [5, 5, 5] and share == pytest.approx(3 / 8)
    whole = task.attack(step, task.config.attack)
    assert seen[3:] == [8, 8, 8]
    kept = drift == 0
    torch.testing.assert_close(x[kept], whole[kept], rtol=0, atol=1e-12)
    assert not torch.isclose(x[~kept], whole[~kept]).all()

    seen.clear()
    frozen_to(monkeypatch, task, torch.ones(8))
    assert task.inputs(step, [])[1] == 1 and seen == []  # no one is left to attack
    frozen_to(monkeypatch, task, torch.zeros(8))
    assert torch.equal(task.inputs(step, [])[0], whole) and seen == [8, 8, 8]


def test_the_draws_follow_the_sample_and_the_seed(monkeypatch):
    """A permuted batch gives permuted inputs: attack starts and noise belong to an image, not to its place."""
    task = arrest(cnn().double(), steps=1, alpha=EPS)
    step = dataclasses.replace(batch(6), x=batch(6).x.double())
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    other = dataclasses.replace(step, x=step.x[order], y=step.y[order], sample_ids=step.sample_ids[order])
    drift = torch.tensor([0.0, 1, 0, 1, 1, 0])
    frozen_to(monkeypatch, task, drift)
    x, _ = task.inputs(step, [])
    again, _ = task.inputs(dataclasses.replace(step, seed=8), [])
    assert all(not torch.equal(a, b) for a, b in zip(x, again, strict=True))
    frozen_to(monkeypatch, task, drift[order])
    torch.testing.assert_close(task.inputs(other, [])[0], x[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_sees_cross_entropy_alone(norm):
    step, found = batch(), []
    for weight in (0.0, 50.0, 1e4):
        task = arrest(moved(cnn()), teacher=cnn(), distillation_weight=weight, replay=False, norm=norm)
        found.append(task.inputs(step, [])[0])
    options = {"eps": EPS, "alpha": 0.1, "steps": 2, "norm": norm, "seed": 7, "sample_ids": step.sample_ids}
    wanted = direct(pgd, moved(cnn()), step.x, step.y, **options)
    assert all(torch.equal(x, wanted) for x in found) and not torch.equal(wanted, step.x)


def test_the_attack_runs_in_evaluation_mode_and_the_loss_in_training_mode():
    model = resnet().train()
    task, step, modes = arrest(model, replay=False), batch(), []
    model.norm.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    before = model.norm.num_batches_tracked.item()
    task.training_step(step)
    assert modes == [False, False, True] and model.norm.num_batches_tracked == before + 1
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_drift_tests_mode(mode):
    """In evaluation mode it leaves BatchNorm's statistics alone; in training mode it is another number, and updates."""
    model = resnet().train()
    task, step = arrest(model, drift_mode=mode), batch()
    before = states(model)
    drift = task.drift(step.x, task.teacher(step.x))
    if mode == "eval":
        assert same(states(model), before) and not drift.any()
    else:
        assert model.norm.num_batches_tracked == before["norm.num_batches_tracked"] + 1 and drift.all()
        assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert model.training and not drift.requires_grad


def test_the_distance_is_between_the_student_on_its_input_and_the_teacher_on_the_clean_image():
    model = moved(cnn()).train()
    task, step = arrest(model, teacher=cnn(), layers=["conv4"], distillation_weight=3.0), batch()
    x = (step.x + 0.1).clamp(0, 1)
    seen = []
    for net, images in ((model, x), (cnn(), step.x)):
        handle = net.conv4.register_forward_hook(lambda m, args, out: seen.append(out.detach().flatten(1)))
        net(images)
        handle.remove()
    u, v = seen
    distance = 1 - ((u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))).abs()
    want = F.cross_entropy(model(x), step.y) + 3.0 * distance.mean()
    loss, metrics = task.loss(x, step.y, task.teacher(step.x))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(metrics["distance"], distance.mean())
    task = arrest(model, teacher=cnn(), layers=["conv4"], tau=distance.median().item())
    whole, metrics = task.training_step(step)
    x, share = task.inputs(step, task.teacher(step.x))
    assert torch.equal(whole, task.loss(x, step.y, task.teacher(step.x))[0]) and metrics["replayed"] == share > 0


def test_several_layers_are_averaged_and_pooling_reads_their_means():
    step, distances = batch(), {}
    for pooled in (False, True):
        for layers in (["conv2"], ["conv4"], ["conv2", "conv4"]):
            task = arrest(moved(cnn()), teacher=cnn(), layers=layers, pooled=pooled)
            distances[" ".join(layers), pooled] = task.distance(task.forward(step.x)[1], task.teacher(step.x))
        mean = (distances["conv2", pooled] + distances["conv4", pooled]) / 2
        torch.testing.assert_close(distances["conv2 conv4", pooled], mean)
    assert not torch.allclose(distances["conv4", False], distances["conv4", True], rtol=0.01)

    maps = [arrest(net, ["conv4"]).teacher(step.x)[0] for net in (moved(cnn()), cnn())]
    by_hand = representation_distance(*(m.flatten(2).mean(2) for m in maps))
    torch.testing.assert_close(distances["conv4", True], by_hand)


def test_without_either_part_it_is_adversarial_training():
    """Loss, inputs and two steps' weights of PGD adversarial training written out; no teacher is made or asked."""
    model = resnet().train()
    other = copy.deepcopy(model)
    task = arrest(model, distillation_weight=0.0, replay=False)
    assert task.teacher(batch().x) == [] and task.layers == []
    optimizer = torch.optim.SGD(other.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
    for seed in (7, 8):
        step = dataclasses.replace(batch(), seed=seed)
        x = direct(pgd, other, step.x, step.y, eps=EPS, alpha=0.1, steps=2, seed=seed, sample_ids=step.sample_ids)
        want = F.cross_entropy(other(x), step.y)
        loss, metrics = task.training_step(step)
        assert torch.equal(loss, want) and metrics.keys() == {"cross_entropy", "accuracy"}
        for result, chosen in ((loss, task.optimizer), (want, optimizer)):
            chosen.zero_grad()
            result.backward()
            chosen.step()
    assert same(states(model), states(other))


@pytest.mark.parametrize("make", [cnn, resnet])
def test_every_parameter_of_the_student_is_trained_and_none_of_the_teacher(make):
    task, step = arrest(moved(make()).train(), teacher=make(), replay=False), batch()
    assert not any(f.requires_grad for f in task.teacher(step.x))
    loss, _ = task.training_step(step)
    loss.backward()
    model = task.model
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    teacher = task.teacher_reader.model
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in model.parameters()}


def test_the_teacher_is_the_students_start_unless_one_is_given():
    step, model = batch(), cnn()
    task = arrest(model)
    want = arrest(cnn(), ["hidden"]).teacher(step.x)[0]
    moved(model)
    assert torch.equal(task.teacher(step.x)[0], want)
    assert torch.equal(arrest(model, teacher=cnn()).teacher(step.x)[0], want)
    assert not torch.equal(arrest(model).teacher(step.x)[0], want)


def test_the_moving_average_by_hand():
    model = resnet().train()
    task = arrest(model, ema_decay=0.8)
    assert task.result is not model and same(states(task.result), states(model))
    average = states(model)
    for seed in (7, 8):
        task.model.train()
        loss, _ = task.training_step(dataclasses.replace(batch(), seed=seed))
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step()
        task.after_step()
        for name, now in states(model).items():
            average[name] = 0.8 * average[name] + 0.2 * now if now.is_floating_point() else now
    for name, value in states(task.result).items():
        torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-7)
    assert not same(states(task.result), states(model)) and task.result.norm.num_batches_tracked == 2
    assert not any(m._forward_hooks for m in task.result.modules())
    trained = {id(p) for group in task.optimizer.param_groups for p in group["params"]}
    assert not {id(p) for p in task.result.parameters()} & trained and arrest(model).result is model


def test_maps_and_tokens_are_averaged_over_their_positions():
    maps, tokens, vectors = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3), torch.randn(2, 3)
    averaged = pool([maps, tokens, vectors])
    for got, wanted in zip(averaged, (maps.mean((2, 3)), tokens.mean(1), vectors), strict=True):
        assert torch.equal(got, wanted)


def test_the_gradient_is_bounded_where_nothing_normalizes():
    assert arrest(cnn()).max_gradient == 1.0 and arrest(resnet()).max_gradient is None
    assert arrest(resnet(), max_gradient=0.5).max_gradient == 0.5
    assert arrest(cnn(), optimizer="adamw").max_gradient is None
    for bound in (1e-3, 1e3):
        task = arrest(cnn(), max_gradient=bound)
        norms = []
        task.optimizer.register_step_pre_hook(
            lambda optimizer, *_, norms=norms: norms.append(
                nn.utils.get_total_norm([weight.grad for weight in optimizer.param_groups[0]["params"]])
            )
        )
        train_step(task, batch())
        assert (float(norms[0]) == pytest.approx(bound)) == (bound < 1)


# -- ARREST on the command line starts from the classifier that is given -----------------------------------------------


def test_it_keeps_the_weights_of_the_given_classifier_where_the_rate_is_0(tmp_path):
    bars_and_classifier(tmp_path)
    words = ["train", "arrest", "--classifier", str(tmp_path / "classifier"), "--data", str(tmp_path / "bars.npz")]
    words += ["--device", "cpu", "--epochs", "1", "--batch-size", "16", "--steps", "1", "--weight-decay", "0"]
    for rate in ("0.1", "0"):
        assert cli.main([*words, "--learning-rate", rate, "--out", str(tmp_path / rate)]) == 0
    networks = (load_classifier(tmp_path / name) for name in ("classifier", "0.1", "0"))
    before, moved, still = map(weights_fingerprint, networks)
    assert before == still != moved


def test_the_rate_is_in_proportion_to_the_batch():
    command = cli._KINDS["train arrest"]
    rates = [parse(command, words).method.learning_rate for words in ([], ["--batch-size", "16"])]
    assert rates == [0.025, 0.025 / 8]
    given = parse(command, ["--batch-size", "16", "--learning-rate", "0.1"])
    assert given.method.learning_rate == 0.1
    published = parse(command, ["--recipe", "resnet18", "--batch-size", "64"])
    assert published.method.learning_rate == 0.025 * 64 / recipe("arrest/resnet18")["loop.batch_size"]
