"""The Triton kernels on CPU tensors, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

#: Tests of tests/ops that take the interpreter long. They are slow tests here, beside faster tests of the same kernels.
LONG = re.compile(
    r"test_contract_(?!empty).*\[(contextual_attention|random_transform 4|(square_proposal|hyperplane_projection) l1)\]"
    r"|test_random_transform_results_of_any_dtype\[torch\.float(16|64)\]"
    r"|test_diffusion_step_one_tensor_in_two_places_compiles"
)

COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_public.py" and LONG.match(item.name):
            item.add_marker("slow")


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    import triton

    from purify_fast.kernels import philox

    if isinstance(philox._philox, triton.JITFunction):
        state = "set too late" if os.environ.get("TRITON_INTERPRET") == "1" else "not set"
        pytest.fail(
            f"TRITON_INTERPRET=1 was {state}: it must be there before triton is imported, so these tests need a "
            "process of their own: TRITON_INTERPRET=1 python -m pytest tests/interpreter",
            pytrace=False,
        )


@pytest.fixture(autouse=True, scope="session")
def fast(interpreter):
    """Work is left out that Triton's interpreter repeats for every launch, sum and dtype."""
    from dataclasses import replace

    import triton.language as tl
    from triton.runtime import interpreter

    replace_language, get_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    known: dict = {}

    def once(fn):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return replace_language(fn)

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = get_dtype(dtype)
        return known[name]

    splat, compute = interpreter.InterpreterBuilder.create_splat, interpreter.InterpreterBuilder.binary_op

    def of_its_own_type(self, type_, number):
        made = splat(self, type_, number)
        return interpreter.TensorHandle(made.data.astype(bool), tl.int1) if number.data.dtype == bool else made

    def computed(self, left, right, op):
        if left.dtype.scalar == right.dtype.scalar == tl.bfloat16 and op in COMPARISONS:
            left, right = (self.cast_impl(one, tl.float32) for one in (left, right))
        return compute(self, left, right, op)

    with pytest.MonkeyPatch.context() as patch:
        # Triton 3.9 compares the bits of numbers in bfloat16, as integers without a sign.
        patch.setattr(interpreter.InterpreterBuilder, "binary_op", computed)
        # Triton 3.9 says that a compared number has the type of an integer, and refuses masks that are made with it.
        patch.setattr(interpreter.InterpreterBuilder, "create_splat", of_its_own_type)
        # A launch replaces the functions of Triton's language once.
        if hasattr(interpreter, "_LangPatchScope"):
            patch.setattr(interpreter, "_patch_lang", once)
        # Triton computes for every sum of integers whether it overflows, and asserts it only if `debug` is set.
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        # Triton makes a table of all dtypes whenever it needs one dtype of NumPy. That took a tenth of the time.
        patch.setattr(interpreter, "_get_np_dtype", remembered)
        yield


@pytest.fixture(autouse=True, scope="session")
def addresses(interpreter):
    """Every launch of every test is watched: an address outside of its tensors is an error."""
    from addresses import watched

    with watched() as watch:
        yield watch


@pytest.fixture
def bfloat16_of_a_gpu(monkeypatch):
    """Rounds to bfloat16 as a GPU does, and multiplies its numbers."""
    # Sums are made in float64, because NumPy's BLAS may sum in another order for every element of a product.
    import triton.language as tl
    from triton.runtime import interpreter

    own, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def rounded(x, given, wanted, *mode):
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(x, given, wanted, *mode)
        bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to even where two are as near
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    def widened(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def create_dot(self, a, b, total, *rest):
        if a.dtype.scalar != tl.bfloat16:
            return own(self, a, b, total, *rest)
        product = (widened(a) @ widened(b)).astype(total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def backend(monkeypatch) -> Iterator[str]:
    """Every op is computed by its Triton kernel, and float64 by the reference."""
    import torch

    from purify_fast.ops import REGISTRY
    from purify_fast.ops.dispatch import gradient, registry

    library = torch.library.Library("purify_fast", "IMPL")
    for name, op in REGISTRY.items():
        if op.launch is not None:
            kernel = registry._narrow(op.launch, torch.no_grad()(op.reference))
            library.impl(name, kernel, "CPU", allow_override=True)
    monkeypatch.setattr(registry.Op, "uses_reference", lambda *_: False)
    monkeypatch.setattr(gradient, "SAVING_KERNELS", False)
    yield "triton"
    library._destroy()


@pytest.fixture(autouse=True)
def quiet():
    """NumPy warns of what the masked lanes compute."""
    with np.errstate(all="ignore"):
        yield
