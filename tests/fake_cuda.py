"""Runs code on tensors that claim to be on ``cuda:0``, without a GPU: a host wait fails, and names its line.

The tensors are fake: they have shapes, dtypes and devices, and no values. So the branches for CUDA run, an operator
whose result the host reads raises an error, and so does one whose data decide its shape or that copies between devices.
PyTorch's autograd asks CUDA's driver which stream it is on, so gradients are computed here, by the same nodes.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import purify_fast
from purify_fast.ops.dispatch.registry import Op
from purify_fast.speed.frozen_copy import Followed

PACKAGE = Path(purify_fast.__file__).resolve().parent
#: Modules whose objects are searched for tensors.
OURS = ("purify_fast", "small_models", "torch.optim", "torch.nn")


class RefusedOnCuda(AssertionError):
    """The host would wait for the device here."""


def _line() -> str:
    """The innermost line of the package in the call stack."""
    frame = sys._getframe(3)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE.parent).as_posix()}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"


class _Waits(TorchDispatchMode):
    """Raises an error for each operator for which the host waits, or that mixes devices."""

    def __init__(self, found: list[str], copies: bool):
        super().__init__()
        self.found, self.copies = found, copies

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        try:
            out = function(*args, **(kwargs or {}))
        except (DataDependentOutputException, DynamicOutputShapeException):
            self._refuse(f"the host must know the result of {name}")
        source = args[name == "copy_"] if name in ("_to_copy", "copy_") else None
        if isinstance(source, Tensor) and source.device.type != out.device.type and not self.copies:
            self._refuse(f"{name} copies from {source.device.type} to {out.device.type}")
        return out

    def _refuse(self, what: str) -> None:
        self.found.append(f"{what}, at {_line()}")
        raise RefusedOnCuda(self.found[-1])


class _Fused(TorchDispatchMode):
    """Skips fused optimizers: they write to their arguments, and PyTorch has no fake of some of them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return None if function._schema.name.startswith("aten::_fused_sgd") else function(*args, **(kwargs or {}))


# -- gradients --------------------------------------------------------------------------------------------------------


