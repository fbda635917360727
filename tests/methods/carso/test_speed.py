"""The frozen copy of a defence: the same function within bfloat16's rounding, and the defence itself unchanged."""

import copy
import pickle
import sys

import pytest
import torch
from input_gradients import input_gradient
from small_models import with_statistics
from torch import nn

import purify_fast
from purify_fast.methods.carso import Carso, CarsoConfig, CarsoTask
from purify_fast.training import Batch
from purify_fast.training.config import TrainingAttack

SHAPE = (3, 16, 16)


class Residual(nn.Module):
    """BatchNorm, in-place layers and a shortcut: what the frozen copies have to get right."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8 * 16, 10)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x - self.mean)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.head(nn.functional.avg_pool2d(self.act(y), 4).flatten(1))


def defence(layers=("bn1", "conv2"), samples=4):
    torch.manual_seed(0)
    made = Carso(Residual(), list(layers), SHAPE, 16, 4, samples, decoder_width=4)
    return with_statistics(made, 0.2).eval()


def images(n, seed=1):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def batch(n=32, seed=1):
    labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
    return Batch(images(n, seed), labels, torch.arange(n), 7, 5, 10)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def response(made, x):
    """Logits of the samples and the input gradient of the aggregated cross-entropy."""
    leaf = x.clone().requires_grad_()
    with made.fixed_noise(3):
        loss = nn.functional.cross_entropy(made(leaf), torch.arange(len(x)) % 10)
        return made.sample_logits(x).detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.07)])
def test_the_function_and_gradient_of_the_copy_are_the_plain_ones(dtype, tolerance):
    """Relative L2 distance to the plain defence: 1e-5 folded in float32, 7 % in bfloat16."""
    made, x = defence(), images(8)
    want = response(made, x)
    fast = purify_fast.frozen_copy(made, x, dtype=dtype)
    for got, right in zip(response(fast, x), want, strict=True):
        assert got.dtype == torch.float32 and relative(got, right) < tolerance
    assert type(fast) is Carso and fast.classifier.folded == 2 and str(dtype)[6:] in fast.about
    assert all(torch.equal(a, b) for a, b in zip(response(made, x), want, strict=True))


def test_a_copy_is_neither_saved_nor_trained(tmp_path):
    fast = purify_fast.frozen_copy(defence(), images(3), dtype=torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with pytest.raises(ValueError, match="save the defence itself"):
        fast.save(tmp_path)
    with pytest.raises(ValueError, match="defence must not be a frozen copy"):
        CarsoTask(fast, CarsoConfig())
    with pytest.raises(TypeError, match="frozen copy itself"):
        purify_fast.frozen_copy(fast, images(3))
    with defence().fixed_noise(0) as fixed, pytest.raises(ValueError, match="outside of fixed_noise"):
        purify_fast.frozen_copy(fixed, images(3))
    with pytest.raises(ValueError, match="purifier must be in float32"):
        defence().double().computing_in(torch.bfloat16)


@pytest.mark.parametrize("how", ["counted", "data", "loaded", "statistics"])
def test_a_copy_follows_every_part_of_its_defence(how):
    made, x = defence(), images(4)
    fast = purify_fast.frozen_copy(made, x, dtype=torch.float32)
    whole = nn.ModuleDict({"defence": made})
    for name in ("classifier.head.weight", "classifier.conv2.weight", "condition_encoder", "decoder"):
        part = made.get_submodule(name) if "." not in name else made
        weight = made.get_parameter(name) if "." in name else max(part.parameters(), key=torch.Tensor.numel)
        if how == "statistics":
            norms = [part for part in made.modules() if isinstance(part, nn.BatchNorm2d)]
            for norm in norms:
                norm.running_mean.add_(0.02)
        elif how == "loaded":
            key = next(key for key, value in whole.state_dict().items() if value.data_ptr() == weight.data_ptr())
            whole.load_state_dict({**whole.state_dict(), key: 0.5 * weight})
        elif how == "data":
            weight.data.mul_(0.5)
            fast.update()
        else:
            with torch.no_grad():
                weight.mul_(0.5)
        for got, right in zip(response(fast, x), response(made, x), strict=True):
            assert relative(got, right) < 1e-4


def test_a_forward_of_ones_own_is_what_is_attacked():
    class Opposite(Carso):
        def forward(self, x):
            return -super().forward(x)

    torch.manual_seed(0)
    made, x, y = Opposite(Residual(), ["conv2"], SHAPE, 8, 4, 2, decoder_width=4).eval(), images(3), torch.arange(3)
    with made.fixed_noise(1):
        (one, _), (three, _) = (input_gradient(made, x, y, eot_iter=eot) for eot in (1, 3))
    torch.testing.assert_close(three, 3 * one, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("chunk", [None, 6, 1])
def test_attacks_use_the_draws_and_their_gradient_is_that_of_the_calls(chunk):
    made, x, y = defence(samples=2), images(3), torch.arange(3)
    torch.manual_seed(0)
    with made.fixed_noise(2):  # then both are deterministic
        got, value = input_gradient(made, x, y, eot_iter=4, max_forward_batch=chunk)
        # a bound method has no draws to offer
        want, right = input_gradient(made.forward, x, y, eot_iter=4, max_forward_batch=chunk)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(value, right)
    asked = []
    original = type(made).draw_sample_logits
    made.draw_sample_logits = lambda x, draws: asked.append((len(x), draws)) or original(made, x, draws)
    gradient, _ = input_gradient(made, x, y, eot_iter=4, max_forward_batch=chunk)
    assert torch.isfinite(gradient).all() and (gradient.flatten(1).abs().amax(1) > 0).all()
    # a bounded pass holds all draws of as many images as fit
    assert asked == {None: [(3, 4)], 6: [(1, 4)] * 3, 1: []}[chunk]


@pytest.mark.parametrize("target", ["classifier", "pipeline"])
def test_loss_and_gradients_are_close_to_float32s(target):
    """The loss within 2 %, all weights' gradient within 15 % (relative L2): the adversarial images differ as well."""
    config, found = CarsoConfig(attack_target=target, attack=TrainingAttack(eps=0.1, steps=3), train_samples=2), []
    for precision in ("float32", "bfloat16"):
        made = defence().train()
        torch.manual_seed(4)
        task = CarsoTask(made, CarsoConfig(**{**vars(config), "precision": precision}))
        loss, _ = task.training_step(batch())
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
        assert loss.dtype == gradient.dtype == torch.float32 and torch.isfinite(gradient).all()
        assert all(not p.requires_grad and p.grad is None for p in made.classifier.parameters())
        found.append((loss.detach(), gradient))
    assert relative(found[1][0], found[0][0]) < 0.02 and relative(found[1][1], found[0][1]) < 0.15


