"""Which backend serves an op, and what happens when a forced one is missing. The tests of kernels that save what
backward needs follow."""

import math
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module

import op_cases
import pytest
import torch
from op_cases import DTYPES
from torch._dynamo.testing import CompileCounter

from purify_fast import _library, ops
from purify_fast.attacks import checkpointed_steps
from purify_fast.ops import REGISTRY, aggregate, gated_elu, use_backend
from purify_fast.ops.dispatch.examples import tensors
from purify_fast.ops.dispatch.gradient import SAVING_KERNELS
from purify_fast.ops.dispatch.registry import Op, _narrow, forced_backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_extension = pytest.mark.skipif(not _library.loaded(), reason="the CPU's kernels are the extension's")


def test_a_forced_backend_serves_or_is_said_to_be_missing():
    meta = torch.device("meta")
    for name, op in REGISTRY.items():
        for backend, device in [("triton", CPU), ("cpp", CUDA), ("triton", meta), ("cpp,triton", meta)]:
            with use_backend(backend), pytest.raises(RuntimeError, match=f"^{name}: .*{device.type}, allowed are: ref"):
                op.backend_for(device, 1)
        there = ", ".join(op.available["cpu"])
        with use_backend("triton"), pytest.raises(RuntimeError, match=rf"for tensors on cpu, .*: {there}\. Add one"):
            op.uses_reference(CPU, 1)
        with use_backend("triton,cpp,reference"):
            assert op.backend_for(CUDA, 1) == op.available["cuda"][-1]
            assert op.backend_for(CPU, 1) == op.available["cpu"][-1] and op.backend_for(meta, 1) == "reference"
        with use_backend("reference"):
            assert op.backend_for(meta, 1) == "reference"
        assert op.backend_for(meta, 1) == "reference"


def test_of_several_forced_backends_an_op_takes_the_first_it_has(monkeypatch):
    op = REGISTRY["philox"]
    with use_backend("cpp, triton,reference"):
        assert op.backend_for(CUDA, 1) == "triton"
        monkeypatch.setitem(op.available, "cuda", ("reference",))
        assert op.backend_for(CUDA, 1) == "reference"
    missing = r"philox: the forced backend 'cpp' or 'triton' has no kernel .* cuda, .*: ref"
    with use_backend("cpp,triton"), pytest.raises(RuntimeError, match=missing):
        op.backend_for(CUDA, 1)
    for wrong in (3, "triton,gpu"):
        with pytest.raises(ValueError, match=r"backend must be one of reference, cpp, triton .*, got '(3|gpu)'"):
            use_backend(wrong).__enter__()


def test_use_backend_nests_and_restores():
    op = REGISTRY["aggregate"]
    default = op.backend_for(CPU, 1)
    with use_backend("reference"):
        assert op.uses_reference(CPU, 1)
        with use_backend(None):
            assert op.backend_for(CPU, 1) == default
        with pytest.raises(KeyError), use_backend(None):
            raise KeyError
        assert op.uses_reference(CPU, 1)
    assert op.backend_for(CPU, 1) == default


def test_use_backend_concerns_its_own_thread():
    entered, left, inside = threading.Event(), threading.Event(), []

    def first():
        with use_backend("reference"):
            entered.set()
            left.wait(60)
            inside.append(forced_backends())

    before, thread = forced_backends(), threading.Thread(target=first)
    thread.start()
    entered.wait(60)
    with use_backend("cpp"):
        left.set()
        thread.join()
        assert forced_backends() == ("cpp",)
    assert inside == [("reference",)] and forced_backends() == before


@needs_extension
def test_a_backward_pass_in_another_thread_has_the_backend_of_the_forward(monkeypatch):
    chosen, backward = [], REGISTRY["gated_elu_backward"]
    backend_for = type(backward).backend_for

    def watch(op: Op, *given) -> str:
        chosen.append((op.name, backend := backend_for(op, *given)))
        return backend

    monkeypatch.setattr(type(backward), "backend_for", watch)
    x = torch.rand(2, 4, 3, 3, requires_grad=True)
    monkeypatch.setitem(backward.chosen, (CPU, ""), math.inf)
    with use_backend("cpp"):
        gated = gated_elu(x)
        repeated = checkpointed_steps(lambda x, i: gated_elu(torch.cat([x, x], 1)), x, 2, keep=0)
    for result in (gated, repeated):
        chosen.clear()
        thread = threading.Thread(target=result.sum().backward)
        thread.start()
        thread.join()
        assert {one for one in chosen if "gated_elu" in one[0]} >= {("gated_elu_backward", "cpp")}
        assert all(backend == "cpp" for _, backend in chosen)


