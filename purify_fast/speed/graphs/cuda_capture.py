"""Capture functions as CUDA graphs, on a separate stream, and recover if a capture fails. `StepGraphs` uses this."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class CudaCapture:
    """Captures functions as CUDA graphs.

    All graphs of a `CudaCapture` share a private pool of memory. The next replay of any graph may use the memory of an
    earlier replay. So replays must not overlap, and a result that is needed after a replay must be in memory that was
    allocated before the capture.
    """

    #: The type of the devices on which functions can be captured.
    kind = "cuda"

    def __init__(self) -> None:
        self._places: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}

    def _place(self, device: torch.device) -> tuple[torch.cuda.Stream, Any]:
        """The stream on which functions are captured, and the memory pool of their graphs."""
        if device not in self._places:
            self._places[device] = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        return self._places[device]

    @contextlib.contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """Within the block, use the stream of captures. It and the caller's stream wait for each other."""
        stream, caller = self._place(device)[0], torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            caller.wait_stream(stream)

    def release(self) -> None:
        """Return the memory of deleted graphs to the device."""
        self._places.clear()
        torch.cuda.empty_cache()

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Capture a function, and return its replay, which works on the current content of the same memory.

        The function must have run on the stream of captures before, and must not wait for the device. It may draw from
        torch's generator of the device. If it cannot be captured, a RuntimeError is raised, and the device and its
        generator work as before.
        """
        stream, pool = self._place(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # With "thread_local", other threads may allocate memory and synchronize during the capture. Examples are
            # threads that read data or that watch collective operations.
            with (
                _own_workspaces(device),
                self.aside(device),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                run()
        except Exception as error:
            # After an error, the end of the capture fails too, and PyTorch raises this second error. The first error is
            # the context of the second.
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            self._recover(device)
            raise RuntimeError(f"{type(first).__name__}: {str(first).strip().splitlines()[0]}") from error
        return graph.replay

    def _recover(self, device: torch.device) -> None:
        """Repair the state of PyTorch after a failed capture.

        After a failure, torch's generator of the device is in the state of a capture, and PyTorch would refuse the next
        draw. A successful capture of another function repairs this state.
        """
        # The pool of the failed capture is not used again.
        stream, pool = self._places.pop(device)
        # Before torch 2.13, the allocator behaves as if the failed capture had not ended, and would never return freed
        # memory to the device. Newer versions have already ended the capture, and raise an error here.
        with contextlib.suppress(RuntimeError):
            index = torch.cuda.current_device() if device.index is None else device.index
            torch._C._cuda_endAllocateToPool(index, pool)
        with contextlib.suppress(RuntimeError), torch.cuda.stream(stream):
            spare = torch.zeros(1, device=device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                spare.add_(1)


@contextlib.contextmanager
def _own_workspaces(device: torch.device) -> Iterator[None]:
    """Let cuBLAS allocate a new workspace within the block. During a capture, the workspace is in the graphs' pool.

    Otherwise cuBLAS would use a workspace that it keeps from call to call. `torch.compile` frees that workspace for its
    own graphs, while a captured graph would still use it.
    """
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
