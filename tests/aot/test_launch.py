"""Launches of kernels without a GPU: which compiled kernel is started, with what, and how much Python that takes.

The driver of the GPU and the compiler are replaced, and nothing else of Triton. A compiled kernel is an object that
notes how it is started.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.fail("launches need a process without TRITON_INTERPRET=1", pytrace=False)

import torch  # noqa: E402
from ahead import MODULES, Device, name_of  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.nvidia.driver import CudaLauncher  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from purify_fast import ops  # noqa: E402
from purify_fast.kernels import _launch, aggregate, pgd_step, sample_latent  # noqa: E402
from purify_fast.kernels._ahead import compile_together  # noqa: E402
from purify_fast.kernels._launch import launch  # noqa: E402
from purify_fast.ops import REGISTRY  # noqa: E402
from purify_fast.ops.dispatch import registry  # noqa: E402

#: The kernels that launchers start, by name.
KERNELS = {
    name_of(function): function
    for module in MODULES.values()
    for function in vars(module).values()
    if isinstance(function, triton.JITFunction) and any(param.name.endswith("_ptr") for param in function.params)
}


class Cuda(Device):
    """A driver with two devices, whose current device and current stream the test chooses.

    Attributes:
        started: for each launch: the compiled kernel, the grid, the current device, the stream, the identities of the
            arguments, and whether a profiler would get a description.
    """

    def __init__(self, device: int = 0):
        super().__init__(90)
        self.device, self.stream = device, 0
        self.started: list[tuple] = []

    def get_current_device(self) -> int:
        return self.device

    def exchange(self, device: int) -> int:
        """As `torch.cuda._exchange_device`: make a device current, and return the one that was."""
        before, self.device = self.device, device
        return before

    def get_current_stream(self, device: int) -> int:
        return 100 * device + self.stream


class Compiled(CompiledKernel):
    """What the compiler would have made for one key of Triton's, started by the real code of Triton's driver."""

    def __init__(self, cuda: Any):
        self.src = self.metadata = self.hash = None
        self.name, self.module, self.function, self.packed_metadata = "kernel", "module", object(), object()

        def started(x, y, z, stream, function, *rest):
            assert function is self.function
            # the launcher of each version of Triton puts other values between these
            metadata = next(i for i, one in enumerate(rest) if one is self.packed_metadata)
            described, enter, exit = rest[metadata + 1 : metadata + 4]
            for hook in (enter, exit):
                if hook is not None:
                    hook(described)
            given = rest[-1] if isinstance(rest[-1], tuple) else rest[metadata + 4 :]
            values = list(map(id, given))
            cuda.started.append((self, (x, y, z), cuda.device, stream, values, described is not None))

        # `str.format` takes what it is called with, and enters no function of Python
        self._run = Started(started if cuda is not None else "".format)

    def __del__(self):
        """The module of a kernel that was never loaded is not unloaded."""


class Started(SimpleNamespace):
    """Starts a kernel as Triton's driver does, up to the call into C."""

    __call__ = CudaLauncher.__call__

    def __init__(self, start: Callable):
        nothing = dict.fromkeys(
            ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"), 0
        )
        flags = dict.fromkeys(("gsan_enabled", "launch_cooperative_grid", "launch_pdl"), False)
        super().__init__(launch=start, num_ctas=1, arg_annotations=None, kernel_signature=None, **nothing, **flags)


@contextmanager
def standing_in(cuda: Cuda, record: bool = True) -> Iterator[Cuda]:
    """Within the block, ``cuda`` is the driver, and its devices have compiled nothing yet.

    Args:
        cuda: the driver.
        record: whether it notes what is started. If not, a start enters no function of Python.
    """

    def compiled(function, key, *_):
        made = function.device_caches[cuda.device][0][key] = Compiled(cuda if record else None)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", cuda)
        patch.setattr(triton.JITFunction, "_do_compile", compiled)
        patch.setattr(_launch, "_kept", {})
        patch.setattr(_launch, "_current_device", cuda.get_current_device)
        patch.setattr(torch.cuda, "_exchange_device", cuda.exchange)
        patch.setattr(torch.cuda, "_maybe_exchange_device", cuda.exchange)
        try:
            yield cuda
        finally:
            for kernel in KERNELS.values():
                for device in (-1, 0, 1):
                    kernel.device_caches.pop(device, None)


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with standing_in(Cuda()) as made:
        yield made


