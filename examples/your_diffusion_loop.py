"""Attack a diffusion purifier of your own by its exact gradient, in the memory of one step.

    python examples/your_diffusion_loop.py

The purifier adds noise to an image, and removes the noise in five deterministic steps (DDIM). The denoiser and the
classifier of the zoo stand for your own. For a number to quote, take some hundred images, and ``protocol="strong"`` in
place of the list of attacks.
"""

from __future__ import annotations

import torch

import purify_fast
from purify_fast.attacks import PGD, checkpointed_steps
from purify_fast.evaluation import evaluate

TIMES = [100, 80, 60, 40, 20, 0]  # steps of noise that are left; the training has 1,000
KEPT = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)])  # DDPM's linear schedule


class Purifier(torch.nn.Module):
    def __init__(self, denoiser, classifier):
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier

    def step(self, x, i):
        now, then = KEPT[TIMES[i]], KEPT[TIMES[i + 1]]
        noise = self.denoiser(x, torch.full((len(x),), TIMES[i] - 1))  # the training steps are counted from 0
        clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
        return then.sqrt() * clean + (1 - then).sqrt() * noise

    def purify(self, x):
        x = KEPT[TIMES[0]].sqrt() * (2 * x - 1) + (1 - KEPT[TIMES[0]]).sqrt() * torch.randn_like(x)
        return (checkpointed_steps(self.step, x, len(TIMES) - 1) + 1) / 2

    def forward(self, x):
        return self.classifier(self.purify(x))


def main() -> None:
    digits = purify_fast.load_dataset("digits")
    purifier = Purifier(purify_fast.zoo.load("digits-diffpure").denoiser.module, purify_fast.zoo.load("digits-pgd-at"))
    images, labels = digits.x_test[:4], digits.y_test[:4]
    # Each gradient is averaged over 20 draws.
    report = evaluate(purifier, images, labels, eps=0.1, attacks=[PGD(steps=10)], eot_iter=20, progress=False)
    row = report.headline
    print(f"one draw: {row.mean:.1%} ± {row.mean_error:.1%}; all {row.n_eval} draws right: {row.accuracy:.1%}")


if __name__ == "__main__":
    main()
