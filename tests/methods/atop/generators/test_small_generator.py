"""The generator for small images: any of their sizes, cheap, and able to repair."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from purify_fast.methods.atop.generators.small_generator import KEPT, SmallGenerator
from purify_fast.ops import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


def example(batch, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = 2 * torch.rand(batch, channels, height, width, generator=generator) - 1
    hidden = (torch.rand(batch, 1, height // 4, width // 4, generator=generator) < 0.25).float()
    mask = F.interpolate(hidden, scale_factor=4)
    return torch.cat([image * (1 - mask), torch.ones_like(mask), mask], 1), mask


def trained(**options):
    """One whose corrections are not zero."""
    torch.manual_seed(0)
    made = SmallGenerator(**options)
    for head in (made.coarse.to_image, made.refined.to_image):
        torch.nn.init.normal_(head.conv.weight, std=0.1)
    return made


SIZES = [(1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 16, 24), (2, 4, 8)]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("channels", "height", "width"), SIZES)
def test_any_small_image(channels, height, width, attention, residual):
    made = trained(channels=channels, width=4, attention=attention, residual=residual)
    images = made(*example(2, channels, height, width))
    assert len(images) == 2 and made.channels == channels
    for image in images:
        assert image.shape == (2, channels, height, width) and image.abs().max() <= 1 and image.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "size", "attention", "mflop"),
    [
        (1, 16, True, 9.7),
        (1, 28, True, 30.0),
        (3, 32, True, 41.6),
        (1, 16, False, 7.9),
        (1, 28, False, 24.2),
        (3, 32, False, 33.9),
    ],
)
def test_its_cost_is_the_stated_one(channels, size, attention, mflop):
    packed, mask = example(1, channels, size, size)
    with use_backend("reference"), FlopCounterMode(display=False) as counter, torch.no_grad():
        SmallGenerator(channels, attention=attention)(packed, mask)
    assert counter.get_total_flops() / 1e6 == pytest.approx(mflop, abs=0.05)


def test_a_fresh_residual_generator_gives_its_input_back():
    packed, mask = example(2, 1, 16, 16)
    coarse, refined = SmallGenerator(1, residual=True)(packed, mask)
    torch.testing.assert_close(coarse, KEPT * packed[:, :1])
    torch.testing.assert_close(refined, KEPT**2 * packed[:, :1])


@pytest.mark.parametrize("residual", [True, False])
def test_saturated_pixels_have_a_gradient(residual):
    made = trained(channels=1, residual=residual)
    packed, mask = example(1, 1, 16, 16)
    packed[:, :1] = packed[:, :1].sign()
    packed.requires_grad_()
    made(packed, mask)[1].square().sum().backward()
    assert packed.grad.isfinite().all() and (packed.grad[:, :1] != 0).float().mean() > 0.99


@pytest.mark.parametrize("residual", [True, False])
def test_every_parameter_gets_a_finite_gradient(residual):
    made = trained(channels=3, residual=residual)
    packed, mask = example(4, 3, 32, 32)
    coarse, refined = made(packed, mask)
    (coarse.square().sum() + refined.square().sum()).backward()
    for name, p in made.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_a_batch_of_different_masks_equals_separate_calls_in_either_mode():
    made = trained(channels=1)
    packed, mask = example(3, 1, 28, 28)
    together = made.train()(packed, mask)
    made.eval()
    apart = [made(packed[i : i + 1], mask[i : i + 1]) for i in range(3)]
    for image, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(image, torch.cat(parts), rtol=1e-4, atol=1e-6)


def test_attention_reads_kept_cells_only():
    """Behind the attention, a key that is not valid counts nothing: all hidden, it gives zeros."""
    made = trained(channels=1).refined.attention
    features = torch.randn(2, 16, 8, 8)
    mask = torch.ones(2, 1, 16, 16)
    mask[1, :, :4, :4] = 0
    none, one = (made.after(torch.zeros(1, 16, 8, 8)), made(features, mask))
    torch.testing.assert_close(one[:1], none)
    assert not torch.allclose(one[1:], none, atol=1e-3)


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    made = trained(channels=1)
    packed, mask = example(2, 1, 16, 16)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for image, same in zip(made(packed, mask), compiled(packed, mask), strict=True):
        torch.testing.assert_close(same, image, rtol=1e-4, atol=1e-6)


def test_bfloat16_and_channels_last_inside_stay_close():
    made = trained(channels=3)
    packed, mask = example(4, 3, 32, 32)
    last = copy.deepcopy(made).to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = made(packed, mask)[1]
        with torch.autocast("cpu", torch.bfloat16):
            rough = last(packed.contiguous(memory_format=torch.channels_last), mask)[1]
    assert (rough - want).abs().mean() < 0.02 * want.std()


@pytest.mark.parametrize("residual", [True, False])
def test_it_learns_to_repair(residual):
    """Gratings, noisy and a quarter hidden: soon nearer to the clean ones than what it is given, hidden or not."""
    torch.manual_seed(0)
    made = SmallGenerator(1, residual=residual)
    optimiser = torch.optim.Adam(made.parameters(), 3e-3)
    grid = torch.arange(16) / 16

    def batch(count):
        a, b, phase = (4 * torch.rand(3, count, 1, 1) - 2).unbind()
        clean = torch.sin(6.28 * (a * grid[:, None] + b * grid) + phase)[:, None] * 0.9
        mask = F.interpolate((torch.rand(count, 1, 4, 4) < 0.25).float(), scale_factor=4)
        noisy = (clean + 0.5 * torch.randn_like(clean)).clamp(-1, 1) * (1 - mask)
        return clean, torch.cat([noisy, torch.ones_like(mask), mask], 1), mask

    for _ in range(80):
        clean, packed, mask = batch(16)
        loss = sum((image - clean).abs().mean() for image in made(packed, mask))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    clean, packed, mask = batch(64)
    with torch.no_grad():
        error = (made(packed, mask)[1] - clean).abs()
    before = (packed[:, :1] - clean).abs()
    for part in (mask, 1 - mask):
        assert (error * part).sum() < 0.8 * (before * part).sum()


@pytest.mark.parametrize(
    ("packed", "message"),
    [((1, 3, 30, 32), r"multiples of 4, got packed \[1, 3, 30, 32\]"), ((1, 5, 32, 32), r"\[B, 3, H, W\], got")],
)
def test_inputs_that_do_not_fit_are_refused(packed, message):
    with pytest.raises(ValueError, match=message):
        SmallGenerator(1)(torch.zeros(packed), torch.zeros(1, 1, *packed[2:]))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need channels, width >= 1, got 0 and 8"):
        SmallGenerator(0)
