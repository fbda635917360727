"""Measure one step of ARREST's finetuning of a ResNet-18.

The step attacks every image by PGD-10, and computes the loss on logits and representations. Such a step belongs to the
second half of a training. In the first half, an image gets noise in place of the attack if its representation has moved
too far from the teacher's. The student is the trained network, and the teacher is the network before the finetuning.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.methods.arrest import ArrestConfig, ArrestTask
from purify_fast.models.classifiers import PreActResNet18
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

from . import Case, Job, columns, expert, precision, random_batch, training_step, update
from .carso_inference import classifier
from .carso_training import attack, start_of

BATCH, EPOCHS = 64, 20


def networks(device: torch.device, quick: bool) -> tuple[nn.Module, nn.Module, list[str]]:
    """Return a student, its teacher, and the names of the layers that the training step compares.

    The teacher is the classifier at the start of the training. The student is the teacher with noise on its weights,
    and stands for the classifier during the training. A quick run gets a small classifier.
    """
    if quick:
        torch.manual_seed(0)
        start, layers = PreActResNet18(width=8).eval(), ["act"]
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


def setting(quick: bool, precision: str = "float32") -> ArrestConfig:
    steps, alpha = (2, 4 / 255) if quick else (10, 2 / 255)
    return ArrestConfig(attack=TrainingAttack(eps=8 / 255, steps=steps, alpha=alpha), replay=False, precision=precision)


def batch_of(device: torch.device, quick: bool) -> Batch:
    return random_batch(device, 16 if quick else BATCH, 32, EPOCHS)


def flattened(features: Tensor) -> Tensor:
    """Flatten a map of features in the order of its memory, without a copy."""
    last = features.is_contiguous(memory_format=torch.channels_last)
    return (features.permute(0, 2, 3, 1) if last else features).flatten(1)


class _Split(nn.Module):
    """Wraps a ResNet-18, and returns its logits and the flattened map before pooling."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = self.model
        if isinstance(m, PreActResNet18):
            features = F.relu(m.norm(m.stages(m.conv(m.normalize(x)))))
            return m.head(features.mean((2, 3))), flattened(features)
        features = m.layer4(m.layer3(m.layer2(m.layer1(F.relu(m.bn1(m.conv1(x)))))))
        return m.fc(features.mean((2, 3))), flattened(features)


class Step:
    """The step in PyTorch alone."""

    def job(self) -> Job:
        return Job(self.run, lambda: torch.stack(self.losses(fixed=True)).detach())

    def run(self) -> None:
        cross_entropy, distance = self.losses(fixed=False)
        update(self.optimizer, cross_entropy + self.config.distillation_weight * distance)


class PlainStep(Step):
    """The step in plain PyTorch, with contiguous float32 tensors. PGD attacks every image, and calls ``backward()``."""

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        now, start, _ = networks(device, quick)
        self.config, self.batch = setting(quick), batch_of(device, quick)
        self.student, self.teacher = (_Split(model.to(memory_format=torch.contiguous_format)) for model in (now, start))
        self.teacher.eval()
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.025, momentum=0.9, weight_decay=5e-4)
        self.f, self.g = self.student, self.teacher
        if compiled:
            self.f, self.g = (torch.compile(part, dynamic=False) for part in (self.f, self.g))

    def losses(self, fixed: bool) -> tuple[Tensor, Tensor]:
        b, a = self.batch, self.config.attack
        with torch.no_grad():
            of_teacher = self.g(b.x)[1]
        self.student.eval()
        x = attack(lambda x: self.f(x)[0], b.x, b.y, a.eps, a.step_size(a.eps), a.steps, b.seed, b.sample_ids)
        self.student.train()
        logits, features = self.f(x)
        return F.cross_entropy(logits, b.y), (1 - F.cosine_similarity(features, of_teacher).abs()).mean()


class ExpertStep(Step):
    """The step as an expert writes it (see `expert`). The attack runs on a frozen copy of the student."""

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        now, start, _ = networks(device, quick)
        self.config, self.batch = setting(quick), batch_of(device, quick)
        self.student = _Split(now.to(memory_format=expert.LAST))
        self.attacked = expert.FrozenCopy(self.student.model.eval())
        teacher = _Split(expert.FrozenCopy(start).model)
        self.optimizer = torch.optim.SGD(self.student.parameters(), 0.025, 0.9, weight_decay=5e-4, fused=True)
        self.ascent = expert.ascent(expert.loss_of(self.attacked.model), device, compiled, constant=False)
        self.teacher = expert.compiled(teacher, device, compiled, "inference")
        self.loss = expert.compiled(self.both, device, compiled)

    def both(self, x: Tensor, y: Tensor, of_teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy and the distance of the student."""
        with expert.autocast(x.device):
            logits, features = self.student(x)
        distance = 1 - F.cosine_similarity(features.float(), of_teacher.float()).abs()
        return F.cross_entropy(logits.float(), y), distance.mean()

    def losses(self, fixed: bool) -> tuple[Tensor, Tensor]:
        b, a = self.batch, self.config.attack
        start = start_of(b, a.eps) if fixed else expert.random_start(b.x, a.eps)
        with torch.no_grad():
            of_teacher = self.teacher(expert.entering(b.x))[1].clone()
        self.attacked.refresh()
        x = expert.attack(self.ascent, b.x, b.y, a.eps, a.step_size(a.eps), a.steps, start)
        self.student.train()
        return self.loss(x.contiguous(memory_format=expert.LAST), b.y, of_teacher)


def _job(form: type[PlainStep] | type[ExpertStep], device: torch.device, quick: bool, compiled: bool = False) -> Job:
    return form(device, quick, compiled).job()


def _ours(device: torch.device, quick: bool, compiled: bool = False, captured: bool = False) -> Job:
    now, start, layers = networks(device, quick)
    config = setting(quick, precision(device))
    task, batch = ArrestTask(now, config, (3, 32, 32), layers, start), batch_of(device, quick)
    run = training_step(task, batch, compiled, captured)
    now.train()

    def result() -> Tensor:
        metrics = task.training_step(batch)[1]
        return torch.stack([metrics["cross_entropy"], metrics["distance"]])

    return Job(run, result)


def cases(quick: bool) -> dict[str, Case]:
    shape = f"{16 if quick else BATCH} images, PGD-{setting(quick).attack.steps}, the map before pooling; all attacked"
    return {"all attacked": Case(shape, 0.05, columns(partial(_job, PlainStep), partial(_job, ExpertStep), _ours))}
