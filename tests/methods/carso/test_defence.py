"""The defence's contract: finite logits, usable gradients, noise the caller can fix, compilation, files."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import purify_fast
from purify_fast import attacks
from purify_fast.methods.carso import Carso, WithAggregation
from purify_fast.models.classifiers import SmallCNN
from purify_fast.ops import aggregate

LAYERS = ["conv1", "conv3", "hidden"]


def defence(samples=8, seed=0, **options):
    torch.manual_seed(seed)
    made = Carso(SmallCNN(), LAYERS, (1, 16, 16), 16, 4, samples, decoder_width=4, **options).eval()
    for module in made.modules():  # statistics a trained purifier would have
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


@pytest.fixture(scope="module")
def carso():
    return defence()


def images(n, seed=1):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_ranges(carso):
    x = images(5)
    assert carso(x).shape == (5, 10) and carso(x).dtype == torch.float32
    assert carso.condition(x).shape == (5, 16)
    reconstructions = carso.reconstruct(x)
    assert reconstructions.shape == (5, 8, 1, 16, 16)
    assert reconstructions.min() > 0 and reconstructions.max() < 1
    assert carso.reconstruct(x, torch.zeros(1, 3, 4)).shape == (5, 3, 1, 16, 16)
    torch.testing.assert_close(carso.predict_proba(x).sum(1), torch.ones(5))


def test_forward_is_logsumexp_and_peel_decides_the_same(carso):
    x = images(6)
    with carso.fixed_noise(3):
        logits = carso.sample_logits(x)
        torch.testing.assert_close(carso(x), torch.logsumexp(logits, 1))
        torch.testing.assert_close(carso.peel(x), aggregate(logits, "peel"))
        assert torch.equal(carso(x).argmax(1), carso.peel(x).argmax(1))
        torch.testing.assert_close(WithAggregation(carso, "mean")(x), logits.mean(1))


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 12, 20)])
def test_other_images_and_classes(classes, shape):
    torch.manual_seed(0)
    classifier = SmallCNN(shape[0], classes, shape[1:], width=4)
    made = Carso(classifier, ["conv2", "head"], shape, 8, 2, 3, decoder_width=2).eval()
    assert made(torch.rand(2, *shape)).shape == (2, classes)
    assert made.reconstruct(torch.rand(2, *shape)).shape == (2, 3, *shape)


# -- the caller's own things stay as they were ------------------------------------------------------------------------


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


def test_forward_changes_neither_input_nor_mode_nor_weights(carso):
    x = images(4)
    before, state = x.clone(), copy.deepcopy(carso.state_dict())
    carso(x)
    with torch.no_grad():
        carso(x)
    with torch.inference_mode():
        carso(x)
    assert torch.equal(x, before) and not x.requires_grad and not carso.training
    assert all(torch.equal(state[k], v) for k, v in carso.state_dict().items())


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_fresh_by_default_and_follows_torch_manual_seed(carso):
    x = images(4)
    assert not torch.equal(carso(x), carso(x))
    torch.manual_seed(5)
    first = carso(x)
    torch.manual_seed(5)
    assert torch.equal(first, carso(x))


def test_fresh_noise_differs_between_images(carso):
    z = carso.prior_latents(3, torch.device("cpu"))
    assert not torch.equal(z[0], z[1]) and not torch.equal(z[0, 0], z[0, 1])


@pytest.mark.parametrize("mode", ["fixed", "deterministic"])
def test_permuting_or_splitting_a_batch_permutes_or_splits_the_logits(carso, mode):
    x = images(33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), carso.fixed_noise(11) if mode == "fixed" else carso.deterministic():
        whole = carso(x)
        torch.testing.assert_close(carso(x[order]), whole[order], rtol=1e-5, atol=1e-5)
        for sizes in ([1] * 33, [2, 30, 1], [17, 16]):
            parts = torch.cat([carso(part) for part in x.split(sizes)])
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_fixed_noise_is_a_function_of_the_seed_nests_and_ends(carso):
    x = images(3)
    with carso.fixed_noise(1):
        one = carso(x)
        with carso.fixed_noise(2):
            two = carso(x)
        assert torch.equal(carso(x), one) and not torch.equal(one, two)
        with carso.deterministic():
            assert carso.reconstruct(x).shape[1] == 1
    assert not torch.equal(carso(x), carso(x))
    with pytest.raises(RuntimeError, match="inside"), carso.fixed_noise(1):
        raise RuntimeError("inside")
    assert carso._noise == "fresh"


# -- errors -----------------------------------------------------------------------------------------------------------


def test_clear_errors(carso):
    for wrong in (torch.rand(2, 3, 16, 16), torch.rand(1, 16, 16), torch.zeros(2, 1, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"x must be floating point \[B, 1, 16, 16\]"):
            carso(wrong)
    with pytest.raises(ValueError, match=r"z must be \[B, K, 4\] with B = 2 or 1"):
        carso.reconstruct(images(2), torch.zeros(2, 3, 5))
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed must be in"), carso.fixed_noise(seed):
            pass
    with pytest.raises(ValueError, match=r"std must be above 0, got \[0\.0\]"):
        Carso(SmallCNN(), ["conv1"], (1, 16, 16), std=0.0)
    for name in ("cond_dim", "latent_dim", "samples", "decoder_width", "encoder_depth"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Carso(SmallCNN(), LAYERS, (1, 16, 16), **{name: 0})


def test_classifiers_and_statistics_that_do_not_fit():
    with pytest.raises(ValueError, match=r"unwrap it \(classifier\.module\)"):
        Carso(nn.DataParallel(SmallCNN()), LAYERS, (1, 16, 16))
    with pytest.raises(ValueError, match=r"unwrap it \(classifier\._orig_mod\)"):
        Carso(torch.compile(SmallCNN()), LAYERS, (1, 16, 16))
    with pytest.raises(ValueError, match="mean needs 1 or 1 numbers, got 3"):
        Carso(SmallCNN(), LAYERS, (1, 16, 16), mean=(0.1, 0.2, 0.3))


def test_each_part_computes_in_its_own_precision(tmp_path):
    torch.manual_seed(0)
    classifier = SmallCNN().bfloat16()
    made = Carso(classifier, LAYERS, (1, 16, 16), 16, 4, 2, decoder_width=4, mean=torch.tensor([0.5])).eval()
    x = images(3).requires_grad_()
    logits = made(x)
    assert logits.dtype == torch.float32 and made.condition(x).dtype == torch.float32
    assert torch.autograd.grad(logits.sum(), x)[0].dtype == torch.float32
    made.save(tmp_path)  # a tensor among the arguments is no obstacle
    assert made.bfloat16()(x).dtype == torch.float32
    assert made.float()(x).dtype == torch.float32 and next(made.classifier.parameters()).dtype == torch.float32


# -- gradients --------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A linear classifier whose top margin is ``margin`` on every image."""

    def __init__(self, margin):
        super().__init__()
        self.body, self.margin = nn.Linear(256, 10), margin

    def forward(self, x):
        logits = self.body(x.flatten(1))
        top = logits.topk(2, 1).values
        gap = (top[:, 0] - top[:, 1])[:, None].detach()
        return logits * self.margin / gap


