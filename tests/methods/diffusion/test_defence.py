"""The purifier as a module: noise, modes, copies, files, other people's denoisers. The tests of schedules follow."""

import json
import math
import types

import pytest
import torch
from denoisers import Tiny, defence, images, logits_and_gradient, trained_unet
from safetensors.torch import save_file
from small_models import Made
from torch import nn

import purify_fast
from purify_fast.attacks import frozen
from purify_fast.defences import MajorityVote
from purify_fast.methods.diffusion import RECIPES, DiffusionPurifier, Process, Schedule, load_denoiser, save_denoiser
from purify_fast.methods.diffusion.process import END
from purify_fast.models.classifiers import SmallCNN

FEW = Process(steps=3)


def nothing():
    return Made(lambda self, x, t: torch.zeros_like(x))


def test_every_addition_of_noise_has_its_own():
    """Draws, samples, rounds and images differ; under fixed noise every image has the same draws."""
    process = Process(solver="one_shot", prediction="noise", clip=False, t_star=(0.1, 0.1))
    made = defence(denoiser=nothing(), process=process, samples=3)
    x = torch.full((2, 3, 8, 12), 0.5)
    with made.fixed_noise(0):
        fixed = made.purify(x)
    assert torch.equal(fixed[0], fixed[1])
    # what is left of two additions of noise, of one and the same it would be a multiple
    flat = made.purify(x, draws=2).flatten(0, 1).flatten(1)
    assert flat.shape == (12, 288)
    assert (torch.corrcoef(flat) - torch.eye(12)).abs().max() < 0.3
    deviation = (2 * flat).std().item()
    kept = Schedule().alpha_bar(torch.tensor(0.1)).item()
    # independent noises add up by their squares
    assert deviation == pytest.approx((2 * (1 / kept - 1)) ** 0.5, rel=0.05)


def test_aggregation():
    x, logits = images(), 3 * torch.randn(4, 5, 10)
    wanted = {"mean": logits.mean(1), "mean_softmax": logits.softmax(-1).mean(1).log(), "lse": logits.logsumexp(1)}
    for name, want in wanted.items():
        torch.testing.assert_close(defence(process=FEW, samples=5, aggregation=name).aggregate(logits), want)
    made, one = (defence(process=FEW, samples=n, aggregation="vote") for n in (5, 1))
    torch.manual_seed(0)
    voted = MajorityVote(one, 5)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(made(x), voted)
    assert logits_and_gradient(made, x)[1].norm() > 0


def test_a_frozen_denoiser_and_a_released_one():
    denoiser = Tiny()
    made = defence(denoiser=denoiser, process=FEW)
    assert all(weight.requires_grad for weight in denoiser.parameters())
    assert not any(weight.requires_grad for weight in made.parameters())
    made.denoiser.requires_grad_(True)
    # an attack asks for no gradient of them
    with frozen(made):
        logits_and_gradient(made, images())
    assert all(weight.grad is None for weight in made.denoiser.parameters())


def test_a_frozen_copy_multiplies_in_bfloat16_and_keeps_its_state_in_float32():
    made, x = defence(denoiser=Tiny(width=16), process=FEW, samples=2), images()
    with made.fixed_noise(1):
        plain = made.purify(x)
    _, slope = logits_and_gradient(made, x)
    copied = purify_fast.frozen_copy(made, x, dtype=torch.bfloat16)
    with copied.fixed_noise(1):
        fast = copied.purify(x)
    _, fast_slope = logits_and_gradient(copied, x)
    weight = copied.denoiser.module.first.weight
    assert weight.dtype == torch.bfloat16 and made.denoiser.module.first.weight.dtype == torch.float32
    assert fast.dtype == torch.float32 and 0 < (fast - plain).abs().max() < 0.02
    assert torch.cosine_similarity(slope.flatten(), fast_slope.flatten(), 0) > 0.98
    # the copy follows the weights, in its memory
    memory = weight.data_ptr()
    with torch.no_grad():
        for weight in made.denoiser.parameters():
            weight.mul_(1.5)
    with copied.fixed_noise(1):
        changed = copied.purify(x)
    assert (changed - fast).abs().max() > 0.02 and copied.denoiser.module.first.weight.data_ptr() == memory


