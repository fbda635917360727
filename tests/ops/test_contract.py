"""The rules for every op: one test for each promise, of each function and setting in tests/op_table.py. The tests
of PyTorch's conventions follow."""

import inspect
import math

import op_table
import pytest
import torch
from op_cases import compiles, registered
from op_table import BY_INDUCTOR, ELSEWHERE, FUNCTIONS, PUBLIC, REFUSALS, TOGETHER, Function
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from purify_fast import _library, ops
from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch.examples import tensors, tile
from purify_fast.ops.dispatch.registry import Op

NHWC = torch.channels_last
needs_kernels = pytest.mark.skipif(not _library.loaded(), reason="the kernels are the extension's")
#: One setting of each function, for what does not depend on the setting.
FIRST = list({name.partition(" ")[0]: name for name in reversed(FUNCTIONS)}.values())[::-1]
DIFFERENTIABLE = [name for name, function in FUNCTIONS.items() if function.gradients]


def batches(function: Function) -> list[int | None]:
    """The dimension of the samples of each tensor."""
    fewer, more = function.make(6), function.make(7)
    pairs = zip(fewer, more, strict=True)
    return [next((d for d in range(a.dim()) if a.shape[d] != b.shape[d]), None) for a, b in pairs]


def leaves_of(function: Function, given: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in given[: function.gradients]]


