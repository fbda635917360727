"""Use the fused ops inside your own loop: in a PGD attack, and in the loss of a conditional autoencoder.

Every op is a function of tensors, which checks its arguments and works with torch.compile. Ops for losses and networks
have gradients.

    python examples/kernels_in_your_loop.py
    PURIFY_FAST_BACKEND=reference python examples/kernels_in_your_loop.py   # does the same without kernels
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import tyro

from purify_fast.ops import Stream, aggregate, pgd_step, philox, reconstruction_loss, sample_latent, use_backend


def attack(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, eps: float, steps: int) -> torch.Tensor:
    """Run PGD with a fused op for each step: sign, step, and projection onto the ball and onto [0, 1].

    Args:
        model: module from images to logits.
        x: images in [0, 1].
        y: labels.
        eps: radius of the L-inf ball.
        steps: number of gradient steps.
    """
    point = x
    for _ in range(steps):
        point = point.detach().requires_grad_(True)
        # Compute only the gradient of the images, not of the weights.
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        point = pgd_step(point.detach(), gradient, x, alpha=2.5 * eps / steps, eps=eps)
    return point


def main(images: int = 64, steps: int = 5) -> None:
    """Run the ops, and compare them with their references.

    Args:
        images: number of random images.
        steps: number of steps of PGD.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    x, y = torch.rand(images, 3, 32, 32), torch.arange(images) % 10

    chosen = attack(model, x, y, eps=8 / 255, steps=steps)
    with use_backend("reference"):
        plain = attack(model, x, y, eps=8 / 255, steps=steps)
    print(f"PGD: the kernel's and the reference's images differ by {(chosen - plain).abs().max():g}")

    # Draw a latent with its KL, and compute a reconstruction loss. Both ops have gradients.
    mean, log_variance = (torch.randn(images, 16, requires_grad=True) for _ in range(2))
    # The seed is a tensor, so that torch.compile does not compile again for another seed.
    seed = torch.tensor([7])
    # The random draws depend on an image's index in the data set, not on its place in the batch.
    ids = torch.arange(images)
    z, kl = sample_latent(mean, log_variance, seed, ids)
    logits = (z @ torch.randn(16, 3 * 32 * 32)).view_as(x)
    loss = (reconstruction_loss(logits, x) + kl).mean()
    loss.backward()
    print(f"autoencoder: loss {loss.item():.1f}, gradient of the mean {mean.grad.norm().item():.3f}")

    # Aggregate K predictions. The result is finite even if the published formula would overflow.
    many = 30 * torch.randn(images, 8, 10)
    print(f"aggregated: all finite: {bool(aggregate(many, 'peel').isfinite().all())}")

    # The random numbers are the same on every device and for every split of the batch.
    first = philox(seed, ids, 4, stream=Stream.LATENT)
    second = torch.cat([philox(seed, half, 4, stream=Stream.LATENT) for half in ids.chunk(2)])
    print(f"random numbers do not depend on the batch: {torch.equal(first, second)}")


if __name__ == "__main__":
    tyro.cli(main)
