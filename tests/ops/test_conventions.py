"""The ops take what PyTorch's own functions take: no seed, any leading shape, a dimension, a reduction, a mask."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from purify_fast import ops

IMAGE, ROWS = torch.rand(3, 3, 8, 8), torch.rand(3, 16)
NUMBERS = torch.tensor([1.0, 0.0, 9.0, 0.0, 1.0, 1.0, 0.0, 0.0])
#: Each random op, as a function of seed and sample_ids.
RANDOM = {
    "sample_latent": lambda **given: ops.sample_latent(ROWS, ROWS, **given)[0],
    "random_transform": lambda **given: ops.random_transform(IMAGE, block=2, **given)[0],
    "noisy_replay": lambda **given: ops.noisy_replay(IMAGE, IMAGE, torch.ones(3), 0.5, 0.1, **given),
    "diffusion_step": lambda **given: ops.diffusion_step(
        IMAGE, IMAGE, NUMBERS, step=torch.tensor([1]) if "seed" in given else None, **given
    ),
}
#: Functions of low level, of which a seed or ids are a part of the question.
NAMED = {"philox", "decode_prior"}


def test_every_random_op_is_here():
    takes_seed = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    takes_seed = {name for name in takes_seed if "seed" in inspect.signature(getattr(ops, name)).parameters}
    assert takes_seed == RANDOM.keys() | NAMED


@pytest.mark.parametrize("name", RANDOM)
def test_without_a_seed_the_numbers_come_from_the_generator_of_pytorch(backend, name):
    call = RANDOM[name]
    torch.manual_seed(3)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(call(), first) and torch.equal(call(), second)
    # the rows have different numbers, though their inputs are equal
    assert not torch.equal(call(sample_ids=torch.tensor([0, 0, 0])), call(sample_ids=torch.tensor([0, 1, 2])))


@pytest.mark.parametrize("name", RANDOM)
def test_with_a_seed_the_bits_repeat_and_the_ids_are_the_rows(backend, name):
    call, seed = RANDOM[name], torch.tensor([7])
    assert torch.equal(call(seed=seed), call(seed=seed))
    assert torch.equal(call(seed=seed), call(seed=seed, sample_ids=torch.arange(3)))
    assert not torch.equal(call(seed=seed), call(seed=seed + 1))


def test_a_seed_is_new_in_every_call_of_a_compiled_function():
    draw = torch.compile(lambda x: ops.sample_latent(x, x)[0], backend="aot_eager", fullgraph=True)
    assert not torch.equal(draw(ROWS), draw(ROWS))


@pytest.mark.parametrize("leading", [(2,), (2, 3), (2, 1, 3), (0, 3)])
def test_a_latent_of_any_leading_shape(backend, leading):
    mu, logvar = torch.randn(2, *leading, 5, dtype=torch.float64).requires_grad_().unbind()
    z, kl = ops.sample_latent(mu, logvar, torch.tensor([4]))
    assert z.shape == mu.shape and kl.shape == leading
    flat, flat_kl = ops.sample_latent(mu.reshape(-1, 5), logvar.reshape(-1, 5), torch.tensor([4]))
    assert torch.equal(z.reshape(-1, 5), flat) and torch.equal(kl.flatten(), flat_kl)
    prior, posterior = torch.distributions.Normal(0, 1), torch.distributions.Normal(mu, (0.5 * logvar).exp())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(posterior, prior).sum(-1), check_dtype=False)


PLAIN = {
    ("bce", True): F.binary_cross_entropy_with_logits,
    ("bce", False): F.binary_cross_entropy,
    ("mse", True): F.mse_loss,
    ("mse", False): F.mse_loss,
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kind", "from_logits"), PLAIN)
def test_every_form_of_the_reconstruction_loss_is_a_loop_in_float64(backend, kind, from_logits, layout):
    generator = torch.Generator().manual_seed(1)
    numbers = torch.rand(4, 5, 3, 6, 7, generator=generator)
    target = torch.rand(4, 3, 6, 7, generator=generator).contiguous(memory_format=layout)
    many = (8 * numbers - 4 if from_logits else numbers).requires_grad_()
    loss = ops.reconstruction_loss(many, target, kind, from_logits=from_logits)
    plain, wide = PLAIN[kind, from_logits], target.double()
    expected = torch.stack([plain(k.double(), wide, reduction="none").sum((1, 2, 3)) for k in many.unbind(1)], 1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    one = ops.reconstruction_loss(many[:, 0].contiguous(memory_format=layout), target, kind, from_logits=from_logits)
    torch.testing.assert_close(one, loss[:, 0], rtol=1e-6, atol=1e-6)
    (slope,), (wanted,) = (torch.autograd.grad(value.sum(), many) for value in (loss, expected))
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)
    for reduction, reduced in (("mean", loss.mean()), ("sum", loss.sum())):
        got = ops.reconstruction_loss(many, target, kind, from_logits=from_logits, reduction=reduction)
        assert torch.equal(got, reduced)


def test_many_reconstructions_make_no_copy_of_the_target():
    """A copy would have 512 times the target's numbers."""
    target, logits = torch.rand(2, 64), torch.randn(2, 512, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.reconstruction_loss(logits, target)
    own = [x for x in kept if x.data_ptr() != logits.data_ptr()]
    assert all(x.untyped_storage().size() <= target.untyped_storage().size() for x in own)


def test_probabilities_work_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.reconstruction_loss(ROWS, ROWS, from_logits=False)
    assert loss.dtype == torch.float32 and loss.isfinite().all()


@pytest.mark.parametrize("method", ["lse", "mean", "vote", "peel_reference"])
@pytest.mark.parametrize("dim", [0, 2, -1, -2, -3])
def test_the_samples_of_an_aggregation_may_have_any_dimension(backend, method, dim):
    logits = torch.randn(4, 6, 5)
    moved = logits.movedim(1, dim).contiguous()
    torch.testing.assert_close(ops.aggregate(moved, method, dim=dim), ops.aggregate(logits, method))


@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 8, 8), (3, 1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_the_caller(backend, shape, dtype):
    x, seed = IMAGE.clone().requires_grad_(), torch.tensor([2])
    mask = (torch.rand(shape) < 0.4).to(dtype)
    packed, owners = ops.random_transform(x, seed, mask=mask, samples=2)
    hidden = (mask != 0).expand(3, 1, 8, 8)
    n = ops.philox(seed, torch.arange(3), 192, stream=ops.Stream.TRANSFORM_NOISE, distribution="normal", draws=2)
    noisy = (x[:, None] + 0.25 * n.view(3, 2, 3, 8, 8)).clamp(0, 1).transpose(0, 1)
    expected = torch.where(hidden, 0, 2 * noisy - 1).flatten(0, 1)
    torch.testing.assert_close(packed[:, :3], expected)
    assert (packed[:, 3] == 1).all() and torch.equal(packed[:, 4:].bool(), hidden.repeat(2, 1, 1, 1))
    assert torch.equal(owners.bool(), hidden[None, :, 0].expand(2, 3, 8, 8))
    slopes = [torch.autograd.grad(value.square().sum(), x, retain_graph=True)[0] for value in (packed[:, :3], expected)]
    torch.testing.assert_close(*slopes)
