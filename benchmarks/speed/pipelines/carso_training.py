"""Measure one training step of CARSO's purifier, attacks included.

The case "paper's objective" attacks the classifier. The case "pipeline step" attacks the whole defence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.attacks.base import Ball, sample_in_ball
from purify_fast.methods.carso import CarsoConfig, CarsoTask
from purify_fast.methods.carso.task import kl_weight
from purify_fast.ops.sample_latent import sample_latent
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

from . import Case, Job, columns, expert, precision, training_step, update
from .carso_inference import FrozenCarso, Plain, defence, images

BATCH, OBJECTIVE_STEPS, PIPELINE_STEPS = 64, 40, 10


def setting(target: str, quick: bool, precision: str = "float32") -> CarsoConfig:
    steps = 2 if quick else OBJECTIVE_STEPS if target == "classifier" else PIPELINE_STEPS
    return CarsoConfig(attack_target=target, attack=TrainingAttack(eps=8 / 255, steps=steps), precision=precision)


def batch_of(made, device: torch.device, quick: bool) -> Batch:
    size = 16 if quick else BATCH
    labels = torch.randint(10, (size,), generator=torch.Generator().manual_seed(2)).to(device)
    return Batch(images(size, made, device), labels, torch.arange(size, device=device), 7, 9, 10)


def in_ball(x: Tensor, eps: Tensor, seed: int, ids: Tensor) -> Tensor:
    """Return the random starts of this package's attack, for a comparison of results. The radii are ``[B]``."""
    return sample_in_ball(x, Ball(eps), seed=seed, sample_ids=ids)


def start_of(batch: Batch, eps: float) -> Tensor:
    """Return `in_ball` for all images of a batch."""
    return in_ball(batch.x, torch.full((len(batch.x),), eps, device=batch.x.device), batch.seed, batch.sample_ids)


def attack(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, alpha: float, steps: int, seed: int | None, ids
) -> Tensor:
    """Attack images by L-inf PGD in plain PyTorch. With a seed, the attack starts at random points.

    The backward pass also computes gradients of the weights, because plain code does not freeze the model.
    """
    adversarial = x.clone()
    if seed is not None:
        adversarial = in_ball(x, torch.full((len(x),), eps, device=x.device), seed, ids)
    for _ in range(steps):
        adversarial = adversarial.clone().detach().requires_grad_(True)
        F.cross_entropy(model(adversarial), y, reduction="sum").backward()
        moved = adversarial.detach() + alpha * adversarial.grad.sign()
        adversarial = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return adversarial.detach()


