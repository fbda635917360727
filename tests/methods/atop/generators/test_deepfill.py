"""DeepFillv2's generator: its published tensors, every layer against the published table, each image's own mask."""

import copy
import hashlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import purify_fast.methods.atop.generators.deepfill as module
from purify_fast.methods.atop.generators.deepfill import DeepFillGenerator, GatedConv
from purify_fast.models.layers import Conv2d
from purify_fast.ops.contextual_attention import contextual_attention, key_validity


def parameters(part):
    return sum(p.numel() for p in part.parameters())


def pack(image, mask):
    return torch.cat([image * (1 - mask), torch.ones_like(mask), mask], 1)


def blocks(height, width, *missing, side=32):
    """A mask [1, 1, H, W] with blocks (row, column) missing."""
    mask = torch.zeros(1, 1, height, width)
    for row, column in missing:
        mask[..., side * row : side * (row + 1), side * column : side * (column + 1)] = 1
    return mask


def example(batch, height, width, channels=3, seed=0, side=8):
    """(packed, mask), each image with blocks of its own missing."""
    generator = torch.Generator().manual_seed(seed)
    image = 2 * torch.rand(batch, channels, height, width, generator=generator) - 1
    small = (torch.rand(batch, 1, height // side, width // side, generator=generator) < 0.25).float()
    mask = F.interpolate(small, scale_factor=side)
    return pack(image, mask), mask


def lively(generator):
    """Weights that keep the signal's size from layer to layer: the published start lets it fade to 1e-7."""
    for layer in generator.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=2.2 / layer.weight[0].numel() ** 0.5)
            nn.init.normal_(layer.bias, std=0.1)
    return generator


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return lively(DeepFillGenerator(width=8))


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return DeepFillGenerator()


def test_fact_6_parameters(full):
    counts = parameters(full), parameters(full.stage1), parameters(full.stage2)
    assert counts == (4_052_478, 1_631_151, 2_421_327)


def test_names_and_shapes_are_the_official_ones(full):
    names = sorted((name, tuple(tensor.shape)) for name, tensor in full.state_dict().items())
    assert len(names) == 85
    digest = hashlib.sha256(repr(names).encode()).hexdigest()
    assert digest == "9af154d76fbc98f81dcf433d63db91be721cd9e1d18911bcaf7213859e36846d"


def test_weights_start_by_fan_out_and_biases_at_zero(full):
    for layer in full.modules():
        if isinstance(layer, GatedConv):
            weight = layer.conv.weight
            bound = (6 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5  # kaiming: sqrt(2) sqrt(3 / fan_out)
            assert 0.95 * bound < weight.abs().max() <= bound
    assert all((p == 0).all() for name, p in full.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("size", [32, 256])
def test_fact_6_shapes_and_range(size):
    torch.manual_seed(0)
    full = lively(DeepFillGenerator())
    with torch.no_grad():
        for image in full(*example(1, size, size)):
            assert image.shape == (1, 3, size, size) and image.abs().max() <= 1 and image.std() > 0.01


@pytest.mark.parametrize("size", [32, 256])
def test_compiled_as_one_graph_forward_and_backward(size):
    """Inductor would take minutes for its forty layers; the ops' own tests have it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    generator = lively(DeepFillGenerator(width=4))
    packed, mask = example(1, size, size)
    leaves, results = [packed.requires_grad_(), *generator.parameters()], []
    for call in (generator, torch.compile(generator, fullgraph=True, backend="aot_eager")):
        images = call(packed, mask)
        loss = sum(image.square().mean() for image in images)
        results.append([*images, *torch.autograd.grad(loss, leaves)])
    for value, same in zip(*results, strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(same, value, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("a", "b", "relu", "want"),
    [(1.0, 1.0, False, 0.7310586), (-1.0, 0.0, False, -0.3160603), (1.0, 1.0, True, 0.7310586), (-1.0, 0.0, True, 0.0)],
)
def test_fact_7_the_gated_unit(a, b, relu, want):
    layer = GatedConv(1, 1, relu=relu)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.copy_(torch.tensor([a, b]))
    out = layer(torch.ones(1, 1, 2, 2))
    assert out.shape == (1, 1, 2, 2)
    torch.testing.assert_close(out, torch.full_like(out, want), rtol=0, atol=2e-7)


def test_fact_8_each_image_has_the_keys_of_its_own_mask(tiny, monkeypatch):
    seen = []

    def spy(features, valid, *rest):
        seen.append(valid)
        return contextual_attention(features, valid, *rest)

    monkeypatch.setattr(module, "contextual_attention", spy)
    corner = [(row, column) for row in range(4) for column in range(4)]
    mask = torch.cat([blocks(256, 256, *missing) for missing in (corner, [(0, 0)], [(1, 1)], [])])
    with torch.no_grad():
        DeepFillGenerator(width=4)(pack(torch.zeros(4, 3, 256, 256), mask), mask)
    assert len(seen) == 1 and seen[0].sum(1).tolist() == [735, 999, 988, 1024]


def published_stage(state, x, rows):
    """Layers of the published table: (name, stride, dilation, activation), "up" for a pixel fourfold first."""
    for name, stride, dilation, activation in rows:
        if activation == "up":
            x = F.interpolate(x, scale_factor=2)
        weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
        kernel = weight.shape[-1]
        x = F.conv2d(x, weight, bias, stride, dilation * (kernel - 1) // 2, dilation)
        if activation == "tanh":
            return x.tanh()
        a, b = x.split(x.shape[1] // 2, 1)
        x = (a.relu() if activation == "relu" else F.elu(a)) * b.sigmoid()
    return x


def down(name):
    return [(f"{name}.conv1_downsample", 2, 1, "elu"), (f"{name}.conv2", 1, 1, "elu")]


def end(stage):
    ups = [
        row
        for block in ("up_block1", "up_block2")
        for row in [(f"{stage}.{block}.conv1_upsample.conv", 1, 1, "up"), (f"{stage}.{block}.conv2", 1, 1, "elu")]
    ]
    return [(f"{stage}.{name}", 1, 1, "elu") for name in ("conv_bn6", "conv_bn7")] + [
        *ups,
        (f"{stage}.conv_to_rgb", 1, 1, "tanh"),
    ]


def dilated(prefix):
    return [(f"{prefix}_bn{i + 1}", 1, dilation, "elu") for i, dilation in enumerate((1, 2, 4, 8, 16))]


@torch.no_grad()
def published(state, packed, mask):
    rows = [("stage1.conv1", 1, 1, "elu"), *down("stage1.down_block1"), *down("stage1.down_block2")]
    coarse = published_stage(state, packed, rows + dilated("stage1.conv") + end("stage1"))
    x = coarse * mask + packed[:, :3] * (1 - mask)
    rows = [("stage2.conv_conv1", 1, 1, "elu"), *down("stage2.conv_down_block1"), *down("stage2.conv_down_block2")]
    one = published_stage(state, x, rows + dilated("stage2.conv_conv"))
    rows = [("stage2.ca_conv1", 1, 1, "elu"), *down("stage2.ca_down_block1"), *down("stage2.ca_down_block2")]
    two = published_stage(state, x, [*rows, ("stage2.ca_conv_bn1", 1, 1, "relu")])
    h, w = mask.shape[2:]
    two = contextual_attention(two, key_validity(mask, (h // 8, w // 8)))
    two = published_stage(state, two, [(f"stage2.ca_conv_bn{i}", 1, 1, "elu") for i in (4, 5)])
    return coarse, published_stage(state, torch.cat([one, two], 1), end("stage2"))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 72)])
def test_every_layer_is_the_published_one(tiny, height, width):
    made = copy.deepcopy(tiny).double()  # in float32 the attention makes much of rounding
    packed, mask = (tensor.double() for tensor in example(2, height, width))
    with torch.no_grad():
        images = made(packed, mask)
    for image, want in zip(images, published(made.state_dict(), packed, mask), strict=True):
        assert image.shape == (2, 3, height, width)
        torch.testing.assert_close(image, want, rtol=1e-9, atol=1e-12)


def test_a_batch_of_different_masks_equals_separate_calls(tiny):
    made = copy.deepcopy(tiny).double()
    packed, mask = (tensor.double() for tensor in example(3, 64, 64))
    mask[1] = 0
    packed = pack(packed[:, :3], mask)
    with torch.no_grad():
        together = made(packed, mask)
        apart = [made(packed[i : i + 1], mask[i : i + 1]) for i in range(3)]
        shared = made(packed, mask[:1].expand(3, -1, -1, -1))
    for image, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(image, torch.cat(parts), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(together[1][1], shared[1][1], atol=1e-3)


def test_training_and_evaluation_mode_are_one_function(tiny):
    packed, mask = example(1, 32, 32)
    with torch.no_grad():
        trained, evaluated = tiny.train()(packed, mask), tiny.eval()(packed, mask)
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))


def test_every_parameter_and_the_input_get_finite_gradients():
    torch.manual_seed(0)
    generator = lively(DeepFillGenerator(width=8))
    packed, mask = example(2, 64, 64)
    packed.requires_grad_()
    coarse, refined = generator(packed, mask)
    (coarse.square().sum() + refined.square().sum()).backward()
    for name, p in generator.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert packed.grad.isfinite().all() and packed.grad.abs().amax((0, 2, 3)).min() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_inside_stays_close(tiny, layout):
    packed, mask = example(2, 64, 64)
    made = copy.deepcopy(tiny).to(memory_format=layout)
    with torch.no_grad():
        want = tiny(packed, mask)
        # in float64: by the CPU's kernels float32 is sometimes beside it by more than would tell an error from rounding
        truth = copy.deepcopy(tiny).double()(packed.double(), mask.double())
        plain = copy.deepcopy(made).double()(packed.double().contiguous(memory_format=layout), mask.double())
        with torch.autocast("cpu", torch.bfloat16):
            rough = made(packed.contiguous(memory_format=layout), mask)
    for image, exact, same, close in zip(want, truth, plain, rough, strict=True):
        torch.testing.assert_close(same, exact, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(image, exact, rtol=1e-3, atol=1e-4, check_dtype=False)
        assert close.isfinite().all() and (close - image).abs().mean() < 0.02 * image.std() + 0.002


@pytest.mark.parametrize("size", [(8, 8), (8, 24)])
def test_the_smallest_images(tiny, size):
    packed, mask = example(1, *size)
    assert all(image.shape == (1, 3, *size) and image.isfinite().all() for image in tiny(packed, mask))


def test_grey_images():
    packed, mask = example(2, 16, 16, channels=1)
    generator = DeepFillGenerator(3, 8)
    assert generator.arguments == {"in_channels": 3, "width": 8}
    assert all(image.shape == (2, 1, 16, 16) for image in generator(packed, mask))


@pytest.mark.parametrize(
    ("packed", "mask", "message"),
    [
        ((1, 5, 30, 32), (1, 1, 30, 32), r"multiples of 8, got packed \[1, 5, 30, 32\]"),
        ((1, 4, 32, 32), (1, 1, 32, 32), r"packed must be floating point \[B, 5, H, W\], got .*\[1, 4, 32, 32\]"),
        ((2, 5, 32, 32), (1, 1, 32, 32), r"mask must be \[2, 1, 32, 32\] .* got \[1, 1, 32, 32\]"),
        ((1, 5, 32, 32), (1, 1, 4, 4), r"mask must be \[1, 1, 32, 32\] .* got \[1, 1, 4, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tiny, packed, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny(torch.zeros(packed), torch.zeros(mask))


@pytest.mark.parametrize("arguments", [(2, 48), (5, 6), (5, 0)])
def test_sizes_that_do_not_fit_are_refused(arguments):
    with pytest.raises(ValueError, match=r"need in_channels >= 3 and width a multiple of 4"):
        DeepFillGenerator(*arguments)


def test_no_layer_normalises_or_drops(full):
    leaves = {type(layer) for layer in full.modules() if not list(layer.children())}
    assert leaves == {Conv2d, module._Attention}