class Pointer:
    """All that Triton reads of a tensor."""

    def __init__(self, dtype: torch.dtype, address: int, device: int = 0):
        self.dtype, self.address, self.device = dtype, address, device

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device

    def __repr__(self) -> str:
        return f"Pointer({self.dtype}, {self.address}, {self.device})"


def test_this_version_of_triton_is_tested():
    assert _launch._RUN is triton.JITFunction.run
    assert len(KERNELS) >= 26


POINTERS = st.builds(
    Pointer,
    st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8)),
    st.sampled_from((0, 16, 4096, 8, 20, 4097)),
)
INTEGERS = st.one_of(
    st.sampled_from((0, 1, 2, 3, 15, 16, 17, 48, -1, -16, 2**31 - 16, 2**31, 2**31 + 1, 2**40, 2**63)),
    st.integers(0, 99),
)
CONSTANTS = st.sampled_from((0, 1, 16, 64, True, False, 2))
OTHERS = st.one_of(POINTERS, INTEGERS, st.floats(-2, 2), st.booleans(), st.none())
OPTIONS = st.fixed_dictionaries(
    {}, optional={"num_warps": st.sampled_from((1, 4)), "enable_fp_fusion": st.booleans(), "maxnreg": st.just(128)}
)


@st.composite
def launches(draw) -> list[tuple]:
    """Launches of one kernel, which differ from the first in at most one place each."""
    kernel = draw(st.sampled_from(sorted(KERNELS)))
    params = KERNELS[kernel].params
    count = next((i for i, param in enumerate(params) if param.is_constexpr), len(params))
    kinds = [CONSTANTS if param.is_constexpr else st.one_of(OTHERS, st.tuples(OTHERS, OTHERS)) for param in params]
    kinds[0] = st.one_of(POINTERS, st.tuples(POINTERS, POINTERS))
    state = [OPTIONS, st.integers(0, 1), st.booleans(), st.sampled_from(("", "some mode")), st.booleans()]
    first = [draw(kind) for kind in kinds + state]
    made = []
    for _ in range(draw(st.integers(2, 8))):
        own = list(first)
        place = draw(st.one_of(st.integers(0, len(params) - 1), st.integers(len(params), len(own) - 1)))
        own[place] = draw((kinds + state)[place])
        constants = {param.name: one for param, one in zip(params[count:], own[count:], strict=False)}
        options, *others = own[len(params) :]
        made.append((kernel, own[:count], constants | options, *others))
    return made


def moved(value: Any, device: int) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        one.device = device


@settings(max_examples=150, deadline=None, derandomize=True)
@given(launches(), st.randoms(use_true_random=False))
def test_a_launch_starts_what_triton_starts(made, order):
    """Each launch is done by Triton and by `launch`, which has kept the kernels of all launches before."""
    with standing_in(Cuda()) as cuda, pytest.MonkeyPatch.context() as patch:
        for name, args, options, device, debug, mode, own in made + order.sample(made, len(made)):
            kernel, programs = KERNELS[name], order.choice([(5,), (7, 1), (2, 3, 4)])
            moved(args[0], device)
            patch.setattr(knobs.runtime, "debug", debug)
            patch.setattr(knobs.compilation, "instrumentation_mode", mode)
            patch.setattr(kernel, "debug", own)
            cuda.device, cuda.stream = device, order.randrange(9)
            kernel[programs](*args, **options)
            cuda.device = current = order.randrange(2)
            launch(kernel, programs, *args, **options)
            assert cuda.device == current
            (*theirs, described), (*ours, _) = cuda.started
            assert theirs == ours and described
            cuda.started.clear()


def small() -> None:
    launch(
        sample_latent._forward,
        (4,),
        *[Pointer(torch.float32, 16)] * 6,
        48,
        STREAM=1,
        GROUPS=8,
        PAIRS=False,
        num_warps=1,
    )


def test_only_the_first_launch_is_triton_s(cuda):
    """Triton makes a description for its chains of hooks, also for empty ones; a direct launch makes none."""
    for _ in range(3):
        small()
    assert len({kernel for kernel, *_ in cuda.started}) == 1
    assert [described for *_, described in cuda.started] == [True, False, False]


