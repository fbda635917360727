"""Capture plain calls of a frozen copy as CUDA graphs: the forward pass, and the gradient of the images."""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..._validation import in_one_line
from ...model_state import identity_key
from ..memory import same_draws_again
from .cuda_capture import CudaCapture
from .step_graphs import alike, is_tracing, leave_no_trace, run_trial
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

    All graphs are deleted when a tensor, a part or a mode of the module is another one than before. A hook or another
    attribute that is set later is not seen. A call does not wait for the device, except for a capture. It runs without
    a graph on another stream than the device's default one, beside the call of another thread, in a compiled or
    captured function, under a transform of `torch.func`, and where weights need gradients.

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
        self._parts: list[nn.Module] = []
        self._looked: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedCalls, ()

    def __len__(self) -> int:
        return sum(isinstance(one, _Graphs) for one in self._kinds.values())

    def release(self) -> None:
        """Delete the graphs, and return their memory to the device."""
        self._forget()
        self.capture.release()

    def __call__(self, model: nn.Module, call: Call, x: Tensor) -> Tensor:
        """Return ``call(x)`` for images ``[B, C, H, W]``. It calls ``model``, and both are the same each time."""
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        usable = x.device.type == self.capture.kind and not transformed and not is_in_torch_dispatch_mode()
        if usable and len(x) and on_usual_stream(x.device) and not is_tracing() and self._lock.acquire(blocking=False):
            try:
                graphs = self._graphs(model, call, x)
                if graphs is not None and not self._open:
                    self.replays += 1
                    return cast(Tensor, _Replay.apply(x, self, graphs)) if graphs.gradient else graphs.forward(x)
            finally:
                self._lock.release()
        return call(x)

    def _graphs(self, model: nn.Module, call: Call, x: Tensor) -> _Graphs | None:
        """Find the graphs of calls like this, or make them if there were enough such calls."""
        if self._look() != self._looked or not self._parts:
            self._forget()
            self._parts = list(model.modules())
            self._looked = self._look()
        if any(learns for *_, learns in self._looked[0]):
            return None
        gradient = torch.is_grad_enabled() and x.requires_grad
        key = x.shape, x.stride(), x.dtype, x.device, gradient, numerics(x.device)
        found = self._kinds.get(key, 0)
        if isinstance(found, int) and found >= LAUNCHED_CALLS:
            found = found if self._open else self._made(model, call, x)
        elif isinstance(found, int):
            found += 1
        self._kinds[key] = found
        return found if isinstance(found, _Graphs) else None

    def _tensors(self) -> list[Tensor]:
        held = [one for part in self._parts for one in (*part._parameters.values(), *part._buffers.values())]
        return [one for one in held if one is not None]

    def _look(self) -> Any:
        """Return the tensors, the parts and their modes, as values that can be compared."""
        tensors = [(id(one), one.data_ptr(), one.requires_grad) for one in self._tensors()]
        below = [id(part) for whole in self._parts for part in whole._modules.values()]
        return tensors, below, [part.training for part in self._parts]

    def _versions(self) -> list[int]:
        """The counts of writes to the tensors; a tensor that was made in inference mode has none."""
        return [-1 if one.is_inference() else one._version for one in self._tensors()]

    def _forget(self) -> None:
        """Delete the graphs. A backward pass through an earlier replay is then an error."""
        self._kinds.clear()
        self.replays += 1

    def _made(self, model: nn.Module, call: Call, x: Tensor) -> _Graphs | None:
        begin, before = time.perf_counter(), reserved(x.device)
        gradient = torch.is_grad_enabled() and x.requires_grad
        kind = f"calls with images {list(x.shape)}{' and their gradients' if gradient else ''}"
        try:
            if len(self) >= MOST_KINDS:
                raise RuntimeError(f"{MOST_KINDS} kinds of calls have graphs")
            made = _Graphs(model, call, x, self.capture)
        except Exception as error:
            # A user's model may raise any error. Its calls then run without a graph.
            reason = in_one_line(error)
        else:
            seconds, size = time.perf_counter() - begin, reserved(x.device) - before
            logger.info("%s are captured as CUDA graphs, in %.1f s and %d MB", kind, seconds, size >> 20)
            return made
        if not len(self):
            self.capture.release()
        warnings.warn(f"{kind} run without a CUDA graph: {reason}", RuntimeWarning, stacklevel=7)
        return None

    def opened(self) -> _Pass:
        """Remember a forward pass until its backward pass has run, or can no longer come."""
        made = _Pass(self.replays, self._versions())
        self._open.add(made)
        return made

    def differentiate(self, graphs: _Graphs, one: _Pass, gradient: Tensor) -> Tensor:
        """Return the gradient of the images of a forward pass, and let calls use the graphs again.

        Raises:
            RuntimeError: what the forward pass has stored, or the weights that it read, are no longer there.
        """
        with self._lock:
            if one.number != self.replays or one.versions != self._versions():
                raise RuntimeError(
                    "the backward pass through a call of a frozen copy came after a later call or other weights, which "
                    "have overwritten what it needs: take it before them, or make the copy without graphs=True"
                )
            image = graphs.backward(gradient)
            self._open.discard(one)
        return image


class _Pass:
    """A replayed forward pass, by its number, and the counts of writes to the weights that it read."""

    def __init__(self, number: int, versions: list[int]):
        self.number, self.versions = number, versions


class _Graphs:
    """The graphs of a kind of calls.

    Raises:
        RuntimeError: the call cannot be captured, or a replay gives other results.
    """

    def __init__(self, model: nn.Module, call: Call, x: Tensor, capture: Any):
        device, gradient = x.device, torch.is_grad_enabled() and x.requires_grad
        # Images of an inference mode would need a gradient neither here nor in a replay.
        with torch.inference_mode(False), torch.set_grad_enabled(gradient), leave_no_trace(device):
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
                # A call that changes what it reads, such as a count, would be frozen as it is.
                settings = identity_key(model)[0]
                self.gradient = self.out.requires_grad
                numbers = torch.linspace(-1, 1, self.out.numel(), device=device).sin_()
                self.weight = numbers.view_as(self.out).to(self.out.dtype)
                parts = [forward, backward] if self.gradient else [forward]
                for part in parts:
                    part()
                    run_trial(part, device)
                if identity_key(model)[0] != settings:
                    raise RuntimeError("the call changes an attribute, a mode or a part of the model")
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
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Autograd records gradients in a backward pass only under create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a replayed call of a frozen copy has no second derivative, so create_graph=True is refused: make the "
                "copy without graphs=True"
            )
        return ctx.calls.differentiate(ctx.graphs, ctx.opened, gradient), None, None
