"""Every op's kernel on a device, against its float64 reference on the CPU, and in every way PyTorch may run it."""

from pathlib import Path

import pytest
import torch
from on_device import DEVICE
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.speed.op_cases import Case, registry
from purify_fast import _library
from purify_fast.ops import REGISTRY, use_backend
from purify_fast.ops.dispatch import examples as example_tensors
from purify_fast.ops.dispatch.verify import deviation

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason=f"{DEVICE.type} has neither streams nor CUDA graphs")
SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
#: The ops without a kernel for CPUs.
CUDA_ONLY = [op for op in REGISTRY if not (SOURCES / f"{op.removesuffix('_backward')}.cpp").exists()]
#: Elements of a large tensor: beyond what 32 bits count; in the rehearsal, beyond one example.
MANY = 2**31 if DEVICE.type == "cuda" else 2**17
REPEATS = 100 if DEVICE.type == "cuda" else 10


def backend(op: str) -> str:
    """The backend whose kernel the op's handle runs."""
    return REGISTRY[op].available[DEVICE.type][-1]


OPS = [pytest.param(op, id=f"{op}-{backend(op)}") for op in REGISTRY]
EXAMPLES = [
    pytest.param(op, example, dtype, id=f"{op}-{backend(op)}-{example.name}-{str(dtype).removeprefix('torch.')}")
    for op in REGISTRY
    for example in REGISTRY[op].examples
    for dtype in example.dtypes
]
CASES = [
    pytest.param(name, case, id=f"{name}-{backend(name)}-{case.variant}")
    for name, cases in registry().items()
    for case in {case.variant: case for case in reversed(cases())}.values()
]


def need_kernel(op: str, device: str, backend_there: str) -> None:
    """Fail where an op has nothing but its reference, as there would be nothing to test.

    Args:
        op: its name.
        device: the type of the device that is tested.
        backend_there: the backend that computes the op there.
    """
    if op in CUDA_ONLY and device != "cuda":
        pytest.skip(f"{op} has a kernel on a GPU only")
    if REGISTRY[op].launch is None and device == "cuda":
        pytest.skip(f"{op} has a kernel on a CPU only")
    if backend_there == "reference":
        pytest.fail(f"{op}: no kernel on {device}; the extension: {_library.load_error or 'loaded'}", pytrace=False)


@pytest.fixture(autouse=True)
def kernel(request):
    """Applies `need_kernel` to the test's op."""
    op = request.node.callspec.params.get("op")
    if op is not None:
        need_kernel(op, DEVICE.type, backend(op))


def run(op: str, arguments: tuple) -> tuple[Tensor, ...]:
    return example_tensors.tensors(REGISTRY[op].handle(*arguments))


def given(op: str, seed: int = 0) -> tuple:
    """Arguments of the op's first example, on the device."""
    example = REGISTRY[op].examples[0]
    return example_tensors.to(example.make(example.dtypes[0], seed), DEVICE)


def same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("op", "example", "dtype"), EXAMPLES)
def test_values(op, example, dtype, poisoned):
    arguments = example.make(dtype, 0)
    moved = example_tensors.to(arguments, DEVICE)
    outputs = run(op, moved)
    for leaf, before in zip(tree_leaves(moved), tree_leaves(example_tensors.to(arguments, DEVICE)), strict=True):
        assert not isinstance(leaf, Tensor) or torch.equal(leaf.nan_to_num(), before.nan_to_num()), "it was written to"
    reference = REGISTRY[op].reference
    same, golden = (example_tensors.tensors(reference(*a)) for a in (arguments, example_tensors.double(arguments)))
    for actual, exact, rounded in zip(outputs, golden, same, strict=True):
        assert actual.device.type == DEVICE.type
        assert actual.is_contiguous() or actual.is_contiguous(memory_format=torch.channels_last)
        found = deviation(actual.cpu(), exact, rounded, example, example.name)
        assert found.passed, found