class PlainTraining:
    """Both training steps in plain PyTorch, in float32. The attacks run one after the other, and no part is frozen."""

    def __init__(self, target: str, device: torch.device, quick: bool, compiled: bool):
        made = defence(device, quick, samples=1)
        self.config, self.model, self.batch = setting(target, quick), Plain(made), batch_of(made, device, quick)
        parameters = [p for n, p in self.model.made.named_parameters() if not n.startswith("classifier.")]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.config.learning_rate)
        self.step = self.objective if target == "classifier" else self.pipeline
        compile = partial(torch.compile, dynamic=False, disable=not compiled)
        self.classifier, self.read = compile(self.model.made.classifier), self.model.made.representation
        self.purify, self.whole = compile(self.purifier_loss), compile(self.model)

    def purifier_loss(self, representation: list[Tensor], perturbed: Tensor, seed: Tensor, ids: Tensor) -> Tensor:
        made, clean = self.model.made, self.batch.x
        condition = made.condition_encoder(representation)
        mean, log_variance = made.posterior_encoder((perturbed - made.mean) / made.std, condition)
        z, kl = sample_latent(mean, log_variance, seed, ids)
        logits = self.model.reconstruct(z, condition)
        reconstruction = F.binary_cross_entropy_with_logits(logits, clean, reduction="none").flatten(1).sum(1)
        return reconstruction.mean() + kl_weight(self.batch.epoch, self.batch.epochs / 8) * kl.mean()

    def objective(self) -> Tensor:
        b, a = self.batch, self.config.attack
        atom = int(len(b.x) * self.config.adversarial_fraction // 4)
        clean = len(b.x) - 4 * atom
        parts = [b.x[:clean]]
        for i, (eps, fast) in enumerate(((a.eps / 2, False), (a.eps, False), (a.eps / 2, True), (a.eps, True))):
            rows = slice(clean + i * atom, clean + (i + 1) * atom)
            alpha, steps, seed = (eps, 1, None) if fast else (a.step_size(eps), a.steps, b.seed)
            parts.append(attack(self.classifier, b.x[rows], b.y[rows], eps, alpha, steps, seed, b.sample_ids[rows]))
        perturbed = torch.cat(parts)
        with torch.no_grad():
            representation = self.read(perturbed)
        self.model.made.train()
        seed = torch.full((1,), b.seed, dtype=torch.int64, device=b.x.device)
        return self.purify(representation, perturbed, seed, b.sample_ids)

    def pipeline(self) -> Tensor:
        b, a = self.batch, self.config.attack
        self.model.made.eval()

        def latents() -> Tensor:
            return torch.randn(1, len(b.x), self.model.made.latent_dim, device=b.x.device)

        def logits(x: Tensor) -> Tensor:
            return torch.logsumexp(self.whole(x, latents())[1], 0)

        x = attack(logits, b.x, b.y, a.eps, a.step_size(a.eps), a.steps, b.seed, b.sample_ids)
        image, predictions = (out[0] for out in self.whole(x, latents()))
        reconstruction = F.binary_cross_entropy_with_logits(image, b.x, reduction="none").flatten(1).sum(1).mean()
        return F.cross_entropy(predictions, b.y) + self.config.reconstruction_weight * reconstruction

    def run(self) -> None:
        loss = self.step()
        # The attacks have left gradients in the classifier too, which the optimizer does not know.
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class ExpertTraining:
    """Both training steps as an expert writes them (see `expert`). Attacks of equally many steps share a batch."""

    def __init__(self, target: str, device: torch.device, quick: bool, compiled: bool):
        made = defence(device, quick, samples=1)
        made.to(memory_format=expert.LAST)
        made.classifier.requires_grad_(False)
        self.config, self.made, self.batch = setting(target, quick), made, batch_of(made, device, quick)
        self.plain, self.frozen = Plain(made, copied=False), FrozenCarso(made)
        parameters = [p for p in made.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.config.learning_rate, fused=True)
        self.step = self.objective if target == "classifier" else self.pipeline
        copy = self.frozen.copies[0].model
        constant = target == "classifier"
        loss = expert.loss_of(copy.classifier if constant else self.of_one_sample)
        self.ascent = expert.ascent(loss, device, compiled, constant)
        self.read = expert.compiled(copy.representation, device, compiled, "inference")
        self.purify = expert.compiled(self.purifier_loss, device, compiled)
        self.predict = expert.compiled(self.prediction_loss, device, compiled)

    def of_one_sample(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the logits ``[B, classes]`` of the copy of the whole defence for latents ``[1, B, latent_dim]``."""
        return self.frozen.plain(x, z)[1][0]

    def latents(self) -> Tensor:
        return torch.randn(1, len(self.batch.x), self.made.latent_dim, device=self.batch.x.device)

    def purifier_loss(self, representation: list[Tensor], perturbed: Tensor, noise: Tensor) -> Tensor:
        made, clean = self.made, self.batch.x
        with expert.autocast(clean.device):
            condition = made.condition_encoder(representation)
            mean, logs = (out.float() for out in made.posterior_encoder((perturbed - made.mean) / made.std, condition))
            logits = self.plain.reconstruct(mean + noise * torch.exp(0.5 * logs), condition)
        kl = 0.5 * (mean**2 + logs.exp() - 1 - logs).sum(1).mean()
        reconstruction = F.binary_cross_entropy_with_logits(logits.float(), clean, reduction="sum") / len(clean)
        return reconstruction + kl_weight(self.batch.epoch, self.batch.epochs / 8) * kl

    def objective(self, fixed: bool) -> Tensor:
        b, a = self.batch, self.config.attack
        atom = int(len(b.x) * self.config.adversarial_fraction // 4)
        clean = len(b.x) - 4 * atom
        slow, fast = slice(clean, clean + 2 * atom), slice(clean + 2 * atom, len(b.x))
        radii = torch.tensor([a.eps / 2, a.eps], device=b.x.device).repeat_interleave(atom)
        lengths = torch.tensor([a.step_size(a.eps / 2), a.step_size(a.eps)], device=b.x.device).repeat_interleave(atom)
        eps, alpha = radii.view(-1, 1, 1, 1), lengths.view(-1, 1, 1, 1)
        x, ids = b.x[slow], b.sample_ids[slow]
        start = in_ball(x, radii, b.seed, ids) if fixed else expert.random_start(x, eps)
        by_pgd = expert.attack(self.ascent, x, b.y[slow], eps, alpha, a.steps, start)
        by_fgsm = expert.attack(self.ascent, b.x[fast], b.y[fast], eps, eps, 1)
        perturbed = torch.cat([b.x[:clean], by_pgd, by_fgsm])
        with torch.no_grad():
            representation = [layer.clone() for layer in self.read(expert.entering(perturbed))]
        self.made.train()
        zeros, seed = b.x.new_zeros(len(b.x), self.made.latent_dim), torch.full_like(b.sample_ids[:1], b.seed)
        noise = sample_latent(zeros, zeros, seed, b.sample_ids)[0] if fixed else torch.randn_like(zeros)
        return self.purify(representation, perturbed, noise)

    def prediction_loss(self, representation: list[Tensor], z: Tensor) -> Tensor:
        b, copy = self.batch, self.frozen.copies[0].model
        with expert.autocast(b.x.device):
            image = self.plain.reconstruct(z, self.made.condition_encoder(representation))
        predictions = copy.classifier(expert.entering(torch.sigmoid(image))).float()
        reconstruction = F.binary_cross_entropy_with_logits(image.float(), b.x, reduction="sum") / len(b.x)
        return F.cross_entropy(predictions, b.y) + self.config.reconstruction_weight * reconstruction

    def pipeline(self, fixed: bool) -> Tensor:
        b, a = self.batch, self.config.attack
        self.made.eval()
        self.frozen.copies[0].refresh("condition_encoder", "decoder")
        start = start_of(b, a.eps) if fixed else expert.random_start(b.x, a.eps)
        more = lambda: (self.latents().to(expert.DTYPES[b.x.device.type]),)  # noqa: E731
        x = expert.attack(self.ascent, b.x, b.y, a.eps, a.step_size(a.eps), a.steps, start, more)
        with torch.no_grad():
            representation = [layer.clone() for layer in self.read(expert.entering(x))]
        return self.predict(representation, self.latents()[0])

    def run(self) -> None:
        update(self.optimizer, self.step(fixed=False))


def _plain(device: torch.device, quick: bool, target: str, compiled: bool = False) -> Job:
    plain = PlainTraining(target, device, quick, compiled)
    return Job(plain.run, lambda: plain.step().detach())


def _expert(device: torch.device, quick: bool, target: str, compiled: bool = False) -> Job:
    made = ExpertTraining(target, device, quick, compiled)
    return Job(made.run, lambda: made.step(fixed=True).detach())


def _ours(device: torch.device, quick: bool, target: str, compiled: bool = False, captured: bool = False) -> Job:
    made = defence(device, quick, samples=1)
    batch = batch_of(made, device, quick)
    task = CarsoTask(made, setting(target, quick, precision(device)))
    run = training_step(task, batch, compiled, captured)

    def result() -> Tensor:
        task.train()
        return task.training_step(batch)[0].detach()

    return Job(run, result)


def cases(quick: bool) -> dict[str, Case]:
    every = {}
    for name, target, with_what in (
        ("paper's objective", "classifier", "half of them adversarial"),
        ("pipeline step", "pipeline", "K = 1"),
    ):
        shape = f"{16 if quick else BATCH} images, PGD-{setting(target, quick).attack.steps}, {with_what}"
        makes = (partial(make, target=target) for make in (_plain, _expert, _ours))
        every[name] = Case(shape, 0.03, columns(*makes))
    return every
