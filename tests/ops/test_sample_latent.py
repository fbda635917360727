from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from purify_fast.ops import Stream, philox, sample_latent

op = import_module("purify_fast.ops.sample_latent")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((1, 1), (3, 64), (5, 37), (2, 1026), (0, 8), (4, 0))
SEED = torch.tensor([987654321])


def inputs(batch: int, dim: int, dtype=torch.float32, seed: int = 0) -> tuple:
    made = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made[0].to(dtype), made[1].to(dtype), SEED, torch.arange(batch) * 3 + seed


def test_published_divergence(backend):
    mu, logvar = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0]])
    _, kl = sample_latent(mu, logvar, SEED, torch.arange(2))
    torch.testing.assert_close(kl, torch.tensor([1.306853, 0.0]), rtol=0, atol=1e-6)


def test_the_sample_is_the_named_noise(backend):
    mu, logvar, seed, ids = inputs(6, 64)
    noise = philox(seed, ids, 64, stream=Stream.LATENT, distribution="normal")[:, 0]
    z, _ = sample_latent(mu, logvar, seed, ids)
    torch.testing.assert_close(z, mu + noise * (0.5 * logvar).exp())
    standard, _ = sample_latent(torch.zeros_like(mu), torch.zeros_like(mu), seed, ids)
    assert torch.equal(standard, noise)
    other, _ = sample_latent(mu, logvar, seed + 1, ids)
    assert not torch.equal(other, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, within_budget, poisoned, monkeypatch, shape, dtype):
    # normals differ by a few ulp between backends (test_philox.py): here everything else is compared
    own = lambda mu, *key: philox(*key, mu.shape[1], stream=Stream.LATENT, distribution="normal")[:, 0]  # noqa: E731
    monkeypatch.setattr(op, "_noise", own)
    mu, logvar, seed, ids = inputs(*shape, dtype)
    gz = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    gk = torch.linspace(-1, 2, shape[0], dtype=torch.promote_types(dtype, torch.float32))
    leaves = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z, kl = sample_latent(*leaves, seed, ids)
    golden = op.reference(mu.double(), logvar.double(), seed, ids)
    same = op.reference(mu, logvar, seed, ids)
    for got, exact, rounded in zip((z, kl), golden, same, strict=True):
        within_budget(got, exact, rounded)
    got = torch.autograd.grad((z, kl), leaves, (gz, gk))
    golden = op.reference_backward(gz.double(), gk.double(), mu.double(), logvar.double(), seed, ids)
    same = op.reference_backward(gz, gk, mu, logvar, seed, ids)
    for value, exact, rounded in zip(got, golden, same, strict=True):
        if backend == "reference":  # autograd's rounding, not the reference backward's
            eps = 8 * torch.finfo(dtype).eps
            atol = eps * exact.abs().amax().item() if exact.numel() else 0.0
            torch.testing.assert_close(value.double(), exact, rtol=eps, atol=atol)
        else:
            within_budget(value, exact, rounded)


def test_kernels_on_their_own(within_budget, poisoned):
    mu, logvar, seed, ids = inputs(4, 33)
    gz, gk = mu.flip(0) + 1, torch.linspace(0.5, 1, 4)
    wide = op.reference(mu.double(), logvar.double(), seed, ids)
    for got, exact, same in zip(
        op.OP.handle(mu, logvar, seed, ids), wide, op.reference(mu, logvar, seed, ids), strict=True
    ):
        within_budget(got, exact, same)
    wide = op.reference_backward(gz.double(), gk.double(), mu.double(), logvar.double(), seed, ids)
    arguments = (gz, gk, mu, logvar, seed, ids)
    for got, exact, same in zip(op.BACKWARD.handle(*arguments), wide, op.reference_backward(*arguments), strict=True):
        within_budget(got, exact, same)


def test_divergence_near_the_prior_keeps_its_gradient(backend):
    """exp(v) - 1 loses everything at a small v; expm1 does not."""
    logvar = torch.full((1, 4), 1e-6, requires_grad=True)
    _, kl = sample_latent(torch.zeros(1, 4), logvar, SEED, torch.zeros(1, dtype=torch.int64))
    if backend != "reference":  # autograd's derivative of exp(v) - v - 1 is the subtraction
        torch.testing.assert_close(torch.autograd.grad(kl.sum(), logvar)[0], torch.full((1, 4), 5e-7))


def test_batch_split_and_order_change_nothing(backend):
    mu, logvar, seed, ids = inputs(7, 65)
    whole = sample_latent(mu, logvar, seed, ids)
    parts = [sample_latent(mu[i], logvar[i], seed, ids[i]) for i in (slice(0, 3), slice(3, 4), slice(4, 7))]
    for index, full in enumerate(whole):
        assert torch.equal(torch.cat([p[index] for p in parts]), full)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    for full, moved in zip(whole, sample_latent(mu[order], logvar[order], seed, ids[order]), strict=True):
        assert torch.equal(full[order], moved)


