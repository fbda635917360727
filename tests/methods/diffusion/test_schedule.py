"""Schedules and solvers against the formulas of their papers, in float64, step by step."""

import math

import pytest
import torch

from purify_fast.methods.diffusion import Process, Schedule
from purify_fast.methods.diffusion.schedule import END

pytestmark = pytest.mark.usefixtures("one_thread")
T, EPS = torch.tensor, 1e-12


def step(schedule, solver, t, s, x, m, z, **options):
    """One step by the table, with the noise z."""
    process = Process(schedule, solver=solver, **{"clip": False, **options})
    rows, _ = process.denoising(T([t, s, 0.0], dtype=torch.float64))
    p, q, c, a, b, d, low, high = rows[0]
    m, v = (m[:1], m[1:]) if process.variance == "learned" else (m, None)
    if v is not None:
        d = d * torch.exp(((1 + v) / 2 * high + (1 - v) / 2 * low) / 2)
    return a * (p * x + q * m).clamp(-c, c) + b * x + d * z


@pytest.fixture
def numbers():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, dtype=torch.float64, generator=generator)


def test_linear_and_cosine_are_those_of_their_papers():
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    kept = math.prod(1 - beta for beta in betas[:300])
    assert Schedule().alpha_bar(T(0.3)).item() == pytest.approx(kept, rel=EPS)
    # fewer steps add as much noise in all
    assert Schedule(steps=500).betas.sum().item() == pytest.approx(Schedule().betas.sum().item(), rel=1e-2)

    def f(t):
        return math.cos(math.pi / 2 * (t + 0.008) / 1.008) ** 2

    cosine = Schedule("cosine", 200)
    assert cosine.alpha_bar(T(0.4)).item() == pytest.approx(f(0.4) / f(0), rel=1e-10)
    assert cosine.betas.max() == 0.999 and cosine.alpha_bar(T(0.0)) == 1


def test_vp_is_that_of_its_paper():
    vp, t = Schedule("vp"), 0.37
    at = T(t, dtype=torch.float64, requires_grad=True)
    assert vp.alpha_bar(at).item() == pytest.approx(math.exp(-0.1 * t - 19.9 * t**2 / 2), rel=EPS)
    assert vp.rate(at).item() == pytest.approx(0.1 + 19.9 * t, rel=EPS)
    # beta(t) is minus the slope of the logarithm of alpha_bar
    assert -torch.autograd.grad(vp.alpha_bar(at).log(), at)[0].item() == pytest.approx(vp.rate(at).item(), rel=1e-10)
    # the discrete schedule is the same process, up to the size of its steps
    assert Schedule().alpha_bar(T(0.5)).item() == pytest.approx(vp.alpha_bar(T(0.5)).item(), rel=2e-2)


def test_times():
    assert torch.equal(1000 * Schedule().times(0.1, 5), T([100.0, 80, 60, 40, 20, 0], dtype=torch.float64))
    assert len(Schedule().times(0.1)) == 101
    continuous = Schedule("vp").times(0.1, 100)
    torch.testing.assert_close(continuous[:-1], T([(100 - i) / 1000 for i in range(100)], dtype=torch.float64))
    assert continuous[-1] == END
    linear, t = Schedule(steps=500), T([0.1, 0.002], dtype=torch.float64)
    assert linear.told(t, "index").tolist() == [49, 0] and linear.told(t, "rescaled").tolist() == [98, 0]
    assert Schedule("vp").told(t, "index").tolist() == [100, 2]
    torch.testing.assert_close(Schedule("vp").told(t, "continuous"), 999 * t)
    # of images in [0, 1] with noise of 1/4, whose process is twice as wide
    at = T(Schedule().time_of(0.25), dtype=torch.float64)
    kept = Schedule().alpha_bar(torch.stack([at, at - 0.001]))
    first, before = ((1 - kept) / kept).sqrt().tolist()
    assert before < 0.5 <= first


def test_ddpm(numbers):
    """Equations 6 and 7 of Ho et al., by the names of the paper."""
    x, m, z = numbers
    betas = Schedule().betas
    i = 40
    beta, alpha, bar = betas[i], 1 - betas[i], (1 - betas)[: i + 1].prod()
    bar_before = bar / alpha
    x0 = (x - (1 - bar).sqrt() * m) / bar.sqrt()
    mean = bar_before.sqrt() * beta / (1 - bar) * x0 + alpha.sqrt() * (1 - bar_before) / (1 - bar) * x
    small = (1 - bar_before) / (1 - bar) * beta
    at, before = (i + 1) / 1000, i / 1000
    for variance, value in (("small", small), ("large", beta)):
        got = step(Schedule(), "ddpm", at, before, x, m, z, variance=variance)
        torch.testing.assert_close(got, mean + value.sqrt() * z, rtol=1e-10, atol=EPS)
    # the mean in terms of the noise, equation 11
    torch.testing.assert_close(mean, (x - beta / (1 - bar).sqrt() * m) / alpha.sqrt(), rtol=1e-10, atol=EPS)
    learned = step(Schedule(), "ddpm", at, before, x, torch.cat([m, T([0.2]).double()]), z, variance="learned")
    deviation = torch.exp(0.5 * (0.6 * beta.log() + 0.4 * small.log()))
    torch.testing.assert_close(learned, mean + deviation * z, rtol=1e-10, atol=EPS)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(numbers, eta):
    """Equations 12 and 16 of Song et al. over a jump of several steps; with eta = 1 it is ddpm."""
    x, m, z = numbers
    kept, kept_s = Schedule().alpha_bar(T([0.06, 0.02]))
    sigma = eta * ((1 - kept_s) / (1 - kept)).sqrt() * (1 - kept / kept_s).sqrt()
    want = kept_s.sqrt() * (x - (1 - kept).sqrt() * m) / kept.sqrt() + (1 - kept_s - sigma**2).sqrt() * m + sigma * z
    torch.testing.assert_close(step(Schedule(), "ddim", 0.06, 0.02, x, m, z, eta=eta), want, rtol=1e-10, atol=EPS)
    if eta == 1:
        torch.testing.assert_close(step(Schedule(), "ddpm", 0.06, 0.02, x, m, z), want, rtol=1e-10, atol=EPS)


