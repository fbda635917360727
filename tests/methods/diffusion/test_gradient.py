"""The exact gradient against plain autograd through the whole process, written out as in the papers."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from denoisers import Tiny, defence, images, logits_and_gradient
from small_models import Linear

from purify_fast.methods.diffusion import RECIPES, Process, Schedule
from purify_fast.ops import diffusion_step

SEED = 5


def normals(like, ids, draws, word):
    """The noise of one addition, as the op draws it."""
    only = torch.tensor([0, 0, torch.inf, 0, 0, 1, 0, 0], dtype=like.dtype)
    name = {"seed": torch.tensor([SEED]), "sample_ids": ids, "draws": draws, "step": torch.tensor([word])}
    return diffusion_step(torch.zeros_like(like), torch.zeros_like(like), only, **name)


def textbook(made, x):
    """Purified images [B, K, C, H, W] under fixed noise, step by step; plain autograd sees all of it."""
    process, channels = made.process, x.shape[1]
    schedule = process.schedule
    image = (2 * x - 1).repeat_interleave(made.samples, 0)
    ids, draws = torch.zeros(len(image), dtype=torch.int64), torch.arange(made.samples).repeat(len(x))
    word, state = 0, image
    for start, count in process.rounds:
        times = schedule.times(start, 1 if process.solver == "one_shot" else count)
        kept = schedule.alpha_bar(times[0])
        state = kept.sqrt() * state + (1 - kept).sqrt() * normals(image, ids, draws, word)
        word += 1
        posterior = None
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            kept, kept_s, last = schedule.alpha_bar(t), schedule.alpha_bar(s), i == len(times) - 2
            alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
            dtype = torch.int64 if process.time_units == "index" else x.dtype
            units = schedule.to_denoiser_units(t, process.time_units).to(dtype)
            whole = made.denoiser.module(state, units.expand(len(state)))
            m, v = whole[:, :channels], whole[:, channels:]
            x0 = {"noise": (state - sigma * m) / alpha, "x0": m, "v": alpha * state - sigma * m}[process.prediction]
            x0 = x0.clamp(-1, 1) if process.clip else x0
            z = normals(image, ids, draws, word)
            beta = 1 - kept / kept_s
            before, posterior = posterior, (1 - kept_s) / (1 - kept) * beta
            if process.solver == "ddpm":
                small = posterior if not last else beta if before is None else before
                variance = small if process.variance != "large" or last else beta
                mean = kept_s.sqrt() * beta / sigma**2 * x0 + (1 - beta).sqrt() * (1 - kept_s) / sigma**2 * state
                deviation = variance.sqrt()
                if process.learns_variances:
                    deviation = torch.exp(((1 + v) / 2 * beta.log() + (1 - v) / 2 * small.log()) / 2)
                following = mean if last else mean + deviation * z
                variance = deviation.square()
            elif process.solver == "ddim":
                variance = process.eta**2 * posterior
                ahead = (1 - kept_s - variance).clamp(min=0).sqrt() * (state - alpha * x0) / sigma
                following = kept_s.sqrt() * x0 + ahead + variance.sqrt() * z
            elif process.solver == "one_shot":
                following = x0
            else:
                score = (alpha * x0 - state) / sigma**2
                variance = schedule.rate(t) * (t - s)
                share, noise = (1, variance.sqrt() * z) if process.solver == "vp_sde" else (0.5, 0)
                following = state + variance * (state / 2 + share * score)
                following = following if last and process.denoise_last else following + noise
            state, word = following, word + 1
    state = state.clamp(-1, 1) if process.clip else state
    return ((state + 1) / 2).unflatten(0, (len(x), -1))


#: Number of steps whose activations are kept: none, some, all, and those that fit.
KEEPS = (0, 2, 99, "auto")


def both(made, x):
    """The images of the textbook's process and of the defence, however many steps it keeps, and a sum's gradient."""
    results = []
    for keep in (None, *KEEPS):
        made.keep, run = keep, partial(textbook, made) if keep is None else made.purify
        leaf = x.clone().requires_grad_()
        with made.fixed_noise(SEED):
            out = run(leaf)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.dtype)
        results.append((out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]))
    for again in results[2:]:
        for one, other in zip(results[1], again, strict=True):
            close(other, one, 1e-6 if x.dtype == torch.float32 else 1e-14)
    return results[:2]


def close(got, want, tolerance):
    assert (got - want).norm() <= tolerance * want.norm(), (got - want).norm() / want.norm()


#: Solver and its options.
SOLVERS = {
    "ddpm": {"solver": "ddpm", "steps": 4},
    "ddpm, large": {"solver": "ddpm", "steps": 4, "variance": "large", "clip": False},
    "ddpm, learned": {"solver": "ddpm", "steps": 4, "variance": "learned"},
    "ddim": {"solver": "ddim", "steps": 3},
    "ddim, eta": {"solver": "ddim", "steps": 3, "eta": 0.7, "clip": False},
    "vp_sde": {"solver": "vp_sde", "steps": 5, "schedule": Schedule("vp"), "clip": False},
    "vp_sde, linear": {"solver": "vp_sde", "steps": 5},
    "vp_sde, clean end": {"solver": "vp_sde", "steps": 3, "schedule": Schedule("vp"), "denoise_last": True},
    "ode": {"solver": "ode", "steps": 5, "schedule": Schedule("vp")},
    "one_shot": {"solver": "one_shot", "schedule": Schedule("cosine", 200)},
}
SHAPES = ((3, 8, 12), (1, 9, 8), (2, 8, 11))
PREDICTIONS = ("noise", "x0", "v")
#: Every solver, one of them with every prediction.
KINDS = [(name, PREDICTIONS[number % 3]) for number, name in enumerate(SOLVERS)]
KINDS += [("ddpm", "x0"), ("ddpm", "v")]
CASES = [(*kind, SHAPES[number % 3], *((1, 1), (3, 2))[number % 2]) for number, kind in enumerate(KINDS)]


def made_for(name, prediction, shape, samples, rounds):
    options = {**SOLVERS[name], "prediction": prediction, "t_star": (0.3, 0.2)[:rounds] if rounds > 1 else 0.3}
    return defence(shape, process=Process(**options), samples=samples)


@pytest.mark.parametrize(("name", "prediction", "shape", "samples", "rounds"), CASES)
def test_it_is_that_of_plain_autograd(name, prediction, shape, samples, rounds):
    made = made_for(name, prediction, shape, samples, rounds)
    (want, slope), (got, gradient) = both(made, images(2, shape))
    close(got, want, 1e-5)
    close(gradient, slope, 1e-5)
    assert slope.norm() > 0
    (want, slope), (got, gradient) = both(made.double(), images(2, shape, torch.float64))
    close(got, want, 1e-10)
    close(gradient, slope, 1e-10)


def test_the_published_settings_are_those_of_their_papers():
    """In float64, a few steps of each recipe's process give the images that the formulas give."""
    for made in RECIPES.values():
        process = made.process()
        starts, steps = tuple(t for t, _ in process.rounds[::3]), None if process.solver == "one_shot" else 6
        process = replace(process, t_star=starts, steps=steps)
        purifier = made.defence(Tiny(), Linear(3 * 32 * 32), process=process, samples=2).double()
        (want, slope), (got, gradient) = both(purifier, images(2, (3, 32, 32), torch.float64))
        close(got, want, 1e-10)
        close(gradient, slope, 1e-10)


