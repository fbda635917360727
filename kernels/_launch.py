"""Launches kernels with less work on the host than Triton's own launch.

Triton's launch looks up what does not change from launch to launch. `launch` keeps the compiled kernel that Triton
chose, and starts it directly the next time, if Triton would choose the same one. So the key of a kept kernel has
everything that Triton's choice depends on, most of which Triton itself computes from the arguments: their dtypes, the
alignment of the pointers, whether an integer is 1 or a multiple of 16, and the compile-time constants. Triton launches
the kernel itself if `launch` cannot know its choice: in the interpreter, while kernels are only compiled, while a
profiler has hooks, and with versions of Triton for which this module was not tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import JITFunction, knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

#: The oldest and the newest version of Triton with which compiled kernels are started directly.
TESTED = (3, 6), (3, 8)
#: What `launch` compares with, to notice that a function or a hook of Triton was replaced.
_RUN = JITFunction.run if TESTED[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= TESTED[1] else None
_ENTER, _EXIT = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
#: PyTorch's public function also checks whether CUDA is initialized, but a tensor on a GPU exists here.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Kept(NamedTuple):
    """A compiled kernel, and what its launch needs.

    Attributes:
        run: function that starts it.
        function: handle of the kernel on its device.
        metadata: what Triton's driver needs to know of the kernel.
        stream: function that returns the current stream of a device.
        constants: the global constants in the kernel's source: module, name and value.
    """

    run: Callable[..., Any]
    function: Any
    metadata: Any
    stream: Callable[[int], Any]
    constants: tuple[tuple[dict[str, Any], str, Any], ...]


_kept: dict[tuple[Any, ...], _Kept] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its tensors, in the current stream of this device.

    Args:
        kernel: a function with the decorator ``triton.jit``.
        grid: numbers of programs along one to three axes.
        args: arguments of the kernel. The first is a tensor, or a tuple of tensors.
        options: compile-time constants of the kernel by their names, and options of the compiler such as ``num_warps``.
    """
    first = args[0]
    device = (first[0] if type(first) is tuple else first).get_device()
    runtime = knobs.runtime
    if (
        type(kernel) is not JITFunction
        or JITFunction.run is not _RUN
        or runtime.launch_enter_hook is not _ENTER
        or runtime.launch_exit_hook is not _EXIT
        or _ENTER.calls
        or _EXIT.calls
        or runtime.add_stages_inspection_hook is not None
        or kernel.pre_run_hooks
    ):
        return _launch_by_triton(kernel, grid, device, args, options)
    if device != _current_device():
        if device < 0:
            # These are CPU tensors, about which Triton raises an error.
            return _launch_by_triton(kernel, grid, device, args, options)
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, **options)
    # The binder is made for one kernel and one device, so it stands for both in the key.
    binder = kernel.device_caches[device][-1]
    bound, specialization, others = binder(*args, **options)
    mode = knobs.compilation.instrumentation_mode
    key = (binder, kernel.debug or runtime.debug, mode, *specialization, *others.items())
    kept = _kept.get(key)
    if kept is None:
        return _keep(key, kernel, _launch_by_triton(kernel, grid, device, args, options))
    for module, name, value in kept.constants:
        if module[name] is not value:
            return _launch_by_triton(kernel, grid, device, args, options)
    x, y, z = (*grid, 1, 1)[:3]
    # The arguments are positional because each version of Triton has other names for them. Without hooks, nothing reads
    # a description of the launch, so it is None like the hooks.
    kept.run(x, y, z, kept.stream(device), kept.function, kept.metadata, None, None, None, *bound.values())


def _launch_by_triton(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    # CPU tensors, which Triton's interpreter gets, have the index -1. For it the context manager does nothing.
    with torch.cuda.device(device):
        return kernel[grid](*args, **options)


def _keep(key: tuple[Any, ...], kernel: JITFunction[Any], compiled: Any) -> None:
    # Triton returns something else if the kernel was not compiled, or is being compiled by another thread.
    if isinstance(compiled, CompiledKernel):
        constants = tuple((module, name, module[name]) for (name, _), (_, module) in kernel.used_global_vals.items())
        stream = driver.active.get_current_stream
        _kept[key] = _Kept(compiled.run, compiled.function, compiled.packed_metadata, stream, constants)
