"""The measurements of the study of the papers' questions. Each returns the numbers of a line of a table.

The number of a label is a list of texts with a 0 or 1 for each image, one text for each prediction, or a list of
numbers, one for each image.
"""

from __future__ import annotations

import importlib
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo.setting import EPS
from purify_fast import zoo
from purify_fast.attacks import PGD, Square, StAdv, pgd
from purify_fast.data import balanced_subset, load_dataset, to_float
from purify_fast.defences import Defence
from purify_fast.defences.stochastic import WithAggregation, WithFixedNoise, with_samples
from purify_fast.evaluation import AttackSpec, as_attack, evaluate
from purify_fast.methods.carso import Carso
from purify_fast.models.layers import Representation
from purify_fast.ops import aggregate, attack_loss

from ...kept import bits
from ...speed.flops import flop_of
from .trained_models import STANDARD, Setting, arrest_task, atop, classifier

Numbers = dict[str, list[Any]]
#: The rules that combine the K predictions of CARSO, by their names in the paper and in other packages.
RULES = {"PeeL": "peel", "logsumexp": "lse", "mean": "mean", "probability": "mean_sigmoid", "vote": "vote"}
#: The steps of PGD at which gradients are compared.
STEPS = (0, 1, 5, 20)
#: The radii on digits of the norms other than L-inf, in image units.
L2, L1 = 1.0, 5.0


def images_of(name: str, count: int, data: Any) -> tuple[Tensor, Tensor]:
    """Return the first held-out images with equally many of each class, and their labels."""
    whole = load_dataset(name, data)
    some = balanced_subset(whole.x_test, whole.y_test, count, 0, num_classes=10)
    return to_float(some.x), some.y


def judged(model: nn.Module, x: Tensor, y: Tensor, eps: float, **attacks: AttackSpec) -> Numbers:
    """Attack a model by some attacks, whose columns are the keywords, or by the protocol ``fast``."""
    how: dict[str, Any] = {"attacks": list(attacks.values())} if attacks else {"protocol": "fast"}
    report = evaluate(model, x, y, eps=eps, progress=False, probes=False, **how)
    attacked = [row for row in report.rows if row.is_attack] if attacks else [report.headline]
    rows = dict(zip(("clean", *(attacks or ("fast",))), (report.row("clean"), *attacked), strict=True))
    found: Numbers = {name: [bits(draw) for draw in row.right] for name, row in rows.items()}
    return found | {"unreliable": [name for name, row in rows.items() if not row.reliable]}


def of_zoo(setting: Setting, name: str) -> tuple[nn.Module, Tensor, Tensor, float]:
    """Return a model of the zoo, its attacked images, their labels, and its radius."""
    card = zoo.card(name)
    count = setting.few // 5 if card.data == "cifar10" else setting.few
    return zoo.load(name), *images_of(card.data, count, setting.data), card.eps


def samples(setting: Setting, seed: int, name: str, count: int) -> Numbers:
    """Judge a CARSO of the zoo that predicts from ``count`` samples, and measure the cost of an image."""
    model, x, y, eps = of_zoo(setting, name)
    model = with_samples(model, count)
    with torch.no_grad():
        seconds = sorted(timeit.repeat(lambda: model(x), number=1, repeat=6))[2]
        operations = flop_of(lambda: model(x))
    costs = {"ms": [1000 * seconds / len(x)], "MFLOP": [operations / 1e6 / len(x)]}
    return judged(model, x, y, eps) | costs


