"""The published systems: their sizes layer by layer, and that they run."""

import hashlib

import pytest
import torch
from torch import nn

from purify_fast.methods.carso.recipes import RECIPES, official_tensors
from purify_fast.models.classifiers import FullyConnected


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def on_meta(name):
    """The whole system, without its memory."""
    with torch.device("meta"):
        return RECIPES[name].defence(RECIPES[name].build_classifier())


@pytest.fixture(scope="module")
def systems():
    return {name: on_meta(name) for name in RECIPES}


@pytest.mark.parametrize(
    ("name", "counts"),
    # fact 2, per map size: (layers, channels, size)
    [
        ("cifar10", [(8, 160, 32), (9, 320, 16), (9, 640, 8)]),
        ("cifar100", [(8, 160, 32), (9, 320, 16), (9, 640, 8)]),
        ("tiny_imagenet", [(8, 160, 64), (9, 320, 32), (9, 640, 16)]),
    ],
)
def test_fact_2_the_26_representation_tensors(systems, name, counts):
    want = [(channels, size, size) for n, channels, size in counts for _ in range(n)]
    shapes = systems[name].representation.shapes
    assert shapes == want and len(shapes) == 26
    total = 9_666_560 if name == "tiny_imagenet" else 2_416_640
    assert sum(c * h * w for c, h, w in shapes) == total
    with torch.device("meta"):
        encoder = systems[name].condition_encoder
        outputs = [layer[:-1](torch.empty(2, *shape)) for layer, shape in zip(encoder.layers, shapes, strict=True)]
    kept = [tuple(out.shape[1:]) for out in outputs]
    if name == "tiny_imagenet":
        assert kept == [(10, 56, 56)] * 8 + [(20, 24, 24)] * 9 + [(40, 8, 8)] * 9
    else:
        assert kept == [(20, 26, 26)] * 8 + [(40, 10, 10)] * 9 + [(80, 2, 2)] * 9
    flat = 377_600 if name == "tiny_imagenet" else 147_040
    assert sum(out[0].numel() for out in outputs) == flat == encoder.joint[0].in_features


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # the posterior encoder's image part, pre-encoders 0, 8 and 25, all, joint, posterior, heads, decoder
        ("cifar10", [846, 151_480, 605_360, 2_420_320, 28_442_960, 75_285_504, 164_096, 33_024, 2_455_107]),
        ("tiny_imagenet", [846, 153_300, 612_600, 2_449_200, 28_782_600, 289_998_336, 737_664, 74_112, 4_914_979]),
    ],
)
def test_fact_3_parameters_of_the_purifiers(systems, name, counts):
    made = systems[name]
    encoder, posterior = made.condition_encoder, made.posterior_encoder
    parts = [posterior.image, *(encoder.layers[i] for i in (0, 8, 25)), encoder.layers, encoder.joint, posterior.joint]
    parts += [nn.ModuleList([posterior.mean, posterior.log_variance]), made.decoder]
    assert [parameters(part) for part in parts] == counts
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == counts[0] + sum(counts[4:])


def test_the_first_version_on_mnist(systems):
    made = systems["mnist_v1"]
    assert made.representation.shapes == [(200,), (80,), (10,)]
    assert made.latent_dim == 64 and made.samples == 4
    assert parameters(made.condition_encoder) == 110_370


@pytest.mark.parametrize(
    ("part", "count", "want"),
    [
        ("repr_compressors", 468, "5c12a84cd70f9bf553713d3d6d9083f02afb0ee95ce498c65bf77af5769427eb"),
        ("repr_fcn_compressor", 6, "35f5d7b74c7e854b8d0e4b6280765f6d290f39dedc2283d3328c70da85141a20"),
        ("decoder", 28, "4a958939e6bc047ceffb423996cc38a4aed602f0f07206234259fcb075ec284b"),
    ],
)
def test_full_size_tensors_have_the_official_names_and_shapes(systems, part, count, want):
    state = official_tensors(systems["cifar10"])[part]
    names = sorted((name, tuple(tensor.shape)) for name, tensor in state.items())
    assert len(names) == count
    assert hashlib.sha256(repr(names).encode()).hexdigest() == want


def test_the_optimizer_is_radam_within_lookahead():
    task = RECIPES["mnist_v1"].task(RECIPES["mnist_v1"].defence(FullyConnected()))
    assert task.optimizer.k == 5 and task.optimizer.alpha == 0.8
    assert isinstance(task.optimizer.inner, torch.optim.RAdam)
