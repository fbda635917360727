"""A loop of steps that replays a CUDA graph after its step was captured, and the keys by which graphs are found."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..._library import section
from ..._validation import CudaGraphs, CudnnBenchmark, check_literal, in_one_line
from ...model_state import describe
from ...ops.dispatch.registry import forced_backends
from ...protocols import CountsImages, Passes, supports
from ..agreement import nearly_as_exact
from ..draws import same_draws
from ..eager_mode import EagerDispatchMode
from ..memory import in_capture, memory_of_capture, retry_when_memory_ends
from ..precision import float32_settings, raced_convolutions
from .step_loop import State, StepFunction, Steps

#: A step is captured after this many launches. For a PGD step of a ResNet-18 on an H200, a capture took as long as 13
#: to 15 launches in bfloat16 (50 to 59 ms), and 18 to 40 in float32 (104 to 291 ms), where cuDNN also chose algorithms.
CAPTURE_STEPS = 15


@dataclass
class Launches:
    """Counts the launches of a step without a graph, at one batch size."""

    count: int = 0


class GraphedSteps(Steps):
    """A loop that is eager at first. ``find`` returns the captured step, the count of its launches, or None."""

    def __init__(
        self, function: StepFunction, state: State, find: Callable[[StepFunction, State], Captured | Launches | None]
    ):
        super().__init__(function, state)
        # Graphs are found by the strides of the initial tensors, because the results of a step may have other strides.
        self.find, self._first = find, dict(state)
        self.captured: Captured | None = None
        self.launched: Launches | None = None
        self._ask()

    def advance(self) -> None:
        """Do a step, eagerly or as a replay."""
        if self.launched is not None and self.launched.count >= CAPTURE_STEPS:
            self._ask()
        if self.captured is not None:
            with section("replay of an attack step"):
                self.captured.replay()
            for counter, images in self.counters:
                counter.count(images)
            return
        super().advance()
        if self.launched is not None:
            self.launched.count += 1

    def put(self, **values: Tensor) -> None:
        if self.captured is None:
            super().put(**values)
            return
        for name, value in values.items():
            if value is not self.state[name]:
                self.state[name].copy_(value)

    def values(self, *names: str) -> State:
        values = super().values(*names)
        return values if self.captured is None else {name: value.clone() for name, value in values.items()}

    def _ask(self) -> None:
        """Use the graph of the step, if there is one or if the step can be captured now, or else set `launched`."""
        graph = self.find(self.function, self._first)
        if not isinstance(graph, Captured):
            self.launched = graph
            return
        holder = None if graph.loop is None else graph.loop()
        if holder is not None:
            # This loop takes the buffers of an earlier loop. If the earlier loop continues, it continues eagerly with a
            # copy of its state.
            holder.state, holder.captured = holder.values(), None
        before, self.state = self.state, graph.buffers
        self.captured, self.launched = graph, None
        self.counters = list(zip(parts_of(self.function.model, CountsImages), graph.counts, strict=True))
        graph.loop = weakref.ref(self)
        self.put(**before)


@dataclass
class Captured:
    """A captured step.

    Args:
        model: the model that the step uses. The graph is deleted when the model no longer exists.
        buffers: the tensors of the state.
        replay: function that launches the captured step.
        counts: the numbers of images that a replay adds to the counters in the model, one number for each counter.
        objects: objects that the captured step uses, and that must therefore stay alive.
        loop: the loop that replayed this step last. Its state is in the buffers until another loop begins.
    """

    model: weakref.ref[nn.Module]
    buffers: State
    replay: Callable[[], None]
    counts: list[Passes]
    objects: list[Any]
    loop: weakref.ref[GraphedSteps] | None = None


def parts_of(model: nn.Module, methods: type | str) -> list[Any]:
    """The submodules of a model that have a method, or the methods of a protocol (`purify_fast.protocols.supports`)."""
    return [part for part in model.modules() if supports(part, methods)]


def weak_key(value: Any) -> Hashable:
    """Make a key that is equal for equal values and has only weak references to modules.

    The value is a module, a value that can be hashed, or a dataclass of such values; else a TypeError is raised.
    """
    if isinstance(value, nn.Module):
        return weakref.ref(value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = (weak_key(getattr(value, field.name)) for field in fields(value) if field.compare)
        return (type(value), *parts)
    hash(value)
    return value


def numerics(device: torch.device) -> tuple[Any, ...]:
    """The settings of the process that affect the results of operators on a device, as a value that can be hashed."""
    older, newer = float32_settings()
    return (
        older,
        tuple(newer),
        forced_backends(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


def step_key(function: StepFunction, state: State) -> Hashable:
    """Return a key of a step, its shapes and the settings of the process, see `weak_key`."""
    device = next(iter(state.values())).device
    shapes = tuple((name, value.shape, value.stride(), value.dtype) for name, value in sorted(state.items()))
    return weak_key((weak_key(function), shapes, device, numerics(device)))


def reserved(device: torch.device) -> int:
    """The bytes that this process has reserved on a GPU for tensors and graphs; 0 for a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def on_usual_stream(device: torch.device) -> bool:
    """Return True if the present stream is the default one, so that all replays come one after the other."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


# -- capture functions as CUDA graphs ----------------------------------------------------------------------------------


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


# -- the graphs of a training or an evaluation -------------------------------------------------------------------------

logger = logging.getLogger("purify_fast")

Result = TypeVar("Result")

#: The largest number of graphs.
MOST_GRAPHS = 32
#: The number of steps without a graph whose launches are remembered.
REMEMBERED = 64


def write(values: State, buffers: State) -> None:
    """Write the results of a step to the buffers. A result in a buffer's memory is copied before the writing begins."""
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}
    ready = {}
    for name, value in values.items():
        if value is not buffers[name]:
            ready[name] = value.clone() if value.untyped_storage().data_ptr() in storages else value
    for name, value in ready.items():
        buffers[name].copy_(value)