def results(function: Function, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = leaves_of(function, given)
    outputs = tensors(function.call(*leaves, *given[function.gradients :]))
    if not leaves:
        return list(outputs)
    total = sum((out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(total, leaves)]


def smallest(name: str) -> dict[str, tuple]:
    """The smallest example of each of an op's variants."""
    by_variant: dict[str, list] = {}
    for example in REGISTRY[name].examples:
        by_variant.setdefault(example.variant, []).append(example)

    def size(example) -> int:
        leaves = tree_leaves(example.make(example.dtypes[0], 0))
        return sum(one.numel() for one in leaves if isinstance(one, Tensor))

    return {variant: min(examples, key=size) for variant, examples in by_variant.items()}


def reversed_strides(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


@pytest.fixture
def function(backend, name) -> Function:
    """The function of that name, where the backend has a kernel of it."""
    if backend not in REGISTRY[name.partition(" ")[0]].available["cpu"]:
        pytest.skip("there is no such kernel")
    return FUNCTIONS[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_table_has_every_op(name):
    """The tests of every op run with the entries of tests/op_table.py, so an op without an entry would have none."""
    there = {
        f'FUNCTIONS["{name}"]': name in ELSEWHERE or any(key.partition(" ")[0] == name for key in FUNCTIONS),
        f'REFUSALS["{name}"]': name in REFUSALS,
        f"def {name}(draw)": callable(getattr(op_table, name, None)),
    }
    missing = [entry for entry, found in there.items() if not found]
    assert not missing, f"tests/op_table.py has no {', '.join(missing)}: docs/extend.md, An op, step 5"


@pytest.mark.parametrize("name", REGISTRY)
def test_the_schema_the_fake_and_the_registrations(name):
    for example in list(smallest(name).values())[:2]:
        one, other = (example.make(example.dtypes[at], 0) for at in (0, -1))
        registered(REGISTRY[name].handle, one, other, *([] if name.startswith("decode") else [tile(one, 0)]))


COMPILED = [name for name in FUNCTIONS if name not in ("square_proposal l1", "random_transform None")]


@pytest.mark.slow
# the other settings of these two compile as slowly, and to the same operators
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(function, backend, name, request):
    drawn = ("noisy_replay", "diffusion_step learned", "philox uniform", "sample_latent")
    if name in drawn and backend == "reference" and torch.__version__ < "2.12":
        reason = "torch 2.11: an id that is negative gets other noise in a CPU graph"
        request.applymarker(pytest.mark.xfail(reason=reason))

    def make(size: int) -> tuple:
        given = function.make(size)
        return *leaves_of(function, given), *given[function.gradients :]

    compiles(
        lambda first, *given: function.call(first if first.dtype == torch.int64 else 1 * first, *given),
        make,
        function.sizes,
        exact=function.exact,
        compiler="inductor" if name in BY_INDUCTOR else "aot_eager",
        batch_only=function.batch_only,
    )


@pytest.mark.parametrize("name", REGISTRY)
def test_a_reference_of_any_layout_has_the_strides_of_the_fake(name):
    """The op runs the reference for float64 on a GPU, also inside compiled graphs, which rely on the fake."""
    for example in smallest(name).values():
        arguments = tree_map_only(Tensor, reversed_strides, list(example.make(torch.float64, 0)))
        with FakeTensorMode() as mode:
            fakes = tensors(REGISTRY[name].handle(*tree_map_only(Tensor, mode.from_tensor, arguments)))
        for real, fake in zip(tensors(REGISTRY[name].reference(*arguments)), fakes, strict=True):
            strides = zip(real.shape, real.stride(), fake.stride(), strict=True)
            differing = [size for size, ours, theirs in strides if size > 1 and ours != theirs]
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype) and (real.numel() == 0 or not differing)


@pytest.mark.parametrize("backend", ["cpp", pytest.param("reference", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("name", FIRST)
def test_exports(function, backend, name, request):
    if name == "square_proposal linf" and backend == "reference" and torch.__version__ < "2.12":
        reason = "torch 2.11: the export of a reshaped tensor bounds the batch"
        request.applymarker(pytest.mark.xfail(reason=reason))

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function.call(*given)

    batch = torch.export.Dim("batch")
    shapes = tuple({} if dimension is None else {dimension: batch} for dimension in batches(function))
    program = torch.export.export(Module(), function.make(4), dynamic_shapes=(shapes,))
    given = function.make(7)
    torch.testing.assert_close(tensors(program.module()(*given)), tensors(function.call(*given)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_and_inference_mode_change_nothing(function, name):
    given = function.make(3, torch.bfloat16) if function.make(1)[0].is_floating_point() and " " not in name else None
    for arguments in filter(None, (function.make(3), given)):
        expected = tensors(function.call(*arguments))
        with torch.autocast("cpu", torch.float16), torch.inference_mode():
            got = tensors(function.call(*arguments))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_layout_and_no_mutation(function):
    """Tensors in channels_last, within larger ones that hold NaN, and stored the other way round."""
    given = function.make(function.sizes[0])
    before, wanted = [x.clone() for x in given], results(function, given)

    def padded(x: Tensor) -> Tensor:
        around = x.new_full([size + 3 for size in x.shape], torch.nan if x.is_floating_point() else 1)
        return around[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)

    for change in (lambda x: x.contiguous(memory_format=NHWC) if x.dim() == 4 else x, padded, reversed_strides):
        moved = tuple(change(x) if x.numel() > 1 else x for x in given)
        got = results(function, moved)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if function.exact else {}))
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sample_does_not_depend_on_its_batch(function, backend, name):
    given = function.make(7)
    whole = tensors(function.call(*given))
    dimensions = batches(function)
    parts = []
    for part in (slice(0, 2), slice(2, 3), slice(3, 7)):
        narrow = (x if d is None else x[(slice(None),) * d + (part,)] for x, d in zip(given, dimensions, strict=True))
        parts.append(tensors(function.call(*narrow)))
    close = backend == "reference" or name == "contextual_attention"
    for index, out in enumerate(whole):
        torch.testing.assert_close(torch.cat([p[index] for p in parts]), out, rtol=0, atol=1e-6 if close else 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_that_are_not_finite_reach_what_they_reach_in_the_definition(function, name, monkeypatch):
    """An infinite number has no projection onto an l1 ball."""
    for value in (math.nan,) if name.endswith(" l1") else (math.nan, math.inf, -math.inf):
        for number, x in enumerate(function.make(3)):
            given = [one.clone() for one in function.make(3)]
            if not x.is_floating_point() or x.shape[0] != 3:
                continue
            given[number][1].view(-1)[x[1].numel() // 2] = value
            got = tensors(function.call(*given))
            with monkeypatch.context() as patch:
                patch.setattr(Op, "uses_reference", lambda *_: True)
                wanted = tensors(function.call(*given))
            assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(got, wanted, strict=True))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_batches(function):
    assert all(out.shape[0] == 0 for out in tensors(function.call(*function.make(0))))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_the_derivative(function, name):
    given = tuple(x[..., :4, :4] if x.dim() == 4 and name != "contextual_attention" else x for x in function.make(2))
    if name == "stitch":
        given = function.make(1)
    given = tuple(x.double() if x.is_floating_point() else x for x in given)
    leaves = leaves_of(function, given)
    assert torch.autograd.gradcheck(lambda *x: function.call(*x, *given[len(leaves) :]), leaves, fast_mode=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_func_grad(function):
    given = function.make(3)
    rest = given[function.gradients :]

    def total(*leaves: Tensor) -> Tensor:
        return sum(out.sum() for out in tensors(function.call(*leaves, *rest)))

    leaves = leaves_of(function, given)
    got = torch.func.grad(total, argnums=tuple(range(function.gradients)))(*given[: function.gradients])
    torch.testing.assert_close(got, torch.autograd.grad(total(*leaves), leaves))


@needs_kernels
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_kernels_refuse_second_derivatives_and_vmap(name):
    function, given = FUNCTIONS[name], FUNCTIONS[name].make(3)
    if "cpp" not in REGISTRY[name.partition(" ")[0]].available["cpu"]:
        pytest.skip("there is no such kernel")
    with use_backend("cpp"):
        leaves = leaves_of(function, given)
        out = tensors(function.call(*leaves, *given[function.gradients :]))[0]
        # With a constant incoming gradient, once_differentiable would lose the second derivative silently.
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
        of_one = torch.func.grad(lambda x: tensors(function.call(x, *given[1:]))[0].sum())
        with pytest.raises(RuntimeError, match="vmap"):
            torch.vmap(of_one)(torch.stack([given[0]]))


@pytest.mark.parametrize("norm", ["Linf", "L-inf", "l_inf", "LINF", "L2", "l2"])
def test_a_norm_is_read_as_others_write_it(norm):
    """By every op that takes one, in compiled code too."""
    plain = "l2" if "2" in norm else "linf"
    x, grad, near = torch.rand(3, 2, 6, 6), torch.randn(3, 2, 6, 6), torch.rand(3, 2, 6, 6)
    numbers, pattern = torch.rand(3, 1, 7), torch.full((2, 2, 2), 0.5) if plain == "l2" else None
    for op in (
        lambda norm: ops.pgd_step(x, grad, near, 0.1, 0.2, norm),
        lambda norm: ops.apgd_step(x, grad, near, x, 0.1, 0.2, 0.7, norm),
        lambda norm: ops.hyperplane_projection(x, grad, 0.3, norm),
        lambda norm: ops.square_proposal(x, near, 0.1, numbers, 2, norm, pattern=pattern),
    ):
        assert torch.equal(op(norm), op(plain))
    compiled = torch.compile(lambda x: ops.pgd_step(x, grad, near, 0.1, 0.2, norm), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.pgd_step(x, grad, near, 0.1, 0.2, plain))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_its_name(name):
    given, refused = REFUSALS[name]
    alone = ({argument: value} for argument, values in refused.items() for value in values)
    for change in (*alone, *TOGETHER.get(name, ())):
        with pytest.raises((ValueError, TypeError), match=rf"\b({'|'.join(change)})\b"):
            getattr(ops, name)(**(given | change))


@pytest.mark.parametrize("name", sorted({*REFUSALS} - {"philox", "decode_prior", "key_validity"}))
@pytest.mark.parametrize("kind", ["float8", "sparse", "mkldnn"])
def test_tensors_that_no_kernel_reads_are_refused(name, kind):
    """The op gets another dtype or layout in place of its images, logits or features."""
    arguments = REFUSALS[name][0]
    change = {"float8": lambda x: x.to(torch.float8_e4m3fn), "sparse": Tensor.to_sparse, "mkldnn": Tensor.to_mkldnn}
    first = next(one for one, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point())
    alike = [one for one, x in arguments.items() if isinstance(x, Tensor) and x.shape == arguments[first].shape]
    for changed in (alike, [first]):
        with pytest.raises(ValueError, match=first):
            getattr(ops, name)(**(arguments | {one: change[kind](arguments[one]) for one in changed}))


# -- PyTorch's conventions ---------------------------------------------------------------------------------------------
# The ops take what PyTorch's own functions take: no seed, and any leading shape.

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
