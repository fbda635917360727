"""The exact gradient against plain autograd through the whole process, written out as in the papers. The tests of
attacks on a purifier follow."""

import itertools
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from denoisers import Tiny, defence, images, logits_and_gradient
from evaluating import evaluate
from small_models import Linear, Purifying

from purify_fast.attacks import APGD, BpdaModel, LeavingPGD
from purify_fast.attacks.base import ThreatModel
from purify_fast.evaluation import lee_kim_2023
from purify_fast.judge.request.deadline import Subject
from purify_fast.judge.request.preparation import LEE_KIM, PROTOCOLS, protocol_attacks, strong_attacks
from purify_fast.judge.surrogates.copies import Softened, surrogates
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


# -- attacks -----------------------------------------------------------------------------------------------------------
# Attacks on a purifier by diffusion: exact gradients, surrogates and ways to predict.

SHAPE = (1, 8, 8)
QUIET = {"eps": 0.1, "progress": False, "batch_size": 4}
BALL = ThreatModel("linf", 0.1)


def gradient(model, x, seed=1):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]


def test_published_attacks_follow_exact_gradients():
    made, x = defence(SHAPE, process=Process(steps=2), samples=2), images(3, SHAPE)
    with torch.no_grad():
        y = made(x).argmax(1)
    subject = Subject(made, x, y, batch_size=3, n_eval=2, seed=0)
    lee_kim = replace(lee_kim_2023(0.1), attack=replace(lee_kim_2023(0.1).attack, steps=3))
    report = evaluate(made, x, y, **QUIET, steps=2, attacks=[lee_kim, *PROTOCOLS["rand"](subject, BALL)])
    for row in report.rows[1:3]:
        assert row.health["gradients"] > 0 and row.health["zero"] == row.health["nonfinite"] == 0, row.attack


class Rounds(Tiny):
    """A denoiser whose prediction is rounded."""

    def forward(self, x, t):
        return (4 * super().forward(x, t)).round() / 4


def test_softened_copies_reach_into_the_denoiser():
    made, x = defence(SHAPE, Rounds(1), Process(steps=3)), images(3, SHAPE)
    hard, soft = (gradient(model, x) for model in (made, Softened(made, 10.0)))
    # through the process alone, and through the denoiser too
    assert (hard - soft).norm() > 0.01 * hard.norm()
    assert "a straight-through copy" in [name for name, _ in surrogates(made, x, 10, BALL)[0]]


def test_a_denoiser_that_draws_draws_the_same_again():
    class Drops(Tiny):
        def forward(self, x, t):
            return torch.nn.functional.dropout(x, 0.3)

    made, x = defence(SHAPE, Drops(1), Process(solver="ddim", steps=3, clip=False)).double(), images(3, SHAPE).double()
    leaf, ahead = x.clone().requires_grad_(), torch.randn_like(x)

    def purified(z):
        torch.manual_seed(1)
        with made.fixed_noise(0):
            return made.purify(z).square().sum()

    (found,) = torch.autograd.grad(purified(leaf), leaf)
    change = (purified(x + 1e-4 * ahead) - purified(x - 1e-4 * ahead)) / 2e-4
    torch.testing.assert_close((found * ahead).sum(), change.detach())


def test_skipped_gradients_leave_values_as_they_are():
    made, x = defence(SHAPE, process=Process(t_star=0.3, steps=6)), images(4, SHAPE)
    ((_, few), (name, skips), _) = made.attack_surrogates()
    assert name == "a process whose denoiser has a gradient at every step in 4"
    for model, same in ((skips, True), (few, False)):
        torch.manual_seed(1)
        logits = made(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), logits) == same and not torch.allclose(gradient(model, x), gradient(made, x))
    skips.followed = [True] * len(skips.begins)
    assert torch.equal(gradient(skips, x), gradient(made, x))
    # without any gradient of the denoiser a step of DDIM is linear in the state
    ddim = made.with_process(Process(solver="ddim", t_star=0.3, steps=6, clip=False))
    ddim.followed = [False] * len(ddim.begins)
    torch.testing.assert_close(gradient(ddim, x), gradient(BpdaModel.of(ddim), x), rtol=1e-4, atol=1e-7)


def test_one_step_has_no_shorter_form():
    assert defence(SHAPE, process=Process(solver="one_shot")).attack_surrogates() == []
    names = [name for name, _ in defence(SHAPE, process=Process(steps=3)).attack_surrogates()]
    assert names == ["a process whose denoiser has a gradient at every step in 4", "one step in place of its process"]


def test_strong_tries_them_by_itself():
    made, x = defence(SHAPE, process=Process(steps=5)), images(2, SHAPE)
    names = [name for name, _ in surrogates(made, x, 10, BALL)[0]]
    wanted = {"classifier alone", "a copy without noise", "a copy with fixed noise", "a process of fewer steps"}
    wanted |= {"a copy whose purifier is the identity backward", "one step in place of its process"}
    assert wanted | {"a process whose denoiser has a gradient at every step in 4"} <= set(names)


def test_strong_adds_what_the_field_attacks_such_purifiers_with():
    made, x = defence(SHAPE, process=Process(steps=2)), images(2, SHAPE)
    subject = Subject(made, x, torch.zeros(2, dtype=torch.int64), batch_size=2, n_eval=2, seed=0)
    specs = {spec.label: spec for spec in protocol_attacks("strong", subject, BALL)}
    lee_kim = next(spec for label, spec in specs.items() if label and label.startswith(LEE_KIM))
    assert isinstance(lee_kim.attack, LeavingPGD) and lee_kim.survivors_only
    published = lee_kim_2023(0.1).attack
    assert all(getattr(lee_kim.attack, name) == value for name, value in asdict(published).items())
    # steps of 0.007 are those of L-inf
    assert strong_attacks(made, "l2", 0.5) == []
    # other models are attacked as before
    with torch.no_grad():
        alone = Subject(made.classifier, x, made.classifier(x).argmax(1), batch_size=2, n_eval=2, seed=0)
    labels = {spec.label for spec in protocol_attacks("strong", alone, BALL)}
    assert lee_kim.label not in labels


def test_a_defence_names_attacks_of_its_own():
    class Own(torch.nn.Identity):
        def strong_attacks(self, norm, eps):
            return [APGD(), *self.others]

    own = Own()
    own.others = []
    assert [spec.attack for spec in strong_attacks(own, "linf", 0.1)] == [APGD()]
    own.others = ["APGD"]
    with pytest.raises(TypeError, match="APGD"):
        strong_attacks(own, "linf", 0.1)


@pytest.mark.parametrize(("noise", "norm", "expected"), [(0.1, "linf", True), (0.0, "linf", False), (0.1, "l2", False)])
def test_strong_adds_lee_and_kims_attack_for_any_random_purifier(noise, norm, expected):
    """Also for somebody's own."""
    x, y = images(2, SHAPE), torch.zeros(2, dtype=torch.int64)
    own = Purifying(defence(SHAPE).classifier, lambda z: z + noise * torch.randn_like(z)).eval()
    subject = Subject(own, x, y, batch_size=2, n_eval=2, seed=0)
    labels = [spec.label or "" for spec in protocol_attacks("strong", subject, ThreatModel(norm, 0.1))]
    assert any(label.startswith(LEE_KIM) for label in labels) == expected
