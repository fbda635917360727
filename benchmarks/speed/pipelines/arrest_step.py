"""Measure one step of ARREST's finetuning of a ResNet-18.

The step computes the drift of each image, attacks by PGD-10, and computes the loss on logits and representations. The
drift is the distance between the representations of the student (the trained network) and the teacher (the network
before the finetuning). In the first half of a training, images with a large drift are replayed, which means that they
get random noise in place of the attack. In the second half every image is attacked.

The case "half replayed" computes the drifts too, but then ignores them, and replays every second image. If the drifts
decided, contestants would attack different numbers of images, because rounding moves some drifts across the threshold.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.speed import StepGraphs
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

from . import Case, Job, columns, optimizer_step, random_batch
from .carso_inference import classifier
from .carso_training import attack

BATCH, EPOCHS = 64, 20


def networks(device: torch.device, quick: bool) -> tuple[nn.Module, nn.Module, list[str]]:
    """Return a student, its teacher, and the names of the layers that the training step compares.

    The teacher is the classifier at the start of the training. The student is the teacher with noise on its weights,
    and stands for the classifier during the training. A quick run gets a small classifier.
    """
    if quick:
        torch.manual_seed(0)
        start, layers = PreActResNet18(width=4).eval(), ["act"]
    else:
        start, layers = classifier(), ["layer4"]
    now = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in now.parameters():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * (0.3 * weight.norm() / noise.norm()))
    return now.to(device), start.to(device), layers


def setting(replay: bool, quick: bool, precision: str = "float32") -> ArrestConfig:
    steps, alpha = (2, 4 / 255) if quick else (10, 2 / 255)
    return ArrestConfig(
        attack=TrainingAttack(eps=8 / 255, steps=steps, alpha=alpha), replay=replay, tau=0.5, precision=precision
    )


def batch_of(device: torch.device, quick: bool) -> Batch:
    return random_batch(device, 16 if quick else BATCH, 32, EPOCHS)


def every_second(x: Tensor) -> Tensor:
    """Return a drift for each image: 0 and 1 in turn."""
    return (torch.arange(len(x), device=x.device) % 2).float()


class HalfReplayed(ArrestTask):
    """ARREST's task with fixed drifts. The true drifts are computed too, because a step of ARREST has this work."""

    def drift(self, x: Tensor, of_teacher: list[Tensor]) -> Tensor:
        super().drift(x, of_teacher)
        return every_second(x)


class _Split(nn.Module):
    """Wraps a ResNet-18, and returns its logits and the flattened map before pooling."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = self.model
        if isinstance(m, PreActResNet18):
            features = F.relu(m.norm(m.stages(m.conv(m.normalize(x)))))
            return m.head(features.mean((2, 3))), features.flatten(1)
        features = m.layer4(m.layer3(m.layer2(m.layer1(F.relu(m.bn1(m.conv1(x)))))))
        return m.fc(features.mean((2, 3))), features.flatten(1)


class PlainStep:
    """The step in plain PyTorch, with contiguous float32 tensors. PGD attacks every image, and calls ``backward()``."""

    def __init__(self, device: torch.device, quick: bool, replay: bool, compiled: bool):
        now, start, _ = networks(device, quick)
        self.config, self.batch = setting(replay, quick), batch_of(device, quick)
        self.student, self.teacher = (_Split(model.to(memory_format=torch.contiguous_format)) for model in (now, start))
        self.teacher.eval()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
        self.f, self.g = self.student, self.teacher
        if compiled:
            self.f, self.g = (torch.compile(part, dynamic=False) for part in (self.f, self.g))

    def drift(self, of_teacher: Tensor) -> Tensor:
        with torch.no_grad():
            self.computed = 1 - F.cosine_similarity(self.f(self.batch.x)[1], of_teacher).abs()
        return every_second(self.batch.x)

    def inputs(self, of_teacher: Tensor) -> Tensor:
        b, c, a = self.batch, self.config, self.config.attack
        self.student.eval()
        x = attack(lambda x: self.f(x)[0], b.x, b.y, a.eps, a.step_size(a.eps), a.steps, b.seed, b.sample_ids)
        if c.replay:
            replayed = self.drift(of_teacher) > c.threshold
            noisy = (b.x + torch.empty_like(b.x).uniform_(-a.eps, a.eps)).clamp(0, 1)
            x = torch.where(replayed.view(-1, 1, 1, 1), noisy, x)
        self.student.train()
        return x

    def losses(self, x: Tensor, of_teacher: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self.f(x)
        return F.cross_entropy(logits, self.batch.y), (1 - F.cosine_similarity(features, of_teacher).abs()).mean()

    def read(self) -> Tensor:
        with torch.no_grad():
            return self.g(self.batch.x)[1]

    def run(self) -> None:
        of_teacher = self.read()
        cross_entropy, distance = self.losses(self.inputs(of_teacher), of_teacher)
        self.optimizer.zero_grad()
        (cross_entropy + self.config.distillation_weight * distance).backward()
        self.optimizer.step()

    def result(self) -> Tensor:
        of_teacher = self.read()
        torch.manual_seed(0)
        return torch.stack(self.losses(self.inputs(of_teacher), of_teacher)).detach()


def _plain(device: torch.device, quick: bool, replay: bool, compiled: bool = False) -> Job:
    step = PlainStep(device, quick, replay, compiled)
    return Job(step.run, step.result)


def _ours(device: torch.device, quick: bool, replay: bool, compiled: bool = False, captured: bool = False) -> Job:
    now, start, layers = networks(device, quick)
    config = setting(replay, quick, "bfloat16")
    task, batch = HalfReplayed(now, config, (3, 32, 32), layers, start, compile=compiled), batch_of(device, quick)
    task.graphs = StepGraphs("always") if captured else None
    now.train()

    def result() -> Tensor:
        metrics = task.training_step(batch)[1]
        return torch.stack([metrics["cross_entropy"], metrics["distance"]])

    return Job(lambda: optimizer_step(task, batch), result)


def cases(quick: bool) -> dict[str, Case]:
    every = {}
    for name, replay in (("all attacked", False), ("half replayed", True)):
        steps = setting(replay, quick).attack.steps
        shape = f"{16 if quick else BATCH} images, PGD-{steps}, the map before pooling; {name}"
        every[name] = Case(shape, 0.05, columns(partial(_plain, replay=replay), partial(_ours, replay=replay)))
    return every