def test_a_conversion_does_not_round_the_schedule():
    made, x = defence(process=Process(steps=100), denoiser=Tiny()), images()
    with made.fixed_noise(1):
        want = made.purify(x)
        low = made.to(torch.bfloat16)
        got = low.purify(x)
    assert got.dtype == torch.float32 and (got - want).abs().max() < 0.05
    assert logits_and_gradient(low, x)[1].isfinite().all()


def test_learned_variances_and_objects_with_a_sample():
    class Sample(Tiny):
        def forward(self, x, t):
            return types.SimpleNamespace(sample=super().forward(x, t))

    x = images()
    torch.manual_seed(0)
    twice = Sample(3, 6)
    once = Tiny()
    once.load_state_dict({**twice.state_dict(), "last.weight": twice.last.weight[:3], "last.bias": twice.last.bias[:3]})
    # where variances are not learned, the other channels are not looked at
    want, got = (logits_and_gradient(defence(denoiser=one, process=FEW), x)[0] for one in (once, twice))
    torch.testing.assert_close(got, want)
    learned = defence(denoiser=twice, process=Process(steps=3, variance="learned"))
    assert not torch.allclose(logits_and_gradient(learned, x)[0], want)
    with pytest.raises(ValueError, match=r"variance 'learned'.*6 channels.*got 3"):
        defence(denoiser=once, process=Process(steps=3, variance="learned"))


TOLD = [
    (Schedule(steps=500), None, (torch.int64, [49, 32, 16])),
    (Schedule(steps=500), "rescaled", (torch.float32, [98.0, 64.0, 32.0])),
    (Schedule("vp"), None, (torch.float32, [99.9, 66.6, 33.3])),
    (Schedule("vp"), "index", (torch.int64, [100, 66, 33])),
]


@pytest.mark.parametrize(("schedule", "times", "told"), TOLD)
def test_what_a_denoiser_is_told(schedule, times, told):
    heard = []

    class Listening(Tiny):
        def forward(self, x, t):
            heard.append(t)
            return super().forward(x, t)

    made = defence(process=Process(schedule=schedule, times=times, steps=3), denoiser=Tiny())
    made.denoiser.module = Listening()
    made(images(2))
    assert [t.dtype for t in heard] == [told[0]] * 3 and all(t.shape == (2,) for t in heard)
    assert [t[0].item() for t in heard] == pytest.approx(told[1], rel=1e-5)


def test_a_denoiser_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"denoiser must return \[2, 3, 8, 12\] or \[2, 6, 8, 12\], got \[2, 4"):
        defence(denoiser=Tiny(3, 4))
    with pytest.raises(ValueError, match="denoiser must not be"):
        defence(denoiser=nn.DataParallel(Tiny()))
    with pytest.raises(ValueError, match=r"draws must be at most 32768 .*, got 32769"):
        defence(process=FEW, samples=2).purify(images(), 32769)


def test_draws_follow_the_names_of_images():
    made, x = defence(process=FEW, samples=2), images()
    with made.noise_ids(torch.tensor([7, 8, 9, 3])):
        torch.manual_seed(5)
        named = made.sample_logits(x)
    with made.noise_ids(torch.tensor([3, 9])):
        torch.manual_seed(5)
        torch.testing.assert_close(made.sample_logits(x[[3, 2]]), named[[3, 2]])


def test_another_process_on_the_same_parts():
    made, x = defence(process=FEW, samples=2, aggregation="lse"), images()
    other = made.with_process(Process(solver="one_shot"))
    assert other.samples == 2 and other.aggregation == "lse" and len(other.begins) == 2
    again = other.with_process(FEW)
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    torch.testing.assert_close(logits_and_gradient(again, x), logits_and_gradient(made, x))


UNSUPPORTED = [
    ({"clip_sample_range": 2.0}, "clip_sample_range must be 1, as images are in"),
    ({"variance_type": "learned"}, "variance_type must be one of fixed_small, .*, learned_range, got 'learned'"),
    ({"variance_type": "fixed_large_log"}, "variance_type must be one of"),
]