def test_compiled_code_follows_use_backend():
    """Dynamo compiles once for each choice, and traces a block within the compiled function."""
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.rand(3, 8, 10)
    compiled = torch.compile(aggregate, backend=counter, fullgraph=True)
    for name in (None, "reference", "cpp" if _library.loaded() else None, None):
        with use_backend(name):
            compiled(x)
    assert counter.frame_count == 2 + _library.loaded()

    def inside(x: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            return aggregate(x)

    assert torch.equal(torch.compile(inside, backend="eager", fullgraph=True)(x), inside(x))


def test_double_precision_passes_the_triton_kernels_by():
    seen = []
    launch = _narrow(lambda *args: seen.append("kernel"), lambda *args: seen.append("reference"))
    launch(torch.zeros(2), 3)
    launch(torch.zeros(2, dtype=torch.float64), 3)
    launch([torch.zeros(2), torch.zeros(2)], 3)
    launch([torch.zeros(2), torch.zeros(2, dtype=torch.float64)], 3)
    assert seen == ["kernel", "reference"] * 2


#: The variants whose reference moves as few bytes as the kernel, once Inductor has compiled it for a GPU; it also fuses
#: the reference with its neighbors.
LEVEL = {
    **{name: ("linf",) for name in ("pgd_step", "apgd_step", "square_proposal")},
    "diffusion_step": ("noiseless",),
    "diffusion_step_backward": ("fixed", "noiseless"),
    **{
        name: tuple(REGISTRY[name].smallest["cuda"])
        for op in ("aggregate", "gated_elu", "reconstruction_loss", "stitch", "representation_distance")
        for name in (op, f"{op}_backward")
        if name != "representation_distance"
    },
}


def test_in_compiled_graphs_kernels_give_way_to_references_that_move_as_few_bytes():
    assert {name for name, op in REGISTRY.items() if op.launch is not None} > LEVEL.keys()
    for name, variants in LEVEL.items():
        assert not {*variants} & {*REGISTRY[name].in_graphs.get("cuda", ())}, name


# -- kernels that save what backward needs -----------------------------------------------------------------------------
# Kernels that save what backward needs: the results of the ops, and that they serve.

loss_op, latent_op, distance_op, aggregate_op = (
    import_module(f"purify_fast.ops.{name}")
    for name in ("reconstruction_loss", "sample_latent", "representation_distance", "aggregate")
)
normal = partial(op_cases.normal, dtype=torch.float32)
needs_kernels = pytest.mark.skipif(not SAVING_KERNELS, reason="the kernels are the extension's")


def served_by_saving(out: torch.Tensor) -> bool:
    functions = [op._with_saved.__self__ for op in (loss_op, latent_op, distance_op, aggregate_op)]
    return getattr(out.grad_fn, "_forward_cls", None) in functions


SEED, IDS = torch.tensor([5]), torch.arange(3)
#: Functions of two tensors, of which the first has a gradient.
CALLS = {
    **{f"aggregate {name}": lambda x, _, name=name: aggregate(x, name) for name in ("lse", "peel")},
    "reconstruction_loss": lambda x, y: ops.reconstruction_loss(x, y.abs().clamp(max=1)),
    "sample_latent": lambda x, y: ops.sample_latent(x.flatten(1), y.flatten(1), SEED, IDS),
    **{
        f"representation_distance {kind}": lambda x, y, kind=kind: ops.representation_distance(x, y, kind)
        for kind in distance_op.KINDS
    },
}


def results(call: Callable, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, and the gradient of a sum with weights that every dtype has."""
    leaf = x.clone().requires_grad_()
    outputs = tensors(call(leaf, y))
    total = sum((out * (torch.arange(out.numel()) % 7 - 3).to(out.dtype).view_as(out) / 4).sum() for out in outputs)
    return [*(out.detach() for out in outputs), torch.autograd.grad(total, leaf)[0]]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(within_budget, poisoned, monkeypatch, name, dtype):
    """The saved tensors are as near to the definition in float64 as the definition in the same dtype is."""
    for size, scale in ((20, 1.0), (101, 20.0), (1300, 1.0)):
        x, y = scale * normal(2, 3, 5, size, dtype=dtype)
        with use_backend("cpp"), monkeypatch.context() as patch:
            assert served_by_saving(tensors(CALLS[name](x.clone().requires_grad_(), y))[0])
            found = results(CALLS[name], x, y)
            # the definition with the kernel's normals, which differ by a few units in the last place
            patch.setattr(Op, "uses_reference", lambda op, *_: op.name != "philox")
            golden, same = results(CALLS[name], x.double(), y.double()), results(CALLS[name], x, y)
        for triple in zip(found, golden, same, strict=True):
            within_budget(*triple)


def test_a_tangent_is_refused_and_not_lost(backend):
    x = normal(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        if backend == "reference":
            assert torch.autograd.forward_ad.unpack_dual(ops.gated_elu(dual)).tangent is not None
        else:
            with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
                ops.gated_elu(dual)
