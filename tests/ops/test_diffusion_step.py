import math
from importlib import import_module

import pytest
import torch
from op_cases import normal
from torch import Tensor

from purify_fast.ops import Stream, diffusion_step, philox

pytestmark = pytest.mark.interpreter

op = import_module("purify_fast.ops.diffusion_step")
SEED, STEP = torch.tensor([0x0123456789ABCDEF]), torch.tensor([3])


def named(batch: int, step: Tensor = STEP) -> dict[str, Tensor]:
    """The names of the noise of a batch in which two draws of an image are neighbors."""
    rows = torch.arange(batch)
    return {"seed": SEED, "sample_ids": rows // 2 * 3 - 1, "draws": rows % 2, "step": step}


def coefficients(dtype: torch.dtype = torch.float32, **changes: float) -> Tensor:
    """The arguments of a step that clips at 1, with the changes."""
    given = dict(zip(op.COEFFICIENTS, (1.25, -0.75, 1.0, 0.4, 0.6, 0.3, -4.0, -2.0), strict=True))
    return torch.tensor(list((given | changes).values()), dtype=dtype)


def noise(shape: tuple[int, ...], name: dict[str, Tensor]) -> Tensor:
    """The normals of a batch, each row on its own through the public stream."""
    numel = math.prod(shape[1:])
    word = (name["draws"] * 2**16 + name["step"]).tolist()
    rows = [
        philox(name["seed"], one[None], numel, stream=Stream.DIFFUSION, distribution="normal", first_draw=at)
        for one, at in zip(name["sample_ids"], word, strict=True)
    ]
    return torch.cat(rows).view(shape) if rows else torch.empty(shape)


def test_the_noise_is_the_named_stream(backend):
    shape, name = (4, 3, 5, 7), named(4)
    zero = torch.zeros(shape)
    out = diffusion_step(zero, zero, coefficients(noise=1.0), **name)
    assert torch.equal(out, noise(shape, name))
    for other in ({"seed": SEED + 1}, {"step": STEP + 1}, {"draws": name["draws"] + 1}):
        again = diffusion_step(zero, zero, coefficients(noise=1.0), **(name | other))
        assert (again != out).float().mean() > 0.99
    far = {"draws": torch.full((4,), 2**16 + 1), "step": torch.tensor([2**16 - 1])}
    wrapped = {"draws": torch.full((4,), 1), "step": far["step"]}  # the low 32 bits count
    a, b = (diffusion_step(zero, zero, coefficients(noise=1.0), **(name | one)) for one in (far, wrapped))
    assert torch.equal(a, b)


def test_one_tensor_in_two_places_compiles(backend):
    """The forward process gives the image as the prediction too, and a seed may be a step."""
    x = normal(2, 1, 4, 4, dtype=torch.float32).requires_grad_()
    values, one = coefficients(of_state=0.0, of_prediction=0.0, image=0.0, state=0.8, noise=0.6), torch.tensor([1])

    def noised(x: Tensor) -> Tensor:
        ids = torch.zeros(2, dtype=torch.int64)
        return diffusion_step(x, x, values, seed=one, sample_ids=ids, draws=ids, step=one)

    compiled = torch.compile(noised, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, noised(x))
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], torch.full_like(x, 0.8))


def test_both_ends_of_the_clip_pass_the_gradient(backend):
    x = torch.tensor([[-1.0, 1.0, -1.5, 1.5, 0.0, math.nan]]).requires_grad_()
    m, name = torch.zeros(1, 6).requires_grad_(), named(1)
    for c, passing in ((1.0, [1, 1, 0, 0, 1, 0]), (math.inf, [1, 1, 1, 1, 1, 0])):
        values = coefficients(of_state=1.0, of_prediction=2.0, clip=c, image=0.5, state=0.25)
        out = diffusion_step(x, m, values, **name, noisy=False)
        to_x, to_m = torch.autograd.grad(out.sum(), (x, m))
        assert to_x[0].tolist() == [0.25 + 0.5 * one for one in passing]
        assert to_m[0].tolist() == [1.0 * one for one in passing]
        given = torch.ones_like(out), x.detach(), m.detach(), values, *name.values(), False
        assert all(map(torch.equal, op.reference_backward(*given), (to_x, to_m)))
        assert out[0].isnan().tolist() == [False] * 5 + [True]