@pytest.mark.parametrize(("given", "wanted"), UNSUPPORTED)
def test_what_a_folder_of_diffusers_asks_and_is_not_there_is_refused(tmp_path, given, wanted):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=wanted):
        DiffusionPurifier.from_pretrained(tmp_path, SmallCNN(3))


def test_its_files(tmp_path):
    process = Process(t_star=(0.1, 0.05), steps=(3, 2), schedule=Schedule("cosine", 500))
    classifier = SmallCNN(3, image_size=(8, 12), width=4)
    torch.manual_seed(2)
    denoiser = Tiny()
    made = DiffusionPurifier(denoiser, classifier, (3, 8, 12), process, samples=2, aggregation="vote")
    made.save(tmp_path)
    with pytest.raises(ValueError, match=r"purifier must be given: .* of a Tiny"):
        purify_fast.load_defence(tmp_path, classifier)
    again = purify_fast.load_defence(tmp_path, classifier, purifier=Tiny())
    assert again.process == process and again.arguments == made.arguments
    torch.testing.assert_close(logits_and_gradient(again, images()), logits_and_gradient(made, images()))


# -- schedules ---------------------------------------------------------------------------------------------------------
# Schedules against the formulas of their papers; the formulas of the solvers are in test_gradient.py.

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
    # The images are in [0, 1] with noise of 1/4. The process is twice as wide.
    at = T(Schedule().time_of(0.25), dtype=torch.float64)
    kept = Schedule().alpha_bar(torch.stack([at, at - 0.001]))
    first, before = ((1 - kept) / kept).sqrt().tolist()
    assert before < 0.5 <= first


REFUSED = {
    "t_star must be in (0, 1] and at least 1 / 1000, got 1e-05": {"t_star": 1e-5},
    "steps must be at most 100": {"steps": 101},
    "over all rounds must be at most 65536, got 72008": {"t_star": (0.1,) * 8, "steps": 9000, "schedule": "vp"},
    "as many as t_star has": {"t_star": (0.1, 0.2), "steps": (3,)},
    "steps must be 1 or None for the solver one_shot, got 2": {"solver": "one_shot", "steps": 2},
    "eta must be 0 for the solver ddpm": {"eta": 0.5},
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


# -- denoisers with random weights that are read from files ------------------------------------------------------------
class ScoreNetwork(Tiny):
    """As score-SDE's: weights that are not trained, such as Fourier's frequencies, and a buffer of noise levels."""

    def __init__(self, width=6):
        super().__init__(3, width=width)
        self.frequencies = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("sigmas", torch.rand(10))


def checkpoint(path, width=6):
    """A checkpoint of score_sde_pytorch: the network within DataParallel, an optimizer, an average of its weights."""
    torch.manual_seed(1)
    network = ScoreNetwork(width)
    averaged = [torch.randn_like(weight) for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad])
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": averaged}
    model = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({"optimizer": optimizer.state_dict(), "model": model, "ema": ema, "step": 7}, path)
    return network, averaged


def test_a_checkpoint_of_score_sde_gives_its_moving_average(tmp_path):
    saved, averaged = checkpoint(tmp_path / "checkpoint_8.pth")
    torch.manual_seed(2)
    network = load_denoiser(ScoreNetwork(), tmp_path / "checkpoint_8.pth")
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    assert len(trained) == len(averaged) and all(torch.equal(*pair) for pair in zip(trained, averaged, strict=True))
    assert torch.equal(network.frequencies, saved.frequencies) and torch.equal(network.sigmas, saved.sigmas)
    # behind the process that its recipe names
    process = {**vars(RECIPES["diffpure"].process()), "steps": 3}
    made = DiffusionPurifier(network, SmallCNN(3, image_size=(8, 12), width=4), (3, 8, 12), process)
    assert made.process.time_units == "continuous" and made(images()).isfinite().all()
    assert torch.equal(made.denoiser.module.first.weight, averaged[0])


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_state_dict_of_guided_diffusion_has_learned_variances(tmp_path, ending):
    torch.manual_seed(1)
    saved = Tiny(3, 6)
    path = tmp_path / f"256x256_diffusion_uncond.{ending}"
    save_file(saved.state_dict(), path) if ending == "safetensors" else torch.save(saved.state_dict(), path)
    torch.manual_seed(2)
    network = load_denoiser(Tiny(3, 6), path)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in network.state_dict().items())
    process = Process(variance="learned", times="rescaled", t_star=0.15, steps=3)
    made = DiffusionPurifier(network, SmallCNN(3, image_size=(8, 12), width=4), (3, 8, 12), process)
    assert made.denoiser.learns_variances and made(images()).isfinite().all()


