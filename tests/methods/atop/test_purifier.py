"""One interface to every purifier, a user's own included."""

import pytest
import torch
from small_models import Made
from torch import nn

from purify_fast.methods.atop.defence import PURIFIERS, PurifierAdapter, build_purifier
from purify_fast.methods.atop.generators import SmallGenerator


def packed(batch=2, channels=3, size=16):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, :4] = 1
    image = 2 * torch.rand(batch, channels, size, size, generator=generator) - 1
    return torch.cat([image * (1 - mask), torch.ones_like(mask), mask], 1)


def of(function):
    """A user's module that returns what ``function`` makes of (transformed, mask)."""
    return Made(lambda self, transformed, mask: function(transformed, mask))


@pytest.mark.parametrize("name", PURIFIERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_network_by_its_name(name, channels):
    torch.manual_seed(0)
    module = build_purifier(name, channels, width=8)
    assert type(module) is PURIFIERS[name] and type(module)(**module.arguments).arguments == module.arguments
    x = packed(channels=channels)
    images = PurifierAdapter(module, (channels, 16, 16))(x)
    assert len(images) == 2
    assert all(image.shape == (2, channels, 16, 16) and image.abs().max() <= 1 for image in images)
    assert all(torch.equal(a, b) for a, b in zip(images, module(x, x[:, channels + 1 :]), strict=True))


def test_defaults_and_refusals():
    assert build_purifier("small_generator", 1).arguments == SmallGenerator(1).arguments
    assert build_purifier("small_generator", 1, residual=True).arguments["residual"]
    with pytest.raises(ValueError, match="residual needs purifier small_generator, got deepfill"):
        build_purifier("deepfill", 3, residual=True)


def test_a_users_module_gets_transformed_images_and_masks():
    how = lambda self, transformed, mask: transformed + self.colour * mask  # noqa: E731
    module = Made(how, colour=nn.Parameter(torch.tensor(0.5)))
    x = packed()
    (image,) = PurifierAdapter(module, (3, 16, 16))(x)
    assert torch.equal(image, x[:, :3] + 0.5 * x[:, 4:])
    image.sum().backward()
    assert module.colour.grad == 2 * 3 * 4 * 16


def test_a_users_two_stage_module():
    x = packed()
    lists = PurifierAdapter(of(lambda t, m: [t, t * (1 - m)]), (3, 16, 16))(x)
    assert isinstance(lists, tuple) and torch.equal(lists[0], x[:, :3])
    whole = of(lambda p, m: p[:, :3] * p[:, 3:4])
    whole.takes_packed = True
    assert torch.equal(PurifierAdapter(whole, (3, 16, 16))(x)[0], x[:, :3])


def test_the_dry_run_leaves_modes_and_statistics_alone():
    module = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "fixed": nn.BatchNorm2d(3).eval()})
    module.forward = lambda t, m: module["norm"](t)
    purifier = PurifierAdapter(module, (3, 16, 16))
    assert module["norm"].training and not module["fixed"].training and purifier.module is module
    assert module["norm"].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t, m: t[:, :1], r"a finite floating-point tensor \[2, 3, 16, 16\], .* got \[\[2, 1, 16, 16\]\]"),
        (lambda t, m: t / 0, "must return a finite floating-point tensor"),
    ],
)
def test_modules_that_are_no_purifiers_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        PurifierAdapter(of(function), (3, 16, 16))
