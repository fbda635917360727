"""The rules for every op: one table of the public functions, one test for each promise, one table of refusals."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from op_cases import compiles, decoder, registered
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from purify_fast import _library, ops
from purify_fast.attacks.square import pattern
from purify_fast.ops import REGISTRY, Stream, use_backend
from purify_fast.ops.aggregate import METHODS
from purify_fast.ops.dispatch.examples import tensors, tile
from purify_fast.ops.dispatch.registry import Op
from purify_fast.ops.representation_distance import KINDS

NHWC = torch.channels_last
needs_kernels = pytest.mark.skipif(not _library.loaded(), reason="the kernels are the extension's")


@dataclass(frozen=True)
class Function:
    """A public function at one setting."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[..., tuple[Tensor, ...]]
    # The number of first tensors that have a gradient.
    gradients: int = 0
    exact: bool = False  # every backend, layout and compiler gives the same bits
    sizes: tuple[int, ...] = (5, 8, 13)  # batches that are compiled
    batch_only: bool = False  # only the batch may change without another compilation


def images(count: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Numbers in [0, 1] for each shape, ``count`` samples of each."""
    generator = torch.Generator().manual_seed(count)
    return [torch.rand((count, *shape), generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def of(*shapes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda size, dtype=torch.float32: tuple(images(size, *shapes, dtype=dtype))


def with_stream(*shapes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The images, then a seed, another for each size, and ids."""
    return lambda size, dtype=torch.float32: (
        *images(size, *shapes, dtype=dtype),
        torch.tensor([size]),
        torch.arange(size) * 3 - 1,
    )


def features_and_keys(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    features, keys = images(size, (3, 4, 6), (6,))
    return (features - 0.5).to(dtype), keys > 0.3


def passes_and_owners(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    passes, owners = images(size, (4, 3, 8, 8), (2, 2))
    return passes.to(dtype), (4 * owners).to(torch.uint8)[None]


def images_and_numbers(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return *images(size, (3, 10, 12), (3, 10, 12), dtype=dtype), *images(size, (2, 8))


def states_and_predictions(halves: int) -> Callable[..., tuple[Tensor, ...]]:
    """The state, the prediction of so many times its channels, coefficients, a seed, ids and draws."""
    numbers = (1.25, -0.75, 1.0, 0.4, 0.6, 0.3, -4.0, -2.0)
    return lambda size, dtype=torch.float32: (
        *images(size, IMAGE),
        *images(size, (3 * halves, 8, 8), dtype=dtype),
        torch.tensor(numbers),
        torch.tensor([size]),
        torch.arange(size) * 3 - 1,
        torch.arange(size) // 2,
    )


def denoised(*given: Tensor | str) -> Tensor:
    x, m, coefficients, seed, ids, draws, kind = given
    name = {"seed": seed, "sample_ids": ids, "draws": draws, "step": seed + 1}
    return ops.diffusion_step(2 * x - 1, 2 * m - 1, coefficients, **name, noisy=kind != "noiseless")


def proposed(x: Tensor, nat: Tensor, numbers: Tensor, norm: str) -> Tensor:
    """The proposals of each image, beside each other."""
    eps, patterns = (0.5, None) if norm == "linf" else (30.0, pattern(5, norm, torch.device("cpu")))
    found = ops.square_proposal(x, nat, eps, numbers, 5, norm, pattern=patterns)
    return found.unflatten(0, (2, -1)).transpose(0, 1)


def of_settings(
    name: str, settings: tuple, call: Callable, make: Callable, exact: tuple = (), **options
) -> dict[str, Function]:
    """A function at several settings, each of which its call gets after the tensors."""
    return {
        f"{name} {setting}": Function(
            lambda *given, setting=setting: call(*given, setting), make, exact=setting in exact, **options
        )
        for setting in settings
    }


IMAGE, STEP, NORMS, LINF = (3, 8, 8), (0.05, 0.1), ("linf", "l2", "l1"), ("linf",)
FUNCTIONS = {
    **of_settings("aggregate", METHODS[:-1], lambda x, how: ops.aggregate(6 * x - 3, how), of((8, 10)), gradients=1),
    "aggregate vote": Function(lambda x: ops.aggregate(6 * x - 3, "vote"), of((8, 10))),
    **of_settings(
        "apgd_step",
        NORMS[:2],
        lambda x, g, n, p, norm: ops.apgd_step(x, g - 0.5, n, p, *STEP, 0.75, norm),
        of(*[IMAGE] * 4),
        LINF,
    ),
    "contextual_attention": Function(
        ops.contextual_attention, features_and_keys, gradients=1, sizes=(2, 3), batch_only=True
    ),
    **of_settings("diffusion_step", ("fixed", "noiseless"), denoised, states_and_predictions(1), gradients=2),
    **of_settings("diffusion_step", ("learned",), denoised, states_and_predictions(2), gradients=2),
    "gated_elu": Function(lambda x: ops.gated_elu(6 * x - 3), of((6, 8, 10)), gradients=1),
    **of_settings(
        "hyperplane_projection",
        NORMS,
        lambda x, w, b, norm: ops.hyperplane_projection(x, w - 0.5, 4 * b.flatten() - 2, norm),
        of(IMAGE, IMAGE, ()),
    ),
    "noisy_replay": Function(
        lambda x, adv, drift, seed, ids: ops.noisy_replay(x, adv, drift, 0.5, 0.1, seed, ids),
        with_stream(IMAGE, IMAGE, ()),
        exact=True,
    ),
    **of_settings(
        "pgd_step", NORMS, lambda x, g, n, norm: ops.pgd_step(x, g - 0.5, n, *STEP, norm), of(*[IMAGE] * 3), LINF
    ),
    **of_settings(
        "philox",
        ("bits", "uniform", "normal"),
        lambda seed, ids, name: ops.philox(seed, ids, 12, stream=Stream.LATENT, distribution=name, draws=3),
        with_stream(),
        ("bits", "uniform"),
    ),
    **of_settings(
        "random_transform",
        (None, 4),
        lambda x, seed, ids, passes: ops.random_transform(x, seed, ids, block=2, num_passes=passes)[0],
        with_stream(IMAGE),
        gradients=1,
    ),
    "reconstruction_loss": Function(lambda x, t: ops.reconstruction_loss(6 * x - 3, t), of(IMAGE, IMAGE), gradients=1),
    **of_settings(
        "representation_distance",
        KINDS,
        lambda a, b, c, d, kind: ops.representation_distance([2 * a - 1, b], [c, d], kind),
        of(IMAGE, (40,), IMAGE, (40,)),
        gradients=2,
    ),
    "sample_latent": Function(ops.sample_latent, with_stream((16,), (16,)), gradients=2),
    # the first size is not the edge's, which would be taken for it
    **of_settings("square_proposal", NORMS, proposed, images_and_numbers, LINF, sizes=(6, 8, 13)),
    "stitch": Function(
        lambda passes, owners: ops.stitch(passes.flatten(0, 1), owners), passes_and_owners, gradients=1, exact=True
    ),
}
#: The functions that inductor compiles, which takes seconds; the others are traced.
BY_INDUCTOR = (
    *("aggregate lse", "apgd_step linf", "diffusion_step learned", "gated_elu", "noisy_replay", "pgd_step linf"),
    *("philox uniform", "reconstruction_loss", "representation_distance abs_cosine", "sample_latent", "stitch"),
)
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


@pytest.mark.parametrize("name", REGISTRY)
def test_the_schema_the_fake_and_the_registrations(name):
    for example in list(smallest(name).values())[:2]:
        one, other = (example.make(example.dtypes[at], 0) for at in (0, -1))
        registered(REGISTRY[name].handle, one, other, *([] if name.startswith("decode") else [tile(one, 0)]))


@pytest.mark.slow
# the other settings of these two compile as slowly, and to the same operators
@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if name not in ("square_proposal l1", "random_transform None")]
)
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


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_layout_and_no_mutation(function):
    """Tensors in channels_last, within larger ones that hold NaN, and stored the other way round."""
    given = function.make(function.sizes[0])
    before, wanted = [x.clone() for x in given], results(function, given)

    def padded(x: Tensor) -> Tensor:
        around = x.new_full([size + 3 for size in x.shape], torch.nan if x.is_floating_point() else 1)
        view = around[tuple(slice(1, size + 1) for size in x.shape)]
        return view.copy_(x)

    for change in (lambda x: x.contiguous(memory_format=NHWC) if x.dim() == 4 else x, padded, reversed_strides):
        moved = tuple(change(x) if x.numel() > 1 else x for x in given)
        got = results(function, moved)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if function.exact else {}))
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


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
    torch.manual_seed(0)
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


