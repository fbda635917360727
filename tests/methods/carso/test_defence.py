"""The defence's contract: finite logits, usable gradients, noise the caller can fix, compilation, files. The tests
of other classifiers and images follow."""

import copy

import pytest
import torch
from small_models import images, with_statistics
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import purify_fast
from purify_fast.attacks import pgd
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask, WithAggregation, networks
from purify_fast.methods.carso.networks import Decoder, Deconvolution, pre_encoder, published_decoder
from purify_fast.models.classifiers import SmallCNN, WideResNet
from purify_fast.ops import aggregate
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

LAYERS = ["conv1", "conv3", "hidden"]


def defence(samples=8, seed=0, **options):
    torch.manual_seed(seed)
    made = Carso(SmallCNN(), LAYERS, (1, 16, 16), 16, 4, samples, decoder_width=4, **options)
    return with_statistics(made).eval()


@pytest.fixture(scope="module")
def carso():
    return defence()


def test_forward_is_logsumexp_and_peel_decides_the_same(carso):
    x = images(6)
    reconstructions = carso.purify(x)
    assert carso.purify(x, z=torch.zeros(1, 3, 4)).shape == (6, 3, 1, 16, 16)
    assert reconstructions.shape == (6, 8, 1, 16, 16) and reconstructions.min() > 0 and reconstructions.max() < 1
    with carso.fixed_noise(3):
        logits = carso.sample_logits(x)
        torch.testing.assert_close(carso(x), torch.logsumexp(logits, 1))
        assert torch.equal(carso(x).argmax(1), aggregate(logits, "peel").argmax(1))
        torch.testing.assert_close(WithAggregation(carso, "mean")(x), logits.mean(1))


def test_the_callers_classifier_is_left_untouched():
    classifier = SmallCNN().train()
    before = copy.deepcopy(classifier.state_dict())
    made = Carso(classifier, LAYERS, (1, 16, 16), 8, 2, 2, decoder_width=2)
    made.train()
    made(images(4)).sum().backward()
    assert classifier.training and all(p.requires_grad and p.grad is None for p in classifier.parameters())
    assert not any(m._forward_hooks for m in classifier.modules())
    assert all(torch.equal(before[k], v) for k, v in classifier.state_dict().items())
    assert not made.classifier.training and not any(p.requires_grad for p in made.classifier.parameters())


def test_fixed_noise_is_a_function_of_the_seed_nests_and_ends(carso):
    x = images(3)
    with carso.fixed_noise(1):
        one = carso(x)
        with carso.fixed_noise(2):
            two = carso(x)
        assert torch.equal(carso(x), one) and not torch.equal(one, two)
        with carso.deterministic():
            assert carso.purify(x).shape[1] == 1
    assert not torch.equal(carso(x), carso(x))
    with pytest.raises(RuntimeError, match="inside"), carso.fixed_noise(1):
        raise RuntimeError("inside")
    assert carso.noise_is_fresh


def test_clear_errors(carso):
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed must be in"), carso.fixed_noise(seed):
            pass
    with pytest.raises(ValueError, match=r"std must be above 0, got \[0\.0\]"):
        Carso(SmallCNN(), ["conv1"], (1, 16, 16), std=0.0)
    with pytest.raises(ValueError, match=r"classifier must not be compiled: give classifier\._orig_mod"):
        Carso(torch.compile(SmallCNN()), LAYERS, (1, 16, 16))


def test_each_part_computes_in_its_own_precision(tmp_path):
    classifier = SmallCNN().bfloat16()
    made = Carso(classifier, LAYERS, (1, 16, 16), 16, 4, 2, decoder_width=4, mean=torch.tensor([0.5])).eval()
    x = images(3).requires_grad_()
    logits = made(x)
    assert logits.dtype == torch.float32 and made.condition(x).dtype == torch.float32
    assert torch.autograd.grad(logits.sum(), x)[0].dtype == torch.float32
    made.save(tmp_path)  # a tensor among the arguments is no obstacle
    assert made.bfloat16()(x).dtype == torch.float32
    assert made.float()(x).dtype == torch.float32 and next(made.classifier.parameters()).dtype == torch.float32


def test_input_gradients_match_finite_differences():
    made = defence(samples=2).double()
    x = images(2).double().requires_grad_()
    with made.fixed_noise(0):  # sample_logits is float32 at the border, so the check stops before it

        def logits(x):
            return made.classifier(made.purify(x).flatten(0, 1)).unflatten(0, (2, 2)).logsumexp(1)

        torch.autograd.gradcheck(logits, (x,), fast_mode=True, atol=1e-4)


def test_another_classifier_is_refused_unless_it_is_meant_and_a_broken_file(carso, tmp_path):
    carso.save(tmp_path)
    torch.manual_seed(1)
    other = SmallCNN()
    with pytest.raises(ValueError, match="check=False"):
        purify_fast.load_defence(tmp_path, other)
    purify_fast.load_defence(tmp_path, other, check=False)
    for change, message in (({"sides": 3}, "sides is no argument of"), ({"purifier": other}, "purifier must be None")):
        with pytest.raises(ValueError, match=message):
            purify_fast.load_defence(tmp_path, carso.classifier, **change)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="holds a model that cannot be loaded"):
        purify_fast.load_defence(tmp_path, carso.classifier)


