"""TRADES and MART against plain loops, written from the papers; and what trainers expect of `fit`."""

import pytest
import torch
from small_models import first_digits
from torch import nn
from torch.nn import functional as F

from purify_fast.attacks.base import ball_around, normal_in_ball, sample_in_ball
from purify_fast.training import ClassifierConfig, ClassifierTask, FitConfig, TrainingAttack, fit
from purify_fast.training.classifier import mart, trades
from purify_fast.training.sources import InMemory, step_seed

EPS, ALPHA = 0.1, 0.04
ATTACK = TrainingAttack(EPS, 3, alpha=ALPHA)


def network():
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 3, 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 49, 10))


def plain(objective, x, y, config, beta, dtype):
    """The weights after a plain loop."""
    model = network().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-4)
    source, task = InMemory(x, y, config, x.device), ClassifierTask(network(), ClassifierConfig())
    kl = nn.KLDivLoss(reduction="none")
    for step in range(config.epochs * source.steps):
        raw, labels, ids = list(source.epoch(step // source.steps, 0))[step % source.steps]
        clean, seeds = raw.to(dtype) / 255, {"seed": step_seed(config.seed, step), "sample_ids": ids}
        ball = ball_around(clean.float(), EPS)
        model.eval()
        with torch.no_grad():
            natural = F.softmax(model(clean), 1)
        if objective == "trades":
            point = normal_in_ball(clean.float(), ball, 0.001, **seeds).to(dtype)
        else:
            point = sample_in_ball(clean.float(), ball, **seeds).to(dtype)
        for _ in range(3):
            point.requires_grad_()
            if objective == "trades":
                loss = kl(F.log_softmax(model(point), 1), natural).sum()
            else:
                loss = F.cross_entropy(model(point), labels)
            (gradient,) = torch.autograd.grad(loss, point)
            point = point.detach() + ALPHA * gradient.sign()
            point = torch.min(torch.max(point, clean - EPS), clean + EPS).clamp(0, 1)
        model.train()
        logits, attacked = model(clean), model(point)
        p, q = F.softmax(logits, 1), F.softmax(attacked, 1)
        divergence = (p * (p.log() - q.log())).sum(1)
        if objective == "trades":
            loss = F.cross_entropy(logits, labels) + beta * divergence.mean()
        else:
            rows = torch.arange(len(labels))
            others = q.clone()
            others[rows, labels] = 0
            boosted = -q[rows, labels].log() - (1 - others.max(1).values).log()
            loss = (boosted + beta * divergence * (1 - p[rows, labels])).mean()
        optimizer.param_groups[0]["lr"] = task.learning_rate(step / (config.epochs * source.steps), 0, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("objective", "beta"), [("trades", 6.0), ("mart", 5.0)])
def test_twenty_steps_have_the_weights_of_a_plain_loop_of_the_paper(objective, beta):
    (x, y), config = first_digits(160), FitConfig(4, 32)
    exact, usual = (plain(objective, x, y, config, beta, dtype) for dtype in (torch.float64, torch.float32))
    made = ClassifierTask(network(), ClassifierConfig(attack=ATTACK, objective=objective))
    fit(made, x, y, config, progress=False)
    models = network(), exact, usual, made.model
    start, *ends = (nn.utils.parameters_to_vector(model.parameters()).double() for model in models)
    wanted, rounded, found = (end - start for end in ends)
    rounding = (rounded - wanted).norm()
    assert rounding < 5e-3 * wanted.norm()
    assert (found - wanted).norm() < 4 * rounding


@pytest.mark.parametrize("loss", [trades, mart])
def test_the_gradient_is_finite_where_a_probability_is_0(loss):
    clean = torch.tensor([[120.0, 0, 1], [1, 2, 0]], requires_grad=True)
    attacked, y = torch.tensor([[60.0, 1, 0], [0.5, 1.5, 1]]), torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(loss(clean, attacked, y, 6.0), clean)
    exact = clean.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(loss(exact, attacked.double(), y, 6.0), exact)
    torch.testing.assert_close(gradient, right.float(), rtol=1e-3, atol=1e-6)
