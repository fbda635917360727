"""CUDA graphs as `StepGraphs` uses them: a stream aside, one pool of memory, and a way back from a failed capture."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class CudaCapture:
    """Captures functions into CUDA graphs.

    All graphs of one `CudaCapture` share a private pool of memory. The memory that a replay takes is free again when
    the replay ends, and the next replay of any graph may take it. So replays must not overlap, and a result that should
    outlast a replay must lie in memory that was allocated before the capture.
    """

    #: The type of the devices on which functions can be captured.
    kind = "cuda"
    #: The host's time in seconds; reading it does not wait for the device.
    clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self._places: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}

    def _place(self, device: torch.device) -> tuple[torch.cuda.Stream, Any]:
        """The stream on which functions are captured, and the pool that their graphs share."""
        if device not in self._places:
            self._places[device] = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        return self._places[device]

    @contextlib.contextmanager
    def aside(self, device: torch.device) -> Iterator[None]:
        """Within the block, the stream that is captured is the current one; it keeps the caller's order."""
        stream, caller = self._place(device)[0], torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            yield
        caller.wait_stream(stream)

    def timed(self, run: Callable[[], object], device: torch.device) -> tuple[float, float]:
        """Seconds until the host had launched all operators of a function, and until the device was done.

        A first call before it makes the function's allocations and choices.
        """
        with self.aside(device):
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            run()
            launched = time.perf_counter()
            torch.cuda.synchronize(device)
            return launched - begin, time.perf_counter() - begin

    def now(self, device: torch.device) -> float:
        """A time in seconds, when the device has done all that was launched."""
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def release(self) -> None:
        """Give the memory of graphs that are gone back to the device."""
        self._places.clear()
        torch.cuda.empty_cache()

    def record(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Capture a function that has run on the stream aside before, and waits for none of the work that it launches.

        It may draw from torch's generator of the device.

        Returns:
            A function that launches the same work again, with whatever is in the same memory by then.

        Raises:
            RuntimeError: the function cannot be captured; the device and its generator work as before.
        """
        stream, pool = self._place(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # In this mode other threads may allocate memory and synchronize during the capture, such as threads that
            # read data ahead or watch collectives.
            with (
                _own_workspaces(device),
                self.aside(device),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                run()
        except Exception as error:
            # After a failure the end of the capture fails too, and PyTorch raises that second error. The first error is
            # its context.
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            self._recover(device)
            raise RuntimeError(f"{type(first).__name__}: {str(first).strip().splitlines()[0]}") from error
        return graph.replay

    def _recover(self, device: torch.device) -> None:
        """After a failed capture, end what it left open, and capture something that works.

        A capture that fails leaves torch's generator of the device as if it were still captured, and the next draw
        would be refused. A capture that ends well puts it right.
        """
        # The pool of the failed capture is not used again.
        stream, pool = self._places.pop(device)
        # Before torch 2.13 the allocator behaves as if the failed capture were still under way, and would never give
        # freed memory back to the device. Newer versions have ended the capture already, and raise an error here.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
        with contextlib.suppress(RuntimeError), torch.cuda.stream(stream):
            spare = torch.zeros(1, device=device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                spare.add_(1)


@contextlib.contextmanager
def _own_workspaces(device: torch.device) -> Iterator[None]:
    """Within the block, cuBLAS takes new memory to work in, that of the pool if it is captured.

    It keeps that memory from call to call. `torch.compile` clears it for its own graphs, and would take it from under a
    graph that was captured with it.
    """
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
