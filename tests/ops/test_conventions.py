"""The ops take what PyTorch's own functions take: no seed, and any leading shape."""

import inspect

import pytest
import torch

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
