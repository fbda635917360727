"""Train a denoiser, or attack a diffusion purifier of your own by its exact gradient, in the memory of one step.

    python examples/your_diffusion_loop.py
    python examples/your_diffusion_loop.py --train runs/denoiser --epochs 300

With ``--train``, a U-Net learns to predict the noise in clean images, as the denoisers `diffpure` of the zoo did. The
folder is then a denoiser for `purify_fast.load_defence` and for ``purify-fast evaluate``, which put it in front of a
classifier.

Without options, the script attacks a purifier. It adds noise to an image, and removes the noise in five deterministic
steps (DDIM). The denoiser and the classifier of the zoo stand for your own. For a number to quote, take some hundred
images, and ``protocol="strong"`` in place of the list of attacks.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import purify_fast
from purify_fast.attacks import PGD, checkpointed_steps
from purify_fast.evaluation import evaluate
from purify_fast.methods.diffusion import save_denoiser
from purify_fast.models import UNet
from purify_fast.nn import EMA
from purify_fast.ops import Stream, philox
from purify_fast.training import FitConfig, Task, fit

TIMES = [100, 80, 60, 40, 20, 0]  # steps of noise that are left; the training has 1,000
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM's linear schedule
KEPT = torch.cat([torch.ones(1), (1 - BETAS).cumprod(0)])

WIDTH, PATCH = 16, 2  # sizes of the U-Net; squares of 2 x 2 pixels become channels
PEAK = 2e-3  # the highest learning rate


# -- training ----------------------------------------------------------------------------------------------------------


class Denoising(Task):
    """Trains a denoiser to predict the noise in images at a random time (Ho et al., arXiv 2006.11239, equation 14)."""

    def __init__(self, denoiser, last_time=0.4):
        self.last_time = last_time
        self.denoiser, self.average = denoiser, EMA(denoiser, 0.999, warm_up=True)
        self.model = torch.nn.ModuleDict({"denoiser": denoiser, "average": self.average})
        self.optimizer = torch.optim.AdamW(denoiser.parameters(), PEAK, weight_decay=0.0, foreach=True)

    def training_step(self, batch):
        # The numbers of an image depend only on the step and the image, not on the process that draws them.
        seed, size = torch.full((1,), batch.seed, device=batch.x.device), batch.x[0].numel()
        of = {"seed": seed, "sample_ids": batch.sample_ids, "stream": Stream.DIFFUSION_TRAINING}
        noise = philox(**of, numel=size, distribution="normal").view_as(batch.x)
        index = (philox(**of, numel=1, first_draw=1).flatten().double() * round(self.last_time * len(BETAS))).long()
        kept = KEPT.to(index.device)[index + 1].view(-1, 1, 1, 1)
        noisy = kept.sqrt().float() * (2 * batch.x - 1) + (1 - kept).sqrt().float() * noise
        return (self.denoiser(noisy, index) - noise).square().mean(), {}

    @property
    def result(self):
        return self.average.average.module

    def after_step(self):
        self.average.update(self.denoiser)

    def learning_rate(self, progress, epoch, epochs):
        # One cycle: up in the first fifth of the run, and then down.
        low, place = (PEAK / 25, 1 - progress / 0.2) if progress < 0.2 else (PEAK / 1000, (progress - 0.2) / 0.8)
        return low + (PEAK - low) * 0.5 * (1 + math.cos(math.pi * place))

    def describe(self):
        return {"task": "denoiser", "last_time": self.last_time, "learning_rate": PEAK}


def train(out: Path, images: purify_fast.data.DataSet, last_time: float, loop: FitConfig) -> None:
    torch.manual_seed(0)
    network = UNet(images.image_shape[0], WIDTH, patch=PATCH)
    task = Denoising(network.to(images.y_train.device), last_time)
    # A killed training continues if the script is run again.
    fit(task, images.x_train, images.y_train, loop, out)
    save_denoiser(task.result, out, images.image_shape, {"schedule": "linear", "prediction": "noise"}, last_time)
    print(f"saved to {out}; judge it with: purify-fast evaluate {out} --classifier FOLDER --denoising-steps 5")


# -- your own loop -----------------------------------------------------------------------------------------------------


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


def attack() -> None:
    digits = purify_fast.load_dataset("digits")
    purifier = Purifier(purify_fast.zoo.load("digits-diffpure").denoiser.module, purify_fast.zoo.load("digits-pgd-at"))
    images, labels = digits.x_test[:4], digits.y_test[:4]
    # Each gradient is averaged over 20 draws.
    report = evaluate(purifier, images, labels, eps=0.1, attacks=[PGD(steps=10)], eot_iter=20, progress=False)
    row = report.headline
    print(f"one draw: {row.mean:.1%} ± {row.mean_error:.1%}; all {row.n_eval} draws right: {row.accuracy:.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, metavar="OUT", help="train a denoiser, and save it to this folder")
    parser.add_argument("--data", default="digits", help="images, as in purify_fast.load_dataset; default: digits")
    parser.add_argument("--size", type=int, nargs=2, help="height and width to which images are resized")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--flip", action="store_true", help="mirror half of the images")
    strongest = "the strongest noise, as a time: a small denoiser then removes weaker noise better; default: 0.4"
    parser.add_argument("--last-time", type=float, default=0.4, help=strongest)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.train is None:
        attack()
    else:
        images = purify_fast.load_dataset(options.data, image_size=options.size).to(options.device)
        loop = FitConfig(options.epochs, options.batch_size, flip=options.flip)
        train(options.train, images, options.last_time, loop)


if __name__ == "__main__":
    main()