SEED, IDS, META = torch.tensor([5]), torch.arange(3), torch.device("meta")
ROW, PICTURE, BLOCKED = torch.zeros(3, 4), torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 64, 96)
VALID, OWNERS = torch.ones(2, 6, dtype=torch.bool), torch.zeros(1, 2, 4, 4).byte()
BALL = {
    "x": (torch.zeros(3, 5), ROW.half()),
    "x_nat": (ROW.to(META),),
    "norm": ("l3",),
    "lo": (1.5, math.nan),
    "alpha": (torch.zeros(2),),
    "eps": (-0.1, math.nan),
}
NAMED = {"seed": (7, torch.tensor(1)), "sample_ids": ([0, 1, 2], IDS.float(), IDS.to(META))}
ONE_PER_SAMPLE = {**NAMED, "sample_ids": (*NAMED["sample_ids"], torch.arange(2))}
#: By function: arguments that it takes, and values of single arguments that it refuses.
REFUSALS: dict[str, tuple[dict, dict[str, tuple]]] = {
    "aggregate": (
        {"logits": torch.zeros(3, 4, 5)},
        {"logits": (ROW, torch.zeros(3, 4, 5).long(), torch.zeros(3, 0, 5), torch.zeros(3, 4, 1))},
    ),
    "pgd_step": (
        {"x": ROW, "grad": ROW, "x_nat": ROW, "alpha": 0.1, "eps": 0.1},
        {**BALL, "density": (0.0, math.nan)},
    ),
    "apgd_step": (
        {"x": ROW, "grad": ROW, "x_nat": ROW, "previous": ROW, "alpha": 0.1, "eps": 0.1},
        {**BALL, "previous": (torch.zeros(3, 5),), "norm": ("l1",), "momentum": (1.5, math.nan)},
    ),
    "contextual_attention": (
        {"features": torch.zeros(2, 3, 4, 6), "valid": VALID},
        {
            "features": (torch.zeros(2, 3, 4, 4).int(), torch.zeros(2, 3, 5, 4)),
            "valid": (VALID[:, :5], VALID.to(META)),
        },
    ),
    "decode_prior": (
        {**decoder(), "samples": 3},
        {
            "packed": (torch.zeros(9, dtype=torch.float16), torch.zeros(9)),
            "biases": (torch.zeros(1), decoder()["biases"].double()),
            "condition": (torch.zeros(2, 23), decoder()["condition"].half(), decoder()["condition"].to(META)),
            "dtype": (torch.float16,),
            "seed": (7, torch.zeros(0, dtype=torch.int64)),
            "sample_ids": (torch.arange(3),),
            "samples": (-1,),
        },
    ),
    "diffusion_step": (
        {
            **{"x": ROW, "prediction": ROW, "coefficients": torch.zeros(8)},
            **{"seed": SEED, "sample_ids": IDS, "draws": IDS, "step": SEED},
        },
        {
            **ONE_PER_SAMPLE,
            "x": (ROW.half(),),
            "prediction": (torch.zeros(3, 5), ROW.double()),
            "coefficients": (torch.zeros(6), torch.zeros(8).double(), torch.zeros(8, device=META)),
            "draws": (IDS[:2],),
            "step": (IDS, None),
        },
    ),
    "gated_elu": ({"features": ROW}, {"features": (ROW.byte(), torch.zeros(3, 5, 4, 4))}),
    "hyperplane_projection": (
        {"x": ROW, "w": ROW, "b": 0.0},
        {
            "w": (torch.zeros(3, 5), ROW.half(), ROW.to(META)),
            "b": (torch.zeros(2),),
            "norm": ("l3",),
            "lo": (1.5,),
        },
    ),
    "noisy_replay": (
        {"x": ROW, "x_adv": ROW, "drift": ROW[:, 0], "tau": 0.1, "eps": 0.1, "seed": SEED, "sample_ids": IDS},
        {
            **ONE_PER_SAMPLE,
            "x": (torch.zeros(3, 5),),
            "x_adv": (ROW.half(),),
            "drift": (torch.zeros(2), ROW[:, 0].to(META)),
            "tau": (torch.zeros(3),),
            "eps": (torch.zeros(3, 1),),
            "hi": (math.nan,),
        },
    ),
    "philox": (
        {"seed": SEED, "sample_ids": IDS, "numel": 3, "stream": Stream.MASK},
        {**NAMED, "numel": (-1,), "draws": (0,), "first_draw": (-2,)},
    ),
    "random_transform": (
        {"x": BLOCKED, "seed": SEED, "sample_ids": IDS},
        {
            **ONE_PER_SAMPLE,
            "x": (BLOCKED.byte(), BLOCKED.to(META)),
            "block": (0, 64),
            "sigma": (-0.1, math.inf, math.nan),
            "mask_ratio": (1.0, -0.1, math.nan),
            "num_passes": (0, 4, 7),
            "samples": (0,),
            "dtype": (torch.int8,),
        },
    ),
    "reconstruction_loss": (
        {"logits": ROW, "target": ROW},
        {"target": (torch.zeros(3, 5), ROW.byte(), ROW.to(META)), "logits": (torch.zeros(2, 5, 4),)},
    ),
    "representation_distance": (
        {"student": ROW, "teacher": ROW},
        {"teacher": (torch.zeros(3, 5), ROW.byte(), ROW.to(META))},
    ),
    "sample_latent": (
        {"mu": ROW, "logvar": ROW, "seed": SEED, "sample_ids": IDS},
        {**ONE_PER_SAMPLE, "mu": (torch.zeros(3, 5),), "logvar": (ROW.half(), ROW.to(META))},
    ),
    "square_proposal": (
        {"x": PICTURE, "x_nat": PICTURE, "eps": 0.1, "numbers": torch.zeros(2, 1, 8), "edge": 3},
        {
            "x_nat": (torch.zeros(2, 3, 8, 9),),
            "numbers": (torch.zeros(2, 8), torch.zeros(2, 1, 8).double(), torch.zeros(2, 1, 8, device=META)),
            "edge": (9, torch.tensor(5.0), torch.tensor([5])),
            "norm": ("l3",),
            "lo": (1.5,),
            "eps": (torch.zeros(3),),
        },
    ),
    "stitch": (
        {"images": torch.zeros(6, 3, 8, 8), "owners": OWNERS},
        {
            "images": (torch.zeros(0, 3, 8, 8),),
            "owners": (OWNERS.float(), OWNERS.to(META), OWNERS[:, :, :3], OWNERS.repeat(1, 2, 1, 1)),
        },
    ),
}
#: By function: values of several arguments that it refuses together.
TOGETHER: dict[str, list[dict]] = {
    "pgd_step": [dict.fromkeys(("x", "grad", "x_nat"), torch.zeros(3))],
    "apgd_step": [{"eps": torch.zeros(3, 1)}],
    "random_transform": [{"block": 2, "num_passes": 256}],
    "reconstruction_loss": [{"logits": IDS.float(), "target": IDS.float()}],
    "representation_distance": [
        {"student": IDS.float(), "teacher": IDS.float()},
        {"student": [ROW, ROW.to(META)], "teacher": [ROW, ROW.to(META)]},
        {"student": [ROW], "teacher": [ROW, ROW]},
        {"student": [ROW, ROW[:2]], "teacher": [ROW, ROW[:2]]},
    ],
    "sample_latent": [{"sample_ids": IDS, "mu": torch.zeros(3, 4, 2), "logvar": torch.zeros(3, 4, 2)}],
    "square_proposal": [
        {"norm": "l2", "pattern": None},
        {"norm": "l1", "pattern": torch.zeros(2, 9)},
        {"norm": "l1", "pattern": torch.zeros(2, 3, 3, device=META)},
    ],
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_its_name(name):
    given, refused = REFUSALS[name]
    alone = ({argument: value} for argument, values in refused.items() for value in values)
    for change in (*alone, *TOGETHER.get(name, ())):
        with pytest.raises((ValueError, TypeError), match=rf"\b({'|'.join(change)})\b"):
            getattr(ops, name)(**(given | change))


@pytest.mark.parametrize("name", sorted({*REFUSALS} - {"philox", "decode_prior"}))
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