def test_the_sde_and_its_probability_flow(numbers):
    """One step backwards of dx = (f - g^2 score) dt + g dw, f = -beta x / 2, and half of the score without noise."""
    x, m, z = numbers
    t, s = 0.1, 0.099
    vp, beta = Schedule("vp"), 0.1 + 19.9 * t
    score = -m / (1 - vp.alpha_bar(T(t, dtype=torch.float64))).sqrt()
    dt = t - s
    want = x + (beta * x / 2 + beta * score) * dt + math.sqrt(beta * dt) * z
    torch.testing.assert_close(step(vp, "vp_sde", t, s, x, m, z), want, rtol=1e-10, atol=EPS)
    want = x + (beta * x / 2 + beta * score / 2) * dt
    torch.testing.assert_close(step(vp, "ode", t, s, x, m, z), want, rtol=1e-10, atol=EPS)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "vp_sde", "ode", "one_shot"])
def test_every_solver_finds_the_image_that_the_prediction_is_of(solver):
    """A denoiser that knows the image, in each of its three languages, ends at the image."""
    schedule = Schedule("vp") if solver in ("vp_sde", "ode") else Schedule()
    start, image, noise = 0.2, T([0.3], dtype=torch.float64), T([-1.1], dtype=torch.float64)
    times = schedule.times(start, 1 if solver == "one_shot" else 200)
    ends = []
    for prediction in ("noise", "x0", "v"):
        rows, _ = Process(schedule, prediction, solver=solver, clip=False).denoising(times)
        alpha, sigma = schedule.noising(times[:1])[0, 4:6]
        x = alpha * image + sigma * noise
        for t, (p, q, _, a, b, *_) in zip(times[:-1], rows, strict=True):
            alpha, sigma = schedule.noising(t)[4:6]
            z = (x - alpha * image) / sigma
            m = {"noise": z, "x0": image, "v": alpha * z - sigma * image}[prediction]
            x = a * (p * x + q * m) + b * x
        ends.append(x)
    torch.testing.assert_close(ends[0], image, rtol=0, atol=5e-2 if solver in ("vp_sde", "ode") else 1e-8)
    torch.testing.assert_close(torch.stack(ends), ends[0].expand(3, 1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_step_is_that_of_the_schedulers_of_diffusers(kind, prediction, numbers):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed", exc_type=ImportError)
    x, m, _ = (number.float() for number in numbers)
    betas = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[kind]
    of = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction]
    options = {"beta_schedule": betas, "beta_start": 1e-4, "prediction_type": of, "clip_sample": True}
    scheduler = diffusers.DDIMScheduler(**options)
    scheduler.set_timesteps(50)
    for index in (19, 79, 599):
        want = scheduler.step(m, index, x, use_clipped_model_output=True).prev_sample
        # a jump of 20 steps, the last one to the image
        t, s = (index + 1) / 1000, (index + 1 - 20) / 1000
        got = step(Schedule(kind), "ddim", t, s, x.double(), m.double(), 0, prediction=prediction, clip=True)
        torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)


REFUSED = {
    "t_star must be in (0, 1] and at least 1 / 1000, got 1e-05": {"t_star": 1e-5},
    "steps must be at most 100": {"steps": 101},
    "over all rounds must be at most 32768, got 45005": {"t_star": (0.1,) * 5, "steps": 9000, "schedule": "vp"},
    "as many as t_star has": {"t_star": (0.1, 0.2), "steps": (3,)},
    "steps must be 1 or None for the solver one_shot, got 2": {"solver": "one_shot", "steps": 2},
    "eta must be 0 for the solver ddpm": {"eta": 0.5},
    "guidance needs a solver that adds noise, got 'ode'": {"solver": "ode", "guidance": "mse"},
    "kind must be one of linear, cosine, vp, got 'vpsde'": {"schedule": "vpsde"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_process_refuses(message):
    with pytest.raises(ValueError) as caught:
        Process(**REFUSED[message])
    assert message in str(caught.value)


def test_what_a_schedule_is_and_refuses():
    for kind in ("linear", "cosine", "vp"):
        assert Process(schedule=kind) == Process(schedule=Schedule(kind))
        assert Process(schedule=kind).table()[0].times.equal(Process(schedule=Schedule(kind)).table()[0].times)
    with pytest.raises(ValueError, match=r"steps must be one number, .* for \(\)"):
        Process(t_star=())
    with pytest.raises(ValueError, match=r"last_beta must be below 0.01, got 0.02"):
        Schedule(steps=10)
    with pytest.raises(ValueError, match=r"sigma must be above 0 and at most \d.*, got 1000000"):
        Schedule().time_of(1e6)
