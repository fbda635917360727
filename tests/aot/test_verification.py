"""How many kernels a GPU compiles to verify them: counted by the keys under which Triton keeps what it compiled."""

import os
import threading
from collections.abc import Iterable
from unittest import mock

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("keys of compiled kernels need a process without TRITON_INTERPRET=1", pytrace=False)

import torch  # noqa: E402
from ahead import Device, name_of, recorded  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from purify_fast import EvaluateConfig, evaluate  # noqa: E402
from purify_fast.kernels import _ahead, _common, sample_latent  # noqa: E402
from purify_fast.models.classifiers import SmallCNN  # noqa: E402
from purify_fast.ops import REGISTRY  # noqa: E402
from purify_fast.ops.dispatch import registry  # noqa: E402
from purify_fast.ops.dispatch.op import Call  # noqa: E402
from purify_fast.ops.dispatch.verify import cases  # noqa: E402

ARCHITECTURE, GPU = 90, torch.device("cuda")
GPU_OPS = [name for name, op in REGISTRY.items() if op.launch is not None]
Cell = tuple[str, str, "torch.dtype | None"]


def compiled(cells: Iterable[Cell]) -> set[tuple]:
    """The keys of the kernels that verifying these ops, variants and dtypes compiles; nothing is compiled here."""
    keys: set[tuple] = set()

    def start(function, *args, grid, **kwargs):
        *_, bind = function.device_caches[ARCHITECTURE]
        _, specialization, options = bind(*args, **kwargs, debug=False)
        keys.add((name_of(function), str(specialization), str(sorted(options.items()))))

    with recorded(ARCHITECTURE, start), torch.no_grad():
        for name, variant, dtype in cells:
            for example, own in cases(REGISTRY[name], Call(GPU, variant, dtype)):
                REGISTRY[name].launch(*example.make(own, 0))
    return keys


def test_all_kernels_are_verified_by_136_compiles():
    """Sixteen are those of convolutions, which are not used before they have won a race."""
    found = compiled((name, "", None) for name in GPU_OPS)
    assert 0 < len(found) <= 136, len(found)


@pytest.fixture
def reached(monkeypatch) -> set[Cell]:
    """The variants and dtypes in which ops are called from now on, all served by their references."""
    cells: set[Cell] = set()

    def serving(op, call):
        cells.add((op.name, call.variant, call.dtype))
        return "reference"

    monkeypatch.setattr(registry.Op, "serving", serving)
    return cells


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_undefended_classifier_waits_for_12_compiles(norm, reached, short_signs, one_thread):
    torch.manual_seed(0)
    model, x = SmallCNN().eval(), torch.rand(4, 1, 16, 16)
    evaluate(
        model,
        x,
        model(x).argmax(1),
        eps={"linf": 0.1, "l2": 1.0}[norm],
        norm=norm,
        config=EvaluateConfig(steps=2),
        progress=False,
    )
    kernels = [cell for cell in reached if cell[0] in GPU_OPS]
    assert ("apgd_step", norm, torch.float32) in kernels
    assert 0 < len(compiled(kernels)) <= 12, (len(compiled(kernels)), kernels)


@pytest.mark.parametrize("op", GPU_OPS)
def test_every_served_kernel_dtype_and_setting_is_verified(op):
    """By the table each op in every dtype that it has and each of its settings; before a call, those of the call."""
    every = REGISTRY[op].examples
    table = cases(REGISTRY[op], Call(GPU))
    assert {dtype for _, dtype in table} == {dtype for one in every for dtype in one.dtypes}
    variants = {one.variant for one in every}
    assert {example.variant for example, _ in table} == variants
    for variant in variants:
        for dtype in {dtype for one in every if one.variant == variant for dtype in one.dtypes}:
            own = cases(REGISTRY[op], Call(GPU, variant, dtype))
            assert own and all((example.variant, one) == (variant, dtype) for example, one in own)


@pytest.mark.parametrize("op", GPU_OPS)
def test_a_call_waits_for_every_kernel_and_path_of_its_dtype(op):
    """Verified with the cases of one dtype after the other, an op launches each kernel that its examples launch."""
    launched: dict[str, set[str]] = {}
    for how in ("examples", "calls"):
        names = launched.setdefault(how, set())
        with recorded(ARCHITECTURE, lambda fn, *_, names=names, **__: names.add(name_of(fn))), torch.no_grad():
            every = [(one, dtype) for one in REGISTRY[op].examples for dtype in one.dtypes]
            calls = {(one.variant, dtype) for one, dtype in every}
            own = [case for call in sorted(calls, key=str) for case in cases(REGISTRY[op], Call(GPU, *call))]
            for example, dtype in every if how == "examples" else own:
                REGISTRY[op].launch(*example.make(dtype, 0))
    assert launched["calls"] == launched["examples"]


def test_kernels_are_compiled_side_by_side_and_none_runs(monkeypatch):
    """The launchers return as they do, other threads launch as ever, and what was compiled is there for the launch."""
    functions = (sample_latent._forward, sample_latent._backward)
    makers, ran, meanwhile = set(), [], []
    real = triton.compiler.compile
    barrier = threading.Barrier(2, timeout=600)

    def slow(*args, **kwargs):
        makers.add(threading.get_ident())
        barrier.wait()  # passes only if both are compiled at the same time
        return real(*args, **kwargs)

    def launch() -> None:
        latent, rows, seed, ids = torch.empty(4, 48), torch.empty(4), torch.zeros(1, dtype=torch.int64), torch.arange(4)
        sample_latent.forward(latent, latent, seed, ids)
        sample_latent.backward(latent, rows, latent, latent, seed, ids)
        elsewhere = lambda: meanwhile.append(functions[0].run(grid=(1,), warmup=False))  # noqa: E731
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()

    def run(function, *args, grid, warmup, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            return "ran"
        ran.append(warmup)
        return before(function, *args, grid=grid, warmup=warmup, **kwargs)

    before = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(triton.compiler, "compile", slow)
    for function in functions:
        function.device_caches.pop(ARCHITECTURE, None)
    monkeypatch.setattr(_ahead.os, "cpu_count", lambda: 2)
    with mock.patch.object(driver, "_active", Device(ARCHITECTURE)), mock.patch.object(_common, "_major", lambda _: 9):
        _ahead.compile_together(launch)
    assert ran == [True, True] and meanwhile == ["ran"] and len(makers) == 2
    assert triton.JITFunction.run is run
    assert all(len(function.device_caches[ARCHITECTURE][0]) == 1 for function in functions)