# -- the networks of CARSO's purifier: published sizes, any image, the first version, a decoder as one op --------------
SHAPES = [(1, 16, 16), (3, 32, 32), (1, 28, 28), (3, 17, 45), (2, 4, 4), (3, 64, 64), (1, 5, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decoder_ends_at_any_image_size(shape):
    decoder = Decoder(6, 10, shape, *networks.decoder_plan(shape, 4)).eval()
    assert decoder(torch.randn(3, 2, 6), torch.randn(3, 10)).shape == (6, *shape)


def test_the_split_adapter_is_the_plain_layer_on_latent_then_condition():
    decoder = Decoder(6, 10, (1, 16, 16), *networks.decoder_plan((1, 16, 16), 4)).eval()
    z, c = torch.randn(3, 2, 6), torch.randn(3, 10)
    both = torch.cat([z, c[:, None].expand(-1, 2, -1)], 2).flatten(0, 1)
    plain = decoder.stack(F.leaky_relu(decoder.adapter(both), 0.2).unflatten(1, decoder.start))
    torch.testing.assert_close(decoder(z, c), plain)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_tokens_are_encoded_one_by_one_and_kept_in_order():
    encoder, size = pre_encoder((5, 12), 3)
    assert size == 5 * 2  # 12 -> 6 -> 3 -> 2
    encoder.eval()
    x = torch.randn(4, 5, 12)
    out = encoder(x)
    assert out.shape == (4, 10)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(encoder(x[:, order]), out.unflatten(1, (5, 2))[:, order].flatten(1))
    encoder.train()(x)  # BatchNorm's statistics: over batch and tokens, per feature
    linear, norm, _ = encoder[1]
    assert norm.running_mean.shape == (6,)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * linear(x).flatten(0, 1).var(0))


# -- other classifiers and images --------------------------------------------------------------------------------------
# Carso around other classifiers and images: tokens of a transformer, images that are not square.

CONFIG = CarsoConfig(attack=TrainingAttack(eps=0.1, steps=2))


def transformer():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 16, "num_classes": 4}
    model = VisionTransformer(image_size=24, patch_size=8, **sizes)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at 0, where no gradient passes
    return model


TRANSFORMER_LAYERS = ["conv_proj", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1.mlp", "encoder.ln"]
WIDE_LAYERS = ["layer.0.block.0.conv_1", "layer.2"]
DECODER = ([6, 4, 6], [{"channels": 3, "kernel": 4}])
CASES = {
    "transformer": lambda: Carso(transformer(), TRANSFORMER_LAYERS, (3, 24, 24), 8, 4, 2, decoder_width=4),
    "wide": lambda: Carso(WideResNet(10, 1, 4), WIDE_LAYERS, (3, 24, 40), 8, 4, 2, decoder_width=4),
    "odd": lambda: Carso(SmallCNN(1, 4, (17, 30), 4), ["conv1", "conv3", "hidden"], (1, 17, 30), 8, 4, 2),
    # sixteen channels, of which the condition keeps two: a 1x1 convolution of one channel before a normalization has a
    # gradient of zero, as its only weight is a scale
    "decoder": lambda: Carso(SmallCNN(3, 4, (8, 12), 16), ["conv2"], (3, 8, 12), 8, 4, 2, decoder=DECODER),
}


@pytest.fixture(params=CASES)
def around(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def batch(around, n=8):
    x = torch.rand(n, *around.image_shape, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 4, torch.arange(n), seed=0, epoch=9, epochs=10)


def test_it_trains_and_is_attacked(around):
    b = batch(around)
    for config in (CONFIG, CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.1, steps=1))):
        around.train()
        around.zero_grad()
        CarsoTask(around, config).training_step(b)[0].backward()
        used = ("condition_encoder", "decoder") + (("posterior",) if config is CONFIG else ())
        for name, p in around.named_parameters():
            if name.startswith(used):
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    around.eval()
    logits = around(b.x)
    assert logits.shape == (8, 4) and logits.isfinite().all()
    assert ((pgd(around, b.x, b.y, eps=0.1, steps=2) - b.x).flatten(1).abs().amax(1) > 0.01).all()


def test_it_is_saved_and_loaded(around, tmp_path):
    around.eval().save(tmp_path)
    loaded = purify_fast.load_defence(tmp_path, around.classifier)
    x = batch(around, 2).x
    with torch.no_grad(), around.fixed_noise(1), loaded.fixed_noise(1):
        assert torch.equal(around(x), loaded(x))
    assert loaded.arguments == around.arguments


def test_a_transformers_tokens_are_read_as_they_are():
    made = CASES["transformer"]()
    assert made.representation.shapes == [(12, 3, 3), (10, 12), (10, 12), (10, 12)]
    x = torch.rand(2, 3, 24, 24)
    tokens = torch.cat([made.classifier.class_token.expand(2, -1, -1), made.classifier._process_input(x)], 1)
    torch.testing.assert_close(made.read(x)[3], made.classifier.encoder(tokens))


def test_forms_and_decoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must return images \(1, 16, 16\), got \(1, 7, 7\)"):
        Carso(SmallCNN(), ["conv1"], (1, 16, 16), decoder=((8, 4, 4), [Deconvolution(1)]))
    with pytest.raises(ValueError, match=r"image_shape must be .* got \(1, 28, 28\)"):
        published_decoder((1, 28, 28))
