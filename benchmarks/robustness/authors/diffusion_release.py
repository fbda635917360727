"""The attacks with which the authors of DiffPure and GDMP evaluated their purifiers by diffusion.

The authors of DiffPure (NVlabs/DiffPure at 985703f) use AutoAttack, version rand (lines 24 and 25 of
run_scripts/cifar10/run_cifar_rand_inf.sh), with the gradient of torchsde's ``sdeint_adjoint`` (lines 233 to 238 of
runners/diffpure_sde.py). torchsde solves the SDE again, backward in time, together with the adjoint equation
(google-research/torchsde at eb3a00e, lines 75 to 97 of torchsde/_core/adjoint.py, 111 to 128 and 177 to 216 of
adjoint_sde.py), so the result is not the gradient of the computed output. From the purified image to t*, with the drift
f, the diffusion g, the state y and the gradient a with respect to y, the steps are

    y <- y - f(t, y) dt - g(t) dW,    a <- a + dt (df(t, y) / dy)^T a

The authors of GDMP (JinyiW/GuidedDiffusionPur at 6ee8b1a) use PGD with 10 steps on the classifier alone (lines 25 to 28
of attacks/clf_pgd.py, and 14 to 19 of configs/cifar10_MSE.yml), and BPDA with eps 8/255, 40 steps of 2/255 and 15 draws
(lines 14 to 41 of attacks/bpda_strong.py, and 13 to 20 of configs/BPDA40+EOT15.yml), each of one purification. The
final prediction sums the logits of ten purifications (lines 149 to 162 of runners/empirical.py, and 99 to 126 of
utils/accuracy.py). None of the code of these repositories is used here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from purify_fast.attacks import PGD, BpdaModel, OriginalAutoAttack
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.diffusion.process import END
from purify_fast.ops.diffusion_step import diffusion_step
from purify_fast.ops.dispatch.gradient import first_order

DIFFPURE = "as eval_sde_adv.py (NVlabs/DiffPure): AutoAttack rand through the adjoint SDE"
CLASSIFIER_ROW = "as clf_pgd.py (JinyiW/GuidedDiffusionPur): PGD-10 on the classifier alone (not adaptive)"
STRAIGHT = "as bpda_strong.py (JinyiW/GuidedDiffusionPur): BPDA-40 + EOT 15"
#: Number of purifications in a prediction of GDMP's authors (``path_number``, line 25 of both config files).
PATHS = 10


class AdjointGradient(nn.Module):
    """A purifier with one round and one draw of the reverse SDE, whose gradient the adjoint SDE computes."""

    draws_for_each_image = True

    def __init__(self, defence: nn.Module):
        super().__init__()
        self.defence = defence
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, classes]``, float32, of images ``[B, C, H, W]`` in [0, 1]."""
        defence: Any = self.defence
        images = 2 * x.to(torch.promote_types(defence.purifier_dtype, torch.float32)) - 1
        seed, ids = defence.noise(len(images), images.device)
        most = defence.max_forward_batch or max(1, len(images))
        parts = zip(images.split(most), ids.expand(len(images)).split(most), strict=True)
        purified = torch.cat([_Adjoint.apply(defence, part, seed, names) for part, names in parts])
        return defence.classify(defence._as_images(purified)[:, None])[:, 0]


class TenPaths(nn.Module):
    """A purifier that predicts from ten purifications. For BPDA, `purify` makes one purification, as in GDMP's code."""

    draws_for_each_image = True

    def __init__(self, defence: Any):
        super().__init__()
        self.paths, self.path = _with_samples(defence, PATHS), _with_samples(defence, 1)
        self.classifier = defence.classifier
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits of ten purifications, ``[B, classes]``, float32."""
        return self.paths(x)

    def purify(self, x: Tensor) -> Tensor:
        """Purify each image once, ``[B, 1, C, H, W]``."""
        return self.path.purify(x)


def _with_samples(defence: Any, samples: int) -> Any:
    """Return a copy of the defence with this number of samples and the aggregation "mean"."""
    other = defence.with_process(defence.process)
    other.samples, other.aggregation = samples, "mean"
    return other


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, defence: Any, images: Tensor, seed: Tensor, ids: Tensor) -> Tensor:
        draws = torch.zeros_like(ids)
        state = defence._denoised(images, True, seed, ids, draws)
        ctx.defence = defence
        ctx.save_for_backward(state, seed, ids, draws)
        return state

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        y, seed, ids, draws = ctx.saved_tensors
        defence, process = ctx.defence, ctx.defence.process
        schedule, ((start, count),) = process.schedule, process.rounds
        t = schedule.times(start, count)
        # The adjoint SDE runs backward in time, so each of its steps begins where a step of the SDE ended.
        least = END if schedule.is_continuous else 1 / schedule.steps
        t = torch.cat([t[1:].clamp(min=least), t[-1:] + t[-1] - t[-2]])
        rows, units = process.denoising(t).to(y), schedule.to_denoiser_units(t[:-1], process.time_units).to(y.device)
        for j in reversed(range(len(rows))):
            word = torch.full_like(seed, j + 1)
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                prediction = defence._predict(leaf, units[j].expand(len(leaf)))
                # The state ahead is y + f dt + g dW, with the noise of the same step of the SDE.
                ahead = diffusion_step(leaf, prediction, rows[j], seed=seed, sample_ids=ids, draws=draws, step=word)
            (grad,) = torch.autograd.grad(ahead, leaf, grad)
            y = 2 * leaf.detach() - ahead.detach()
        # The sum alpha x + sigma z is computed before the SDE, and its gradient has the factor alpha.
        return None, grad * schedule.alpha_bar(torch.tensor(start, device="cpu")).sqrt().to(grad), None, None


def evaluations(defence: Any, eps: float) -> list[tuple[nn.Module, AttackSpec]]:
    """Return the authors' evaluations of a purifier. A step has the length eps / 4: the authors use 2/255 for 8/255.

    There are three differences from the authors' attacks. PGD and BPDA return their best point, not the last. BPDA
    averages the gradients of its draws; GDMP's BPDA sums their signs. And GDMP's PGD has a radius of 8/256.
    """
    ten, alone = TenPaths(defence), PGD(steps=10, alpha=eps / 4, eot_iter=1)
    straight = PGD(steps=40, alpha=eps / 4, eot_iter=15, random_start=False)
    found: list[tuple[nn.Module, AttackSpec]] = [
        (ten, AttackSpec(alone, through=ten.classifier, label=CLASSIFIER_ROW)),
        (ten, AttackSpec(straight, through=BpdaModel.of(ten), label=STRAIGHT)),
    ]
    if defence.process.solver == "vp_sde" and len(defence.process.rounds) == 1:
        # DiffPure's authors predict from one draw.
        adjoint = AdjointGradient(_with_samples(defence, 1))
        found.insert(0, (adjoint, AttackSpec(OriginalAutoAttack(version="rand"), label=DIFFPURE)))
    return found
