"""Schedules against the formulas of their papers; the formulas of the solvers are in test_gradient.py."""

import math

import pytest
import torch

from purify_fast.methods.diffusion import Process, Schedule
from purify_fast.methods.diffusion.process import END

T, EPS = torch.tensor, 1e-12


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
    assert linear.to_denoiser_units(t, "index").tolist() == [49, 0]
    assert linear.to_denoiser_units(t, "rescaled").tolist() == [98, 0]
    assert Schedule("vp").to_denoiser_units(t, "index").tolist() == [100, 2]
    torch.testing.assert_close(Schedule("vp").to_denoiser_units(t, "continuous"), 999 * t)
    # of images in [0, 1] with noise of 1/4, whose process is twice as wide
    at = T(Schedule().time_of(0.25), dtype=torch.float64)
    kept = Schedule().alpha_bar(torch.stack([at, at - 0.001]))
    first, before = ((1 - kept) / kept).sqrt().tolist()
    assert before < 0.5 <= first


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