class StepGraphs:
    """The captured steps of attacks in a training or an evaluation.

    All graphs share a pool of memory. There are at most `MOST_GRAPHS` graphs; a new graph replaces the graph that was
    not used for the longest time. The graphs of a model are deleted when the model no longer exists. Only a single loop
    may run at a time, so this object is not for several threads.

    Args:
        mode: "auto": a step is captured after `CAPTURE_STEPS` launches. "always": a step is captured at its first use.
            "off": no step is captured.
        capture: object that makes graphs. None means CUDA graphs, on CUDA devices.
        cudnn_benchmark: whether cuDNN times its algorithms before a capture, see `precision.raced_convolutions`.

    Attributes:
        refusal: reason why the step of the last loop cannot be captured; None if the step is captured or may still be
            captured. A refused capture is not tried again.
        captures: the number of captures so far.
        refusals: all reasons why a step was not captured.

    Raises:
        ValueError: the mode or ``cudnn_benchmark`` is unknown.
    """

    def __init__(
        self, mode: CudaGraphs = "auto", capture: CudaCapture | None = None, cudnn_benchmark: CudnnBenchmark = "auto"
    ):
        check_literal("mode", mode, CudaGraphs)
        check_literal("cudnn_benchmark", cudnn_benchmark, CudnnBenchmark)
        self.mode, self.cudnn_benchmark = mode, cudnn_benchmark
        self.capture = CudaCapture() if capture is None else capture
        self.refusal: str | None = None
        self.captures, self.refusals = 0, list[str]()
        #: Held by a direct attack on a frozen copy.
        self.lock = threading.Lock()
        self._captured: dict[Hashable, Captured] = {}
        self._launched: dict[Hashable, Launches] = {}
        #: The reasons why steps are not captured.
        self._refused: dict[Hashable, str] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepGraphs, (self.mode, None, self.cudnn_benchmark)

    def __deepcopy__(self, memo: Any) -> StepGraphs:
        # A copy of the trained or attacked model needs its own captures.
        return StepGraphs(self.mode, self.capture, self.cudnn_benchmark)

    def begin(self, function: StepFunction, state: State) -> Steps:
        """Begin a loop from tensors on the same device. If the step is captured, even the first step is a replay."""
        off = not self.may_capture(next(iter(state.values())).device)
        nothing = any(value.numel() == 0 for value in state.values())
        if off or nothing or torch.compiler.is_compiling():
            return Steps(function, state)
        return GraphedSteps(function, state, self.find)

    def may_capture(self, device: torch.device) -> bool:
        """Return True if steps on a device may be captured."""
        return self.mode != "off" and device.type == self.capture.kind

    def serves(self, model: Any, device: torch.device) -> bool:
        """Return False, and say why, if each attack makes a frozen copy again, so that a graph would serve once."""
        remade = getattr(getattr(model, "_followed", None), "remade", "")
        if remade and self.may_capture(device):
            self.refuse(f"its frozen copy is made again in every attack, because {remade}")
        return not remade

    def free_for(self, model: Any, device: torch.device) -> bool:
        """Take the lock for a direct attack on a device; False if nothing can be captured now, as in a capture."""
        free = self.may_capture(device) and on_usual_stream(device) and not is_tracing() and self.serves(model, device)
        return free and self.lock.acquire(False)

    def retry_without_graphs(self, work: Callable[[], Result], device: torch.device) -> Result:
        """Call a function. If memory runs out and there are graphs, delete the graphs and call the function again.

        Both calls draw the same random numbers. If memory runs out without graphs, the error is raised.
        """
        return retry_when_memory_ends(work, device, lambda: self._give_up if self._captured else None)

    def _give_up(self) -> None:
        logger.warning("memory ran out: the CUDA graphs of attacks are dropped, and the work is repeated without them")
        self.mode = "off"
        self._captured.clear()
        self.capture.release()

    def find(self, function: StepFunction, state: State) -> Captured | Launches | None:
        """Find the graph of a step, or capture the step now if it was launched often enough.

        Without a graph, return the count of the launches, or None if they need not be counted.
        """
        for key in [key for key, item in self._captured.items() if item.model() is None]:
            del self._captured[key]
        model = function.model
        if not isinstance(model, nn.Module):
            return self.refuse(f"{_name(model)} is not a torch.nn.Module, so its dependencies are unknown")
        try:
            base = step_key(function, state)
        except TypeError:
            return self.refuse(f"{_name(model)} cannot be hashed")
        self.refusal = self._refused.get(base)
        if self.refusal is not None:
            return None
        for part in parts_of(model, "prepare_replay"):
            part.prepare_replay()
        held = describe(model)
        if held.unknown:
            return self.refuse(f"{_name(model)}: {held.unknown}", base)
        key, objects = (base, held.key), held.objects
        if any(isinstance(item, torch.Generator) for item in objects):
            return self.refuse(f"{_name(model)} has its own torch.Generator, which a graph would not advance", base)
        if key in self._captured:
            return remember(self._captured, key, self._captured[key], MOST_GRAPHS)
        launched = remember(self._launched, key, self._launched.get(key) or Launches(), REMEMBERED)
        if self.mode != "always" and launched.count < CAPTURE_STEPS:
            return launched
        # Forget the launches. If the graph is deleted later, the step is captured again only after as many launches.
        del self._launched[key]
        captured = self._make(function, state, base, objects)
        if captured is not None:
            remember(self._captured, key, captured, MOST_GRAPHS)
        return captured

    def refuse(self, reason: str, base: Hashable | None = None) -> Captured | None:
        """Record that a step is not captured, and warn once for each reason. A step with the key ``base`` never is.

        Return None, because there is no graph.
        """
        self.refusal = reason
        if base is not None:
            self._refused[base] = reason
        refusal = f"an attack runs without a CUDA graph: {reason}"
        if refusal not in self.refusals:
            self.refusals.append(refusal)
            warnings.warn(refusal, stacklevel=2)
        return None

    def repeat(self, owner: Any, run: Callable[[], None], written: list[Tensor]) -> bool:
        """Replay a function of an object that writes to the same tensors in every call, once an attack was captured.

        Return False if the function is to be called, because nothing can be replayed here.
        """
        key, device = weakref.ref(owner), written[0].device
        if not self.captures or key in self._refused or not self.free_for(None, device):
            return False
        try:
            captured = self._captured.get(key)
            if captured is None:
                with leave_no_trace(device):
                    with self.capture.aside(device):
                        run()
                    captured = Captured(key, {}, self.capture.record(run, device), [], [])
            remember(self._captured, key, captured, MOST_GRAPHS).replay()
            # A backward pass of an earlier call must notice that its tensors were overwritten.
            torch.autograd.graph.increment_version(written)
        except Exception as error:
            self._refused[key] = in_one_line(error)
            logger.info("%s is not captured: %s", type(owner).__name__, self._refused[key])
        finally:
            self.lock.release()
        return key not in self._refused

    @property
    def facts(self) -> dict[str, Any]:
        """The number of captures so far (``captured``), and the reasons for refusals, if any (``not_captured``)."""
        return {"captured": self.captures, **({"not_captured": list(self.refusals)} if self.refusals else {})}

    def log(self, what: str, seconds: float, size: int) -> None:
        """Log a capture, with its time in seconds and its memory in bytes. The GPU check puts its own in its place."""
        logger.info("%s is captured as a CUDA graph, in %.1f s and %d MB", what, seconds, size >> 20)

    def _make(self, function: StepFunction, state: State, base: Hashable, objects: list[Any]) -> Captured | None:
        """Capture a step, which depends on ``objects``. If this fails, record the reason, and return None."""
        device = next(iter(state.values())).device
        counters: list[CountsImages] = parts_of(function.model, CountsImages)
        before, begin, size = [counter.counted() for counter in counters], time.perf_counter(), reserved(device)
        try:
            buffers = {name: value.detach().clone() for name, value in state.items()}
            # cuDNN times its algorithms in the first call, and the graph keeps the fastest.
            with leave_no_trace(device, function.model), raced_convolutions(self.cudnn_benchmark, device):
                with self.capture.aside(device):
                    # The first call verifies kernels and chooses algorithms, and may wait for the device.
                    function(buffers)
                first = [counter.counted() for counter in counters]
                with self.capture.aside(device), same_draws(function.model, device) as drew:
                    results, held = run_trial(lambda: function(buffers))
                    if drew(on_host=True):
                        raise RuntimeError("the step draws random numbers on the host, which every replay would repeat")
                for name, value in results.items():
                    if _kind(value) != _kind(buffers[name]):
                        raise RuntimeError(f"the step changes {name} from {_kind(buffers[name])} to {_kind(value)}")
                counts = [counter.counted() - start for counter, start in zip(counters, first, strict=True)]
                # The step itself comes first, because afterwards the graph keeps the memory of a whole step. A result
                # may be a buffer itself, which the replay overwrites.
                with same_draws(device=device):
                    with self.capture.aside(device):
                        expected = {name: value.clone() for name, value in function(buffers).items()}
                    # Only replays of the graph write to the buffers. Each loop first copies its state to the buffers.
                    replay = self.capture.record(lambda: write(function(buffers), buffers), device)
                write(state, buffers)
                replay()
                for name, tensor in expected.items():
                    if tensor.is_floating_point() and not nearly_as_exact(buffers[name], tensor, tensor, state[name]):
                        raise RuntimeError("a replay gives another result than the step")
        except Exception as error:
            # A user's model may raise any error. The attack then runs without a graph.
            return self.refuse(f"the step cannot be captured ({in_one_line(error)})", base)
        finally:
            # Restore the counts of images, because the steps of a trial and a capture are not steps of the attack.
            for counter, start in zip(counters, before, strict=True):
                counter.count(start - counter.counted())
        self.captures += 1
        self.log(f"an attack step of {_name(function.model)}", time.perf_counter() - begin, reserved(device) - size)
        return Captured(weakref.ref(function.model), buffers, replay, counts, objects=[*objects, *held])