def test_files_of_other_networks_are_refused(tmp_path):
    checkpoint(tmp_path / "wide.pth", width=7)
    with pytest.raises(ValueError, match=r"wide.pth.*first.weight"):
        load_denoiser(ScoreNetwork(), tmp_path / "wide.pth")
    _, averaged = checkpoint(tmp_path / "short.pth")
    whole = torch.load(tmp_path / "short.pth", weights_only=True)
    whole["ema"]["shadow_params"] = averaged[:-1]
    torch.save(whole, tmp_path / "short.pth")
    wanted = "moving average of the network's 6 trained parameters; it has 5 tensors"
    with pytest.raises(ValueError, match=wanted):
        load_denoiser(ScoreNetwork(), tmp_path / "short.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_denoiser(Tiny(), tmp_path / "none.pt")


KINDS = {"fixed_large": "large", "learned_range": "learned"}


@pytest.mark.parametrize(("kind", "variance"), KINDS.items())
def test_a_folder_of_diffusers_tells_its_process(tmp_path, kind, variance):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    learned = variance == "learned"
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    sizes |= {"sample_size": 16, "in_channels": 3, "out_channels": 6 if learned else 3}
    network, given = diffusers.UNet2DModel(**blocks, **sizes), {"variance_type": kind}
    given |= {} if learned else {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
    network.save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler(**given).save_pretrained(tmp_path / "scheduler")
    classifier, x = SmallCNN(3, image_size=(16, 16), width=4), images(2, (3, 16, 16))
    made = DiffusionPurifier.from_pretrained(tmp_path, classifier, {"steps": 2}, samples=2)
    schedule = Schedule() if learned else Schedule("cosine")
    assert made.process == Process(schedule, variance=variance, clip=learned, steps=2)
    assert made.image_shape == (3, 16, 16)
    logits, gradient = logits_and_gradient(made, x)
    assert gradient.norm() > 0
    made.save(tmp_path / "saved")
    # a folder that was saved, and the network as it is
    direct = DiffusionPurifier(network, classifier, (3, 16, 16), made.process, samples=2)
    for other in (purify_fast.load_defence(tmp_path / "saved", classifier), direct):
        torch.testing.assert_close(logits_and_gradient(other, x), (logits, gradient))


@pytest.mark.parametrize("kind", ["linear", "vp"])
def test_a_saved_denoiser_is_put_before_a_classifier(kind, tmp_path):
    network = trained_unet(1, 4)
    save_denoiser(network, tmp_path, (1, 8, 8), {"schedule": kind, "prediction": "v"}, last_time=0.5)
    classifier = SmallCNN(image_size=(8, 8), num_classes=2, width=4)
    defence = purify_fast.load_defence(tmp_path, classifier, process={"t_star": 0.3, "steps": 4})
    assert isinstance(defence, DiffusionPurifier) and not defence.training
    assert defence.process == Process(Schedule(kind), "v", t_star=0.3, steps=4)
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in defence.denoiser.module.state_dict().items())
    # saved with its classifier, it keeps what was chosen, until another process is asked for
    defence.save(tmp_path / "whole")
    for folder in (tmp_path, tmp_path / "whole"):
        with pytest.raises(ValueError, match=r"t_star must be at most 0\.5, the last time of the training, got 0\.6"):
            purify_fast.load_defence(folder, classifier, process={"t_star": 0.6})
    assert purify_fast.load_defence(tmp_path / "whole", classifier).process == defence.process
    again = purify_fast.load_defence(tmp_path / "whole", classifier, process={"solver": "one_shot", "steps": None})
    assert (again.process.solver, again.process.t_star, again.process.steps) == ("one_shot", 0.3, None)