def test_any_layout(backend):
    mu, logvar, seed, ids = inputs(6, 37)
    wanted = sample_latent(mu, logvar, seed, ids)
    tables = torch.full((39, 8), torch.nan), torch.full((9, 40), torch.nan)
    tables[0][1:38, 1:7], tables[1][2:8, 3:40] = mu.T, logvar
    views = (tables[0][1:38, 1:7].T.requires_grad_(), tables[1][2:8, 3:40].requires_grad_())
    got = sample_latent(*views, seed, ids.repeat_interleave(2)[::2])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    dense = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    expected = torch.autograd.grad(sum(o.sum() for o in sample_latent(*dense, seed, ids)), dense)
    for a, b in zip(torch.autograd.grad(sum(o.sum() for o in got), views), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_one_output_alone_has_a_gradient(backend):
    mu, logvar, seed, ids = inputs(3, 8)
    mu.requires_grad_()
    z, kl = sample_latent(mu, logvar, seed, ids)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), mu, retain_graph=True)[0], torch.ones_like(mu))
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), mu)[0], mu.detach())


def test_non_finite_parameters_are_not_hidden(backend):
    mu, logvar, seed, ids = inputs(4, 8)
    mu[1, 2], logvar[2, 3], logvar[3, 0] = torch.nan, torch.nan, torch.inf
    z, kl = sample_latent(mu, logvar, seed, ids)
    assert z[1].isnan().sum() == 1 and z[2].isnan().sum() == 1 and not z[3, 0].isfinite()
    assert kl[1].isnan() and kl[2].isnan() and not kl[3].isfinite() and kl[0].isfinite()


def test_gradcheck():
    mu, logvar, seed, ids = inputs(3, 5, torch.float64)
    leaves = mu.requires_grad_(), logvar.requires_grad_()
    for function in (op._sample_latent, op.reference):
        assert torch.autograd.gradcheck(lambda m, v, f=function: f(m, v, seed, ids), leaves)


def test_contract(backend, contract):
    sets = [inputs(3, 5), inputs(3, 5, torch.bfloat16), inputs(0, 5), inputs(2, 1)]
    strided = (torch.randn(5, 3).T, torch.randn(3, 10)[:, ::2], SEED, torch.arange(3))
    contract.registered(op.OP.handle, *sets, strided)
    backward = [(s[1], torch.ones(len(s[0]), dtype=torch.float32), *s) for s in [*sets, strided]]
    contract.registered(op.BACKWARD.handle, *backward)


def test_compiles(backend, contract):
    def make(size: int) -> tuple:
        mu, logvar, _, ids = inputs(size, 16, seed=size)
        return mu.requires_grad_(), logvar.requires_grad_(), torch.tensor([size]), ids

    contract.compiles(lambda mu, v, seed, ids: sample_latent(2 * mu, v, seed, ids), make)


def test_export(backend):
    class Sample(torch.nn.Module):
        def forward(self, mu, logvar, seed, ids):
            return sample_latent(mu, logvar, seed, ids)

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Sample(), inputs(4, 8), dynamic_shapes=(batch, batch, {}, batch))
    for got, expected in zip(program.module()(*inputs(7, 8)), sample_latent(*inputs(7, 8)), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast_and_inference_mode(backend):
    arguments = inputs(3, 8, torch.bfloat16)
    expected = sample_latent(*arguments)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        z, kl = sample_latent(*arguments)
    assert z.dtype == torch.bfloat16 and kl.dtype == torch.float32
    assert torch.equal(z, expected[0]) and torch.equal(kl, expected[1])


def test_func_grad(backend):
    mu, logvar, seed, ids = inputs(3, 8)
    got = torch.func.grad(lambda m: sum(o.sum() for o in sample_latent(m, logvar, seed, ids)))(mu)
    torch.testing.assert_close(got, 1 + mu)


def test_what_the_op_cannot_do():
    mu, logvar, seed, ids = inputs(3, 8)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda m: op._sample_latent(m[None], logvar[:1], seed, ids[:1]))(mu)
    leaf, weight = mu.requires_grad_(), torch.ones(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(op._sample_latent(leaf, logvar, seed, ids)[0], leaf, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 4, 2), r"mu and logvar need one floating-point shape \[B, D\]"),
        (0, torch.zeros(3, 5), r"\[3, 5\] and torch.float32 \[3, 4\]"),
        (1, torch.zeros(3, 4).half(), "torch.float32 .* and torch.float16"),
        (2, torch.tensor(1), "seed must be an int64"),
        (3, torch.arange(2), "sample_ids has 2 entries for a batch of 3"),
        (3, torch.arange(3.0), "sample_ids must be an int64"),
        (1, torch.zeros(3, 4, device="meta"), "mu is on cpu, logvar on meta, seed on cpu: they must agree"),
    ],
)
def test_errors(position, value, message):
    arguments = list(inputs(3, 4))
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        sample_latent(*arguments)
