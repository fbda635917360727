"""Carso around other classifiers and images: tokens of a transformer, images that are not square."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import purify_fast
from purify_fast.attacks import pgd
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.methods.carso.networks import Deconvolution, published_decoder
from purify_fast.models.classifiers import SmallCNN, WideResNet
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

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
def defence(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def batch(defence, n=8):
    x = torch.rand(n, *defence.image_shape, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.arange(n) % 4, torch.arange(n), seed=0, epoch=9, epochs=10)


def test_it_trains_and_is_attacked(defence):
    b = batch(defence)
    for config in (CONFIG, CarsoConfig(attack_target="pipeline", attack=TrainingAttack(eps=0.1, steps=1))):
        defence.train()
        defence.zero_grad()
        CarsoTask(defence, config).training_step(b)[0].backward()
        used = ("condition_encoder", "decoder") + (("posterior",) if config is CONFIG else ())
        for name, p in defence.named_parameters():
            if name.startswith(used):
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    defence.eval()
    logits = defence(b.x)
    assert logits.shape == (8, 4) and logits.isfinite().all()
    moved = pgd(defence, b.x, b.y, eps=0.1, steps=2)
    assert ((moved - b.x).flatten(1).abs().amax(1) > 0.01).all()


def test_it_is_saved_and_loaded(defence, tmp_path):
    defence.eval().save(tmp_path)
    loaded = purify_fast.load_defence(tmp_path, defence.classifier)
    x = batch(defence, 2).x
    with torch.no_grad(), defence.fixed_noise(1), loaded.fixed_noise(1):
        assert torch.equal(defence(x), loaded(x))
    assert loaded.arguments == defence.arguments


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
