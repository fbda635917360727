"""Evaluations that several processes share."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from denoisers import Tiny
from evaluating import evaluate
from small_models import Made

from purify_fast.attacks import APGD, FABT, PGD, Square
from purify_fast.defences import NoisyEnsemble, WithFixedNoise
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.diffusion import DiffusionPurifier, Process

KINDS = ("deterministic", "random", "own", "diffusion", "masked")


def noisy(self, x):
    """A user's model that draws from torch's generator, for all images of a batch together."""
    return self.inner(x + 0.1 * torch.randn_like(x))


def rounds(self, x):
    """A step whose gradient is hardly that of what it does."""
    return self.inner(0.1 * x + 0.9 * (10 * x).round() / 10)


def late(self, x):
    """Draws only for images that an attack at eps 0.04 has moved as far as it can."""
    distance = (x[:, None] - self.known).abs().flatten(2).amax(2).amin(1)
    far = (distance > 0.035) & (distance < 0.045)
    return self.inner(x + far[:, None, None, None] * 0.1 * torch.randn_like(x))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def images(model):
    """Images with the classes that a model gives them, but for every seventh one."""
    x = torch.rand(22, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return x, y


def made(kind, out=None, **more):
    """The report on a model of this kind."""
    plain = net()
    x, y = images(plain)
    options = {"eps": 0.04, "batch_size": 4, "n_eval": 2, "eot_iter": 2, "seed": 3, "out": out}
    options |= {"attacks": [PGD(steps=3), AttackSpec(APGD(steps=4, restarts=2), survivors_only=True, until=0.1)]}
    # attacks on single images
    nearest = [AttackSpec(APGD(steps=count), survivors_only=True, nearest=6, seed=count) for count in (5, 7)]
    if kind == "deterministic":
        options["attacks"] += [FABT(steps=3), Square(n_queries=20), *nearest]
        return evaluate(plain, x, y, **options | more)
    if kind == "random":
        model = NoisyEnsemble(plain, 0.1, samples=2)
        fixed = AttackSpec(PGD(steps=2), through=WithFixedNoise(model))
        return evaluate(model, x, y, **options | {"attacks": [*options["attacks"], *nearest, fixed]} | more)
    if kind == "own":
        model = Made(noisy, inner=plain)
        return evaluate(lambda x: model(x), x, y, **options | more)
    if kind == "masked":
        # signs of masked gradients change what all processes attack by
        model = Made(rounds, inner=plain)
        return evaluate(model, x, y, **options | {"eps": 0.06, "attacks": None, "protocol": "fast", "steps": 5} | more)
    if kind == "late":
        return evaluate(Made(late, inner=plain, known=x), x, y, **options | {"attacks": options["attacks"][:1]} | more)
    torch.manual_seed(0)
    model = DiffusionPurifier(Tiny(1), plain, (1, 8, 8), Process(t_star=0.01, steps=2))
    return evaluate(model, x, y, **options | {"attacks": options["attacks"][:1]} | more)


def plain(report):
    """A report without its cost and command, with the margins of all images where it has them."""
    content = json.loads(report.to_json())
    for name in ("command", "seconds", "peak_memory", "passes"):
        content["about"].pop(name, None)
    for values, row in zip(content["rows"], report.rows, strict=True):
        del values["seconds"]
        if row.margins is not None:
            values["margins"] = row.margins.tolist()
    return content


def report(kind, out=None):
    return plain(made(kind, out))


def reports(out=None):
    return {kind: report(kind, out if out is None else f"{out}/{kind}") for kind in KINDS}