def test_kernels_with_the_same_arguments_are_told_apart(cuda):
    given = *[Pointer(torch.float32, 16)] * 6, 48, 0.0, 1.0
    for _ in range(2):
        for kernel in (pgd_step._l2, pgd_step._l2_whole):
            launch(kernel, (4,), *given, WIDTH=64, num_warps=1)
    assert len({kernel for kernel, *_ in cuda.started}) == 2
    assert cuda.started[0][0] is cuda.started[2][0] and cuda.started[1][0] is cuda.started[3][0]


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_a_profiler_see_every_launch(cuda, which):
    small()
    seen: list = []
    chain = getattr(knobs.runtime, which)
    chain.add(seen.append)
    try:
        small()
        small()
    finally:
        chain.remove(seen.append)
    small()
    assert [one.get()["name"] for one in seen] == ["kernel"] * 2
    assert [described for *_, described in cuda.started] == [True, True, True, False]


def test_a_hook_that_replaces_the_chain_sees_every_launch(cuda, monkeypatch):
    small()
    seen: list = []
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", seen.append)
    small()
    assert len(seen) == 1


def test_hooks_of_a_kernel_run(cuda, monkeypatch):
    small()
    seen: list = []
    monkeypatch.setattr(sample_latent._forward, "pre_run_hooks", [lambda *args, **kwargs: seen.append(args)])
    small()
    assert len(seen) == 1 and len(cuda.started) == 2


def test_stages_of_the_compiler_are_triton_s_own_matter(cuda, monkeypatch):
    small()
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *args: ("key", "hash"))
    small()
    assert cuda.started[-1][-1]


def test_a_replaced_launch_of_triton_is_called(cuda, monkeypatch):
    small()
    calls: list = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **kwargs: calls.append(kwargs))
    small()
    assert len(calls) == 1 and len(cuda.started) == 1


def test_kernels_that_are_only_compiled_do_not_run(cuda):
    small()
    compile_together(small)
    assert len(cuda.started) == 1


def test_a_changed_constant_raises_triton_s_error(cuda, monkeypatch):
    kernel = aggregate._peel
    assert kernel.cache_key and kernel.used_global_vals

    def peel() -> None:
        launch(kernel, (4,), *[Pointer(torch.float32, 16)] * 2, 8, 10, K=8, C=16, num_warps=1, enable_fp_fusion=False)

    peel()
    peel()
    monkeypatch.setattr(aggregate, "TANGENT", triton.language.constexpr(60.0))
    with pytest.raises(RuntimeError, match="TANGENT has changed"):
        peel()
    monkeypatch.undo()


def test_tensors_of_a_cpu_are_left_to_triton(cuda, monkeypatch):
    raised = []
    monkeypatch.setattr(_launch, "_launch_by_triton", lambda *args: raised.append(args[2]))
    launch(sample_latent._forward, (4,), torch.zeros(3))
    assert raised == [-1]


def test_an_option_of_another_version_is_triton_s_own_matter(cuda, monkeypatch):
    monkeypatch.setattr(_launch, "_RUN", None)
    small()
    small()
    assert not _launch._kept and [described for *_, described in cuda.started] == [True, True]


x, rows, logits, features = torch.rand(16, 3, 8, 8), torch.rand(16), torch.rand(16, 8, 10), torch.rand(16, 8, 4, 4)
#: By op: a call, and how many Python functions it entered when Triton did every launch, counted as here.
CALLS = {
    "pgd_step": (lambda: ops.pgd_step(x, x, x, rows, rows), 163),
    "gated_elu": (lambda: ops.gated_elu(features), 92),
    "aggregate": (lambda: ops.aggregate(logits), 83),
}


def entered(call: Callable[[], Any]) -> list[str]:
    """The Python functions that a call enters, without those of this file."""
    names: list[str] = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename != __file__:
            names.append(f"{frame.f_code.co_filename}: {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize("op", CALLS)
def test_an_eager_call_enters_a_third_of_the_functions(op, monkeypatch):
    """By the dispatcher and the launcher of a GPU, on CPU tensors, whose device has the index -1."""
    call, before = CALLS[op]

    def choose(self, wanted):
        return self.served.setdefault(wanted, "cpp")

    library = torch.library.Library("purify_fast", "IMPL")
    monkeypatch.setattr(registry.Op, "_choose", choose)
    registry.forget_choices()
    on_gpu = registry._narrow(REGISTRY[op].launch, REGISTRY[op].reference)
    try:
        library.impl(op, on_gpu, "CPU", allow_override=True)
        with standing_in(Cuda(-1), record=False):
            call()
            names = entered(call)
    finally:
        library._destroy()
        registry.forget_choices()
    launchers = [name for name in names if name.endswith("_launch.py: launch")]
    assert len(launchers) == 1 and 0 < len(names) <= before / 3, (len(names), names)
