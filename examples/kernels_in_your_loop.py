"""The fused ops inside a loop of your own: a PGD attack, and a loss of a conditional autoencoder.

Every op is a function of tensors. It checks its arguments, has gradients where they make sense, and compiles.

    python examples/kernels_in_your_loop.py
    PURIFY_FAST_BACKEND=reference python examples/kernels_in_your_loop.py   # the same without kernels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import tyro

from purify_fast.ops import Stream, aggregate, pgd_step, philox, reconstruction_loss, sample_latent, use_backend


def attack(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float, steps: int) -> torch.Tensor:
    """PGD with one fused op per step: sign, step, projection on the ball and on [0, 1].

    Args:
        model: images to logits.
        x: images in [0, 1].
        y: labels.
        eps: radius of the L-inf ball.
        steps: gradient steps.
    """
    point = x
    for _ in range(steps):
        point = point.detach().requires_grad_(True)
        # gradients for the images only: none is computed for the weights
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        point = pgd_step(point.detach(), gradient, x, alpha=2.5 * eps / steps, eps=eps)
    return point


def main(images: int = 64, steps: int = 5) -> None:
    """Run the ops, and compare them with their references.

    Args:
        images: how many random images.
        steps: of PGD.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10

    served = attack(model, x, y, eps=8 / 255, steps=steps)
    with use_backend("reference"):
        plain = attack(model, x, y, eps=8 / 255, steps=steps)
    print(f"PGD: the kernel's and the reference's images differ by {(served - plain).abs().max():g}")

    # a latent, its KL, and a reconstruction loss, each one op with a gradient
    mean, log_variance = (torch.randn(images, 16, requires_grad=True) for _ in range(2))
    seed = torch.tensor([7])  # a tensor, so that another seed compiles nothing anew
    ids = torch.arange(images)  # random draws follow an image's index in the data set, not its place in the batch
    z, kl = sample_latent(mean, log_variance, seed, ids)
    logits = (z @ torch.randn(16, 3 * 32 * 32)).view_as(x)
    loss = (reconstruction_loss(logits, x) + kl).mean()
    loss.backward()
    print(f"autoencoder: loss {loss.item():.1f}, gradient of the mean {mean.grad.norm().item():.3f}")

    # K predictions into one, finite even where the published formula is not
    many = 30 * torch.randn(images, 8, 10)
    print(f"aggregated: all finite: {bool(aggregate(many, 'peel').isfinite().all())}")

    # the same random numbers on every device and for every split of the batch
    first = philox(seed, ids, 4, stream=Stream.LATENT)
    second = torch.cat([philox(seed, half, 4, stream=Stream.LATENT) for half in ids.chunk(2)])
    print(f"random numbers do not depend on the batch: {torch.equal(first, second)}")


if __name__ == "__main__":
    tyro.cli(main)