@pytest.mark.parametrize(("name", "case"), CASES)
def test_functions_and_gradients(name: str, case: Case, poisoned):
    """The public function with its backend forced, its gradients, and both in a compiled graph: the same bits."""
    results = {}
    for kind, device, dtype in (("ours", DEVICE, None), ("same", "cpu", None), ("golden", "cpu", torch.float64)):
        inputs = [t.to(device) for t in case.inputs()]
        inputs = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in inputs]
        leaves = [inputs[i].requires_grad_() for i in case.differentiable]

        def call(function, inputs=inputs, leaves=leaves) -> tuple[Tensor, ...]:
            outputs = [out for out in example_tensors.tensors(function(*inputs)) if out.is_floating_point()]
            grads = [torch.linspace(0.5, 1.5, o.numel()).view(o.shape).to(o) for o in outputs if o.requires_grad]
            roots = [out for out in outputs if out.requires_grad]
            return *(o.detach() for o in outputs), *(torch.autograd.grad(roots, leaves, grads) if leaves else ())

        with use_backend(backend(name) if kind == "ours" else "reference"):
            results[kind] = call(case.call)
            if kind == "ours":
                torch._dynamo.reset()
                compiled = call(torch.compile(case.call, fullgraph=True, backend="aot_eager"))
                if DEVICE.type == "cuda":
                    same_bits(compiled, results[kind])
    # eager calls on a CPU have kernels of their own that keep what backward needs, so that the last bits differ there:
    # the compiled graph is held to the same bounds as they are
    outputs = len(results["ours"]) - len(case.differentiable)
    for index, (*judged, same, golden) in enumerate(
        zip(results["ours"], compiled, results["same"], results["golden"], strict=True)
    ):
        size = golden.double().abs().max().item()
        if index < outputs:  # a distance is 1 less what is near 1
            size = max(1.0, size)
        errors = [x.double().cpu() - golden.double() for x in (*judged, same)]
        # the decoder's gradient jumps where rounding decides on which side of zero an input of its LeakyReLU is
        rms = name == "decode_samples" and index > 0
        *found, budget = ((e.square().mean().sqrt() if rms else e.abs().max()).item() for e in errors)
        rounding = 2 * torch.finfo(same.dtype).eps + 16 * case.slack * 2**-23
        assert max(found) <= 2 * budget + rounding * size, (found, budget, size)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_every_time(op):
    arguments = given(op)
    first = run(op, arguments)
    for _ in range(REPEATS):
        same_bits(run(op, arguments), first)


def refill(arguments: tuple, values: tuple) -> None:
    for into, value in zip(tree_leaves(arguments), tree_leaves(values), strict=True):
        if isinstance(into, Tensor):
            into.copy_(value)


@needs_cuda
@pytest.mark.parametrize("op", OPS)
def test_a_captured_graph_follows_its_inputs(op):
    arguments, side = given(op), torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(op, arguments)  # compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outputs = run(op, arguments)
    for seed in (1, 2):
        values = given(op, seed)
        expected = run(op, values)
        refill(arguments, values)
        graph.replay()
        torch.cuda.synchronize()
        same_bits(outputs, expected)


@needs_cuda
@pytest.mark.parametrize("op", OPS)
def test_works_on_the_current_stream(op):
    """A kernel on another stream would read the inputs before they are written."""
    arguments, values, side = given(op), given(op, 1), torch.cuda.Stream()
    expected = run(op, values)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        refill(arguments, values)
        outputs = run(op, arguments)
    side.synchronize()
    same_bits(outputs, expected)


@pytest.mark.large
@pytest.mark.parametrize("op", OPS)
def test_offsets_beyond_32_bits(op, poisoned):
    """A batch of copies of one example is copies of its results, also where offsets no longer fit into 32 bits."""
    example = REGISTRY[op].examples[0]
    dtype = torch.bfloat16 if torch.bfloat16 in example.dtypes else example.dtypes[0]
    small = example_tensors.to(example.make(dtype, 0), DEVICE)
    expected = run(op, small)
    leaves = [t for t in (*tree_leaves(small), *expected) if isinstance(t, Tensor)]
    batched = [t for t in leaves if example_tensors.batch_dimension(t) is not None]
    times = MANY // max(t.numel() for t in batched) + 2
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        needed = 4 * times * sum(t.numel() * t.element_size() for t in batched)
        free = torch.cuda.mem_get_info(DEVICE)[0]
        if needed > free:
            pytest.skip(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    whole = run(op, example_tensors.tile(small, times))
    for got, wanted in zip(whole, expected, strict=True):
        dimension = example_tensors.batch_dimension(wanted)
        assert got.numel() == times * wanted.numel()
        parts = got.unflatten(dimension, (times, wanted.shape[dimension]))
        wanted = wanted.unsqueeze(dimension)
        assert ((parts == wanted) | (wanted != wanted)).all()
    if DEVICE.type == "cuda":
        del whole, parts, got
        torch.cuda.empty_cache()
