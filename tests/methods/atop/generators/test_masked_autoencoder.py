"""The masked autoencoder: its encoder sees kept patches only, and its published sizes."""

import pytest
import torch
from torch.nn import functional as F

from purify_fast.methods.atop.generators.masked_autoencoder import VIT_B16, MaskedAutoencoder, sincos_positions

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"width": 16, "depth": 2, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def example(shape=(1, 16, 16), batch=2, side=4, seed=0):
    """(transformed, mask); patches are 4 x 4."""
    channels, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(batch, 1, h // side, w // side, generator=generator) < 0.4).float()
    mask = F.interpolate(hidden, scale_factor=side)
    return (2 * torch.rand(batch, channels, h, w, generator=generator) - 1) * (1 - mask), mask


def made(shape=(1, 16, 16), **options):
    torch.manual_seed(0)
    return MaskedAutoencoder(shape, **{**SMALL, **options})


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 16, 24)])
def test_any_small_image(shape):
    model = MaskedAutoencoder(shape)
    image = model(*example(shape))
    assert image.shape == (2, *shape) and image.isfinite().all() and image.abs().max() <= 1


def test_the_paper_size():
    with torch.device("meta"):
        model = MaskedAutoencoder(**VIT_B16)
    assert model.positions.shape == (196, 768) and model.decoder_positions.shape == (196, 512)
    assert sum(p.numel() for p in model.encoder.parameters()) == 12 * 7_087_872  # ViT-B's blocks
    assert model.to_pixels.out_features == 16 * 16 * 3


def test_positions_are_the_fixed_sines_of_row_and_column():
    positions = sincos_positions((2, 3), 8)
    assert positions.shape == (6, 8)
    row, column = torch.tensor(1.0), torch.tensor(2.0)
    want = [f(x * rate) for x in (row, column) for f in (torch.sin, torch.cos) for rate in (1.0, 0.01)]
    torch.testing.assert_close(positions[1 * 3 + 2], torch.stack(want))


def test_encoding_equals_that_of_the_kept_patches_alone():
    model = made()
    transformed, mask = example(batch=1)
    seen = []
    model.to_decoder.register_forward_hook(lambda module, args, output: seen.append(output))
    model(transformed, mask)
    kept = [i for i in range(16) if mask[0, 0, 4 * (i // 4), 4 * (i % 4)] == 0]
    assert 0 < len(kept) < 16
    both = torch.cat([transformed, mask], 1)[0]
    patches = [both[:, 4 * (i // 4) :, 4 * (i % 4) :][:, :4, :4].flatten() for i in kept]
    x = model.embed(torch.stack(patches)) + model.positions[kept]
    x = torch.cat([model.class_token[0], x])[None]
    for block in model.encoder:
        x = block(x, None)
    want = model.to_decoder(model.norm(x))
    torch.testing.assert_close(seen[0][:, [0, *(i + 1 for i in kept)]], want, rtol=1e-4, atol=1e-6)


def test_pixels_come_back_where_they_were():
    """With the transformer out of the way: a patch's prediction lands on that patch."""
    model = made((2, 8, 12))
    with torch.no_grad():
        model.to_pixels.weight.zero_()
        bias = torch.linspace(-1, 1, 32)
        model.to_pixels.bias.copy_(bias)
    image = model(*example((2, 8, 12), batch=1))
    for row in range(2):
        for column in range(3):
            patch = image[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(patch.flatten(), bias.tanh())


def test_hidden_pixels_are_not_read_but_parts_of_patches_are():
    model = made()
    transformed, mask = example()
    torch.testing.assert_close(model(transformed + mask, mask), model(transformed, mask))
    half = torch.zeros(1, 1, 16, 16)
    half[..., :2, :4] = 1  # half a patch
    image = transformed[:1] * (1 - half)
    other = image.clone()
    other[..., 3, 0] += 0.5
    assert not torch.allclose(model(image, half), model(other, half), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_kept_and_all_hidden(value):
    model = made()
    image = model(torch.zeros(2, 1, 16, 16), torch.full((2, 1, 16, 16), value))
    assert image.isfinite().all()
    torch.testing.assert_close(image[0], image[1])


def test_a_batch_of_different_masks_equals_separate_calls_in_either_mode():
    model = made()
    transformed, mask = example(batch=3)
    assert len(set(mask.sum((1, 2, 3)).tolist())) > 1  # other counts of patches
    together = model.train()(transformed, mask)
    model.eval()
    with torch.no_grad():
        apart = torch.cat([model(transformed[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_every_parameter_and_every_kept_pixel_get_finite_gradients():
    model = made()
    transformed, mask = example()
    transformed.requires_grad_()
    image = model(transformed, mask)
    model.original_loss((image,), torch.ones_like(image)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert transformed.grad.isfinite().all()
    assert torch.equal(transformed.grad != 0, mask == 0)


def test_its_loss_is_the_mean_square_over_all_patches():
    image, target = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    target[1, 0, 0, 0] = 2
    loss = MaskedAutoencoder.original_loss(None, (torch.ones_like(image), image), target)
    assert loss.tolist() == [0, 0.25]


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    model = made()
    transformed, mask = example()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(transformed, mask), model(transformed, mask), rtol=1e-4, atol=1e-6)


def test_bfloat16_inside_stays_close():
    model = MaskedAutoencoder((3, 32, 32))
    transformed, mask = example((3, 32, 32))
    with torch.no_grad():
        want = model(transformed, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(transformed, mask)
    assert (rough - want).abs().mean() < 0.03 * want.std()


def test_arguments_build_it_again():
    model = made((2, 8, 12))
    again = MaskedAutoencoder(**model.arguments)
    again.load_state_dict(model.state_dict())
    x = example((2, 8, 12))
    assert torch.equal(again(*x), model(*x))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 18, 16), {}, r"H and W as multiples of patch .* got image_shape \(1, 18, 16\)"),
        ((1, 16, 16), {"width": 10}, r"width must be a multiple of 4 and of its 2 heads, got 10"),
        ((1, 16, 16), {"decoder_heads": 3}, r"decoder_width must be a multiple of 4 and of its 3 heads, got 8"),
        ((1, 16, 16), {"depth": 0}, r"every size >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAutoencoder(shape, **{**SMALL, **options})


@pytest.mark.parametrize(("image", "mask"), [((2, 1, 16, 20), (2, 1, 16, 20)), ((2, 1, 16, 16), (1, 1, 16, 16))])
def test_inputs_that_do_not_fit_are_refused(image, mask):
    with pytest.raises(ValueError, match=r"need transformed \[B, 1, 16, 16\] and mask \[B, 1, 16, 16\], got"):
        made()(torch.zeros(image), torch.zeros(mask))
