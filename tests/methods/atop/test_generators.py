"""The networks that repair images: published tensors and layers, each image's own mask, finite gradients, refusals.
The tests of the defence follow."""

import hashlib
from functools import partial

import pytest
import torch
from evaluating import evaluate
from small_models import Made, atop, images, lively
from small_runs import same
from torch import nn
from torch.nn import functional as F

import purify_fast
import purify_fast.methods.atop.generators as module
from purify_fast.attacks import PGD, BpdaModel
from purify_fast.evaluation import AttackSpec
from purify_fast.methods.atop import Atop, AtopConfig, AtopTask
from purify_fast.methods.atop.defence import PurifierAdapter, build_purifier
from purify_fast.methods.atop.generators import CONSTANT, FIRST, KEPT, DeepFillGenerator, GatedConv, SmallGenerator
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops.contextual_attention import contextual_attention, key_validity
from purify_fast.training import Batch


def pack(image, mask):
    return torch.cat([image * (1 - mask), torch.ones_like(mask), mask], 1)


def example(batch, channels, height, width, side=4):
    """(packed, mask), each image with blocks of its own missing."""
    generator = torch.Generator().manual_seed(0)
    image = 2 * torch.rand(batch, channels, height, width, generator=generator) - 1
    small = (torch.rand(batch, 1, height // side, width // side, generator=generator) < 0.25).float()
    mask = F.interpolate(small, scale_factor=side)
    return pack(image, mask), mask


def deepfill(channels=3, width=8):
    torch.manual_seed(0)
    return lively(DeepFillGenerator(channels + 2, width), 2.2)


def small(channels=1, **options):
    """One whose corrections are not zero."""
    torch.manual_seed(0)
    made = SmallGenerator(channels, **options)
    for head in (made.coarse.to_image, made.refined.to_image):
        nn.init.normal_(head.conv.weight, std=0.1)
    return made


#: Each network, channels and size of its images, and blocks that are hidden.
NETWORKS = {
    "deepfill": (deepfill, 3, 64, 8),
    "small": (small, 1, 28, 4),
    "residual": (lambda: small(residual=True), 1, 28, 4),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    make, channels, size, side = NETWORKS[request.param]
    return make(), lambda batch: example(batch, channels, size, size, side)


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return DeepFillGenerator()


def test_a_batch_of_different_masks_equals_separate_calls_in_either_mode(network):
    model, examples = network
    model = model.double()  # in float32 the attention makes much of rounding
    packed, mask = (tensor.double() for tensor in examples(3))
    assert len(set(mask.sum((1, 2, 3)).tolist())) > 1
    with torch.no_grad():
        together = model.train()(packed, mask)
        model.eval()
        apart = [model(packed[i : i + 1], mask[i : i + 1]) for i in range(3)]
    for image, parts in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(image, torch.cat(parts), rtol=1e-6, atol=1e-9)


def test_every_parameter_and_the_input_get_finite_gradients(network):
    model, examples = network
    packed, mask = examples(2)
    packed.requires_grad_()
    sum(image.square().sum() + image.sum() for image in model(packed, mask)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    assert packed.grad.isfinite().all() and packed.grad[:, :-2].abs().amax((0, 2, 3)).min() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_inside_stays_close(network, layout):
    model, examples = network
    packed, mask = examples(2)
    with torch.no_grad():
        want = model(packed, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.to(memory_format=layout)(packed.contiguous(memory_format=layout), mask)
    for image, close in zip(want, rough, strict=True):
        assert close.isfinite().all() and (close - image).abs().mean() < 0.03 * image.std() + 0.002


SHAPES = [(deepfill, 3, 8, 24), (lambda: deepfill(1), 1, 16, 16)]
for _options in ({"attention": False}, {"residual": True}):
    SHAPES += [(partial(small, c, width=4, **_options), c, h, w) for c, h, w in ((1, 28, 28), (3, 16, 24), (2, 4, 8))]


@pytest.mark.parametrize(("make", "channels", "height", "width"), SHAPES)
def test_images_of_every_shape_keep_it_and_their_range(make, channels, height, width):
    with torch.no_grad():
        for image in make()(*example(2, channels, height, width)):
            assert image.shape == (2, channels, height, width) and image.isfinite().all() and image.abs().max() <= 1


def test_sizes_that_do_not_fit_are_refused():
    for make, sizes, message in (
        (DeepFillGenerator, (2, 48), "in_channels must be at least 3 .* got 2 and 48"),
        (DeepFillGenerator, (5, 6), "width a multiple of 4, got 5 and 6"),
        (SmallGenerator, (0,), "channels must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*sizes)


def test_fact_6_the_published_tensors(full):
    counts = [sum(p.numel() for p in part.parameters()) for part in (full, full.stage1, full.stage2)]
    assert counts == [4_052_478, 1_631_151, 2_421_327]
    names = sorted((name, tuple(tensor.shape)) for name, tensor in full.state_dict().items())
    digest = hashlib.sha256(repr(names).encode()).hexdigest()
    assert len(names) == 85 and digest == "9af154d76fbc98f81dcf433d63db91be721cd9e1d18911bcaf7213859e36846d"
    leaves = {type(layer) for layer in full.modules() if not list(layer.children())}
    assert leaves == {nn.Conv2d, module._Attention, nn.Upsample}  # nothing normalizes or drops


def test_weights_start_by_fan_out_and_biases_at_zero(full):
    for layer in full.modules():
        if isinstance(layer, GatedConv):
            weight = layer.conv.weight
            bound = (6 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5  # kaiming: sqrt(2) sqrt(3 / fan_out)
            assert 0.95 * bound < weight.abs().max() <= bound
    assert all((p == 0).all() for name, p in full.named_parameters() if name.endswith("bias"))


def published_stage(state, x, rows):
    """Layers of the published table: (name, stride, dilation, activation), "up" for a pixel fourfold first."""
    for name, stride, dilation, activation in rows:
        if activation == "up":
            x = F.interpolate(x, scale_factor=2)
        weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
        x = F.conv2d(x, weight, bias, stride, dilation * (weight.shape[-1] - 1) // 2, dilation)
        if activation == "tanh":
            return x.tanh()
        a, b = x.split(x.shape[1] // 2, 1)
        x = (a.relu() if activation == "relu" else F.elu(a)) * b.sigmoid()
    return x


def down(name):
    return [(f"{name}.conv1_downsample", 2, 1, "elu"), (f"{name}.conv2", 1, 1, "elu")]


def end(stage):
    rows = [(f"{stage}.{name}", 1, 1, "elu") for name in ("conv_bn6", "conv_bn7")]
    for block in ("up_block1", "up_block2"):
        rows += [(f"{stage}.{block}.conv1_upsample.conv", 1, 1, "up"), (f"{stage}.{block}.conv2", 1, 1, "elu")]
    return [*rows, (f"{stage}.conv_to_rgb", 1, 1, "tanh")]


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
def test_every_layer_is_the_published_one(height, width):
    made = deepfill().double()  # in float32 the attention makes much of rounding
    packed, mask = (tensor.double() for tensor in example(2, 3, height, width, 8))
    with torch.no_grad():
        images = made(packed, mask)
    for image, want in zip(images, published(made.state_dict(), packed, mask), strict=True):
        assert image.shape == (2, 3, height, width)
        torch.testing.assert_close(image, want, rtol=1e-9, atol=1e-12)


def test_a_fresh_residual_generator_gives_its_input_back():
    packed, mask = example(2, 1, 16, 16)
    coarse, refined = SmallGenerator(1, residual=True)(packed, mask)
    torch.testing.assert_close(coarse, KEPT * packed[:, :1])
    torch.testing.assert_close(refined, KEPT**2 * packed[:, :1])


@pytest.mark.parametrize("residual", [True, False])
def test_saturated_pixels_have_a_gradient(residual):
    made = small(residual=residual)
    packed, mask = example(1, 1, 16, 16)
    packed[:, :1] = packed[:, :1].sign()
    packed.requires_grad_()
    made(packed, mask)[1].square().sum().backward()
    assert packed.grad.isfinite().all() and (packed.grad[:, :1] != 0).float().mean() > 0.99


def test_attention_reads_kept_cells_only():
    """Behind the attention, a key that is not valid counts nothing: all hidden, it gives zeros."""
    made = small().refined.attention
    features = torch.randn(2, 16, 8, 8)
    mask = torch.ones(2, 1, 16, 16)
    mask[1, :, :4, :4] = 0
    none, one = (made.after(torch.zeros(1, 16, 8, 8)), made(features, mask))
    torch.testing.assert_close(one[:1], none)
    assert not torch.allclose(one[1:], none, atol=1e-3)


# -- deepFillv2 checkpoints: read under the official names, and what happens with files that do not fit ----------------
@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(1)
    made = DeepFillGenerator(width=8)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return made


STATES = [
    lambda state: state,  # the state dict alone
    lambda state: {"G": state, "D": {"weight": torch.ones(2)}, "G_optim": {"state": {0: {"step": 1}}}, "n_iter": 7},
    lambda state: {"G": {f"module.{name}": tensor for name, tensor in state.items()}},
    lambda state: {"G": {name: tensor for name, tensor in state.items() if name != CONSTANT}},
]


@pytest.mark.parametrize("change", STATES)
def test_ways_to_hold_it(generator, tmp_path, change):
    torch.save(change(generator.state_dict()), tmp_path / "states.pth")
    loaded = DeepFillGenerator.from_official(tmp_path / "states.pth")
    assert same(loaded, generator) and loaded.arguments == generator.arguments and not loaded.training


UNFIT_STATES = [
    (lambda s: s.pop("stage1.conv_bn3.conv.bias"), r"is not .*: stage1\.conv_bn3\.conv\.bias is missing$"),
    (lambda s: s.update({"stage2.conv_bn7.conv.bias": torch.zeros(3)}), r"bias is \[3\], must be \[32\]$"),
    (lambda s: s.update(extra=3), "has no state dict"),
    (lambda s: s.pop(FIRST), "must hold a generator of deepfillv2-pytorch, got the tensors stage1"),
]


@pytest.mark.parametrize(("change", "message"), UNFIT_STATES)
def test_states_that_do_not_fit_are_named_with_their_tensors(generator, tmp_path, change, message):
    state = dict(generator.state_dict())
    change(state)
    torch.save({"G": state}, tmp_path / "states.pth")
    with pytest.raises(ValueError, match=message):
        DeepFillGenerator.from_official(tmp_path / "states.pth")


# -- one interface to every purifier, a user's own included ------------------------------------------------------------
def packed(batch=2, channels=3, size=16):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, :4] = 1
    image = 2 * torch.rand(batch, channels, size, size, generator=generator) - 1
    return torch.cat([image * (1 - mask), torch.ones_like(mask), mask], 1)


def of(function):
    """A user's module that returns what ``function`` makes of (transformed, mask)."""
    return Made(lambda self, transformed, mask: function(transformed, mask))


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


NO_PURIFIERS = [
    (lambda t, m: t[:, :1], r"a finite floating-point tensor \[2, 3, 16, 16\], .* got \[\[2, 1, 16, 16\]\]"),
    (lambda t, m: t / 0, "must return a finite floating-point tensor"),
]


@pytest.mark.parametrize(("function", "message"), NO_PURIFIERS)
def test_modules_that_are_no_purifiers_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        PurifierAdapter(of(function), (3, 16, 16))


# -- the defence -------------------------------------------------------------------------------------------------------
# AToP's defence: the transforms as it uses them, aggregation, gradients, files.


def identity():
    """A purifier of a user's own: what it is given."""
    return Made(lambda self, image, mask: self.gain * image, gain=nn.Parameter(torch.ones(())))


def defence(*parts, **options):
    return atop(*parts, **options).eval()


@pytest.mark.parametrize("transform", ["rt1", "rt2"])
def test_what_reaches_the_classifier(transform):
    """Nothing is pasted back: of the identity, hidden blocks are mid-grey, the rest is what it was, noise and all."""
    made, x = defence(identity(), transform=transform, sigma=0.1), images()
    with made.fixed_noise(3):
        packed, owners = made.draw(x)
        purified = made.purify(x)
    hidden = packed[:, -1:] > 0
    assert purified.shape == (6, 1, 1, 16, 16) and hidden.float().mean() == 0.25
    assert (owners.flatten(2).sum(2) == 4).all() and (purified[:, 0][hidden] == 0.5).all()
    kept, original = purified[:, 0][~hidden], x[~hidden]
    assert torch.equal(kept, original) if transform == "rt1" else 0.05 < (kept - original).std() < 0.1


def test_rt3_takes_each_block_from_the_pass_that_did_not_see_it():
    # the hole light, the rest dark
    painter = Made(lambda self, image, mask: torch.where(mask > 0, 0.5, -0.5).expand_as(image))
    made = defence(painter, transform="rt3", num_passes=4, samples=2)
    assert (made.purify(images()) == 0.75).all() and made.purify(images()).shape == (6, 2, 1, 16, 16)
    packed, _ = made.draw(images())
    assert len(packed) == 2 * 6 * 4 and torch.equal(packed[:, -1].view(12, 4, 16, 16).sum(1), torch.ones(12, 16, 16))


def test_shared_masks_are_one_for_the_batch():
    shared, own = defence(shared_mask=True), defence()
    masks = shared.draw(images())[1][0]
    assert (masks == masks[:1]).all()
    masks = own.draw(images())[1][0]
    assert not (masks == masks[:1]).all()


@pytest.mark.parametrize(("transform", "aggregation"), [("rt2", "mean"), ("rt3", "mean_softmax")])
def test_gradients_are_exact(transform, aggregation):
    """Finite differences of a whole defence in float64; its logits are float32, so the last step is done here too."""
    made = defence(lively(SmallGenerator(1, 2), 3), transform=transform, sigma=0.05, samples=2, aggregation=aggregation)
    made.double().requires_grad_(False)
    x = (0.3 + 0.4 * images(2).double()).requires_grad_()  # the noise reaches no end of [0, 1]

    def whole(x):
        logits = made.classifier(made.purify(x).flatten(0, 1)).unflatten(0, (2, 2))
        return logits.mean(1) if aggregation == "mean" else torch.log_softmax(logits, -1).exp().mean(1).log()

    with made.fixed_noise(5):
        assert torch.autograd.gradcheck(whole, x, eps=1e-6, atol=1e-9, rtol=1e-5, fast_mode=True)
        exact = torch.autograd.grad(torch.log_softmax(whole(x), -1)[:, 3].sum(), x)[0]
        got = torch.autograd.grad(torch.log_softmax(made(x), -1)[:, 3].sum(), x)[0]
    assert exact.abs().max() > 1e-4
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_saved_and_read_back(tmp_path):
    purifier = SmallGenerator(1, 2)
    made = defence(purifier, samples=2, transform="rt3", aggregation="mean_softmax")
    made.save(tmp_path)
    with pytest.raises(FileNotFoundError, match="classifier must be given"):
        purify_fast.load_defence(tmp_path)
    loaded = purify_fast.load_defence(tmp_path, made.classifier)
    assert isinstance(loaded, Atop) and loaded.arguments == made.arguments and not loaded.training
    with made.fixed_noise(1), loaded.fixed_noise(1):
        assert torch.equal(made(images()), loaded(images()))
    assert purify_fast.load_defence(tmp_path, made.classifier, purifier=purifier).arguments == made.arguments
    with pytest.raises(ValueError, match=r"holds .*, got .*'residual': True"):
        purify_fast.load_defence(tmp_path, made.classifier, purifier=SmallGenerator(1, width=2, residual=True))
    with pytest.raises(ValueError, match="classifier must have the weights"):
        purify_fast.load_defence(tmp_path, SmallCNN(width=4))


class Convolution(nn.Conv2d):
    """A purifier of a user's own, with tensors of several shapes."""

    def forward(self, image, mask):
        return super().forward(image).tanh()


def test_a_purifier_of_ones_own_is_saved_too_but_must_be_given_to_load(tmp_path):
    made = defence(Convolution(1, 1, 3, padding=1))
    made.save(tmp_path)
    with pytest.raises(ValueError, match=r"purifier must be given: .* of a Convolution"):
        purify_fast.load_defence(tmp_path, made.classifier)
    loaded = purify_fast.load_defence(tmp_path, made.classifier, purifier=Convolution(1, 1, 3, padding=1))
    assert torch.equal(loaded.purifier.module.weight, made.purifier.module.weight)
    with pytest.raises(ValueError, match=r"holds {'kind': 'Convolution', .*}, got {'kind': 'small_generator'"):
        purify_fast.load_defence(tmp_path, made.classifier, purifier=SmallGenerator(1, 2))


BLOCKS = [((256, 256), 32), ((32, 32), 4), ((28, 28), 4), ((12, 12), 1), ((30, 40), 5), ((24, 36), 3)]


@pytest.mark.parametrize(("size", "block"), BLOCKS)
def test_the_default_block_tiles_the_image(size, block):
    made = Atop(SmallCNN(1, image_size=size), identity(), (1, *size))
    assert made.block == made.arguments["block"] == block


def test_a_classifier_in_bfloat16_is_attacked_and_trained_with():
    made, y = defence(classifier=SmallCNN(width=4).bfloat16()), torch.arange(4)
    attacks = [AttackSpec(PGD(steps=2), through=other) for other in (BpdaModel.of(made), made.frozen_classifier, None)]
    report = evaluate(made, images(4), y, eps=0.1, attacks=attacks, eot_iter=1, progress=False)
    assert [row.kind for row in report.rows][1:4] == ["pgd"] * 3
    assert BpdaModel.of(made)(images(4)).dtype == torch.float32
    loss, _ = AtopTask(made, AtopConfig(cls_delay=0)).training_step(Batch(images(4), y, torch.arange(4), 0))
    loss.backward()
    assert loss.isfinite() and all(p.grad is None for p in made.classifier.parameters())