@pytest.mark.parametrize("samples", [1, 2, 8, 64])
@pytest.mark.parametrize("margin", [1, 5, 20, 80, 100])
def test_logits_are_finite_and_gradients_usable_at_any_margin(samples, margin):
    torch.manual_seed(0)
    made = Carso(Scaled(float(margin)), ["body"], (1, 16, 16), 16, 4, samples, decoder_width=4).eval()
    x = images(6).requires_grad_()
    # every image under one image's purification: a well separated margin, whatever K
    with made.deterministic() if samples == 1 else made.fixed_noise(0):
        logits = made(x)
        y = logits.argmax(1)
        assert torch.isfinite(logits).all()
        for name, loss in attacks.LOSSES.items():
            gradient = torch.autograd.grad(loss(logits, y).sum(), x, retain_graph=True)[0]
            assert torch.isfinite(gradient).all(), name
            if name != "ce" or margin <= 80:
                assert (gradient.flatten(1).abs().amax(1) > 0).all(), name


def test_input_gradients_match_finite_differences():
    made = defence(samples=2).double()
    x = images(2).double().requires_grad_()
    with made.fixed_noise(0):  # sample_logits is float32 at the border, so the check stops before it

        def logits(x):
            return made.classifier(made.reconstruct(x).flatten(0, 1)).unflatten(0, (2, 2)).logsumexp(1)

        torch.autograd.gradcheck(logits, (x,), fast_mode=True, atol=1e-4)


def test_an_attack_leaves_no_weight_gradients_and_restores_the_mode():
    made = defence().train()
    trainable = {name for name, p in made.named_parameters() if p.requires_grad}
    attacks.pgd(made, images(3), torch.tensor([1, 2, 3]), eps=0.1, steps=2, eot_iter=2)
    assert made.training and not made.classifier.training and made.condition_encoder.layers[0].training is not False
    assert {name for name, p in made.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in made.parameters())


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations((1, 7, 64))))
def test_compiled_equals_eager_with_two_graphs(order):
    torch._dynamo.reset()
    made = defence()
    counter = CompileCounterWithBackend("inductor" if order[0] == 1 else "aot_eager")
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for seed in range(4):
            with made.fixed_noise(seed):
                for n in order:
                    assert (compiled(images(n)) - made(images(n))).abs().max() < 1e-4
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compiled_gradients_equal_eager():
    torch._dynamo.reset()
    made = defence().requires_grad_(False)
    compiled = torch.compile(made, fullgraph=True, dynamic=True)
    x, y = images(9).requires_grad_(), torch.arange(9)
    with made.fixed_noise(1):
        got = torch.autograd.grad(nn.functional.cross_entropy(compiled(x), y), x)[0]
        want = torch.autograd.grad(nn.functional.cross_entropy(made(x), y), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


# -- copies and files -------------------------------------------------------------------------------------------------


def test_deepcopy_is_independent(carso):
    twin = copy.deepcopy(carso)
    nn.init.zeros_(twin.classifier.head.weight)
    with carso.fixed_noise(1), twin.fixed_noise(1):
        x = images(2)
        assert not torch.equal(carso(x), twin(x))
        assert torch.equal(carso.reconstruct(x), twin.reconstruct(x))


def test_save_and_load(carso, tmp_path):
    carso.save(tmp_path / "d")
    loaded = purify_fast.load_defence(tmp_path / "d", carso.classifier)
    x = images(4)
    with carso.fixed_noise(1), loaded.fixed_noise(1):
        assert torch.equal(carso(x), loaded(x))
    assert not loaded.training and loaded.arguments == carso.arguments


def test_loading_the_wrong_thing_is_refused(carso, tmp_path):
    carso.save(tmp_path / "d")
    with pytest.raises(ValueError, match="check=False"):
        purify_fast.load_defence(tmp_path / "d", SmallCNN())
    purify_fast.load_defence(tmp_path / "d", SmallCNN(), check=False)
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        purify_fast.load_defence(tmp_path / "nothing", SmallCNN())
    (tmp_path / "d" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="broken"):
        purify_fast.load_defence(tmp_path / "d", carso.classifier)


def test_repr(carso):
    assert "PosteriorEncoder" in repr(carso)