# -- trials of a step, and the comparison of a replay with the step ----------------------------------------------------


@contextlib.contextmanager
def leave_no_trace(device: torch.device, model: nn.Module | None = None) -> Iterator[None]:
    """A block for trials and captures of a step. It restores all random generators, and disables autocast's cache.

    Autocast caches converted copies of weights until its outermost block ends. A graph would read these copies, which
    are not updated when the weights change.
    """
    kind, enabled = device.type, torch.is_autocast_enabled(device.type)
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), enabled, cache_enabled=False)
    with section("capture"), same_draws(model, device), memory_of_capture(device), autocast:
        yield


def is_tracing() -> bool:
    """Return True if a step is being tried or captured, so that a call in it must not replay a graph of its own."""
    return in_capture() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class _Trial(EagerDispatchMode):
    """Finds copies between devices, which every replay would repeat from the same memory of the host.

    ``given`` are tensors that the step reads or writes and has not made itself: a graph has only their addresses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crosses = False
        self.given, self._made = dict[int, Tensor](), set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            if (storage := tensor.untyped_storage()._cdata) not in self._made:
                self.given.setdefault(storage, tensor.detach())
        result, name = function(*args, **(kwargs or {})), function._schema.name
        self._made.update({tensor.untyped_storage()._cdata for tensor in _tensors(result)} - self.given.keys())
        if name in ("aten::_to_copy", "aten::copy_"):
            source = args[name == "aten::copy_"]
            self.crosses = self.crosses or source.device.type != result.device.type
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def run_trial(run: Callable[[], Result]) -> tuple[Result, list[Tensor]]:
    """Run a step, and return its result, and the tensors that must stay alive as long as its graph.

    Raises:
        RuntimeError: the step copies between devices.
    """
    with _Trial() as trial:
        result = run()
    if trial.crosses:
        raise RuntimeError("the step copies between the host and the device")
    return result, list(trial.given.values())


def remember(table: dict[Any, Result], key: Hashable, value: Result, most: int) -> Result:
    """Put an entry at the end of a table, and return its value. Keep the last ``most`` entries of the table."""
    table.pop(key, None)
    table[key] = value
    if len(table) > most:
        del table[next(iter(table))]
    return value


def _kind(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, list(value.shape), value.device


def _name(model: Any) -> str:
    return getattr(model, "__qualname__", None) or type(model).__qualname__