def aggregation(setting: Setting, seed: int, name: str, through: str | None) -> Numbers:
    """Attack a CARSO of the zoo along the gradients of a rule, and let every rule combine the same samples."""
    model, x, y, eps = of_zoo(setting, name)
    if through is not None:
        attacked = WithAggregation(model, RULES[through])
        x = pgd(attacked, x, y, eps, steps=setting.steps, eot_iter=5, keep_best=True, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        drawn = model.draw_sample_logits(x, 5)
    right = {rule: aggregate(drawn.flatten(0, 1), method).argmax(1).view(5, -1) == y for rule, method in RULES.items()}
    return {rule: [bits(draw) for draw in draws] for rule, draws in right.items()}


def gradients(model: Carso, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three gradients of the cross-entropy, each ``[B, C, H, W]``.

    The first is that of the images, exactly: through the classification, the decoder and the representation. The second
    stops at the reconstructions: it is the sum over the gradients of the K reconstructions, which an attack with the
    identity in place of the purifier (BPDA) follows. The third is that of the classifier alone.
    """
    x = x.clone().requires_grad_()
    with model.fixed_noise(seed):
        rebuilt = model.purify(x)
        loss = F.cross_entropy(model.aggregate(model.classify(rebuilt)), y, reduction="sum")
        exact, behind = torch.autograd.grad(loss, (x, rebuilt))
    alone = torch.autograd.grad(F.cross_entropy(model.classifier(x), y, reduction="sum"), x)[0]
    return exact, behind.sum(1), alone


def interference(setting: Setting, seed: int, name: str, step: int) -> Numbers:
    """Compare the gradients of a CARSO of the zoo by cosines, after some steps of PGD along the exact gradient."""
    model, x, y, eps = of_zoo(setting, name)
    point = x
    for number in range(step):
        point = point + eps / 5 * gradients(model, point, y, 100 + number)[0].sign()
        point = torch.minimum(torch.maximum(point, x - eps), x + eps).clamp(0, 1)
    exact, behind, alone = gradients(model, point, y, 0)
    others = {"classification": behind, "classifier": alone, "draw": gradients(model, point, y, 1)[0]}
    made = {key: F.cosine_similarity(exact.flatten(1), other.flatten(1)) for key, other in others.items()}
    return {key: [round(float(value), 4) for value in values] for key, values in made.items()}


def end_to_end(setting: Setting, seed: int, name: str) -> Numbers:
    """Attack a CARSO of the zoo by PGD through its classifier alone, through PeeL, and by exact gradients."""
    model, x, y, eps = of_zoo(setting, name)
    attack = PGD(steps=setting.steps)
    through = {"classifier alone": model.classifier, "PeeL": WithAggregation(model, "peel_reference"), "exact": None}
    attacks = {key: AttackSpec(attack, through=head, label=key) for key, head in through.items()}
    return judged(model, x, y, eps, **attacks)


def trained(setting: Setting, seed: int, make: Callable[..., nn.Module], *options: Any) -> Numbers:
    """Train a model of CARSO, and judge it by the protocol ``fast``."""
    return judged(make(setting, seed, *options), *images_of("digits", setting.few, None), EPS)


def threats(setting: Setting, seed: int, name: str) -> Numbers:
    """Attack a model of the zoo on digits within several balls, without gradients, and from another architecture."""
    model, x, y, _ = of_zoo(setting, name)
    pgd_of, other = PGD(steps=setting.steps), classifier(setting, seed, "PreActResNet18", epochs=10)
    # A decision at the boundary of a random model would change from call to call.
    quiet = WithFixedNoise(model, seed) if isinstance(model, Defence) else None
    attacks = {
        "L-inf": AttackSpec(pgd_of),
        "L2": AttackSpec(replace(pgd_of, eps=L2, norm="l2")),
        "L1": AttackSpec(replace(pgd_of, eps=L1, norm="l1")),
        "StAdv": AttackSpec(StAdv(steps=setting.steps)),
        "Square": AttackSpec(Square(n_queries=setting.queries)),
        "SPSA": AttackSpec(as_attack(partial(spsa, steps=setting.queries // 100)), label="SPSA"),
        "HopSkipJump": AttackSpec(as_attack(partial(hop_skip_jump, steps=setting.queries // 50)), through=quiet),
        "transfer": AttackSpec(pgd_of, through=other),
    }
    return judged(model, x, y, EPS, **attacks)


def spsa(model: nn.Module, x: Tensor, y: Tensor, steps: int, pairs: int = 50) -> Tensor:
    """Maximize the margin loss by SPSA (Uesato et al., ICML 2018): differences along random signs, and Adam."""
    change = torch.zeros_like(x, requires_grad=True)
    adam = torch.optim.Adam([change], 0.02)
    with torch.no_grad():
        for _ in range(steps):
            change.grad = torch.zeros_like(x)
            for _ in range(pairs):
                signs = torch.randint(0, 2, x.shape) * 2.0 - 1
                ahead, back = (model((x + change + 0.01 * sign * signs).clamp(0, 1)) for sign in (1, -1))
                slope = attack_loss(ahead, y, "margin")[1] - attack_loss(back, y, "margin")[1]
                change.grad -= slope.view(-1, 1, 1, 1) * signs
            adam.step()
            change.copy_((x + change.clamp(-EPS, EPS)).clamp(0, 1) - x)
    return (x + change).detach()


def hop_skip_jump(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Run Foolbox's HopSkipJump, an attack that sees only decisions, and project its images into the ball."""
    foolbox = importlib.import_module("foolbox")
    attack = foolbox.attacks.HopSkipJumpAttack(steps=steps, constraint="linf", max_gradient_eval_steps=100)
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=x.device)
    # The search for an image begins at the first image that the model classifies as another class.
    start = x[(model(x).argmax(1)[None] != y[:, None]).int().argmax(1)]
    found = attack(wrapped, x, y, epsilons=None, starting_points=start)[0]
    return torch.minimum(torch.maximum(found, x - EPS), x + EPS).detach()


def purifiers(setting: Setting, seed: int, transform: str, gan: bool, finetuned: bool) -> Numbers:
    """Train AToP, and attack it through its classifier alone, as a whole, and by attacks that it was not trained on."""
    model, (x, y) = atop(setting, seed, transform, gan, finetuned), images_of("digits", setting.few, None)
    attack = PGD(steps=setting.steps // 2)
    attacks = {
        "classifier alone": AttackSpec(attack, through=model.classifier),
        "exact": AttackSpec(attack),
        "L2": AttackSpec(replace(attack, eps=L2, norm="l2")),
        "StAdv": AttackSpec(StAdv(steps=setting.steps // 2)),
    }
    return judged(model, x, y, EPS, **attacks)


def finetuned(setting: Setting, seed: int, make: Callable[[Setting, int], nn.Module]) -> Numbers:
    """Train a classifier, judge it by ``fast``, and measure how far its representation is from the standard one.

    The drift of an image is the angle, in degrees, between its representations in the classifier and in the zoo's
    standard classifier, with which finetuning begins.
    """
    model, (x, y) = make(setting, seed), images_of("digits", setting.images, None)
    task = arrest_task(zoo.load(STANDARD))
    features = [Representation(each, task.layers, x.shape[1:])(x)[0] for each in (zoo.load(STANDARD), model)]
    angles = torch.rad2deg(F.cosine_similarity(*(each.detach().flatten(1) for each in features)).clamp(-1, 1).acos())
    return judged(model, x, y, EPS) | {"drift": [round(float(angle), 2) for angle in angles]}
