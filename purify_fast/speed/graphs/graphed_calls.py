"""Capture plain calls of a frozen copy as CUDA graphs: the forward pass, and the gradient of the images."""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..._validation import in_one_line
from ..memory import same_draws_again
from .cuda_capture import CudaCapture
from .step_graphs import alike, is_tracing, no_trace, tried
from .step_loop import numerics, on_usual_stream, reserved

logger = logging.getLogger("purify_fast")

#: A call is captured after this many equal calls, as users of `torch.cuda.make_graphed_callables` warm up three times.
LAUNCHED_CALLS = 3
#: The largest number of kinds of calls that are captured. Further kinds run without a graph.
MOST_KINDS = 8

Call = Callable[[Tensor], Tensor]


class GraphedCalls:
    """Runs a module's calls, and replays those that have occurred `LAUNCHED_CALLS` times before.

    Calls are of one kind if shape, strides, dtype and device of the images, the need of a gradient and the settings of
    the process are equal. The graphs of all kinds share memory. So a call runs without a graph while the backward pass
    of an earlier call may still come. Results are copies, which later calls do not change. The calls may draw from
    torch's generator of the device. A gradient that a replay has computed has no gradient itself.

    A call does not wait for the device, except for a capture. It runs without a graph on another stream than the
    device's default one, in a second thread, in a compiled or captured function, and under a transform of `torch.func`.

    Args:
        capture: object that makes graphs. None means CUDA graphs.
    """

    def __init__(self, capture: Any = None):
        self.capture = CudaCapture() if capture is None else capture
        self._lock = threading.Lock()
        #: The number of calls of a kind so far, its graphs, or None if it has none.
        self._kinds: dict[Hashable, int | _Graphs | None] = {}
        #: The number of replayed forward passes, and those whose backward pass may still come.
        self.replays, self._open = 0, weakref.WeakSet[_Pass]()

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedCalls, ()

    def forget(self) -> None:
        """Delete the graphs, for example because tensors have moved to other addresses."""
        self._kinds.clear()

    def __call__(self, call: Call, x: Tensor) -> Tensor:
        """Return ``call(x)``. The function must be the same each time; ``x``: images ``[B, C, H, W]``."""
        transformed = torch._C._are_functorch_transforms_active() or is_in_torch_dispatch_mode()
        usable = x.device.type == self.capture.kind and not transformed and not is_tracing() and len(x)
        if not usable or not on_usual_stream(x.device) or not self._lock.acquire(blocking=False):
            return call(x)
        try:
            graphs = self._graphs(call, x)
            if graphs is None or self._open:
                return call(x)
            self.replays += 1
            result: Tensor = _Replay.apply(x, self, graphs) if graphs.gradient else graphs.forward(x)
            return result
        finally:
            self._lock.release()

    def _graphs(self, call: Call, x: Tensor) -> _Graphs | None:
        """Find the graphs of calls like this, or make them if there were enough such calls."""
        gradient = torch.is_grad_enabled() and x.requires_grad
        key = x.shape, x.stride(), x.dtype, x.device, gradient, numerics(x.device)
        found = self._kinds.get(key, 0)
        if isinstance(found, int) and found >= LAUNCHED_CALLS:
            made = sum(isinstance(one, _Graphs) for one in self._kinds.values())
            found = self._made(call, x, gradient) if made < MOST_KINDS and not self._open else found
        elif isinstance(found, int):
            found += 1
        self._kinds[key] = found
        return found if isinstance(found, _Graphs) else None

    def _made(self, call: Call, x: Tensor, gradient: bool) -> _Graphs | None:
        begin, before = time.perf_counter(), reserved(x.device)
        kind = f"calls with images {list(x.shape)}{' and their gradients' if gradient else ''}"
        try:
            made = _Graphs(call, x, gradient, self.capture)
        except Exception as error:
            # A user's model may raise any error. Its calls then run without a graph.
            warnings.warn(f"{kind} run without a CUDA graph: {in_one_line(error)}", RuntimeWarning, stacklevel=7)
            return None
        seconds, size = time.perf_counter() - begin, reserved(x.device) - before
        logger.info("%s are captured as CUDA graphs, in %.1f s and %d MB", kind, seconds, size >> 20)
        return made

    def opened(self) -> _Pass:
        """Remember a forward pass until its backward pass has run, or can no longer come."""
        made = _Pass(self.replays)
        self._open.add(made)
        return made

    def closed(self, one: _Pass) -> None:
        """Let calls use the graphs again; RuntimeError if a later call has overwritten what the pass has stored."""
        if one.number != self.replays:
            raise RuntimeError(
                "a second backward pass through a call of a frozen copy came after a later call, which has overwritten "
                "its memory: make the copy without graphs=True"
            )
        self._open.discard(one)


class _Pass:
    """A replayed forward pass, by its number."""

    def __init__(self, number: int):
        self.number = number


class _Graphs:
    """The graphs of a kind of calls.

    Raises:
        RuntimeError: the call cannot be captured, or a replay gives other results.
    """

    def __init__(self, call: Call, x: Tensor, gradient: bool, capture: Any):
        device = x.device
        # Images of an inference mode would need a gradient neither here nor in a replay.
        with torch.inference_mode(False), torch.set_grad_enabled(gradient), no_trace(device):
            self.given = x.detach().clone().requires_grad_(gradient)
            self.out, self.image = self.given, self.given
            self.weight = torch.empty(())

            def forward() -> None:
                with torch.set_grad_enabled(gradient):
                    self.out = call(self.given)

            def backward() -> None:
                # The memory of the forward pass stays, so a user may differentiate several times.
                weight, given = self.weight, self.given
                self.image = torch.autograd.grad(self.out, given, weight, retain_graph=True, materialize_grads=True)[0]

            with capture.aside(device):
                # The first call verifies kernels and chooses algorithms, and may wait for the device.
                forward()
                self.gradient = self.out.requires_grad
                numbers = torch.linspace(-1, 1, self.out.numel(), device=device).sin_()
                self.weight = numbers.view_as(self.out).to(self.out.dtype)
                parts = [forward, backward] if self.gradient else [forward]
                for part in parts:
                    part()
                    tried(part, device)
            again = same_draws_again(device)
            # The first replay is for other images than the capture, because a graph might use stale ones.
            other = 0.9 * self.given.detach()
            with capture.aside(device), torch.no_grad():
                self.given.copy_(other)
                for part in parts:
                    part()
                wanted = self.out.detach().clone(), self.image.detach().clone()
                self.given.copy_(x)
            self._replays = [capture.record(part, device) for part in parts]
            again()
            with torch.no_grad():
                self.given.copy_(other)
                for replay in self._replays:
                    replay()
            if not all(map(alike, (self.out.detach(), self.image.detach()), wanted)):
                raise RuntimeError("a replay gives another result than the call")

    def forward(self, x: Tensor) -> Tensor:
        """Replay the forward pass."""
        with torch.no_grad():
            self.given.copy_(x)
            self._replays[0]()
            return self.out.detach().clone()

    def backward(self, gradient: Tensor) -> Tensor:
        """Replay the backward pass of the last forward pass: the gradient of its images."""
        self.weight.copy_(gradient)
        self._replays[1]()
        return self.image.clone()


class _Replay(torch.autograd.Function):
    """A replayed call with a derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: GraphedCalls, graphs: _Graphs) -> Tensor:
        ctx.calls, ctx.graphs, ctx.opened = calls, graphs, calls.opened()
        return graphs.forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.calls.closed(ctx.opened)
        return ctx.graphs.backward(gradient), None, None