def test_it_reaches_the_weights_of_a_released_denoiser():
    made = made_for("ddpm", "noise", (3, 8, 12), 2, 2).double()
    made.denoiser.requires_grad_(True)
    weights, results = list(made.denoiser.parameters()), []
    for made.keep in (None, *KEEPS):
        run = partial(textbook, made) if made.keep is None else made.purify
        with made.fixed_noise(SEED):
            x = images(2, dtype=torch.float64).requires_grad_()
            results.append(torch.autograd.grad(run(x).square().sum(), [x, *weights]))
    for gradients in results[1:]:
        for want, got in zip(results[0], gradients, strict=True):
            close(got, want, 1e-10)


@pytest.mark.parametrize("name", ["ddpm", "vp_sde", "ddpm, learned"])
def test_parts_and_orders_of_a_batch_change_nothing(name):
    """Split and permuted batches have split and permuted logits and gradients; so have chunks of any size."""
    made = made_for(name, "noise", (3, 8, 12), 2, 2)
    x, order = images(5), torch.tensor([4, 2, 0, 1, 3])

    def run(x):
        return logits_and_gradient(made, x, SEED)

    logits, gradient = run(x)
    for one, other in (
        (run(x[order]), (logits[order], gradient[order])),
        ([torch.cat(pair) for pair in zip(run(x[:2]), run(x[2:]), strict=True)], (logits, gradient)),
    ):
        for got, want in zip(one, other, strict=True):
            close(got, want, 1e-5)
    for made.max_forward_batch, made.keep in ((1, 0), (3, 2), (3, "auto"), (100, 0)):
        for got, want in zip(run(x), (logits, gradient), strict=True):
            close(got, want, 1e-5)
