"""The purifier as a module: noise, modes, copies, files, other people's denoisers."""

import json
import types

import pytest
import torch
from denoisers import Tiny, defence, images, logits_and_gradient
from small_models import Made
from torch import nn

import purify_fast
from purify_fast.attacks import frozen
from purify_fast.defences import MajorityVote
from purify_fast.methods.diffusion import DiffusionPurifier, Process, Schedule
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
