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

from purify_fast.kernels import _ahead, _common, sample_latent  # noqa: E402
from purify_fast.ops import REGISTRY  # noqa: E402
from purify_fast.ops.dispatch.verify import cases  # noqa: E402

ARCHITECTURE, GPU = 90, torch.device("cuda")
GPU_OPS = [name for name, op in REGISTRY.items() if op.launch is not None]


def compiled(ops: Iterable[str]) -> set[tuple]:
    """The keys of the kernels that verifying these ops compiles; nothing is compiled here."""
    keys: set[tuple] = set()

    def start(function, *args, grid, **kwargs):
        *_, bind = function.device_caches[ARCHITECTURE]
        _, specialization, options = bind(*args, **kwargs, debug=False)
        keys.add((name_of(function), str(specialization), str(sorted(options.items()))))

    with recorded(ARCHITECTURE, start), torch.no_grad():
        for name in ops:
            for example, own in cases(REGISTRY[name], GPU):
                REGISTRY[name].launch(*example.make(own, 0))
    return keys


def test_all_kernels_are_verified_by_143_compiles():
    found = compiled(GPU_OPS)
    assert 0 < len(found) <= 143, len(found)


@pytest.mark.parametrize("op", GPU_OPS)
def test_every_dtype_variant_and_kernel_is_verified(op):
    every = [(one, dtype) for one in REGISTRY[op].examples for dtype in one.dtypes]
    table = cases(REGISTRY[op], GPU)
    assert {dtype for _, dtype in table} == {dtype for _, dtype in every}
    assert {example.variant for example, _ in table} == {example.variant for example, _ in every}
    launched: list[set[str]] = []
    for chosen in (every, table):
        names: set[str] = set()
        with recorded(ARCHITECTURE, lambda fn, *_, names=names, **__: names.add(name_of(fn))), torch.no_grad():
            for example, dtype in chosen:
                REGISTRY[op].launch(*example.make(dtype, 0))
        launched.append(names)
    assert launched[0] == launched[1]


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