@pytest.fixture
def packing(monkeypatch):
    """As where a kernel decodes: the op is served by its reference here. Counts its calls."""
    calls = []
    module = sys.modules["purify_fast.speed.decoding"]
    plain = module.decode_prior
    monkeypatch.setattr(module, "decode_prior", lambda *a, **k: calls.append(k["samples"]) or plain(*a, **k))
    monkeypatch.setattr("purify_fast.methods.carso.defence.kernel_decodes", lambda device: True)
    return calls


def test_a_packed_decoder_computes_the_same(packing):
    made, x = defence(), images(5)
    want = response(made, x)
    assert not packing  # in full precision the layers decode
    fast = purify_fast.frozen_copy(made, x, dtype=torch.bfloat16)
    del packing[:]
    got = response(fast, x)
    assert packing == [4, 4]
    for a, b, tolerance in zip(got, want, (0.02, 0.1), strict=True):
        assert relative(a, b) < tolerance
    with fast.fixed_noise(3), torch.no_grad():
        torch.testing.assert_close(fast.sample_logits(x[2:]), got[0][2:], rtol=2e-2, atol=2e-2)
    del packing[:]
    torch.manual_seed(5)
    draws = fast.draw_sample_logits(x, 3)
    assert packing == [12] and draws.shape == (3, 5, 4, 10) and not torch.equal(draws[0], draws[1])
    with fast.deterministic():
        fast(x)
    assert packing == [12]  # z = 0 is the layers'


@pytest.mark.parametrize("frozen", [True, False])
def test_a_packed_decoder_follows_its_weights(packing, frozen):
    """In a frozen copy, and in the copy with which a training computes."""
    made, x = defence(), images(3)
    fast = purify_fast.frozen_copy(made, x, dtype=torch.bfloat16) if frozen else made.computing_in(torch.bfloat16)
    del packing[:]
    if not frozen:
        fast(x)
        assert not packing  # a gradient of the decoder's weights may be asked for
    with torch.no_grad(), fast.fixed_noise(3):
        before = fast.purify(x)
        packed = fast._packed
        assert packing == [4]
        places = [tensor.data_ptr() for tensor in packed.buffers()]
        made.decoder.stack[-1].bias.add_(0.5)
        fast.prepare_replay()
        # a captured attack step reads them where they lie
        assert fast._packed is packed and [tensor.data_ptr() for tensor in packed.buffers()] == places
        after = fast.purify(x)
        made.decoder.stack[-1].bias.data.add_(0.5)
        if frozen:
            fast.update()
            assert relative(fast.purify(x), after) > 0.1
    assert relative(after, before) > 0.1
    del packing[:]
    with torch.inference_mode():
        fast(x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    with torch.no_grad():
        twin(x)
    assert packing == [4, 4] and "_packed" not in str(list(made.state_dict()))


def test_a_packed_decoder_follows_statistics_and_partly_frozen_weights(packing):
    made, x = defence().requires_grad_(False), images(16)
    fast = made.computing_in(torch.bfloat16)
    with torch.no_grad(), fast.fixed_noise(3):
        before = fast.purify(x)
        fast.train().purify(x)  # BatchNorm's statistics move, and no weight does
        after = fast.eval().purify(x)
        assert packing == [4, 4] and relative(after, before) > 1e-3
    with torch.no_grad(), made.fixed_noise(3):
        assert relative(after, made.purify(x)) < 0.01
    del packing[:]
    next(made.decoder.parameters()).requires_grad_(True)
    assert fast.purify(x[:2]).requires_grad and not packing