def _gradients(roots: Sequence[Tensor], given: Sequence[Tensor | None], wanted: set | None) -> dict:
    """The gradient that reaches each node, by the output of the node; ``wanted`` nodes alone, or all."""
    edges = [get_gradient_edge(root) for root in roots]
    order, needed, seen = [], set(), set()

    def visit(start: Any) -> None:
        stack = [(start, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
                after = [each for each, _ in node.next_functions if each is not None]
                if wanted is None or node in wanted or any(each in needed for each in after):
                    needed.add(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(each, False) for each, _ in node.next_functions if each is not None]

    for edge in edges:
        visit(edge.node)
    arrived: dict[Any, dict[int, Tensor]] = {}

    def add(node: Any, number: int, value: Tensor) -> None:
        fact, slots = node._input_metadata[number], arrived.setdefault(node, {})
        if value.shape != fact.shape:
            value = value.sum_to_size(fact.shape)
        value = value.to(fact.dtype)
        slots[number] = value if number not in slots else slots[number] + value

    for root, edge, value in zip(roots, edges, given, strict=True):
        add(edge.node, edge.output_nr, torch.ones_like(root) if value is None else value)
    for node in reversed(order):
        if node not in needed or node not in arrived or hasattr(node, "variable"):
            continue
        facts = node._input_metadata
        inputs = [arrived[node].get(number) for number in range(len(facts))]
        if hasattr(node, "_forward_cls"):
            # A function of Python gets zeros for outputs without a gradient.
            inputs = [
                torch.zeros(fact.shape, dtype=fact.dtype, device=fact.device) if one is None else one
                for one, fact in zip(inputs, facts, strict=True)
            ]
            outs = node.apply(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            # Its edges are those of its tensors alone.
            outs = [out for out, needs in zip(outs, node.needs_input_grad, strict=True) if needs]
            edges_on = [edge for edge in node.next_functions if edge[0] is not None]
        else:
            outs = node(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            edges_on = node.next_functions
        for out, (following, number) in zip(outs, edges_on, strict=True):
            if out is not None and following is not None and following in needed:
                add(following, number, out)
    return arrived


def _grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, allow_unused=None, **how):
    outputs, inputs = (((one,) if isinstance(one, Tensor) else tuple(one)) for one in (outputs, inputs))
    given = (None,) * len(outputs) if grad_outputs is None else grad_outputs
    edges = [get_gradient_edge(one) for one in inputs]
    with torch.no_grad():
        arrived = _gradients(outputs, (given,) if isinstance(given, Tensor) else given, {edge.node for edge in edges})
    found = [arrived.get(edge.node, {}).get(edge.output_nr) for edge in edges]
    if how.get("materialize_grads"):
        found = [torch.zeros_like(one) if value is None else value for one, value in zip(inputs, found, strict=True)]
    return tuple(found)


def _backward(self, gradient=None, *args, **kwargs):
    with torch.no_grad():
        arrived = _gradients([self], [gradient], None)
        for node, slots in arrived.items():
            if hasattr(node, "variable"):
                before = node.variable.grad
                node.variable.grad = slots[0].detach() if before is None else before + slots[0]


# -- objects ----------------------------------------------------------------------------------------------------------


#: There is one, so that tables which the package makes once belong to it as well.
#: A table that was made on the CPU is taken as it is, and may not be read by the host or copied to the GPU.
MODE = FakeTensorMode(allow_non_fake_inputs=True)


class FakeCuda:
    """Replaces the tensors of objects by fake ones, and runs code on them (`running`)."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._done: dict[int, Any] = {}
        self._watching: list[Followed] = []

    def tensor(self, real: Tensor) -> Tensor:
        """The fake of a tensor, the same one each time."""
        if id(real) not in self._made:
            with MODE:
                new = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cuda:0")
            if isinstance(real, nn.Parameter):
                new = nn.Parameter(new, real.requires_grad)
            self._made[id(real)] = new, real
        return self._made[id(real)][0]

    def put(self, value: Any) -> Any:
        """Replace every tensor that an object reaches, in place where it can be, and return the object."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, torch.device):
            return torch.device("cuda", 0)
        if id(value) in self._done:
            return self._done[id(value)]
        self._done[id(value)] = value
        if isinstance(value, tuple):
            parts = [self.put(one) for one in value]
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        elif isinstance(value, list):
            value[:] = [self.put(one) for one in value]
        elif isinstance(value, dict):
            # An optimizer has its state by the weights.
            items = [(self.put(key) if isinstance(key, Tensor) else key, self.put(one)) for key, one in value.items()]
            value.clear()
            value.update(items)
        elif isinstance(value, (nn.Module, Optimizer)) or type(value).__module__.startswith(OURS):
            held = getattr(value, "__dict__", {})
            for name, one in list(held.items()):
                if (new := self.put(one)) is not one:
                    # A dataclass may be frozen.
                    held[name] = new
            if isinstance(value, AveragedModel):
                # PyTorch leaves this number on the CPU, where the host may read it.
                with MODE:
                    value._buffers["n_averaged"] = torch.tensor(1)
            if isinstance(value, Followed):
                self._watching.append(value)
        elif callable(value) and hasattr(value, "__self__"):
            self.put(value.__self__)
        return value

    @contextlib.contextmanager
    def running(self, *more: TorchDispatchMode, first: bool = False) -> Iterator[list[str]]:
        """Within the block, tensors are fake, and the list gets each refusal, also one whose error is caught.

        In a ``first`` call, copies between devices are allowed: what is made once may come from the host.
        """
        found: list[str] = []
        with contextlib.ExitStack() as stack:
            for target, name, new in (
                ("torch.cuda.amp.common", "amp_definitely_not_available", lambda: False),
                ("torch.cuda", "is_bf16_supported", lambda *given, **how: True),
                ("torch.cuda", "get_device_capability", lambda *given: (9, 0)),
                # All that runs here may be captured.
                ("torch.cuda", "is_current_stream_capturing", lambda: True),
                ("torch.autograd", "grad", _grad),
                ("torch.Tensor", "backward", _backward),
                # Storages without memory are told apart by their objects.
                ("torch.Tensor", "data_ptr", lambda tensor: tensor.untyped_storage()._cdata),
                ("torch.UntypedStorage", "data_ptr", lambda storage: storage._cdata),
                ("purify_fast.model_state", "Tensor", FakeTensor),
                ("purify_fast.speed.copying", "PLAIN", (FakeTensor,)),
                # A model is the same, though its tensors have become fake.
                ("purify_fast.speed.copying.Snapshot", "same", lambda snapshot: True),
            ):
                stack.enter_context(mock.patch(f"{target}.{name}", new))
            # No kernel is compared with its definition on values that do not exist.
            stack.enter_context(mock.patch.object(Op, "uses_reference", _of_kernels))
            stack.enter_context(mock.patch.object(Op, "__call__", _call))
            stack.enter_context(MODE)
            stack.enter_context(_Fused())
            self._look_again()
            for one in (*more, _Waits(found, first)):
                stack.enter_context(one)
            yield found
        assert not found, "\n".join(found)

    def _look_again(self) -> None:
        """Let copies know the fake tensors of their models, so that they do not seem to be others."""
        for one in self._watching:
            one.read()
        self._watching.clear()


def _of_kernels(op: Op, device: torch.device, *given: Any) -> bool:
    return op.kernel(device.type) == "reference"


def _call(op: Op, *args: Any, variant: str = "") -> Any:
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    return (op.reference if _of_kernels(op, first.device) else op.handle)(*args)
